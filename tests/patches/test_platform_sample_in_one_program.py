"""platform-sample-in-one-program.patch: the tokens are those of the release's blocks, from a program a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import vllm  # noqa: F401  before torch: on a CPU it chooses Triton's interpreter

# isort: split
import torch
from vllm.v1.worker.gpu.sample import gumbel

RELEASE_BLOCK = 1024
VOCAB_SIZE = 5000  # a last block that is not full
TEMPERATURES = [0.0, 0.7, 1.0, 2.0]


def sample(monkeypatch: pytest.MonkeyPatch, block_size: int | None, **arguments: Any) -> torch.Tensor:
    """Tokens with blocks of `block_size`, or of the patch's own choice."""
    with monkeypatch.context() as patch:
        if block_size:
            patch.setattr(gumbel.triton, "next_power_of_2", lambda _: block_size)
        return gumbel.gumbel_sample(**arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the release's blocks stay")
@pytest.mark.parametrize("use_fp64", [False, True])
@pytest.mark.parametrize("apply_temperature", [False, True])
def test_tokens_are_those_of_the_releases_blocks(
    monkeypatch: pytest.MonkeyPatch,
    grids: Callable[[Any, str], list[Any]],
    use_fp64: bool,
    apply_temperature: bool,
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
    launched = grids(gumbel, "_gumbel_sample_kernel")
    expected = sample(monkeypatch, RELEASE_BLOCK, **arguments)
    found = sample(monkeypatch, None, **arguments)
    assert launched == [(6, 5), (6, 1)]
    assert found.tolist() == expected.tolist()
    assert found[0] == 700 and found[4] == logits[4].argmax(), "greedy"
    assert any(found[i] != logits[i].argmax() for i in (1, 2, 3, 5)), "the noise counts"
