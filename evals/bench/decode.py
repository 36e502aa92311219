"""The part decode: time per token and to the first one, on the pristine release and on the fork, in processes of
their own, in turn."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from evals.bench.arithmetic import rotated, size_label, spread, within_spread
from evals.bench.engine import MIN_LENGTH, Bench, EngineSpec
from evals.bench.report import Panel, Part, Result, draw_range, expectation, ranged, table
from scripts.fork import ForkError, Layout, say
from scripts.upstream_tests import make_release

WORKER = Path(__file__).with_name("decode_worker.py")
CONTEXTS = {"cpu": (1024, 8192), "cuda": (1024, 8192, 32768)}
NEW_TOKENS = 64
PRISTINE, FORK = "pristine", "fork, no flag"
DENSE, PRUNED = "fork, flag, dense", "fork, flag, pruned"
WIDEST_SPREAD = 0.2  # runs that differ by more tell nothing


def measure(bench: Bench) -> Iterator[dict[str, Any]]:
    """One row, which says what all of them share."""
    contexts = CONTEXTS[bench.device]
    arguments = bench.arguments(EngineSpec((), contexts[-1], NEW_TOKENS))
    prompts = {size_label(tokens): bench.prompts.ids(tokens, 1) for tokens in contexts}
    with TemporaryDirectory(prefix="bench-pristine-") as folder:
        pristine = bench.options.pristine
        if pristine is None and bench.device == "cpu":
            pristine = make_release(Layout(), Path(folder))
        cuts, pruning = list(bench.shape.selection_layers or ()), bench.by_ratio.extra_args
        jobs = programs(arguments, prompts, cuts, pruning, pristine, bench.repeats)
        yield from measure_decode(jobs, bench.options.decode_rounds)


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
        (job | {"engine": engine, "requests": {FORK: None}}, None),
        (job | {"engine": flag, "requests": both}, None),
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
    for number in range(rounds):
        for job, release in rotated(jobs, number):
            found = run_worker(job, release)
            line = []
            for context, requests in found["seconds"].items():
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
                "contexts": [
                    {
                        "context": context,
                        "seconds_per_token": {name: spread(values) for name, values in requests.items()},
                        "seconds_to_first": {name: spread(values) for name, values in first[context].items()},
                        "compared": comparisons(requests),
                        "first_compared": comparisons(first[context]),
                    }
                    for context, requests in medians.items()
                ],
            }


def comparisons(medians: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """Whom to hold against whom, of those that ran; over 1 is faster."""
    pairs = [(FORK, PRISTINE), (DENSE, PRISTINE), (PRUNED, DENSE)]
    return {
        f"{ours} against {reference}": within_spread(medians[ours], medians[reference])
        for ours, reference in pairs
        if ours in medians and reference in medians
    }


def expectations(result: Result) -> Iterator[dict[str, Any]]:
    for row in result.get("decode", {}).get("contexts", []):
        for pair, found in row["compared"].items():
            after_pruning = pair == f"{PRUNED} against {DENSE}"
            what = "not slower" if after_pruning else "no difference beyond the spread of the runs"
            noisy = found["spread"] > WIDEST_SPREAD
            yield expectation(
                f"decode at {row['context']}, {pair}: {what}",
                f"{found['ratio']:.3f}x, spread {found['spread']:.3f}" + (", too noisy to tell" if noisy else ""),
                not noisy and (found["within"] or (after_pruning and found["ratio"] > 1)),
            )


def lacks(result: Result) -> Iterator[str]:
    packages = result.get("decode", {}).get("packages", {})
    if FORK in packages and PRISTINE not in packages:
        yield "decode on the pristine release: none given (--pristine)"


def section(result: Result) -> str:
    def lines() -> Iterator[tuple[str, ...]]:
        for row in result.get("decode", {}).get("contexts", []):
            for name, value in row["seconds_per_token"].items():
                yield row["context"], name, ranged(value, 2, 1e3), ranged(row["seconds_to_first"][name], 1, 1e3)
            for pair, value in row["compared"].items():
                both = value, row["first_compared"][pair]
                shown = (f"{found['ratio']:.3f}x, spread {found['spread']:.3f}" for found in both)
                yield row["context"], f"{pair}: times faster", *shown

    return table(("context", "", "a token: median [range]", "to the first token"), lines())


def panels(result: Result) -> list[Panel]:
    return [partial(draw, rows=result["decode"]["contexts"])]


def draw(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        spreads = [{key: s[key] * 1e3 for key in ("median", "min", "max")} for s in row["seconds_per_token"].values()]
        names = [name.replace(", ", "\n") for name in row["seconds_per_token"]]
        draw_range(axis, names, spreads, f"context {row['context']}", linestyle="none")
    axis.set_title("Decode", fontsize=10)
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
