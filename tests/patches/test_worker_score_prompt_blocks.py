"""worker-score-prompt-blocks.patch: queries and keys are met where a layer attends, and scored."""

from __future__ import annotations

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import unified_attention_with_output
from vllm.v1.attention.backend import AttentionType
from vllm.v1.uniprefill.selection import SelectionSpec, block_mass_reference
from vllm.v1.worker.gpu.uniprefill import capture
from vllm.v1.worker.gpu.uniprefill.capture import MassCapture, get_attention_layers

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


def tensors(num_rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(num_rows, HEADS, DIM, generator=generator)
    key = torch.randn(num_rows, KV_HEADS, DIM, generator=generator)
    return query, key


# --- the hook in the attention op ------------------------------------------------------


def attend(config: VllmConfig, layer: Attention, query, key) -> None:
    with set_forward_context(None, config, num_tokens=len(query), slot_mapping={}):
        unified_attention_with_output(query, key, torch.zeros_like(key), torch.empty_like(query), layer.layer_name)


def test_the_hook_sees_query_and_key_before_the_layer_attends(config, monkeypatch) -> None:
    layer, other = make_layer(config, 0), make_layer(config, 1)
    calls: list[tuple] = []
    for each in (layer, other):
        monkeypatch.setattr(each.impl, "forward", lambda *args, **_: calls.append(args[0]))
    query, key = tensors(5)
    attend(config, layer, query, key)
    assert calls == [layer]  # no hook, and it attends

    calls.clear()
    layer.on_query_key = lambda q, k: calls.append((q, k))
    attend(config, other, query, key)
    attend(config, layer, query, key)
    assert calls[0] is other and calls[2] is layer
    assert calls[1][0] is query and calls[1][1] is key


def test_a_new_layer_has_no_hook(config) -> None:
    assert make_layer(config).on_query_key is None


# --- the capture -----------------------------------------------------------------------

SPECS = [SelectionSpec(2, 30, 1, 7, 0.9), SelectionSpec(36, 17, 0, 17, 0.9)]
QUERY_ROWS = [*range(25, 32), *range(36, 53)]  # each prompt's last; row 32 is an output token


def expected_mass(query: torch.Tensor, key: torch.Tensor, **kwargs) -> torch.Tensor:
    return block_mass_reference(query[QUERY_ROWS], key, SPECS, block_size=BLOCK, scale=SCALE, **kwargs)


def captured_mass(config: VllmConfig, layer: Attention, query, key) -> torch.Tensor:
    mass_capture = MassCapture(layer, SPECS, BLOCK)
    assert mass_capture.mass is None
    with mass_capture.armed():
        attend(config, layer, query, key)
    assert mass_capture.mass is not None
    return mass_capture.mass


def test_each_prompts_last_tokens_score_its_blocks(config) -> None:
    query, key = tensors(55)
    mass = captured_mass(config, make_layer(config), query, key)
    torch.testing.assert_close(mass, expected_mass(query, key), rtol=1e-6, atol=0)
    assert mass.shape == (4 + 3,)
    # No sinks, so nothing of a query's attention gets lost.
    torch.testing.assert_close(mass[:4].sum().item(), 7.0 * HEADS)


def test_the_layer_is_disarmed_afterwards_also_by_an_exception(config) -> None:
    layer = make_layer(config)
    mass_capture = MassCapture(layer, SPECS, BLOCK)
    with mass_capture.armed():
        assert layer.on_query_key is not None
    assert layer.on_query_key is None
    with pytest.raises(RuntimeError), mass_capture.armed():
        raise RuntimeError
    assert layer.on_query_key is None
    assert mass_capture.mass is None


def test_soft_cap_and_sinks_are_the_layers(config) -> None:
    sinks = torch.linspace(-1, 3, HEADS)
    layer = make_layer(config, logits_soft_cap=1.5, sinks=sinks)
    query, key = tensors(55)
    mass = captured_mass(config, layer, query, key)
    both = expected_mass(query, key, soft_cap=1.5, sinks=sinks)
    torch.testing.assert_close(mass, both, rtol=1e-6, atol=0)
    for part in ({}, {"soft_cap": 1.5}, {"sinks": sinks}):
        assert not torch.allclose(mass, expected_mass(query, key, **part), rtol=1e-3)


def test_quantised_queries_are_multiplied_by_their_scale(config) -> None:
    layer = make_layer(config)
    layer._q_scale.fill_(0.25)
    query, key = tensors(55)
    quantised = (query / 0.25).to(torch.float8_e4m3fn)
    mass = captured_mass(config, layer, quantised, key)
    restored = quantised.float() * 0.25
    torch.testing.assert_close(mass, expected_mass(restored, key), rtol=1e-6, atol=0)
    torch.testing.assert_close(mass, expected_mass(query, key), rtol=0.1, atol=0.1)


def test_half_precision_queries_ignore_the_scale(config) -> None:
    layer = make_layer(config)
    layer._q_scale.fill_(0.25)
    query, key = (tensor.bfloat16() for tensor in tensors(55))
    mass = captured_mass(config, layer, query, key)
    torch.testing.assert_close(mass, expected_mass(query, key), rtol=1e-6, atol=0)


def test_masses_of_tensor_parallel_ranks_are_summed(config, monkeypatch) -> None:
    query, key = tensors(55)
    others = torch.rand(7)
    monkeypatch.setattr(capture, "get_tensor_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(capture, "tensor_model_parallel_all_reduce", lambda mass: mass + others)
    mass = captured_mass(config, make_layer(config), query, key)
    torch.testing.assert_close(mass, expected_mass(query, key) + others, rtol=1e-6, atol=0)


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
