"""KV blocks of dropped tokens come back, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
from engines import engine, generate, scheduler_of

from evals.live_server import NEEDLE_MODEL
from evals.needle.prompts import encode, make_prompt

LENGTHS = (3333, 1500, 900, 2200)  # one is dense
NEW = 16


def token_ids(length: int, seed: int) -> list[int]:
    return list(encode(make_prompt("multikey", length, seed).text))


def run(free_kv: bool, block_size: int, budget: int, asynchronous: bool) -> tuple[list[Any], list[Any]]:
    """(tokens and logprobs of each prompt, their reports) of a batch of old and new, pruned and dense prompts."""
    settings = {"top_p": 0.9, "free_kv": free_kv}
    arguments = {"block_size": block_size, "max_num_batched_tokens": budget, "async_scheduling": asynchronous}
    with engine(NEEDLE_MODEL, uniprefill=settings, dtype="float32", **arguments) as llm:
        pool = scheduler_of(llm).kv_cache_manager.block_pool
        free = pool.get_num_free_blocks()
        outputs = generate(llm, [token_ids(n, i) for i, n in enumerate(LENGTHS)], max_tokens=NEW, logprobs=1)
        assert pool.get_num_free_blocks() == free
        found = [
            [(token, found[token].logprob) for token, found in zip(choice.token_ids, choice.logprobs, strict=True)]
            for output in outputs
            for choice in output.outputs
        ]
        return found, [output.uniprefill for output in outputs]


@pytest.mark.parametrize(
    ("block_size", "budget", "asynchronous"), [(32, 8192, False), (128, 8192, True), (32, 1024, True)]
)
def test_answers_are_the_same_and_over_two_fifths_of_the_memory_come_back(block_size, budget, asynchronous) -> None:
    """In one step and in the lane: bit by bit, with dense and old pruned requests in the batch."""
    kept, reports = run(False, block_size, budget, asynchronous)
    returned, others = run(True, block_size, budget, asynchronous)
    assert returned == kept
    for report, other in zip(reports, others, strict=True):
        assert report["segments"] == other["segments"]
        if report["outcome"] == "dense":
            continue
        assert [group["returned"] for group in report["kv_blocks"]] == [0]
        held, back = (sum(g["layers"] * g[state] for g in other["kv_blocks"]) for state in ("held", "returned"))
        assert back / (held + back) >= 0.4


def test_more_prompts_fit_a_fixed_cache() -> None:
    """Most requests that run side by side, of eight pruned prompts in a cache of three."""
    most = []
    for free_kv in (False, True):
        settings = {"top_p": 0.5, "free_kv": free_kv}
        per_token = 8 * 2 * 2 * 64 * 4
        memory = {"block_size": 32, "kv_cache_memory_bytes": per_token * 2100 * 3, "max_num_batched_tokens": 4096}
        with engine(NEEDLE_MODEL, uniprefill=settings, dtype="float32", max_model_len=4096, **memory) as llm:
            scheduler = scheduler_of(llm)
            running = []
            schedule = scheduler.schedule
            scheduler.schedule = lambda *a, **k: (schedule(*a, **k), running.append(len(scheduler.running)))[0]
            generate(llm, [token_ids(2048, seed) for seed in range(8)], max_tokens=NEW)
            most.append(max(running))
    assert most[0] <= 3 and most[1] >= 2 * most[0]
