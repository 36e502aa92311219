"""A prefill server in a process of its own, for the tests: `python prefill_server.py`.

Its standard input is a JSON object a line. The first has the engine's arguments, each other one a request:
`prompt` (token ids), `extra` (extra_args) and `sampling`. A line of output answers each; {} ends it.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from vllm import SamplingParams, TokensPrompt  # noqa: E402  before torch
from engines import engine  # noqa: E402


def main() -> None:
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asked: queue.Queue[dict[str, Any]] = queue.Queue()
    arguments = json.loads(sys.stdin.readline())
    threading.Thread(target=lambda: [asked.put(json.loads(line)) for line in sys.stdin], daemon=True).start()

    def answer(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    with engine(arguments.pop("model"), **arguments) as llm:
        answer({"ready": True})
        running = llm.llm_engine
        while True:
            try:
                request = asked.get(timeout=0.01)
            except queue.Empty:
                # Blocks that were read are freed in a step.
                running.engine_core.get_output()
                continue
            if not request:
                return
            if "state" in request:
                scheduler = running.engine_core.engine_core.scheduler
                pool = scheduler.kv_cache_manager.block_pool
                counts = {"free": pool.get_num_free_blocks(), "blocks": pool.num_gpu_blocks}
                answer(counts | {"requests": len(scheduler.requests)})
                continue
            params = SamplingParams(
                **({"temperature": 0, "max_tokens": 1, "ignore_eos": True} | request.get("sampling", {})),
                extra_args={"uniprefill_report": 1} | request["extra"],
            )
            (output,) = llm.generate([TokensPrompt(prompt_token_ids=request["prompt"])], params, use_tqdm=False)
            choice = output.outputs[0]
            answer(
                {
                    "kv_transfer_params": output.kv_transfer_params,
                    "tokens": list(choice.token_ids),
                    "finish_reason": choice.finish_reason,
                    "stop_reason": choice.stop_reason,
                    "report": output.uniprefill,
                }
            )


if __name__ == "__main__":
    main()
