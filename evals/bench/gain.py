"""The part ttft: time to first token, dense and pruned, over prompt lengths."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from evals.bench import report
from evals.bench.arithmetic import compare, size_label, spread
from evals.bench.engine import DENSE, Bench, Sample, Variant, alternate, seconds_of, top_p_variants

GAIN_AT_16K = 2.0
SHARE_OF_FLOP_MODEL = 0.9


def measure(bench: Bench) -> Iterator[dict[str, Any]]:
    """With random weights `top_p` keeps nearly everything: once, for what cuts cost that drop nothing."""
    by_top_p = bench.shape.prune_by == "top_p"
    variants = top_p_variants(bench.options.top_p) if by_top_p else [bench.by_ratio]
    for tokens in bench.shape.lengths:
        last = not by_top_p and tokens == bench.shape.lengths[-1]
        yield measure_length(bench, tokens, variants + (top_p_variants(bench.options.top_p)[:1] if last else []))


def measure_length(bench: Bench, tokens: int, variants: Sequence[Variant]) -> dict[str, Any]:
    jobs = [(tokens, variant) for variant in (DENSE, *variants)]
    dense, *pruned = alternate(f"ttft {size_label(tokens)}", bench, jobs)
    return {
        "tokens": tokens,
        "dense": {"seconds": spread(seconds_of(dense)), "answered": answered(bench, tokens, dense)},
        "pruned": {
            variant.name: {
                "seconds": spread(seconds_of(samples)),
                "gain": compare(seconds_of(dense), seconds_of(samples)),
                "answered": answered(bench, tokens, samples),
                "kept": kept_shares(samples),
                "flop_model_gain": statistics.median(bench.model.flop_gain(sample.segments) for sample in samples),
            }
            for variant, samples in zip(variants, pruned, strict=True)
        },
    }


def answered(bench: Bench, tokens: int, samples: Sequence[Sample]) -> dict[str, int] | None:
    """How many of the repetitions' questions were answered right; None if nothing was asked."""
    found = [
        bench.prompts.answered(tokens, repetition, sample.first_token) for repetition, sample in enumerate(samples, 1)
    ]
    return None if None in found else {"right": sum(map(bool, found)), "asked": len(found)}


def kept_shares(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """For every segment, its layers and the share of the prompt that was alive in it."""
    reports = [sample.report for sample in samples]
    return [
        {
            "layers": segment["layers"],
            "share": spread(r["segments"][index]["tokens_in"] / r["prompt_tokens"] for r in reports),
        }
        for index, segment in enumerate(reports[0]["segments"])
    ]


def expectations(result: report.Result) -> Iterator[dict[str, Any]]:
    needle = result["settings"]["shape"] == "needle"
    if needle and not report.on_gpu(result):
        yield from of_needle([row for row in result.get("ttft", []) if row["tokens"] >= 4096])
    if not needle and report.on_gpu(result):  # elsewhere time is not FLOPs
        yield from of_flop_model(result.get("ttft", []))


def of_needle(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for name in rows[0]["pruned"] if rows else ():
        gains = {row["tokens"]: row["pruned"][name]["gain"]["ratio"] for row in rows}
        values = list(gains.values())
        yield report.expectation(
            f"{name}: gain over 1 from 4K, growing with length",
            ", ".join(f"{size_label(tokens)} {gain:.2f}x" for tokens, gain in gains.items()),
            min(values) > 1 and all(a < b for a, b in pairwise(values)),
        )
        if 16384 in gains:
            right = next(r["pruned"][name]["answered"] for r in rows if r["tokens"] == 16384)
            told = f"{right['right']} of {right['asked']} answered" if right else "not asked"
            yield report.expectation(
                f"{name}: gain at least {GAIN_AT_16K:g} at 16K, needle answered",
                f"{gains[16384]:.2f}x, {told}",
                gains[16384] >= GAIN_AT_16K and right is not None and right["right"] == right["asked"],
            )


def of_flop_model(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        for name, pruned in row["pruned"].items():
            gain, model = pruned["gain"]["ratio"], pruned["flop_model_gain"]
            yield report.expectation(
                f"{name} at {size_label(row['tokens'])}: gain at least {SHARE_OF_FLOP_MODEL:g} of the FLOP model",
                f"{gain:.2f}x of {model:.2f}x: {gain / model:.2f}",
                gain >= SHARE_OF_FLOP_MODEL * model,
            )


HEAD = ("prompt", "prefill", "time", "gain", "kept after the cuts", "answered", "FLOP model")


def lines(row: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The cells under HEAD of what `measure_length` found: dense, then each variant."""

    def right(value: dict[str, int] | None) -> str:
        return f"{value['right']}/{value['asked']}" if value else "–"

    def seconds(value: dict[str, Any]) -> str:
        return report.ranged(value, 3).replace(" ", " s ", 1)

    tokens, dense = size_label(row["tokens"]), row["dense"]
    yield tokens, "dense", seconds(dense["seconds"]), "1", "", right(dense["answered"]), ""
    for name, pruned in row["pruned"].items():
        kept = " ".join(f"{segment['share']['median']:.0%}" for segment in pruned["kept"][1:])
        shown = right(pruned["answered"]), f"{pruned['flop_model_gain']:.2f}x"
        yield tokens, name, seconds(pruned["seconds"]), report.gain(pruned["gain"]), kept, *shown


def section(result: report.Result) -> str:
    return report.table(HEAD, (line for row in result.get("ttft", []) for line in lines(row)))


def panels(result: report.Result) -> list[report.Panel]:
    return [partial(draw, rows=result["ttft"]) for draw in (draw_times, draw_gains, draw_kept)]


def draw_times(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    lengths = report.length_axis(axis, rows, "Time to first token", "seconds")
    axis.set_yscale("log")
    lines = {name: [row["pruned"][name]["seconds"] for row in rows] for name in rows[0]["pruned"]}
    report.draw_lines(axis, lengths, {"dense": [row["dense"]["seconds"] for row in rows]} | lines)


def draw_gains(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    lengths = report.length_axis(axis, rows, "Gain: dense over pruned", "times faster")
    axis.axhline(1, color="black", linewidth=0.8)
    gains = {name: [report.of_gain(row["pruned"][name]["gain"]) for row in rows] for name in rows[0]["pruned"]}
    report.draw_lines(axis, lengths, gains)


def draw_kept(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    lengths = report.length_axis(axis, rows, "Tokens kept after the cuts", "share of the prompt")
    axis.set_ylim(0, 1.02)
    shares = {
        f"{name}, cut {cut}": [row["pruned"][name]["kept"][cut]["share"] for row in rows]
        for name, first in rows[0]["pruned"].items()
        for cut in range(1, len(first["kept"]))
    }
    report.draw_lines(axis, lengths, shares)


PART = report.Part(
    "ttft",
    "time to first token, dense and pruned, over prompt lengths",
    "Time to first token",
    section,
    measure,
    lambda bench: [bench.one_at_a_time],
    expectations,
    panels,
)
