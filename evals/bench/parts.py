"""The parts that run in this process: ttft, efficiency, breakdown."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evals.bench.arithmetic import (
    ModelShape,
    compare,
    efficiency,
    flop_gain,
    segments_of,
    size_label,
    spread,
)
from evals.bench.engine import (
    DENSE,
    Sample,
    Variant,
    device_stopwatch,
    first_token,
    host_stopwatch,
    instrumented,
    model_runner_of,
    segment_runner_of,
)
from evals.bench.shapes import Prompts
from scripts.fork import say

if TYPE_CHECKING:
    from vllm import LLM

OVERHEAD = ("score", "select", "compact", "metadata", "rows")


@dataclass(frozen=True)
class Bench:
    """An engine with its prompts, and how often to repeat."""

    llm: LLM
    shape: ModelShape
    prompts: Prompts
    repeats: int

    @property
    def selection_layers(self) -> list[int]:
        return list(segment_runner_of(self.llm).plan.selection_layers)

    def run(self, tokens: int, seed: int, variant: Variant) -> Sample:
        return first_token(self.llm, self.prompts.ids(tokens, seed), variant)


def alternate(what: str, bench: Bench, jobs: Sequence[tuple[int, Variant]]) -> list[list[Sample]]:
    """Run the jobs in turn, `repeats` times after one warm-up; the samples of each job.

    Every repetition has its own prompts, and begins with another job.
    """
    samples: list[list[Sample]] = [[] for _ in jobs]
    for repetition in range(bench.repeats + 1):
        line = []
        for index in rotated(len(jobs), repetition):
            tokens, variant = jobs[index]
            sample = bench.run(tokens, repetition, variant)
            line.append(f"{variant.name} {size_label(tokens)} {sample.seconds:.3f} s")
            if repetition > 0:
                samples[index].append(sample)
        step = f"repetition {repetition}/{bench.repeats}" if repetition else "warm-up"
        say(f"{what}, {step}: {', '.join(line)}")
    return samples


def rotated(count: int, by: int) -> list[int]:
    return [(i + by) % count for i in range(count)]


def seconds_of(samples: Sequence[Sample]) -> list[float]:
    return [sample.seconds for sample in samples]


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
            "layers": reports[0]["segments"][index]["layers"],
            "share": spread(r["segments"][index]["tokens_in"] / r["prompt_tokens"] for r in reports),
        }
        for index in range(len(reports[0]["segments"]))
    ]


def measure_ttft(bench: Bench, tokens: int, variants: Sequence[Variant]) -> dict[str, Any]:
    """Time to first token, dense and pruned in turn."""
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
                "flop_model_gain": statistics.median(
                    flop_gain(bench.shape, segments_of(sample.report)) for sample in samples
                ),
            }
            for variant, samples in zip(variants, pruned, strict=True)
        },
    }


def measure_efficiency(bench: Bench, tokens: int, variant: Variant) -> dict[str, Any]:
    """The gain against the one that dense prefills at the kept lengths predict."""
    say(f"efficiency {size_label(tokens)}: one prefill to see the kept lengths")
    segments = segments_of(bench.run(tokens, 0, variant).report)
    lengths = sorted({alive for _, alive in segments}, reverse=True)
    jobs = [(tokens, variant), *((length, DENSE) for length in lengths)]
    cuts = ",".join(map(str, bench.selection_layers))
    what = f"efficiency {size_label(tokens)}, cuts after {cuts}"
    pruned, *dense = alternate(what, bench, jobs)
    if any(segments_of(sample.report) != segments for sample in pruned):
        raise RuntimeError(f"{variant.name} kept other counts than {segments} of other prompts")
    seconds = {length: seconds_of(samples) for length, samples in zip(lengths, dense, strict=True)}
    return {
        "tokens": tokens,
        "selection_layers": bench.selection_layers,
        "variant": variant.name,
        "segments": [{"layers": layers, "tokens": alive} for layers, alive in segments],
        "pruned_seconds": spread(seconds_of(pruned)),
        "dense_seconds": {str(length): spread(values) for length, values in seconds.items()},
        **efficiency(seconds, seconds_of(pruned), segments),
    }


def prefill_parts(total: float, spans: dict[str, list[float]]) -> dict[str, float]:
    """Split one pruned prefill into parts that add up to it.

    embedding; segment 0, 1, …: the layers of each. score, select, compact, metadata: UniPrefill's
    steps. rows: what else a pruning step does, which is gathering rows and scattering them back.
    sampling: logits and sampler. outside: the engine around it, and stock's own input preparation.
    """
    spent = {name: sum(values) for name, values in spans.items()}
    steps = {name: spent[name] for name in ("score", "select", "compact", "metadata")}
    segments = list(spans["model"])
    segments[0] -= spent["embed"]
    for cut, seconds in enumerate(spans["score"]):
        segments[cut] -= seconds
    return {
        "embedding": spent["embed"],
        **{f"segment {index}": seconds for index, seconds in enumerate(segments)},
        **steps,
        "rows": spent["run"] - spent["embed"] - sum(segments) - sum(steps.values()),
        "sampling": spent["sample"],
        "outside": total - spent["run"] - spent["sample"],
    }


def measure_breakdown(bench: Bench, tokens: int, variant: Variant) -> dict[str, Any]:
    """Where the time of pruned prefills goes; these runs serve no other number."""
    runner = model_runner_of(bench.llm)
    parts: dict[str, list[float]] = defaultdict(list)
    overheads, selections = [], []
    for repetition in range(bench.repeats + 1):
        stopwatch = host_stopwatch()
        with instrumented(runner, stopwatch):
            total = bench.run(tokens, repetition, variant).seconds
        device = device_stopwatch()
        with instrumented(runner, device):
            bench.run(tokens, repetition, variant)
        split = prefill_parts(total, stopwatch.seconds())
        overhead = sum(split[name] for name in OVERHEAD) / total
        spans = device.seconds()
        selection = [sum(cut) for cut in zip(spans["score"], spans["select"], strict=True)]
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
    return {
        "tokens": tokens,
        "selection_layers": bench.selection_layers,
        "variant": variant.name,
        "parts_seconds": {name: spread(values) for name, values in parts.items()},
        "overhead_share": spread(overheads),
        "selection_seconds_per_cut": [spread(values) for values in zip(*selections, strict=True)],
    }
