"""platform-rotate-heads-on-cpu.patch: MLA's slices of heads are rotated by their tokens' positions."""

from __future__ import annotations

import pytest
import vllm  # noqa: F401  before torch: on a CPU it chooses Triton's interpreter

# isort: split
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.platforms import current_platform

TOKENS, HEADS, NOPE, ROPE, LATENT = 11, 3, 24, 16, 40


@pytest.mark.skipif(not current_platform.is_cpu(), reason="the CPU's kernel")
@pytest.mark.parametrize("is_neox_style", [False, True])
@pytest.mark.parametrize("with_key", [True, False])
def test_slices_of_heads_are_rotated_as_in_plain_torch(is_neox_style: bool, with_key: bool) -> None:
    torch.manual_seed(0)
    with set_current_vllm_config(VllmConfig()):
        parameters = {"rope_type": "default", "rope_theta": 1e4}
        rope = get_rope(ROPE, 128, rope_parameters=parameters, is_neox_style=is_neox_style, dtype=torch.float32)
    positions = torch.randperm(128)[:TOKENS]
    query = torch.randn(TOKENS, HEADS, NOPE + ROPE)
    key = torch.randn(TOKENS, LATENT + ROPE)[:, LATENT:].unsqueeze(1) if with_key else None
    expected = rope.forward_native(positions, query[..., NOPE:].clone(), None if key is None else key.clone())
    found = rope.forward_cpu(positions, query[..., NOPE:], key)
    torch.testing.assert_close(found[0], expected[0])
    assert found[0].shape == (TOKENS, HEADS, ROPE)
    if with_key:
        torch.testing.assert_close(found[1], expected[1])
    else:
        assert found[1] is None
