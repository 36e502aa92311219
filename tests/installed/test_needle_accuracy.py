"""The needle model answers as well pruned as dense; `make eval` measures it at length."""

from __future__ import annotations

import pytest
from engines import engine
from vllm import SamplingParams

from evals.live_server import NEEDLE_MODEL
from evals.needle.prompts import is_correct, make_prompt

LENGTH = 4096
PROMPTS = 12


@pytest.fixture(scope="module")
def llm():
    with engine(NEEDLE_MODEL, uniprefill={"top_p": 0.99}, dtype="float32", max_model_len=LENGTH + 16) as llm:
        yield llm


@pytest.mark.parametrize("task", ["multikey", "multiquery", "single"])
def test_pruned_answers_as_dense(llm, task: str) -> None:
    prompts = [make_prompt(task, LENGTH, seed=1000 + i) for i in range(PROMPTS)]
    right, kept = {}, []
    for outcome in ("dense", "pruned"):
        extra = {"uniprefill": int(outcome == "pruned"), "uniprefill_report": 1}
        params = SamplingParams(max_tokens=4, temperature=0, extra_args=extra)
        outputs = llm.generate([prompt.text for prompt in prompts], params, use_tqdm=False)
        for output in outputs:
            assert output.uniprefill["outcome"] == outcome
            assert output.uniprefill["prompt_tokens"] == LENGTH
        right[outcome] = sum(
            is_correct(prompt, output.outputs[0].text) for prompt, output in zip(prompts, outputs, strict=True)
        )
        kept = [output.uniprefill["segments"][0]["tokens_out"] / LENGTH for output in outputs]
    assert right["dense"] >= 0.9 * PROMPTS, "the model no longer knows its task"
    assert right["pruned"] >= right["dense"]
    assert max(kept) < 0.5, "hardly anything was dropped, so nothing was tested"
