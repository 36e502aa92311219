"""The needle model answers as well pruned as dense; the full run is `make eval`."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import engine
from vllm import SamplingParams

from evals.needle.prompts import make_prompt, starts_with_answer

MODEL = Path(__file__).parents[2] / "evals" / "needle" / "model"
LENGTH = 4096
PROMPTS = 10


@pytest.fixture(scope="module")
def llm():
    with engine(MODEL, uniprefill={"top_p": 0.99}, max_model_len=LENGTH + 16) as llm:
        yield llm


@pytest.mark.parametrize("task", ["multikey", "multiquery", "single"])
def test_pruned_answers_as_dense(llm, task: str) -> None:
    right = {"dense": 0, "pruned": 0}
    kept = []
    for seed in range(1000, 1000 + PROMPTS):
        prompt = make_prompt(task, LENGTH, seed)
        for outcome in right:
            extra = {"uniprefill": int(outcome == "pruned"), "uniprefill_report": 1}
            params = SamplingParams(max_tokens=4, temperature=0, extra_args=extra)
            [output] = llm.generate([prompt.text], params, use_tqdm=False)
            assert output.uniprefill["outcome"] == outcome
            assert output.uniprefill["prompt_tokens"] == LENGTH
            right[outcome] += starts_with_answer(output.outputs[0].text, prompt.answer)
            if outcome == "pruned":
                kept.append(output.uniprefill["segments"][0]["tokens_kept"] / LENGTH)
    assert right["dense"] >= 0.9 * PROMPTS, "the model no longer knows its task"
    assert right["pruned"] >= 0.99 * right["dense"]
    assert max(kept) < 0.5, "hardly anything was dropped, so nothing was tested"
