"""The part cache: how many prompts run side by side in a KV cache of fixed size, dense and pruned in turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from evals.bench.arithmetic import compare, rotated, size_label, spread
from evals.bench.engine import DENSE, Bench, EngineSpec
from evals.bench.play import LONG, Arrival, Served, play
from evals.bench.report import Panel, Part, Result, draw_range, expectation, gain, ranged, table
from scripts.fork import say

PROMPTS, NEW_TOKENS = 8, 256


def engines(bench: Bench) -> list[EngineSpec]:
    shape = bench.shape
    return [EngineSpec(shape.selection_layers, shape.traffic_length, NEW_TOKENS, seqs=PROMPTS, resident=2)]


def measure(bench: Bench) -> Iterator[dict[str, Any]]:
    yield measure_length(bench, bench.shape.traffic_length)


def side_by_side(served: Sequence[Served]) -> int:
    """How many had their first token and not yet their last, at most."""
    starts = [one.token_times[0] for one in served]
    return max(sum(one.token_times[0] <= start < one.token_times[-1] for one in served) for start in starts)


def measure_length(bench: Bench, tokens: int) -> dict[str, Any]:
    together: dict[str, list[int]] = {"dense": [], "pruned": []}
    seconds: dict[str, list[float]] = {"dense": [], "pruned": []}
    for repetition in range(bench.repeats + 1):  # the first warms up
        for name, way in rotated([("dense", DENSE), ("pruned", bench.by_ratio)], repetition):
            prompts = [bench.prompts.ids(tokens, 100 * repetition + place) for place in range(PROMPTS)]
            served = play(bench.llm, [Arrival(0.0, ids, LONG, NEW_TOKENS) for ids in prompts], way)
            if repetition > 0:
                together[name].append(side_by_side(served))
                seconds[name].append(max(one.token_times[-1] for one in served))
    row = {
        **bench.place(tokens),
        "prompts": PROMPTS,
        "new_tokens": NEW_TOKENS,
        "side_by_side": {name: spread(values) for name, values in together.items()},
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "gain": compare(seconds["dense"], seconds["pruned"]),
    }
    most = {name: max(values) for name, values in together.items()}
    say(f"cache {size_label(tokens)}: {most['dense']} dense, {most['pruned']} pruned prompts side by side")
    return row


def expectations(result: Result) -> Iterator[dict[str, Any]]:
    for row in result.get("cache", []):
        dense, pruned = (row["side_by_side"][name]["median"] for name in ("dense", "pruned"))
        yield expectation(
            f"{row['prompts']} prompts of {size_label(row['tokens'])}, {row['variant']}, one KV cache: more of them "
            "side by side",
            f"{dense:g} dense, {pruned:g} pruned",
            pruned > dense,
        )


def section(result: Result) -> str:
    rows = (
        (
            f"{row['prompts']} of {size_label(row['tokens'])}",
            label,
            ranged(row["side_by_side"][name], 0),
            ranged(row["seconds"][name]),
            shown,
        )
        for row in result.get("cache", [])
        for name, label, shown in (("dense", "dense", "1"), ("pruned", row["variant"], gain(row["gain"])))
    )
    return table(("prompts", "prefill", "side by side, at most", "seconds for all", "gain"), rows)


def panels(result: Result) -> list[Panel]:
    return [partial(draw, rows=result["cache"])]


def draw(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        found = row["side_by_side"]
        draw_range(axis, list(found), list(found.values()), size_label(row["tokens"]), linestyle="none")
    axis.set_ylim(bottom=0)
    axis.set_title("Prompts side by side in one KV cache", fontsize=10)
    axis.legend(fontsize=8)


PART = Part(
    "cache",
    "how many prompts run side by side in a KV cache of fixed size",
    "One KV cache",
    section,
    measure,
    engines,
    expectations,
    panels,
)
