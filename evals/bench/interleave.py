"""The part interleave: what a long prompt does to decodes that run beside it, dense and pruned in turn.

A dense prompt runs in chunks through all layers. A pruned one that does not fit a step runs in the lane: a step holds
what one chunk costs in the first segment's layers, so the longest gap between a decode's tokens shrinks by all layers
over those, whatever is kept.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from evals.bench.arithmetic import compare, rotated, size_label, spread
from evals.bench.engine import DENSE, Bench, Variant, place_label
from evals.bench.report import Panel, Part, Result, draw_range, expectation, gain, milliseconds, of_gain, table
from scripts.fork import say

DECODES, SHORT_TOKENS = 4, 200
LEAST = 0.75  # of the ratio of layers
TIMES = {"ttft": "the long prompt's time to first token", "gap_p50": "median gap", "gap_max": "longest gap"}
LONG = "long"


def measure(bench: Bench) -> Iterator[dict[str, Any]]:
    yield measure_length(bench, bench.shape.efficiency_lengths[-1])


def beside_decodes(bench: Bench, tokens: int, seed: int, variant: Variant) -> tuple[dict[str, float], dict[str, Any]]:
    """Let decodes run, send a prompt, and wait for its first token: `TIMES` in seconds, and its report."""
    from vllm import SamplingParams, TokensPrompt

    engine, last, gaps = bench.llm.llm_engine, {}, []

    def send(name: str, ids: list[int], new_tokens: int, way: Variant) -> None:
        extra_args = way.extra_args | {"uniprefill_report": 1}
        params = SamplingParams(
            max_tokens=new_tokens, temperature=0, ignore_eos=True, detokenize=False, extra_args=extra_args
        )
        engine.add_request(name, TokensPrompt(prompt_token_ids=ids), params)

    names = [str(place) for place in range(DECODES)]
    for place, name in enumerate(names):
        ids = bench.prompts.ids(1024, 100 * seed + place)[-SHORT_TOKENS:]  # needle prompts only come long
        send(name, ids, bench.shape.lengths[-1] - SHORT_TOKENS, DENSE)
    while len(last) < DECODES:
        last |= {output.request_id: time.perf_counter() for output in engine.step()}
    begin = time.perf_counter()
    send(LONG, bench.prompts.ids(tokens, seed), 1, variant)
    report: dict[str, Any] | None = None
    while report is None:
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            if output.request_id == LONG:
                report = output.uniprefill
            else:
                gaps.append(now - last[output.request_id])
                last[output.request_id] = now
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    if (report["outcome"] == "pruned") != variant.pruned:
        raise RuntimeError(f"{variant.name} at {tokens} tokens: {report['outcome']}, reason {report['reason']}")
    return {"ttft": now - begin, "gap_p50": statistics.median(gaps), "gap_max": max(gaps)}, report


def measure_length(bench: Bench, tokens: int) -> dict[str, Any]:
    ways = [("dense", DENSE), ("pruned", bench.by_ratio)]
    seconds: dict[str, dict[str, list[float]]] = {name: {what: [] for what in TIMES} for name, _ in ways}
    reports: dict[str, dict[str, Any]] = {}
    for repetition in range(bench.repeats + 1):  # the first warms up
        for name, way in rotated(ways, repetition):
            length = tokens if repetition else bench.shape.lengths[0]
            found, reports[name] = beside_decodes(bench, length, repetition, way)
            if repetition > 0:
                for what, value in found.items():
                    seconds[name][what].append(value)
    gains = {what: compare(seconds["dense"][what], seconds["pruned"][what]) for what in TIMES}
    say(
        f"interleave {size_label(tokens)}: longest gap {gains['gap_max']['ratio']:.2f}x shorter, "
        f"first token {gains['ttft']['ratio']:.2f}x sooner"
    )
    layers = [last - first + 1 for first, last in (segment["layers"] for segment in reports["pruned"]["segments"])]
    return {
        **bench.place(tokens),
        "decodes": DECODES,
        "layer_ratio": sum(layers) / layers[0],
        "gains": gains,
        **{
            name: {"steps": reports[name]["steps"]} | {what: spread(values) for what, values in found.items()}
            for name, found in seconds.items()
        },
    }


def expectations(result: Result) -> Iterator[dict[str, Any]]:
    for row in result.get("interleave", []):
        if row["dense"]["steps"] < 2:  # nothing was interleaved
            continue
        gap, wanted = row["gains"]["gap_max"]["ratio"], LEAST * row["layer_ratio"]
        yield expectation(
            f"{place_label(row)}, beside {row['decodes']} decodes: their longest gap shrinks by {LEAST:g} of "
            "all layers over the first segment's",
            f"{gap:.2f}x of {row['layer_ratio']:g}",
            gap >= wanted,
        )
        sooner = row["gains"]["ttft"]["ratio"]
        yield expectation(
            f"{place_label(row)}, beside {row['decodes']} decodes: first token sooner", f"{sooner:.2f}x", sooner > 1
        )


def section(result: Result) -> str:
    def lines() -> Iterator[tuple[str, ...]]:
        for row in result.get("interleave", []):
            for name, label in (("dense", "dense"), ("pruned", row["variant"])):
                way = row[name]
                yield size_label(row["tokens"]), label, str(way["steps"]), *(milliseconds(way[what]) for what in TIMES)
            yield size_label(row["tokens"]), "gain", "", *(gain(row["gains"][what]) for what in TIMES)

    head = ("prompt", "prefill", "steps", *(f"{what}, ms" for what in TIMES.values()))
    shown = table(head, lines())
    return shown and f"Gaps between the tokens of {DECODES} decodes while the prompt prefills.\n\n{shown}"


def panels(result: Result) -> list[Panel]:
    return [partial(draw, rows=result["interleave"])]


def draw(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        names = [what.replace("_", " ") for what in TIMES]
        gains = [of_gain(row["gains"][what]) for what in TIMES]
        draw_range(axis, names, gains, size_label(row["tokens"]), linestyle="none")
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_title("A long prompt beside decodes", fontsize=10)
    axis.set_ylabel("times better")
    axis.legend(fontsize=8)


PART = Part(
    "interleave",
    "gaps between the tokens of decodes beside a long prompt, in chunks or in the lane",
    "A long prompt beside decodes",
    section,
    measure,
    lambda bench: [bench.one_at_a_time],
    expectations,
    panels,
)
