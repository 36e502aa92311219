"""Two tensor-parallel ranks keep the same tokens as one, and answer the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from parallel_outputs import LENGTHS

from evals.needle.prompts import is_correct, make_prompt

SCRIPT = Path(__file__).with_name("parallel_outputs.py")
# One core for each rank; without these vLLM keeps cores back and refuses two ranks on two cores.
RANKS_ON_CPU = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}


def outputs(ranks: int) -> list[tuple[str, dict]]:
    environment = dict(os.environ) | RANKS_ON_CPU
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(ranks)], env=environment, capture_output=True, text=True, timeout=400
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-1000:] + done.stderr[-3000:]
    return [(text, report) for text, report in json.loads(lines[0].removeprefix("RESULT "))]


@pytest.mark.slow
@pytest.mark.skipif(not version("vllm").endswith(".cpu"), reason="binds two ranks to two CPU cores")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_two_ranks_keep_and_answer_as_one() -> None:
    one, two = outputs(1), outputs(2)
    prompts = [make_prompt("multikey", n, seed) for seed, n in enumerate(LENGTHS)]
    for prompt, (text, report), (text_of_two, report_of_two) in zip(prompts, one, two, strict=True):
        assert is_correct(prompt, text_of_two)
        assert text_of_two == text and report_of_two == report
        assert report["outcome"] == ("pruned" if prompt.num_tokens >= 1024 else "dense")
    assert any(r["segments"][-1]["tokens_kept"] < r["prompt_tokens"] / 2 for _, r in two)
