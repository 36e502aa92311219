"""Measure the needle model with transformers: accuracy, pruned accuracy, and where the attention of the tail goes.

    python -m evals.needle.evaluate evals/needle/model --lengths 1024,4096 --count 20 --prune 2,4,6 --table

Prompts are those of `prompts.make_prompt`, seeds 0 to count - 1 from `--seed`. Each is answered densely and, with
`--prune`, also with tokens dropped after the named layers; the tests' oracle (`tests/oracle/selection.py`) chooses the
blocks. `--table` prints, per layer, the share of blocks that hold .9 and .99 of the mass and the rank of the needle's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from evals.needle.prompts import STATEMENT_LENGTH, TASKS, NeedlePrompt, is_correct, make_prompt
from evals.provenance import numbers_argument
from scripts.fork import ForkError, run_main
from tests.oracle.selection import SelectionRule, block_masses, forced_blocks, select_blocks


@dataclass(frozen=True)
class Pruning:
    layers: tuple[int, ...]  # tokens are dropped at the end of these
    rule: SelectionRule


DEFAULTS = SelectionRule(top_p=0.99)
BLOCK = DEFAULTS.block_size


@dataclass
class Result:
    text: str
    kept: list[float]  # share of the prompt alive after each cut
    needle_kept: bool
    prefill_seconds: float


def queries_and_keys(layer: torch.nn.Module, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Rotated queries of the last tokens and keys of all: [heads, tokens, dim], fp32, keys repeated per head."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    shape = (*normed.shape[:-1], -1, attention.head_dim)
    q = attention.q_proj(normed).view(shape).transpose(1, 2)
    k = attention.k_proj(normed).view(shape).transpose(1, 2)
    q, k = apply_rotary_pos_emb(q, k, *rope)
    return q[0, :, -DEFAULTS.num_queries :].float(), k[0].float().repeat_interleave(q.shape[1] // k.shape[1], 0)


def block_mass(q: Tensor, k: Tensor) -> Tensor:
    """Attention mass of each block of alive tokens, summed over heads and queries: [blocks] float64."""
    num_queries, num_keys = q.shape[1], k.shape[1]
    scores = torch.matmul(q, k.transpose(1, 2)) * q.shape[-1] ** -0.5
    future = torch.arange(num_keys) > torch.arange(num_keys - num_queries, num_keys)[:, None]
    return block_masses(scores.masked_fill(future, float("-inf")).softmax(-1).sum((0, 1)), BLOCK)


def kept_tokens(mass: Tensor, num_tokens: int, rule: SelectionRule) -> Tensor:
    kept = select_blocks(mass, num_tokens, rule).kept
    return kept.repeat_interleave(BLOCK)[:num_tokens].nonzero()[:, 0]


@torch.no_grad()
def answer(
    model: PreTrainedModel, ids: list[int], max_new_tokens: int, stop: Sequence[int], needles: Sequence[int],
    pruning: Pruning | None = None, masses: list[Tensor] | None = None,
) -> tuple[list[int], list[float], bool, float]:  # fmt: skip
    """Greedy answer, layer by layer. Returns new ids, shares kept, whether all needle tokens were, prefill seconds.

    `masses`, if given, receives each layer's block mass (dense only: the blocks are then those of the prompt).
    """
    inner = model.model
    cache = DynamicCache()
    alive = torch.arange(len(ids))
    kept: list[float] = []
    out: list[int] = []
    tokens = torch.tensor([ids])
    positions = alive[None]
    started, seconds = time.perf_counter(), 0.0
    while True:
        hidden = inner.embed_tokens(tokens)
        rope = inner.rotary_emb(hidden, positions)
        for index, layer in enumerate(inner.layers):
            cutting = not out and pruning is not None and index in pruning.layers
            if not out and (cutting or masses is not None):
                mass = block_mass(*queries_and_keys(layer, hidden, rope))
            hidden = layer(hidden, attention_mask=None, position_embeddings=rope, past_key_values=cache)
            if not out and masses is not None:
                masses.append(mass)
            if cutting:
                keep = kept_tokens(mass, len(alive), pruning.rule)
                alive, hidden = alive[keep], hidden[:, keep]
                rope = (rope[0][:, keep], rope[1][:, keep])
                kept.append(len(alive) / len(ids))
        next_id = int(model.lm_head(inner.norm(hidden[:, -1:])).argmax())
        if not out:
            seconds = time.perf_counter() - started
        out.append(next_id)
        if next_id in stop or len(out) == max_new_tokens:
            break
        tokens = torch.tensor([[next_id]])
        positions = torch.tensor([[len(ids) + len(out) - 1]])
    alive_set = set(alive.tolist())
    needle_kept = all(p + i in alive_set for p in needles for i in range(STATEMENT_LENGTH))
    return out, kept, needle_kept, seconds


def run(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: NeedlePrompt, pruning: Pruning | None = None,
    masses: list[Tensor] | None = None,
) -> Result:  # fmt: skip
    ids = tokenizer(prompt.text).input_ids
    stop = model.generation_config.eos_token_id
    new, kept, needle_kept, seconds = answer(
        model, ids, len(prompt.answer.split()), stop, prompt.needle_tokens, pruning, masses
    )
    return Result(tokenizer.decode(new), kept, needle_kept, seconds)


def needle_rank(mass: Tensor, prompt: NeedlePrompt) -> int:
    """Worst rank, among the blocks not kept anyway, of the blocks of the statement that holds the asked key."""
    at = prompt.needle_tokens[-1]
    blocks = {at // BLOCK, (at + STATEMENT_LENGTH - 2) // BLOCK}
    middle = mass.masked_fill(forced_blocks(prompt.num_tokens, DEFAULTS), -1.0)
    return 1 + max(int((middle > middle[b]).sum()) - (len(blocks) - 1) for b in blocks)


def table_row(masses: list[Tensor], prompt: NeedlePrompt) -> list[dict[str, float]]:
    """Per layer: share of blocks kept at .9 and .99 ("all", "middle"; forced ones included) and the needle's rank."""
    rows = []
    for mass in masses:
        row: dict[str, float] = {"needle_rank": needle_rank(mass, prompt)}
        for over in ("all", "middle"):
            for top_p in (0.9, 0.99):
                rule = SelectionRule(top_p, top_p_over=over)
                kept = kept_tokens(mass, prompt.num_tokens, rule)
                row[f"{over}_{top_p}"] = len(kept) / prompt.num_tokens
                alive = set(kept.tolist())
                at = prompt.needle_tokens[-1]
                row[f"needle_kept_{over}_{top_p}"] = float(at in alive and at + STATEMENT_LENGTH - 2 in alive)
        rows.append(row)
    return rows


