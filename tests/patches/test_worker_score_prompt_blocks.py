"""worker-score-prompt-blocks.patch: what a layer shows is scored, and blocks are chosen alike on all ranks."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from vllm.config import UniPrefillConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType
from vllm.v1.uniprefill.policy import Decision
from vllm.v1.uniprefill.selection import SelectionSpec, block_mass_reference
from vllm.v1.worker.gpu.uniprefill import events, scoring, selector
from vllm.v1.worker.gpu.uniprefill.scoring import attending, dense_queries, get_attention_layers, score
from vllm.v1.worker.gpu.uniprefill.selector import Selector

HEADS, KV_HEADS, DIM, SCALE, BLOCK = 4, 2, 32, 0.3, 8
NUM_LAYERS = 8

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture
def config(configure) -> VllmConfig:
    return configure({})


def make_layer(config: VllmConfig, index: int = 0, *, name: str = "attn", **kwargs) -> Attention:
    with set_current_vllm_config(config):
        return Attention(
            HEADS,
            DIM,
            SCALE,
            num_kv_heads=KV_HEADS,
            cache_config=config.cache_config,
            prefix=f"model.layers.{index}.self_attn.{name}",
            **kwargs,
        )


# --- the score -------------------------------------------------------------------------

SPECS = [SelectionSpec(2, 30, 1, 7, 0.9), SelectionSpec(36, 17, 0, 17, 0.9)]
QUERIES = torch.randn(24, HEADS, DIM, generator=torch.Generator().manual_seed(0))
KEYS = torch.randn(55, KV_HEADS, DIM, generator=torch.Generator().manual_seed(1))


def expected_mass(**kwargs) -> torch.Tensor:
    return block_mass_reference(QUERIES, KEYS, SPECS, block_size=BLOCK, scale=SCALE, **kwargs)


def test_scale_soft_cap_and_sinks_are_the_layers(config) -> None:
    assert torch.equal(score(make_layer(config), QUERIES, KEYS, SPECS, BLOCK), expected_mass())
    sinks = torch.linspace(-1, 3, HEADS)
    layer = make_layer(config, 1, logits_soft_cap=1.5, sinks=sinks)
    mass = score(layer, QUERIES, KEYS, SPECS, BLOCK)
    assert torch.equal(mass, expected_mass(soft_cap=1.5, sinks=sinks))
    for part in ({}, {"soft_cap": 1.5}, {"sinks": sinks}):
        assert not torch.allclose(mass, expected_mass(**part), rtol=1e-3)


def test_only_quantised_queries_are_multiplied_by_their_scale(config) -> None:
    """And come out in the keys' type."""
    layer = make_layer(config)
    layer._q_scale.fill_(0.25)
    assert dense_queries(layer, QUERIES, torch.bfloat16) is QUERIES
    quantised = (QUERIES / 0.25).to(torch.float8_e4m3fn)
    restored = dense_queries(layer, quantised, torch.bfloat16)
    assert torch.equal(restored, (quantised.float() * 0.25).bfloat16())
    torch.testing.assert_close(restored.float(), QUERIES, rtol=0.1, atol=0.01)


