"""Accuracy of the needle model, dense and pruned, on the same prompts; results in evals/results/.

Eight questions share a context, so that the dense runs can reuse its prefix from the cache; a
pruned prompt never does. (A `single` prompt has one statement, so it has its context alone.)
Interrupted runs resume: prompts that the result file holds are not asked again.

    build/venv/bin/python evals/accuracy.py --lengths 4096,8192,16384 --prompts 200
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from evals.needle import prompts as needle  # noqa: E402
from evals.provenance import provenance  # noqa: E402

QUESTIONS = 8  # per context
TASKS = ("multikey", "multiquery", "single", "variable")


def make_context(task: str, num_tokens: int, seed: int) -> list[tuple[str, str]]:
    """Eight (prompt, answer) pairs, each prompt of `num_tokens` tokens."""
    if task == "single":
        seeds = range(QUESTIONS * seed, QUESTIONS * (seed + 1))
        made = [needle.make_prompt(task, num_tokens, 10_000 + i) for i in seeds]
        return [(prompt.text, prompt.answer) for prompt in made]
    rng = random.Random(f"accuracy/{task}/{num_tokens}/{seed}")
    keys = rng.sample(needle.KEYS, 2 * QUESTIONS)
    values = rng.sample(needle.VALUES, QUESTIONS)
    keys, aliases = keys[:QUESTIONS], keys[QUESTIONS:]
    statements = [needle.key_statement(k, v) for k, v in zip(keys, values, strict=False)]
    asked = [([key], value) for key, value in zip(keys, values, strict=False)]
    if task == "variable":
        for i in range(QUESTIONS):  # an alias stands anywhere behind its key
            alias = needle.alias_statement(aliases[i], keys[i])
            base = statements.index(needle.key_statement(keys[i], values[i]))
            statements.insert(rng.randint(base + 1, len(statements)), alias)
        asked = [([alias], value) for alias, value in zip(aliases, values, strict=False)]
    elif task == "multiquery":
        pairs = list(zip(range(QUESTIONS), [*range(1, QUESTIONS), 0], strict=False))
        asked = [([keys[i], keys[j]], f"{values[i]} and {values[j]}") for i, j in pairs]
    tails = [needle.make_tail(rng, names, needle.TAIL_TOKENS) for names, _ in asked]
    longest = max(map(len, tails))
    tails = [["."] * (longest - len(tail)) + tail for tail in tails]  # one length for all
    num_filler = num_tokens - 1 - longest - sum(map(len, statements))
    filler = needle.make_filler(rng, num_filler)
    words: list[str] = []
    previous = 0
    for cut, statement in zip(sorted(rng.randint(0, num_filler) for _ in statements), statements, strict=False):
        words += filler[previous:cut] + statement
        previous = cut
    words += filler[previous:]
    return [(" ".join(words + tail), answer) for tail, (_, answer) in zip(tails, asked, strict=False)]


def summarize(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per task and length: accuracies, how often only one was right, and the share kept."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["task"], record["length"]].append(record)
    rows = []
    for (task, length), group in sorted(groups.items()):
        dense, pruned = (sum(r[kind] for r in group) for kind in ("dense", "pruned"))
        rows.append(
            {
                "task": task,
                "length": length,
                "prompts": len(group),
                "dense": dense / len(group),
                "pruned": pruned / len(group),
                "pruned_over_dense": pruned / dense if dense else None,
                "only_dense_right": sum(r["dense"] and not r["pruned"] for r in group),
                "only_pruned_right": sum(r["pruned"] and not r["dense"] for r in group),
                "kept": [sum(r["kept"][i] for r in group) / len(group) / length for i in range(len(group[0]["kept"]))],
            }
        )
    return rows


def markdown(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    machine = about["machine"]
    device = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    lines = [
        "# Needle accuracy, dense and pruned",
        "",
        f"{about['package']} on {device}; config {json.dumps(about['uniprefill'])}; "
        f"series {about['series_sha256'][:12]}. Made by `{about['command']}`.",
        "",
        "| task | length | prompts | dense | pruned | only dense right | only pruned right | kept after each cut |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        kept = " ".join(f"{share:.3f}" for share in row["kept"])
        lines.append(
            f"| {row['task']} | {row['length']:,} | {row['prompts']} | {row['dense']:.1%} "
            f"| {row['pruned']:.1%} | {row['only_dense_right']} | {row['only_pruned_right']} "
            f"| {kept} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "evals" / "needle" / "model"))
    parser.add_argument("--tasks", default="multikey,multiquery,single", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--lengths", default="4096,8192,16384", help="tokens, comma-separated")
    parser.add_argument("--prompts", type=int, default=200, help="per task and length")
    parser.add_argument("--uniprefill-config", type=json.loads, default={"top_p": 0.99})
    parser.add_argument("--output", type=Path, default=ROOT / "evals" / "results" / "needle-accuracy")
    args = parser.parse_args()
    lengths = [int(length) for length in args.lengths.split(",")]
    tasks = args.tasks.split(",")
    if unknown := set(tasks) - set(TASKS):
        parser.error(f"--tasks: {', '.join(sorted(unknown))} is not one of {', '.join(TASKS)}")

    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM, SamplingParams

    about = provenance() | {
        "uniprefill": args.uniprefill_config,
        "command": f"evals/accuracy.py --tasks {args.tasks} --lengths {args.lengths} --prompts {args.prompts}",
    }
    json_path = args.output.with_suffix(".json")
    records: list[dict[str, Any]] = []
    if json_path.exists():
        stored = json.loads(json_path.read_text())
        same = ("series_sha256", "uniprefill")
        if all(stored["about"][key] == about[key] for key in same):
            records = stored["records"]
    done = {(r["task"], r["length"], r["context"]) for r in records}

    llm = LLM(
        args.model,
        uniprefill_config=args.uniprefill_config,
        enforce_eager=True,
        max_model_len=max(lengths) + 16,
        max_num_batched_tokens=max(lengths) + 32,
        max_num_seqs=4,
        kv_cache_memory_bytes=1 << 29,
        distributed_executor_backend="uni",
    )

    def ask(prompt: str, **xargs: int) -> Any:
        params = SamplingParams(max_tokens=4, temperature=0, extra_args={"uniprefill_report": 1, **xargs})
        return llm.generate([prompt], params, use_tqdm=False)[0]

    started = time.monotonic()
    num_contexts = -(-args.prompts // QUESTIONS)
    for length in lengths:
        for context in range(num_contexts):
            for task in tasks:
                if (task, length, context) in done:
                    continue
                for prompt, answer in make_context(task, length, context):
                    dense, pruned = ask(prompt, uniprefill=0), ask(prompt, uniprefill=1)
                    assert pruned.uniprefill["outcome"] == "pruned", pruned.uniprefill
                    assert pruned.uniprefill["prompt_tokens"] == length
                    segments = pruned.uniprefill["segments"]
                    records.append(
                        {
                            "task": task,
                            "length": length,
                            "context": context,
                            "dense": needle.starts_with_answer(dense.outputs[0].text, answer),
                            "pruned": needle.starts_with_answer(pruned.outputs[0].text, answer),
                            "kept": [segment["tokens_kept"] for segment in segments[:-1]],
                        }
                    )
            rows = summarize(records)
            args.output.parent.mkdir(parents=True, exist_ok=True)
            json_path.write_text(json.dumps({"about": about, "summary": rows, "records": records}))
            args.output.with_suffix(".md").write_text(markdown(rows, about))
            seconds = time.monotonic() - started
            print(
                f"[{seconds:6.0f}s] {length} tokens: context {context + 1}/{num_contexts}",
                file=sys.stderr,
                flush=True,
            )
    print(markdown(summarize(records), about))
    return 0


if __name__ == "__main__":
    sys.exit(main())
