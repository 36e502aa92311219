"""Keeping everything is stock, to the last bit: only the segments are left to differ."""

from __future__ import annotations

import random

import pytest
import torch
from engines import engine, generate, model_runner_of
from oracle.checkpoints import make_checkpoint

VOCAB = 1024
LENGTHS = [1024, 1025, 3000, 40, 6000]


def signature(output) -> list[tuple[int, dict[int, float]]]:
    """Tokens, and every logprob that came with them."""
    completion = output.outputs[0]
    return [
        (token, {name: entry.logprob for name, entry in entries.items()})
        for token, entries in zip(completion.token_ids, completion.logprobs, strict=False)
    ]


@pytest.mark.parametrize("family", ["llama", "llama with windows", "qwen2", "qwen3", "mistral", "phi3"])
def test_bitwise_equal(family: str, tmp_path) -> None:
    windows = {"window": 200, "full": (1, 3)} if "windows" in family else {}
    path = make_checkpoint(tmp_path / "model", family.split()[0], layers=6, seed=11, **windows)
    rng = random.Random(5)
    prompts = [rng.choices(range(VOCAB), k=n) for n in LENGTHS]
    with engine(path, uniprefill={"selection_layers": [1, 3]}, max_logprobs=8, max_num_batched_tokens=12_288) as llm:
        hidden: dict[str, list[torch.Tensor]] = {"dense": [], "pruned": []}
        runner = model_runner_of(llm)
        sample = runner.sample
        kind = "dense"

        def record(states, *args):
            hidden[kind].append(states.clone())
            return sample(states, *args)

        runner.sample = record
        for groups in ([[p] for p in prompts], [prompts]):
            for group in groups:
                kind = "dense"
                dense = generate(llm, group, max_tokens=12, logprobs=8, uniprefill=0)
                kind = "pruned"
                kept = generate(llm, group, max_tokens=12, logprobs=8, uniprefill_top_p=1.0)
                assert [signature(o) for o in dense] == [signature(o) for o in kept]
                assert {o.uniprefill["outcome"] for o in dense} == {"dense"}
                assert [o.uniprefill["outcome"] for o in kept] == [
                    "pruned" if len(p) >= 1024 else "dense" for p in group
                ]
    assert len(hidden["dense"]) == len(hidden["pruned"]) > 0
    for dense_states, kept_states in zip(hidden["dense"], hidden["pruned"], strict=False):
        assert torch.equal(dense_states, kept_states)
