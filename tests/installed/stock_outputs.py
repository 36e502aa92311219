"""Print what an engine generates for a fixed set of requests, as JSON.

Run with the pristine release first on the path, or with the fork; the test compares the two.
"""

from __future__ import annotations

import argparse
import json
import os
import random

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

VOCAB = 1024
LENGTHS = [1, 17, 130, 1100, 2100, 64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("output", help="file that gets the JSON")
    parser.add_argument("--engine-args", default="{}", help="JSON: more arguments of LLM(...)")
    args = parser.parse_args()
    import vllm
    from vllm import LLM, SamplingParams, TokensPrompt

    rng = random.Random(3)
    shared = rng.choices(range(VOCAB), k=1500)
    prompts = [rng.choices(range(VOCAB), k=n) for n in LENGTHS]
    prompts += [shared + rng.choices(range(VOCAB), k=n) for n in (5, 300)]
    llm = LLM(
        args.model,
        enforce_eager=True,
        max_model_len=8192,
        max_num_seqs=8,
        max_num_batched_tokens=1024,  # chunks every long prompt
        kv_cache_memory_bytes=1 << 28,
        enable_prefix_caching=True,
        distributed_executor_backend="uni",
        seed=0,
        **json.loads(args.engine_args),
    )
    greedy = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=3)
    results: dict[str, list] = {}
    for name, params in {
        "greedy": greedy,
        "again, from the prefix cache": greedy,
        "seeded": [
            SamplingParams(max_tokens=8, temperature=0.9, top_p=0.8, seed=i, ignore_eos=True)
            for i in range(len(prompts))
        ],
        "two samples": SamplingParams(max_tokens=8, temperature=1.0, seed=5, n=2, ignore_eos=True),
        "prompt logprobs": SamplingParams(max_tokens=2, temperature=0, prompt_logprobs=1),
    }.items():
        asked = prompts[:3] if name == "prompt logprobs" else prompts  # a kernel for each token
        outputs = llm.generate([TokensPrompt(prompt_token_ids=p) for p in asked], params, use_tqdm=False)
        results[name] = [
            {
                "tokens": [list(c.token_ids) for c in o.outputs],
                "logprobs": [
                    [sorted((t, e.logprob) for t, e in step.items()) for step in c.logprobs or []] for c in o.outputs
                ],
                "cached": o.num_cached_tokens,
            }
            for o in outputs
        ]
    with open(args.output, "w") as stream:
        json.dump({"version": vllm.__version__, "file": vllm.__file__, "results": results}, stream)


if __name__ == "__main__":
    main()
