"""Time decode steps in one engine and write them as JSON: python decode_worker.py JOB RESULT.

Runs alike on the pristine release and on the fork, so it needs vLLM alone. JOB is JSON:
engine (arguments of LLM), prompts (token ids, by name), requests (extra_args or null, by name),
new_tokens, repeats. RESULT says what ran, and of every prompt and request the seconds to the first
token, in the run that was the first of its length too, those per token behind it, and how many
tokens entered each segment; and of the GPU's memory what start-up counted on and what was used.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


LONG = 65536  # such prompts run once behind the warm-up: dense they take an 8B model some ten seconds


def measured(llm: Any, ids: list[int], extra_args: dict | None, new_tokens: int) -> tuple[float, float, list]:
    """Seconds to the first token, and per token from there to the last one, by the engine's own clock; segments."""
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
    per_token = (times.last_token_ts - times.first_token_ts) / (new_tokens - 1)
    segments = output.uniprefill.get("segments") or [] if extra_args else []
    entered = [(s["layers"][1] - s["layers"][0] + 1, s["tokens_in"]) for s in segments]
    return times.first_token_ts - times.queued_ts, per_token, entered


class Memory:
    """Bytes on the GPU beside weights, graphs and KV cache: at most in start-up's profile, and in what ran since."""

    def __init__(self) -> None:
        import torch
        from vllm.v1.worker.gpu_worker import Worker

        self.cuda, self.profiled, self.resting = torch.cuda, 0, 0
        profile = Worker.determine_available_memory

        def watched(worker: Any) -> Any:
            self.cuda.reset_peak_memory_stats()
            available = profile(worker)
            self.profiled = self.cuda.max_memory_allocated() - self.cuda.memory_allocated()
            return available

        if self.cuda.is_available():
            Worker.determine_available_memory = watched

    def started(self) -> None:
        if self.cuda.is_available():
            self.cuda.reset_peak_memory_stats()
            self.resting = self.cuda.memory_allocated()

    def result(self) -> dict[str, int] | None:
        if not self.cuda.is_available():
            return None
        return {"profiled": self.profiled, "used": self.cuda.max_memory_allocated() - self.resting}


def main(job_file: str, result_file: str) -> None:
    import vllm
    from vllm.platforms import current_platform

    job = json.loads(Path(job_file).read_text())
    # CUDA graphs are what decodes on a GPU; a CPU has none.
    eager = current_platform.is_cpu()
    memory = Memory()
    llm = vllm.LLM(**job["engine"], enforce_eager=eager, disable_log_stats=False)
    memory.started()
    cold, first, seconds, segments = (
        {prompt: {request: [] for request in job["requests"]} for prompt in job["prompts"]} for _ in range(4)
    )
    for repetition in range(job["repeats"] + 1):  # the first warms up, at lengths that grow
        for prompt, ids in job["prompts"].items():
            if repetition > 1 and len(ids) > LONG:
                continue
            for request, extra_args in job["requests"].items():
                *values, entered = measured(llm, ids, extra_args, job["new_tokens"])
                segments[prompt][request] = entered
                if repetition == 0:
                    cold[prompt][request] = values[0]
                    continue
                for kind, value in zip((first, seconds), values, strict=True):
                    kind[prompt][request].append(value)
    result = {"package": vllm.__version__, "file": vllm.__file__, "memory": memory.result()}
    result |= {"cold": cold, "first": first, "seconds": seconds, "segments": segments}
    Path(result_file).write_text(json.dumps(result))
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
