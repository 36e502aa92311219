"""The part poisson: throughput and times of a random mix of short and long prompts, dense and pruned in turn."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from evals.bench.arithmetic import compare, rotated, size_label, spread
from evals.bench.engine import DENSE, Bench
from evals.bench.play import LONG, NEW_TOKENS, SHORT, Arrival, Served, many_at_once, play
from evals.bench.report import Panel, Part, Result, draw_range, gain, milliseconds, of_gain, table
from scripts.fork import say

SHORT_TOKENS = 200
TIMES = ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99")


def measure(bench: Bench) -> Iterator[dict[str, Any]]:
    yield measure_mix(bench, bench.shape.traffic_length, bench.options.arrivals)


def random_arrivals(bench: Bench, tokens: int, rate: float, count: int, new_tokens: int, seed: int) -> list[Arrival]:
    """Three short prompts to one long one in random order; exponential gaps at `rate` a second."""
    source = random.Random(seed)
    kinds = [LONG if place % 4 == 0 else SHORT for place in range(count)]
    source.shuffle(kinds)
    due, arrivals = 0.0, []
    for place, kind in enumerate(kinds):
        due += source.expovariate(rate)
        length = tokens if kind == LONG else SHORT_TOKENS
        ids = bench.prompts.ids(max(length, 1024), 1000 * seed + place)[-length:]  # needle prompts only come long
        arrivals.append(Arrival(due, ids, kind, new_tokens))
    return arrivals


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 100) * len(ordered) // 100) - 1))]


def summary(served: Sequence[Served]) -> dict[tuple[str, str], float]:
    """Of one run: tokens a second, and the times by kind of prompt."""
    span = max(one.token_times[-1] for one in served) - min(one.arrival.due for one in served)
    found = {("all", "throughput"): sum(len(one.arrival.ids) + len(one.token_times) for one in served) / span}
    for kind in (SHORT, LONG):
        group = [one for one in served if one.arrival.kind == kind]
        values = {"ttft": [one.ttft for one in group], "itl": [gap for one in group for gap in one.gaps]}
        for name in TIMES:
            what, share = name.split("_p")
            found[kind, name] = percentile(values[what], int(share) / 100)
    return found


def measure_mix(
    bench: Bench, tokens: int, count: int, new_tokens: int = NEW_TOKENS, load: float = 1.2
) -> dict[str, Any]:
    """The same random arrivals dense and pruned, in turn, at `load` of what dense long prefills allow."""
    warm = [Arrival(0.0, bench.prompts.ids(tokens, seed), LONG, new_tokens) for seed in range(2)]
    play(bench.llm, warm[:1], bench.by_ratio)
    (single,) = play(bench.llm, warm[1:], DENSE)
    rate = 4 * load / single.token_times[-1]  # one in four is long
    runs: dict[str, list[dict[tuple[str, str], float]]] = {"dense": [], "pruned": []}
    for repetition in range(1, bench.repeats + 1):
        arrivals = random_arrivals(bench, tokens, rate, count, new_tokens, repetition)
        for name, way in rotated([("dense", DENSE), ("pruned", bench.by_ratio)], repetition):
            runs[name].append(summary(play(bench.llm, arrivals, way)))
        say(f"poisson, repetition {repetition}/{bench.repeats}: {rate:.2f} requests a second")

    def both(*key: str) -> dict[str, Any]:
        dense, pruned = ([run[key] for run in runs[name]] for name in ("dense", "pruned"))
        gain = compare(pruned, dense) if key[1] == "throughput" else compare(dense, pruned)
        return {"dense": spread(dense), "pruned": spread(pruned), "gain": gain}

    return {
        "tokens": tokens,
        "short_tokens": SHORT_TOKENS,
        "variant": bench.by_ratio.name,
        "requests": count,
        "new_tokens": new_tokens,
        "requests_per_second": rate,
        "load": load,
        "throughput": both("all", "throughput"),
        **{kind: {name: both(kind, name) for name in TIMES} for kind in (SHORT, LONG)},
    }


def section(result: Result) -> str:
    rows = result.get("poisson", [])
    if not rows:
        return ""

    def lines() -> Iterator[tuple[str, ...]]:
        for row in rows:
            throughput = row["throughput"]
            shown = [f"{throughput[way]['median']:.0f}" for way in ("dense", "pruned")]
            yield "all: tokens a second", *shown, gain(throughput["gain"])
            for kind in (SHORT, LONG):
                for name, value in row[kind].items():
                    what, _, share = name.partition("_")
                    label = "to first token" if what == "ttft" else "between tokens"
                    times = [milliseconds(value[way]) for way in ("dense", "pruned")]
                    yield f"{kind}: ms {label}, {share}", *times, gain(value["gain"])

    row = rows[0]
    note = (
        f"{row['requests']} requests at {row['requests_per_second']:.2f} a second on average, one in four of "
        f"{size_label(row['tokens'])}, the others of {row['short_tokens']} tokens, {row['new_tokens']} new tokens "
        f"each; the long ones alone would take {row['load']:.0%} of a dense engine. Pruned is {row['variant']}; "
        "short prompts are dense in both.\n\n"
    )
    return note + table(("", "dense", "pruned", "gain"), lines())


def panels(result: Result) -> list[Panel]:
    return [partial(draw, row=result["poisson"][0])]


def draw(axis: Any, row: dict[str, Any]) -> None:
    gains = {"throughput": row["throughput"]["gain"]}
    gains |= {f"{kind}\n{name.replace('_', ' ')}": row[kind][name]["gain"] for kind in (SHORT, LONG) for name in TIMES}
    draw_range(axis, list(gains), [of_gain(value) for value in gains.values()], "", linestyle="none")
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_title("Random mix of short and long prompts", fontsize=10)
    axis.set_ylabel("times better")
    axis.tick_params(axis="x", labelsize=6)


PART = Part(
    "poisson",
    "throughput and time between tokens of a random mix of short and long prompts",
    "A random mix of short and long prompts",
    section,
    measure,
    many_at_once,
    panels=panels,
)
