"""worker-score-latent-attention.patch: absorbed queries, masses of wide keys, and groups of latent layers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import vllm  # noqa: F401  before torch: on a CPU it chooses Triton's interpreter

# isort: split
import torch
from vllm.model_executor.layers.attention import MLAAttention
from vllm.v1.kv_cache_interface import UNIPREFILL_ROLE, KVCacheGroupSpec, MLAAttentionSpec, SlidingWindowMLASpec
from vllm.v1.uniprefill import kv_groups
from vllm.v1.uniprefill.plan import SegmentPlan
from vllm.v1.uniprefill.selection import SelectionSpec, block_mass
from vllm.v1.uniprefill.selection.mass import block_mass_reference
from vllm.v1.uniprefill.selection.mass_triton import block_mass_triton
from vllm.v1.worker.gpu.uniprefill.scoring import Scorer

HEADS, NOPE, ROPE, LATENT = 4, 24, 8, 48
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def mla_layer() -> MLAAttention:
    """What a scorer reads of one."""
    layer = MLAAttention.__new__(MLAAttention)
    torch.nn.Module.__init__(layer)
    layer.num_heads, layer.num_kv_heads = HEADS, 1
    layer.qk_nope_head_dim, layer.qk_rope_head_dim = NOPE, ROPE
    layer.W_UK_T = torch.randn(HEADS, NOPE, LATENT)
    layer.impl = SimpleNamespace(scale=(NOPE + ROPE) ** -0.5)
    return layer


@pytest.mark.parametrize("heads", [None, [1, 3]], ids=str)
def test_absorbed_queries_score_as_the_projected_keys_do(heads: list[int] | None, monkeypatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("vllm.v1.worker.gpu.uniprefill.scoring.get_tensor_model_parallel_rank", lambda: 0)
    layer, num_prompt, num_queries = mla_layer(), 300, 20
    entry = SimpleNamespace(heads=heads, num_queries=num_queries)
    scorer = Scorer(SimpleNamespace(), entry, layer)
    latent, rope = torch.randn(num_prompt, LATENT), torch.randn(num_prompt, ROPE)
    query = torch.randn(num_queries, HEADS, NOPE + ROPE)

    absorbed = scorer.take_heads(query, query.dtype)
    keys = torch.cat((latent, rope), -1)[:, None]
    assert absorbed.shape == (num_queries, scorer.num_heads, LATENT + ROPE)
    specs = [SelectionSpec(0, num_prompt, 0, num_queries, top_p=0.9)]
    options = {"block_size": 64, "scale": layer.impl.scale}
    found = block_mass(absorbed, keys, specs, kv_heads=scorer.kv_heads, **options)

    projected = torch.einsum("tl,hpl->thp", latent, layer.W_UK_T)
    explicit = torch.cat((projected, rope[:, None].expand(-1, HEADS, -1)), -1)
    chosen = heads or list(range(HEADS))
    expected = block_mass_reference(query[:, chosen], explicit[:, chosen], specs, **options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found.sum() == pytest.approx(num_queries * len(chosen), rel=1e-4)


@pytest.mark.parametrize("head_size", [320, 512, 576])
def test_keys_wider_than_a_tile_have_the_reference_s_masses(head_size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(45, 4, head_size, generator=generator).to(DEVICE) * 2
    key = torch.randn(440, 1, head_size, generator=generator).to(DEVICE)
    specs = [SelectionSpec(3, 200, 2, 40, top_p=0.9), SelectionSpec(210, 230, 0, 5, top_p=0.9)]
    options = {"block_size": 48, "scale": head_size**-0.5}
    found = block_mass_triton(query, key, specs, **options)
    torch.testing.assert_close(found, block_mass_reference(query, key, specs, **options), rtol=1e-4, atol=1e-5)


def latent_spec(kind=MLAAttentionSpec, **others):
    return kind(block_size=16, num_kv_heads=1, head_size=LATENT + ROPE, dtype=torch.bfloat16, **others)


def test_groups_of_latent_layers_return_blocks() -> None:
    names = [f"model.layers.{i}.self_attn.attn" for i in range(8)]
    groups = kv_groups._divide([KVCacheGroupSpec(names, latent_spec())], SegmentPlan(8, (1, 3, 5)))
    assert [(group.role == UNIPREFILL_ROLE, len(group.layer_names)) for group in groups] == [(False, 2)] + [
        (True, 2)
    ] * 3
    assert [group.segment for group in groups] == [0, 1, 2, 3]


def test_latent_layers_with_a_window_keep_their_blocks() -> None:
    names = [f"model.layers.{i}.self_attn.attn" for i in range(4)]
    stock = [KVCacheGroupSpec(names, latent_spec(SlidingWindowMLASpec, sliding_window=64))]
    assert kv_groups._divide(stock, SegmentPlan(4, (1,))) == stock
