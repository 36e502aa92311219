"""Time decode steps in one engine and write them as JSON: python decode_worker.py JOB RESULT.

Runs alike on the pristine release and on the fork, so it needs vLLM alone. JOB is JSON:
engine (arguments of LLM), prompts (token ids, by name), requests (extra_args or null, by name),
new_tokens, repeats. RESULT says what ran, and of every prompt and request the seconds to the first
token and those per token behind it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def seconds_of(llm: Any, ids: list[int], extra_args: dict | None, new_tokens: int) -> tuple[float, float]:
    """To the first token, and per token from there to the last one, by the engine's own clock."""
    from vllm import SamplingParams, TokensPrompt

    params = SamplingParams(
        max_tokens=new_tokens,
        temperature=0,
        ignore_eos=True,
        detokenize=False,
        extra_args=extra_args,
    )
    (output,) = llm.generate([TokensPrompt(prompt_token_ids=ids)], params, use_tqdm=False)
    pruned = bool(extra_args and extra_args["uniprefill"])
    if extra_args and (output.uniprefill["outcome"] == "pruned") != pruned:
        raise RuntimeError(f"asked for {extra_args}, got {output.uniprefill}")
    times = output.metrics
    return times.first_token_ts - times.queued_ts, (times.last_token_ts - times.first_token_ts) / (new_tokens - 1)


def main(job_file: str, result_file: str) -> None:
    import vllm
    from vllm.platforms import current_platform

    job = json.loads(Path(job_file).read_text())
    # CUDA graphs are what decodes on a GPU; a CPU has none.
    eager = current_platform.is_cpu()
    llm = vllm.LLM(**job["engine"], enforce_eager=eager, disable_log_stats=False)
    first, seconds = (
        {prompt: {request: [] for request in job["requests"]} for prompt in job["prompts"]} for _ in range(2)
    )
    for repetition in range(job["repeats"] + 1):  # the first warms up
        for prompt, ids in job["prompts"].items():
            for request, extra_args in job["requests"].items():
                values = seconds_of(llm, ids, extra_args, job["new_tokens"])
                if repetition > 0:
                    for kind, value in zip((first, seconds), values, strict=True):
                        kind[prompt][request].append(value)
    result = {"package": vllm.__version__, "file": vllm.__file__, "first": first, "seconds": seconds}
    Path(result_file).write_text(json.dumps(result))
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
