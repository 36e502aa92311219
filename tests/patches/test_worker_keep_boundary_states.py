"""worker-keep-boundary-states.patch: what is reserved for the prompt whose prefill is spread over steps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.config import UniPrefillConfig
from vllm.sequence import IntermediateTensors
from vllm.v1.worker.gpu.uniprefill import pool
from vllm.v1.worker.gpu.uniprefill.pool import BoundaryPool

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")


def make_empty(num_rows: int, dtype: torch.dtype, device: torch.device) -> IntermediateTensors:
    """As a model with a residual stream hands on."""
    states = {name: torch.empty(num_rows, 8, dtype=dtype, device=device) for name in ("hidden_states", "residual")}
    return IntermediateTensors(states)


def make_pool(device: torch.device = CPU, kv_heads: tuple[int, ...] = (2, 2), **config) -> BoundaryPool:
    scorers = [
        SimpleNamespace(num_heads=4 - i, layer=SimpleNamespace(num_heads=4, num_kv_heads=n, head_size=16))
        for i, n in enumerate(kv_heads)
    ]
    model = SimpleNamespace(make_empty_intermediate_tensors=make_empty)
    config = {"pool_tokens": 50, "num_queries": 6} | config
    return BoundaryPool(UniPrefillConfig(**config), model, scorers, torch.bfloat16, device)


@pytest.mark.parametrize("where", ["device", "host"])
def test_it_holds_states_keys_and_queries_of_its_tokens(where: str) -> None:
    """A CPU's host is its device."""
    states = make_pool(pool_device=where)
    tensors = [*states.boundary.values(), states.keys, states.queries]
    assert list(states.boundary) == ["hidden_states", "residual"]
    assert [tuple(x.shape) for x in tensors] == [(50, 8), (50, 8), (50, 2, 16), (6, 4, 16)]
    assert {(x.dtype, x.device) for x in tensors} == {(torch.bfloat16, CPU)}


def test_with_a_second_hop_any_token_may_ask() -> None:
    assert make_pool(hops=2).queries.shape == (50, 4, 16)


def test_without_pool_tokens_it_takes_no_memory_by_the_prompt() -> None:
    states = make_pool(pool_tokens=0)
    assert {x.numel() for x in (*states.boundary.values(), states.keys)} == {0}


def test_on_the_host_only_the_boundary_is_pinned(monkeypatch) -> None:
    """The device sees it where it lies; the score's inputs are the device's own."""
    monkeypatch.setattr(pool, "is_uva_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda states: ("pinned", states.device))
    monkeypatch.setattr(pool, "get_accelerator_view_from_cpu_tensor", lambda pinned: ("view", *pinned))
    states = make_pool(ELSEWHERE, pool_device="host")
    assert states.boundary == dict.fromkeys(("hidden_states", "residual"), ("view", "pinned", CPU))
    assert states.keys.device == states.queries.device == ELSEWHERE


def test_a_host_without_pinned_memory_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(pool, "is_uva_available", lambda: False)
    with pytest.raises(ValueError, match='--uniprefill-config pool_device "host" needs pinned memory'):
        make_pool(ELSEWHERE, pool_device="host")
    assert make_pool(ELSEWHERE).keys.device == ELSEWHERE


def test_selection_layers_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="models whose selection layers differ in shape"):
        make_pool(kv_heads=(2, 1))
