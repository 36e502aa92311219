"""The part interleave: a long prompt in steps of one budget or another, alone and beside decodes, dense and pruned.

A dense prompt runs in chunks through all layers. A pruned one that does not fit a step runs in the lane: a step holds
what one chunk costs in the first segment's layers, so the longest gap between a decode's tokens shrinks by all layers
over those, whatever is kept. One that fits runs in one step, and the decodes wait for all of it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from evals.bench import hooks
from evals.bench.arithmetic import compare, rotated, size_label, spread
from evals.bench.engine import DENSE, Bench, EngineSpec, Variant, place_label, top_p_variants
from evals.bench.report import Panel, Part, Result, draw_range, expectation, gain, milliseconds, of_gain, table
from scripts.fork import say

DECODES, SHORT_TOKENS = 4, 200
LEAST = 0.75  # of the ratio of layers
LEAST_ALONE = 0.9  # of the gain in one step
LONGEST_GAP = 1 / 4  # of the longest gap in one step
TIMES = {
    "alone": "alone: first token",
    "ttft": "beside decodes: first token",
    "gap_p50": "median gap of the decodes",
    "gap_max": "longest gap",
}
LONG = "long"


def engines(bench: Bench) -> list[EngineSpec]:
    return [replace(bench.one_at_a_time, budget=budget) for budget in bench.shape.budgets]


def measure(bench: Bench) -> Iterator[dict[str, Any]]:
    yield measure_length(bench, bench.shape.efficiency_lengths[-1])


def beside_decodes(bench: Bench, tokens: int, seed: int, variant: Variant) -> tuple[dict[str, float], dict[str, Any]]:
    """Let decodes run, send a prompt, and wait for its first token: `TIMES` in seconds, and its report.

    Raises:
        RuntimeError: if a decode got no token in a step, or the prompt was not prefilled as asked.

    """
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
        if outputs and not set(names) <= {output.request_id for output in outputs}:
            raise RuntimeError(f"{variant.name} at {tokens} tokens: a decode got no token in a step")
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
    ways = [DENSE, bench.by_ratio]
    if bench.prompts.needle:  # elsewhere it keeps nearly everything
        ways += top_p_variants(bench.options.top_p)[:1]
    seconds: dict[str, dict[str, list[float]]] = {way.name: {what: [] for what in TIMES} for way in ways}
    reports: dict[str, dict[str, Any]] = {}
    for repetition in range(bench.repeats + 1):  # the first warms up
        for way in rotated(ways, repetition):
            length = tokens if repetition else bench.shape.lengths[0]
            found, reports[way.name] = beside_decodes(bench, length, repetition, way)
            found["alone"] = bench.run(length, repetition, way).seconds
            if repetition > 0:
                for what, value in found.items():
                    seconds[way.name][what].append(value)
    dense, *pruned = ways
    gains = {
        way.name: {what: compare(seconds[dense.name][what], seconds[way.name][what]) for what in TIMES}
        for way in pruned
    }
    budget = hooks.step_budget(bench.llm)
    for name, found in gains.items():
        say(
            f"interleave {size_label(tokens)}, {budget} tokens a step, {name}: longest gap "
            f"{found['gap_max']['ratio']:.2f}x shorter, first token {found['ttft']['ratio']:.2f}x sooner, alone "
            f"{found['alone']['ratio']:.2f}x"
        )
    segments = reports[pruned[0].name]["segments"]
    layers = [last - first + 1 for first, last in (segment["layers"] for segment in segments)]
    return {
        **bench.place(tokens),
        "budget": budget,
        "decodes": DECODES,
        "layer_ratio": sum(layers) / layers[0],
        "gains": gains,
        "ways": {
            name: {"steps": reports[name]["steps"]} | {what: spread(values) for what, values in found.items()}
            for name, found in seconds.items()
        },
    }


def expectations(result: Result) -> Iterator[dict[str, Any]]:
    rows = result.get("interleave", [])
    for row in rows:
        for name, gains in row["gains"].items():
            if row["ways"][name]["steps"] > 1:
                whole = next((other for other in rows if other["ways"][name]["steps"] == 1), None)
                yield from of_lane(row, name, gains, whole)


def of_lane(
    row: dict[str, Any], name: str, gains: dict[str, Any], whole: dict[str, Any] | None
) -> Iterator[dict[str, Any]]:
    place = f"{place_label(row | {'variant': name})}, {row['budget']} tokens a step"
    beside = f"{place}, beside {row['decodes']} decodes"
    gap, wanted = gains["gap_max"]["ratio"], LEAST * row["layer_ratio"]
    yield expectation(
        f"{beside}: their longest gap shrinks by {LEAST:g} of all layers over the first segment's",
        f"{gap:.2f}x of {row['layer_ratio']:g}",
        gap >= wanted,
    )
    sooner = gains["ttft"]["ratio"]
    yield expectation(f"{beside}: first token sooner", f"{sooner:.2f}x", sooner > 1)
    if whole is None:
        return
    longest, in_one = (one["ways"][name]["gap_max"]["median"] for one in (row, whole))
    yield expectation(
        f"{beside}: their longest gap at most {LONGEST_GAP:g} of that beside one step",
        f"{longest / in_one:.2f}",
        longest <= LONGEST_GAP * in_one,
    )
    alone, at_once = (one["gains"][name]["alone"]["ratio"] for one in (row, whole))
    yield expectation(
        f"{place}, alone: at least {LEAST_ALONE:g} of the gain in one step",
        f"{alone:.2f}x of {at_once:.2f}x: {alone / at_once:.2f}",
        alone >= LEAST_ALONE * at_once,
    )


def section(result: Result) -> str:
    def lines() -> Iterator[tuple[str, ...]]:
        for row in result.get("interleave", []):
            place = size_label(row["tokens"]), str(row["budget"])
            for name, way in row["ways"].items():
                yield *place, name, str(way["steps"]), *(milliseconds(way[what]) for what in TIMES)
                if gains := row["gains"].get(name):
                    yield *place, "gain", "", *(gain(gains[what]) for what in TIMES)

    head = ("prompt", "tokens a step", "prefill", "steps", *(f"{what}, ms" for what in TIMES.values()))
    shown = table(head, lines())
    return shown and f"{DECODES} decodes run beside the prompt, and each gets a token in every step.\n\n{shown}"


def panels(result: Result) -> list[Panel]:
    return [partial(draw, rows=result["interleave"])]


def draw(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        for name, gains in row["gains"].items():
            places = [what.replace("_", " ") for what in TIMES]
            label = f"{name}, {row['budget']} a step"
            draw_range(axis, places, [of_gain(gains[what]) for what in TIMES], label, linestyle="none")
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_title(f"{size_label(rows[0]['tokens'])} alone and beside decodes", fontsize=10)
    axis.set_ylabel("times better")
    axis.legend(fontsize=6)


PART = Part(
    "interleave",
    "a long prompt in chunks, in the lane and in one step, alone and beside decodes",
    "A long prompt at budgets of a step, alone and beside decodes",
    section,
    measure,
    engines,
    expectations,
    panels,
)
