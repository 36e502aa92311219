"""The parts decode and flashinfer: time per token and to the first one, on the pristine release and on the fork, in
processes of their own, in turn.

The release's own defaults are what everything is held against: short and dense prompts cost with the flag what they
cost there, and long ones gain over it what the FLOP model says.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from evals.bench.arithmetic import rotated, size_label, spread, within_spread
from evals.bench.engine import MIN_LENGTH, Bench, EngineSpec
from evals.bench.gain import SHARE_OF_FLOP_MODEL
from evals.bench.report import Panel, Part, Result, draw_range, expectation, on_gpu, ranged, table
from scripts.fork import ForkError, Layout, say
from scripts.upstream_tests import make_release

WORKER = Path(__file__).with_name("decode_worker.py")
CONTEXTS = {"cpu": (1024, 8192), "cuda": (1024, 8192, 32768, 131072)}
NEW_TOKENS = 64
PRISTINE, FORK = "pristine", "fork, no flag"
DENSE, PRUNED = "fork, flag, dense", "fork, flag, pruned"
WIDEST_SPREAD = 0.2  # runs that differ by more tell nothing
FLOP_MODEL_FROM = 32768  # tokens from which on a prompt is FLOPs, and little else
COLD = 1.0  # seconds that the first prompt of a length may take longer
FLASHINFER = {"attention_backend": "FLASHINFER"}


def measure(bench: Bench, backend: Mapping[str, str] | None = None) -> Iterator[dict[str, Any]]:
    """One row, which says what all of them share."""
    contexts = [n for n in CONTEXTS[bench.device] if n <= max(bench.shape.lengths[-1], CONTEXTS["cpu"][-1])]
    if backend:
        if bench.device != "cpu" and importlib.util.find_spec("flashinfer") is None:
            raise ForkError("FlashInfer is not installed here.")
        contexts = contexts[1:3]
    arguments = bench.arguments(EngineSpec((), contexts[-1], NEW_TOKENS))
    if bench.device != "cpu":  # which has one backend
        arguments |= backend or {}
    prompts = {size_label(tokens): bench.prompts.ids(tokens, 1) for tokens in contexts}
    with TemporaryDirectory(prefix="bench-pristine-") as folder:
        pristine = bench.options.pristine
        if pristine is None and bench.device == "cpu":
            pristine = make_release(Layout(), Path(folder))
        cuts, pruning = list(bench.shape.selection_layers or ()), bench.by_ratio.extra_args
        jobs = programs(arguments, prompts, cuts, pruning, pristine, bench.repeats)
        for row in measure_decode(jobs, bench.options.decode_rounds):
            for context in row["contexts"]:
                if segments := context.pop("segments").get(PRUNED):
                    context["flop_model_gain"] = bench.model.flop_gain(segments)
            yield row


def programs(
    engine: dict[str, Any],
    prompts: Mapping[str, list[int]],
    selection_layers: Sequence[int],
    pruning: dict[str, Any],
    pristine: Path | None,
    repeats: int,
) -> list[tuple[dict[str, Any], Path | None]]:
    """The jobs of one round, each with the folder whose vllm it runs on (None: installed)."""
    job = {"prompts": prompts, "new_tokens": NEW_TOKENS, "repeats": repeats}
    config = {"selection_layers": selection_layers, "min_prompt_tokens": MIN_LENGTH}
    flag = engine | {"uniprefill_config": config}
    report = {"uniprefill_report": 1}
    both = {DENSE: {"uniprefill": 0} | report, PRUNED: pruning | report}
    jobs: list[tuple[dict[str, Any], Path | None]] = [
        (job | {"engine": flag, "requests": both}, None),
        (job | {"engine": engine, "requests": {FORK: None}}, None),
    ]
    if pristine is not None:
        jobs.insert(0, (job | {"engine": engine, "requests": {PRISTINE: None}}, pristine))
    return jobs


def run_worker(job: dict[str, Any], release: Path | None) -> dict[str, Any]:
    """Run one job in a process of its own, and make sure of what ran."""
    environment = dict(os.environ)
    if release is not None:  # before what is there: its dependencies may lie on the path too
        inherited = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(release), *([inherited] if inherited else [])])
    with TemporaryDirectory(prefix="bench-decode-") as folder:
        given, result = Path(folder, "job.json"), Path(folder, "result.json")
        given.write_text(json.dumps(job))
        command = [sys.executable, "-P", str(WORKER), str(given), str(result)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise ForkError(f"A decode run failed:\n{done.stderr[-3000:]}")
        found = json.loads(result.read_text())
    if release is not None and not Path(found["file"]).is_relative_to(release.resolve()):
        raise ForkError(f"The release was to run from {release}, and {found['package']} ran.")
    if ("uniprefill" in found["package"]) != (release is None):
        raise ForkError(f"{found['package']} is not the package whose turn it was.")
    return found


def measure_decode(jobs: Sequence[tuple[dict[str, Any], Path | None]], rounds: int) -> Iterator[dict[str, Any]]:
    """Run the jobs in turn, `rounds` times; one process gives one median per request. The row so far, after each.

    With a single round there is one process of a kind, and its repetitions are the values.
    """
    medians: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    first: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    packages: dict[str, str] = {}
    memory: dict[str, dict[str, int]] = {}
    cold: dict[str, dict[str, float]] = defaultdict(dict)
    segments: dict[str, dict[str, list]] = defaultdict(dict)
    for number in range(rounds):
        for job, release in rotated(jobs, number):
            found = run_worker(job, release)
            line = []
            if found["memory"]:
                memory[" and ".join(job["requests"])] = found["memory"]
            for context, requests in found["seconds"].items():
                segments[context] |= found["segments"][context]
                cold[context] |= found["cold"][context]
                for request, seconds in requests.items():
                    packages[request] = found["package"]
                    median = statistics.median(seconds)
                    medians[context][request] += seconds if rounds == 1 else [median]
                    to_first = found["first"][context][request]
                    first[context][request] += to_first if rounds == 1 else [statistics.median(to_first)]
                    line.append(f"{request} {context} {median * 1e3:.2f} ms")
            say(f"decode, round {number + 1}/{rounds}: {', '.join(line)}")
            yield {
                "new_tokens": NEW_TOKENS,
                "rounds": rounds,
                "engine": jobs[0][0]["engine"].get("compilation_config"),
                "packages": dict(packages),
                "memory": dict(memory),
                "contexts": [
                    {
                        "context": context,
                        "tokens": len(jobs[0][0]["prompts"][context]),
                        "seconds_per_token": {name: spread(values) for name, values in requests.items()},
                        "seconds_to_first": {name: spread(values) for name, values in first[context].items()},
                        "compared": comparisons(requests),
                        "first_compared": comparisons(first[context]),
                        "cold_seconds_to_first": dict(cold[context]),
                        "segments": dict(segments[context]),
                    }
                    for context, requests in medians.items()
                ],
            }


def comparisons(medians: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """Whom to hold against whom, of those that ran; over 1 is faster."""
    pairs = [(FORK, PRISTINE), (DENSE, PRISTINE), (PRUNED, DENSE), (PRUNED, PRISTINE)]
    return {
        f"{ours} against {reference}": within_spread(medians[ours], medians[reference])
        for ours, reference in pairs
        if ours in medians and reference in medians
    }


def expectations(result: Result, part: str = "decode") -> Iterator[dict[str, Any]]:
    for row in result.get(part, {}).get("contexts", []):
        yield from unchanged(f"{part} at {row['context']}", row["compared"])
        if on_gpu(result):  # elsewhere time is not FLOPs, and a release's chunks are others
            dense = {pair: found for pair, found in row["first_compared"].items() if not pair.startswith(PRUNED)}
            yield from unchanged(f"{part}: first token at {row['context']}", dense)
            yield from of_long_prompts(f"{part}: first token at {row['context']}", row)
            for name, seconds in row["cold_seconds_to_first"].items():
                later = row["seconds_to_first"][name]["median"]
                yield expectation(
                    f"{part} at {row['context']}, {name}: the first prompt of a length takes at most {COLD:g} s longer",
                    f"{seconds:.2f} s, then {later:.2f} s",
                    seconds <= later + COLD,
                )
    for name, memory in result.get(part, {}).get("memory", {}).items():
        yield expectation(
            f"{part}, {name}: memory while serving within what start-up counted on",
            f"{memory['used'] / 2**30:.2f} of {memory['profiled'] / 2**30:.2f} GiB",
            memory["used"] <= memory["profiled"],
        )


def unchanged(what: str, compared: Mapping[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for pair, found in compared.items():
        after_pruning = pair.startswith(PRUNED)
        aim = "not slower" if after_pruning else "no difference beyond the spread of the runs"
        noisy = found["spread"] > WIDEST_SPREAD
        yield expectation(
            f"{what}, {pair}: {aim}",
            f"{found['ratio']:.3f}x, spread {found['spread']:.3f}" + (", too noisy to tell" if noisy else ""),
            not noisy and (found["within"] or (after_pruning and found["ratio"] > 1)),
        )


def of_long_prompts(what: str, row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    found, model = row["first_compared"].get(f"{PRUNED} against {PRISTINE}"), row.get("flop_model_gain")
    if found and model and row["tokens"] >= FLOP_MODEL_FROM:
        yield expectation(
            f"{what}, {PRUNED} against {PRISTINE}: at least {SHARE_OF_FLOP_MODEL:g} of the FLOP model",
            f"{found['ratio']:.2f}x of {model:.2f}x: {found['ratio'] / model:.2f}",
            found["ratio"] >= SHARE_OF_FLOP_MODEL * model,
        )


def lacks(result: Result, part: str = "decode") -> Iterator[str]:
    packages = result.get(part, {}).get("packages", {})
    if DENSE in packages and PRISTINE not in packages:
        yield f"{part} on the pristine release: none given (--pristine)"


def section(result: Result, part: str = "decode") -> str:
    def lines() -> Iterator[tuple[str, ...]]:
        for row in result.get(part, {}).get("contexts", []):
            for name, value in row["seconds_per_token"].items():
                first = ranged(row["seconds_to_first"][name], 1, 1e3)
                cold = f"{row['cold_seconds_to_first'][name] * 1e3:.1f}" if "cold_seconds_to_first" in row else ""
                yield row["context"], name, ranged(value, 2, 1e3), first, cold
            for pair, value in row["compared"].items():
                both = value, row["first_compared"][pair]
                shown = (f"{found['ratio']:.3f}x, spread {found['spread']:.3f}" for found in both)
                yield row["context"], f"{pair}: times faster", *shown, ""

    head = ("context", "", "a token: median [range]", "to the first token", "in the first run of that length")
    return table(head, lines())


def panels(result: Result, part: str = "decode") -> list[Panel]:
    return [partial(draw, rows=result[part]["contexts"], title=part)]


def draw(axis: Any, rows: Sequence[dict[str, Any]], title: str) -> None:
    for row in rows:
        spreads = [{key: s[key] * 1e3 for key in ("median", "min", "max")} for s in row["seconds_per_token"].values()]
        names = [name.replace(", ", "\n") for name in row["seconds_per_token"]]
        draw_range(axis, names, spreads, f"context {row['context']}", linestyle="none")
    axis.set_title(title.capitalize(), fontsize=10)
    axis.set_ylabel("ms a token")
    axis.set_ylim(bottom=0)
    axis.tick_params(axis="x", labelsize=7)
    axis.legend(fontsize=8)


PART = Part(
    "decode",
    "time per token: the release, the fork, after a dense and a pruned prefill",
    "Decode, milliseconds a token",
    section,
    measure,
    expectations=expectations,
    panels=panels,
    lacks=lacks,
)
OF_FLASHINFER = replace(
    PART,
    name="flashinfer",
    about="the same on the backend FlashInfer, where it is installed",
    title="FlashInfer, milliseconds a token",
    section=partial(section, part="flashinfer"),
    measure=partial(measure, backend=FLASHINFER),
    expectations=partial(expectations, part="flashinfer"),
    panels=partial(panels, part="flashinfer"),
    lacks=partial(lacks, part="flashinfer"),
)
