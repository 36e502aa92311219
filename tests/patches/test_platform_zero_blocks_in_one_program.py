"""platform-zero-blocks-in-one-program.patch: new blocks are zeroed, no others, by one program a block and layer."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import vllm  # noqa: F401  before torch: on a CPU it chooses Triton's interpreter

# isort: split
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker import utils

NUM_BLOCKS, HEADS, BLOCK_SIZE, HEAD_SIZE = 6, 2, 48, 40  # 7,680 elements of 4 bytes: more than the release's block
LAYERS = ("a", "b")


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the release's blocks stay")
def test_new_blocks_are_zeroed_and_no_others(grids: Callable[[Any, str], list[Any]]) -> None:
    launched = grids(utils, "_zero_kv_blocks_kernel")
    caches = {name: torch.ones(NUM_BLOCKS, HEADS, BLOCK_SIZE, 2 * HEAD_SIZE) for name in LAYERS}
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=HEADS, head_size=HEAD_SIZE, dtype=torch.float32)
    group = SimpleNamespace(kv_cache_spec=spec, kv_cache_group_id=0, layer_names=LAYERS, kernel_block_stride=0)
    layers = {name: SimpleNamespace(kv_cache=cache) for name, cache in caches.items()}
    zeroer = utils.KVBlockZeroer(torch.device("cpu"), [group], [BLOCK_SIZE], layers, NUM_BLOCKS)
    zeroer.zero_block_ids([1, 4])
    assert launched == [(2, len(LAYERS), 1)]
    for cache in caches.values():
        assert cache.flatten(1).any(1).tolist() == [True, False, True, True, False, True]
        assert cache[[0, 2, 3, 5]].eq(1).all(), "the others whole"
