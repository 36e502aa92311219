"""The part breakdown: where the time of pruned prefills goes, in runs of their own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from evals.bench.arithmetic import size_label, spread
from evals.bench.efficiency import place
from evals.bench.engine import Bench, place_label, top_p_variants
from evals.bench.hooks import clock, device_stopwatch, host_stopwatch
from evals.bench.kernels import LONG, SELECTION_SECONDS
from evals.bench.report import Panel, Part, Result, expectation, on_gpu, table
from scripts.fork import say

STEPS = ("score", "choose", "leave", "metadata")
MOST = 0.05


def measure(bench: Bench) -> Iterator[dict[str, Any]]:
    for tokens in bench.shape.efficiency_lengths:
        yield measure_length(bench, tokens)


def prefill_parts(total: float, spans: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Split one pruned prefill into parts that add up to it.

    layers: of all segments. score, choose, leave, metadata: UniPrefill's steps. rest: everything
    else, of the engine and of the lane, which brings rows together.
    """
    spent = {name: sum(spans.get(name, ())) for name in ("segment", *STEPS)}
    return {
        "layers": spent["segment"],
        **{name: spent[name] for name in STEPS},
        "rest": total - sum(spent.values()),
    }


def measure_length(bench: Bench, tokens: int) -> dict[str, Any]:
    """These runs serve no other number."""
    from vllm.v1.worker.gpu.uniprefill.events import observed_by

    parts: dict[str, list[float]] = defaultdict(list)
    overheads, selections, waits = [], [], []
    for repetition in range(bench.repeats + 1):
        host, device = host_stopwatch(), device_stopwatch()
        with observed_by(host):
            total = bench.run(tokens, repetition, bench.by_ratio).seconds
        with observed_by(device):
            bench.run(tokens, repetition, bench.by_ratio)
        by_clock = clock()
        with observed_by(by_clock):
            bench.run(tokens, repetition, top_p_variants(bench.options.top_p)[0])
        split, spans = prefill_parts(total, host.seconds()), device.seconds()
        overhead = sum(split[name] for name in STEPS) / total
        selection = [sum(cut) for cut in zip(spans["score"], spans["choose"], strict=True)]
        step = f"repetition {repetition}/{bench.repeats}" if repetition else "warm-up"
        say(
            f"breakdown {size_label(tokens)}, {step}: overhead {overhead:.1%} of {total:.3f} s, "
            f"selection {max(selection) * 1e3:.2f} ms at the slowest cut"
        )
        if repetition > 0:
            for name, value in split.items():
                parts[name].append(value)
            overheads.append(overhead)
            selections.append(selection)
            waits.append(by_clock.seconds()["choose"])
    return {
        **bench.place(tokens),
        "parts_seconds": {name: spread(values) for name, values in parts.items()},
        "overhead_share": spread(overheads),
        "selection_seconds_per_cut": [spread(values) for values in zip(*selections, strict=True)],
        "wait_seconds_per_cut": [spread(values) for values in zip(*waits, strict=True)],
    }


def expectations(result: Result) -> Iterator[dict[str, Any]]:
    with_selection = on_gpu(result) and result["settings"]["shape"] != "needle"
    for row in result.get("breakdown", []):
        share = row["overhead_share"]["median"]
        if row["tokens"] >= 16384:
            yield expectation(
                f"{place_label(row)}: selection, compaction and metadata at most {MOST:.0%} of the prefill",
                f"{share:.1%}",
                share <= MOST,
            )
        if with_selection and row["tokens"] == LONG:
            slowest = max(cut["median"] for cut in row["selection_seconds_per_cut"])
            yield expectation(
                f"{place_label(row)}: selection at most {SELECTION_SECONDS * 1e3:g} ms a layer",
                f"{slowest * 1e3:.2f} ms",
                slowest <= SELECTION_SECONDS,
            )


def section(result: Result) -> str:
    rows = result.get("breakdown", [])
    if not rows:
        return ""
    names = list(rows[0]["parts_seconds"])

    def lines() -> Iterator[list[str]]:
        for row in rows:
            share, parts = row["overhead_share"], row["parts_seconds"]
            yield [
                size_label(row["tokens"]),
                ", ".join(map(str, row["selection_layers"])),
                *(f"{parts[name]['median'] * 1e3:.1f}" for name in names),
                f"{share['median']:.1%} [{share['min']:.1%}–{share['max']:.1%}]",
                ", ".join(f"{cut['median'] * 1e3:.2f}" for cut in row["selection_seconds_per_cut"]),
                ", ".join(f"{cut['median'] * 1e3:.2f}" for cut in row.get("wait_seconds_per_cut", ())),
            ]

    head = ("prompt", "cuts after", *(f"{name} ms" for name in names), "overhead", "selection ms per cut", "wait")
    note = (
        "\n\nThe overhead is score, choose, leave and metadata; selection is score and choose. The rest is the "
        "engine's, and the gathering of the lane's rows. The wait is the host's in choosing by top_p, for a GPU that "
        "is still at what was launched before: milliseconds at each cut."
    )
    return table(head, lines()) + note


def panels(result: Result) -> list[Panel]:
    return [partial(draw, rows=result["breakdown"])]


def draw(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    from matplotlib import colormaps

    names = [place(row) for row in rows]
    left = [0.0] * len(rows)
    for part, color in zip(rows[0]["parts_seconds"], colormaps["tab10"].colors, strict=False):
        values = [row["parts_seconds"][part]["median"] for row in rows]
        axis.barh(names, values, left=left, label=part, color=color)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axis.set_xlim(0, 1.4 * max(left))
    axis.set_title("A pruned prefill's time", fontsize=10)
    axis.set_xlabel("seconds")
    axis.legend(fontsize=7, loc="right")


PART = Part(
    "breakdown",
    "where the time of those pruned prefills goes, in runs of their own",
    "Where a pruned prefill's time goes",
    section,
    measure,
    lambda bench: bench.all_and_first_cut,
    expectations,
    panels,
)