def test_masses_of_tensor_parallel_ranks_are_summed(config, monkeypatch) -> None:
    others = torch.rand(7)
    monkeypatch.setattr(scoring, "get_tensor_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(scoring, "tensor_model_parallel_all_reduce", lambda mass: mass + others)
    assert torch.equal(score(make_layer(config), QUERIES, KEYS, SPECS, BLOCK), expected_mass() + others)


def test_the_observer_leaves_also_by_an_exception(config) -> None:
    layer = make_layer(config)

    def observe(query: torch.Tensor, key: torch.Tensor) -> None:
        raise AssertionError

    with attending(layer, observe):
        assert layer.on_query_key is observe
    assert layer.on_query_key is None
    with pytest.raises(RuntimeError), attending(layer, observe):
        raise RuntimeError
    assert layer.on_query_key is None


# --- the choice ------------------------------------------------------------------------

RULES = UniPrefillConfig(block_size=4, num_queries=6, sink_tokens=4, recent_tokens=6)


def test_a_spec_has_the_requests_rule_and_no_more_queries_than_tokens() -> None:
    by_ratio = Decision(20, None, None, 0.5, wants_report=False)
    by_mass = Decision(20, None, 0.9, None, wants_report=False)
    choose = Selector(RULES)
    assert choose.spec(by_ratio, 3, 20, 1) == SelectionSpec(3, 20, 1, 6, keep_ratio=0.5)
    assert choose.spec(by_mass, 0, 5, 0) == SelectionSpec(0, 5, 0, 5, top_p=0.9)


@pytest.mark.parametrize(
    ("budget", "kept"),
    [({"keep_ratio": 0.6}, [0, 1, 2, 3, *range(8, 12), *range(16, 24)]), ({"top_p": 1.0}, list(range(24)))],
    ids=str,
)
def test_forced_blocks_and_the_heaviest_stay(budget: dict, kept: list[int]) -> None:
    """Of blocks 0 to 5 the first and the last two are forced; other rows than the prompt's stay."""
    spec = SelectionSpec(2, 24, 1, 6, **budget)
    rows, counts = Selector(RULES).choose(torch.tensor([0, 1.0, 9, 2, 0, 0]), [spec], 30)
    assert rows.tolist() == [0, 1, *(2 + token for token in kept), 26, 27, 28, 29] and counts == [len(kept)]


def test_every_rank_takes_the_first_ones_choice(monkeypatch) -> None:
    """Whatever its own masses were."""
    first = torch.tensor([True, False, False, True, True, True])
    asked: list[int] = []

    def broadcast(keep: torch.Tensor, src: int) -> torch.Tensor:
        asked.append(src)
        return first.to(keep.dtype)

    group = SimpleNamespace(world_size=2, broadcast=broadcast)
    monkeypatch.setattr(selector, "get_tp_group", lambda: group)
    spec = SelectionSpec(0, 24, 0, 6, keep_ratio=0.6)
    rows, counts = Selector(RULES).choose(torch.tensor([0, 1.0, 9, 2, 0, 0]), [spec], 24)
    assert asked == [0] and counts == [16]
    assert rows.tolist() == [*range(4), *range(12, 24)]


# --- looking in ------------------------------------------------------------------------


def test_observers_see_spans_and_events_while_they_look() -> None:
    seen: list[object] = []

    class Observer:
        @contextmanager
        def span(self, name: str):
            seen.append(f"<{name}")
            yield
            seen.append(f"{name}>")

        def selected(self, event: events.Selected) -> None:
            seen.append(event)

    event = events.Selected("r", 0, *torch.zeros(3, 2))
    assert not events.observed()
    with events.observed_by(Observer()):
        assert events.observed()
        with events.span("outer"), events.span("inner"):
            events.selected(event)
    with events.span("unseen"):
        events.selected(event)
    assert seen == ["<outer", "<inner", event, "inner>", "outer>"] and not events.observed()


# --- which layers can be scored --------------------------------------------------------


def test_layers_come_in_their_order_not_in_the_names(config) -> None:
    made = {i: make_layer(config, i) for i in (3, 1, 7, 0, 2, 6, 4, 5)}
    assert get_attention_layers(config) == [made[i] for i in range(NUM_LAYERS)]


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"per_layer_sliding_window": 64}, "sliding-window attention (model.layers.5.self_attn"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "encoder_only attention"),
        (
            {"kv_sharing_target_layer_name": "model.layers.0.self_attn.attn"},
            "layers that share a KV cache",
        ),
        ({"alibi_slopes": [0.5] * HEADS}, "ALiBi"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layers_that_cannot_be_compacted_are_refused(config, kwargs, named: str) -> None:
    for i in range(NUM_LAYERS):
        make_layer(config, i, **(kwargs if i == 5 else {}))
    with pytest.raises(ValueError, match="--uniprefill-config does not work") as error:
        get_attention_layers(config)
    assert named in str(error.value)


def test_every_layer_has_one_attention(config) -> None:
    for i in range(NUM_LAYERS - 1):
        make_layer(config, i)
    with pytest.raises(ValueError, match="decoder layers without attention"):
        get_attention_layers(config)
    make_layer(config, NUM_LAYERS - 1)
    assert len(get_attention_layers(config)) == NUM_LAYERS
    make_layer(config, 3, name="cross")
    with pytest.raises(ValueError, match="several attention modules in layer 3"):
        get_attention_layers(config)