def evaluate(args: argparse.Namespace) -> dict[str, object]:
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    if "sliding_attention" in (getattr(model.config, "layer_types", None) or ()):
        raise ForkError(f"{args.model} has sliding windows, which are not computed here; use `make eval`.")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    results: list[dict[str, object]] = []
    for length in args.lengths:
        table: dict[int, list[dict[str, float]]] = defaultdict(list)
        for task in args.tasks:
            runs: dict[str, list[tuple[bool, Result]]] = defaultdict(list)
            for seed in range(args.seed, args.seed + args.count):
                prompt = make_prompt(task, length, seed)
                masses: list[Tensor] | None = [] if args.table else None
                dense = run(model, tokenizer, prompt, masses=masses)
                runs["dense"].append((is_correct(prompt, dense.text), dense))
                for layer, row in enumerate(table_row(masses, prompt) if masses else []):
                    table[layer].append(row)
                for over in args.over if args.prune else ():
                    pruning = Pruning(args.prune, SelectionRule(args.top_p, top_p_over=over))
                    pruned = run(model, tokenizer, prompt, pruning)
                    runs[f"top_p {args.top_p} {over}"].append((is_correct(prompt, pruned.text), pruned))
            for name, outcomes in runs.items():
                row = {
                    "length": length, "task": task, "run": name, "n": len(outcomes),
                    "right": sum(right for right, _ in outcomes),
                    "needle_kept": sum(r.needle_kept for _, r in outcomes),
                    "kept": [round(fmean(x), 4) for x in zip(*(r.kept for _, r in outcomes), strict=False)],
                    "prefill_seconds": round(fmean(r.prefill_seconds for _, r in outcomes), 3),
                }  # fmt: skip
                results.append(row)
                print(
                    f"{length:6} {task:11} {name:18} {row['right']:4}/{row['n']} right, kept {row['kept']}, "
                    f"needle kept {row['needle_kept']}/{row['n']}, prefill {row['prefill_seconds']} s",
                    flush=True,
                )
        for layer, rows in sorted(table.items()):
            averages = {name: round(fmean(r[name] for r in rows), 4) for name in rows[0]}
            results.append({"length": length, "layer": layer, "n": len(rows), **averages})
            print(f"{length:6} layer {layer} " + " ".join(f"{n} {v:.3f}" for n, v in averages.items()), flush=True)
    return {"model": str(args.model.name), "dtype": args.dtype, "seed": args.seed, "results": results}


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the needle model with transformers.")
    parser.add_argument("model", type=Path, help="model directory")
    parser.add_argument("--lengths", type=numbers_argument, default=(1024, 4096), help="prompt lengths in tokens")
    parser.add_argument("--tasks", type=words, default=TASKS, help=f"of {','.join(TASKS)}")
    parser.add_argument("--count", type=int, default=10, help="prompts per task and length")
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument(
        "--prune", type=numbers_argument, default=(), help="also prune, after these layers (such as 2,4,6)"
    )
    parser.add_argument("--top-p", type=float, default=0.99)
    parser.add_argument("--over", type=words, default=("all",), help="all, middle or all,middle")
    parser.add_argument("--table", action="store_true", help="attention mass per layer")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the results here too")
    args = parser.parse_args(argv)
    if "all" not in args.over and "middle" not in args.over:
        parser.error("--over: all, middle or all,middle")
    report = evaluate(args)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_main(main)
