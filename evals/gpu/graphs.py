"""Decode with FULL CUDA graphs: the same tokens as without, dense and after a pruned prefill.

    python -m evals.gpu.graphs --output FILE

The needle model answers questions, so that tokens do not hang on ties of random weights. Several
requests of other lengths decode together, dense and pruned ones in one batch. Without a GPU there
are no graphs and both engines are eager: that shows only that the program works.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evals.bench.decode import GPU_COMPILATION
from evals.bench.engine import (
    DENSE,
    engine,
    engine_arguments,
    keep_ratio_variant,
    model_runner_of,
    prepare_environment,
)
from evals.bench.shapes import NEEDLE_MODEL, Prompts
from scripts.fork import run_main, say

NEW_TOKENS = 24
CUTS = [1, 3, 5]


def generate(llm: Any, prompts: Prompts, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """One batch: every length dense and pruned; the tokens, and whether the first one answers."""
    from vllm import SamplingParams, TokensPrompt

    pruned = keep_ratio_variant(0.3)
    jobs = [(tokens, variant) for tokens in lengths for variant in (DENSE, pruned)]
    params = [
        SamplingParams(
            max_tokens=NEW_TOKENS,
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            extra_args=variant.extra_args | {"uniprefill_report": 1},
        )
        for _, variant in jobs
    ]
    given = [TokensPrompt(prompt_token_ids=prompts.ids(tokens, seed=tokens)) for tokens, _ in jobs]
    outputs = llm.generate(given, params, use_tqdm=False)
    rows = []
    for (tokens, variant), output in zip(jobs, outputs, strict=True):
        if (output.uniprefill["outcome"] == "pruned") != variant.pruned:
            raise RuntimeError(f"{variant.name} at {tokens} tokens was {output.uniprefill['outcome']}")
        made = list(output.outputs[0].token_ids)
        answered = prompts.answered(tokens, tokens, made[0])
        rows.append({"tokens": tokens, "variant": variant.name, "made": made, "answered": answered})
    return rows


def compare_engines(lengths: Sequence[int]) -> dict[str, Any]:
    import torch

    gpu = torch.cuda.is_available()
    prompts = Prompts.of(NEEDLE_MODEL)
    arguments = engine_arguments(NEEDLE_MODEL, "auto", max(lengths), NEW_TOKENS, seqs=2 * len(lengths), resident=4)
    arguments["uniprefill_config"] = {"selection_layers": CUTS}
    with engine(arguments | {"enforce_eager": True}) as llm:
        eager = generate(llm, prompts, lengths)
        del llm
    full = {"compilation_config": GPU_COMPILATION | {"cudagraph_capture_sizes": [1, 2, 4, 8]}} if gpu else {}
    with engine(arguments | {"enforce_eager": not gpu} | full) as llm:
        captured = len(model_runner_of(llm).cudagraph_manager.graphs) if gpu else 0
        replayed = generate(llm, prompts, lengths)
        del llm
    rows = [
        {
            "tokens": one["tokens"],
            "variant": one["variant"],
            "answered": [one["answered"], other["answered"]],
            "same_tokens": sum(a == b for a, b in zip(one["made"], other["made"], strict=True)),
            "of": NEW_TOKENS,
        }
        for one, other in zip(eager, replayed, strict=True)
    ]
    return {"device": "cuda" if gpu else "cpu", "graphs": captured, "rows": rows}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evals.gpu.graphs", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--lengths", default="2048,5000,9000", help="prompt tokens (default: %(default)s)")
    args = parser.parse_args(argv)
    prepare_environment()
    import vllm  # noqa: F401  before torch: on a CPU it chooses Triton's interpreter

    found = compare_engines([int(word) for word in args.lengths.split(",")])
    args.output.write_text(json.dumps(found, indent=1) + "\n")
    same = sum(row["same_tokens"] for row in found["rows"])
    say(f"{found['graphs']} graphs; {same} of {len(found['rows']) * NEW_TOKENS} tokens the same")
    return 0


if __name__ == "__main__":
    run_main(main)
