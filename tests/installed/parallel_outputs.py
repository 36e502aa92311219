"""Print, as JSON, what the needle model keeps and answers under tensor parallelism."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

LENGTHS = (1500, 4096, 2048, 700, 3000, 1024)


def main() -> None:
    from vllm import LLM, SamplingParams

    from evals.needle.prompts import make_prompt

    llm = LLM(
        str(ROOT / "evals" / "needle" / "model"),
        uniprefill_config={"top_p": 0.99},
        tensor_parallel_size=int(sys.argv[1]),
        distributed_executor_backend="mp",
        enforce_eager=True,
        max_model_len=8192,
        max_num_batched_tokens=16_384,
        max_num_seqs=8,
        kv_cache_memory_bytes=1 << 28,
    )
    prompts = [make_prompt("multikey", n, seed).text for seed, n in enumerate(LENGTHS)]
    params = SamplingParams(max_tokens=4, temperature=0, extra_args={"uniprefill_report": 1})
    outputs = llm.generate(prompts, params, use_tqdm=False)
    result = [[o.outputs[0].text, o.uniprefill] for o in outputs]
    print(f"RESULT {json.dumps(result)}", flush=True)


if __name__ == "__main__":
    main()
