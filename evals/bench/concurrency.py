"""The part concurrency: time to first token of prompts that are sent together, dense and pruned in turn."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from evals.bench.arithmetic import compare, rotated, size_label, spread
from evals.bench.engine import DENSE, Bench
from evals.bench.play import LONG, TOGETHER, Arrival, many_at_once, play
from evals.bench.report import Panel, Part, Result, draw_lines, expectation, gain, milliseconds, table
from scripts.fork import say

COUNTS = (1, 4, TOGETHER)


def measure(bench: Bench) -> Iterator[dict[str, Any]]:
    for together in COUNTS:
        yield measure_count(bench, bench.shape.traffic_length, together)


def measure_count(bench: Bench, tokens: int, together: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"dense": [], "pruned": []}
    means: dict[str, list[float]] = {"dense": [], "pruned": []}
    for repetition in range(bench.repeats + 1):  # the first warms up
        for name, way in rotated([("dense", DENSE), ("pruned", bench.by_ratio)], repetition):
            ids = [bench.prompts.ids(tokens, 100 * repetition + place) for place in range(together)]
            times = [one.ttft for one in play(bench.llm, [Arrival(0.0, one, LONG, 1) for one in ids], way)]
            if repetition > 0:
                seconds[name] += times
                means[name].append(statistics.fmean(times))
    row = {
        "tokens": tokens,
        "together": together,
        "variant": bench.by_ratio.name,
        "ttft": {name: spread(values) for name, values in seconds.items()},
        "mean_ttft": {name: spread(values) for name, values in means.items()},
        "gain": compare(means["dense"], means["pruned"]),
    }
    say(f"concurrency {size_label(tokens)} x {together}: {row['gain']['ratio']:.2f}x in the mean time")
    return row


def expectations(result: Result) -> Iterator[dict[str, Any]]:
    for row in result.get("concurrency", []):
        if row["tokens"] >= 4096:
            yield expectation(
                f"{row['together']} prompts of {size_label(row['tokens'])} together: mean time to first token gains",
                f"{row['gain']['ratio']:.2f}x",
                row["gain"]["ratio"] > 1,
            )


def section(result: Result) -> str:
    rows = (
        (
            f"{row['together']} of {size_label(row['tokens'])}",
            label,
            milliseconds(row["mean_ttft"][name]),
            milliseconds(row["ttft"][name]),
            shown,
        )
        for row in result.get("concurrency", [])
        for name, label, shown in (("dense", "dense", "1"), ("pruned", row["variant"], gain(row["gain"])))
    )
    head = ("prompts", "prefill", "mean ms to first token", "all prompts' ms: median [range]", "gain in the mean")
    return table(head, rows)


def panels(result: Result) -> list[Panel]:
    return [partial(draw, rows=result["concurrency"])]


def draw(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    together = [row["together"] for row in rows]
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(together, list(map(str, together)))
    axis.set_title(f"Mean time to first token, {size_label(rows[0]['tokens'])} prompts together", fontsize=10)
    axis.set_xlabel("prompts sent together")
    axis.set_ylabel("seconds")
    names = {"dense": "dense", rows[0]["variant"]: "pruned"}
    draw_lines(axis, together, {label: [row["mean_ttft"][name] for row in rows] for label, name in names.items()})


PART = Part(
    "concurrency",
    "time to first token of 1, 4 and 16 prompts sent together",
    "Prompts sent together",
    section,
    measure,
    many_at_once,
    expectations,
    panels,
)
