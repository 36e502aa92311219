"""The part efficiency: with a fixed keep_ratio, the gain against the one that dense prefills at the kept lengths
predict, for the first cut alone and for all cuts."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from evals.bench.arithmetic import compare, size_label, spread
from evals.bench.engine import DENSE, Bench, alternate, place_label, seconds_of
from evals.bench.report import Panel, Part, Result, expectation, gain, ranged, table
from evals.bench.shapes import Segments
from scripts.fork import say

LEAST = 0.85


def measure(bench: Bench) -> Iterator[dict[str, Any]]:
    for tokens in bench.shape.efficiency_lengths:
        yield measure_length(bench, tokens)


def measure_length(bench: Bench, tokens: int) -> dict[str, Any]:
    what, variant = f"efficiency {size_label(tokens)}", bench.by_ratio
    say(f"{what}: one prefill to see the kept lengths")
    segments = bench.run(tokens, 0, variant).segments
    lengths = sorted({alive for _, alive in segments}, reverse=True)
    jobs = [(tokens, variant), *((length, DENSE) for length in lengths)]
    pruned, *dense = alternate(f"{what}, cuts after {','.join(map(str, bench.cuts))}", bench, jobs)
    if any(sample.segments != segments for sample in pruned):
        raise RuntimeError(f"{variant.name} kept other counts than {segments} of other prompts")
    seconds = {length: seconds_of(samples) for length, samples in zip(lengths, dense, strict=True)}
    return {
        **bench.place(tokens),
        "segments": [{"layers": layers, "tokens": alive} for layers, alive in segments],
        "pruned_seconds": spread(seconds_of(pruned)),
        "dense_seconds": {str(length): spread(values) for length, values in seconds.items()},
        **efficiency(seconds, seconds_of(pruned), segments),
    }


def predicted_seconds(dense_seconds: Mapping[int, float], segments: Segments) -> float:
    """A pruned prefill made of dense ones: each segment at the speed of its kept length."""
    total = sum(layers for layers, _ in segments)
    return sum(layers / total * dense_seconds[tokens] for layers, tokens in segments)


def efficiency(dense: Mapping[int, Sequence[float]], pruned: Sequence[float], segments: Segments) -> dict[str, Any]:
    """The measured gain against the gain that the layers would give at the kept lengths.

    Args:
        dense: seconds of dense prefills, per length, one a repetition; has every length
            alive in a segment.
        pruned: seconds of the pruned prefills of the same repetitions.
        segments: of the pruned prefills.

    """
    middle = {tokens: statistics.median(seconds) for tokens, seconds in dense.items()}
    predicted = [
        predicted_seconds({tokens: seconds[i] for tokens, seconds in dense.items()}, segments)
        for i in range(len(pruned))
    ]
    prompt = segments[0][1]
    gain = compare(dense[prompt], pruned)
    expected = middle[prompt] / predicted_seconds(middle, segments)
    return {
        "gain": gain,
        "expected_gain": expected,
        "efficiency": gain["ratio"] / expected,
        "paired_efficiency": spread(p / t for p, t in zip(predicted, pruned, strict=True)),
    }


def expectations(result: Result) -> Iterator[dict[str, Any]]:
    for row in result.get("efficiency", []):
        if row["tokens"] >= 16384:
            yield expectation(
                f"{place_label(row)}: gain at least {LEAST:g} of that at the kept lengths",
                f"{row['gain']['ratio']:.2f}x of {row['expected_gain']:.2f}x: {row['efficiency']:.2f}",
                row["efficiency"] >= LEAST,
            )


def section(result: Result) -> str:
    rows = (
        (
            size_label(row["tokens"]),
            ", ".join(map(str, row["selection_layers"])),
            ", ".join(f"{s['layers']} at {s['tokens']}" for s in row["segments"]),
            gain(row["gain"]),
            f"{row['expected_gain']:.2f}x",
            ranged(row["paired_efficiency"] | {"median": row["efficiency"]}),
        )
        for row in result.get("efficiency", [])
    )
    return table(("prompt", "cuts after", "layers at tokens", "gain", "expected gain", "share of it"), rows)


def panels(result: Result) -> list[Panel]:
    return [partial(draw, rows=result["efficiency"])]


def draw(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    places = range(len(rows))
    axis.bar([p - 0.2 for p in places], [row["expected_gain"] for row in rows], 0.4, color="0.7")
    bars = axis.bar([p + 0.2 for p in places], [row["gain"]["ratio"] for row in rows], 0.4)
    axis.bar_label(bars, [f"{row['efficiency']:.2f}" for row in rows], fontsize=8)
    axis.set_xticks(places, [place(row) for row in rows], fontsize=8)
    axis.set_title(f"Gain, {rows[0]['variant']}: grey as at the kept lengths", fontsize=10)
    axis.set_ylabel("times faster")


def place(row: Mapping[str, Any]) -> str:
    return f"{size_label(row['tokens'])}\ncuts {','.join(map(str, row['selection_layers']))}"


PART = Part(
    "efficiency",
    "with a fixed keep_ratio: the gain against what dense prefills at the kept lengths predict",
    "Gain against the gain at the kept lengths",
    section,
    measure,
    lambda bench: bench.all_and_first_cut,
    expectations,
    panels,
)
