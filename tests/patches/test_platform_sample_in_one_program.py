"""platform-sample-in-one-program.patch: the tokens are those of the release's blocks, from a program a row."""

from __future__ import annotations

from typing import Any

import pytest
import vllm  # noqa: F401  before torch: on a CPU it chooses Triton's interpreter

# isort: split
import torch
from vllm.v1.worker.gpu.sample import gumbel

RELEASE_BLOCK = 1024
VOCAB_SIZE = 5000  # a last block that is not full
TEMPERATURES = [0.0, 0.7, 1.0, 2.0]


def sample(monkeypatch: pytest.MonkeyPatch, block_size: int | None, **arguments: Any) -> tuple[torch.Tensor, Any]:
    """(tokens, the kernel's grid) with blocks of `block_size`, or of the patch's own choice."""
    grids = []
    kernel = gumbel._gumbel_sample_kernel

    class Watched:
        def __getitem__(self, grid: Any) -> Any:
            grids.append(grid)
            return kernel[grid]

    with monkeypatch.context() as patch:
        patch.setattr(gumbel, "_gumbel_sample_kernel", Watched())
        if block_size:
            patch.setattr(gumbel.triton, "next_power_of_2", lambda _: block_size)
        tokens = gumbel.gumbel_sample(**arguments)
    [grid] = grids
    return tokens, grid


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the release's blocks stay")
@pytest.mark.parametrize("use_fp64", [False, True])
@pytest.mark.parametrize("apply_temperature", [False, True])
def test_tokens_are_those_of_the_releases_blocks(
    monkeypatch: pytest.MonkeyPatch, use_fp64: bool, apply_temperature: bool
) -> None:
    rows = torch.tensor([0, 1, 2, 3, 0, 2], dtype=torch.int32)
    logits = torch.randn(len(rows), VOCAB_SIZE, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    logits[0, [4999, 1500, 700]] = 9.0  # a tie within a block and across: the first one is taken
    arguments = {
        "logits": logits,
        "expanded_idx_mapping": rows,
        "temperature": torch.tensor(TEMPERATURES),
        "seed": torch.arange(40, 40 + len(TEMPERATURES)),
        "pos": torch.arange(len(rows)) * 3,
        "apply_temperature": apply_temperature,
        "is_drafting": False,
        "use_fp64": use_fp64,
    }
    expected, blocks = sample(monkeypatch, RELEASE_BLOCK, **arguments)
    found, one = sample(monkeypatch, None, **arguments)
    assert (blocks, one) == ((6, 5), (6, 1))
    assert found.tolist() == expected.tolist()
    assert found[0] == 700 and found[4] == logits[4].argmax(), "greedy"
    assert any(found[i] != logits[i].argmax() for i in (1, 2, 3, 5)), "the noise counts"
