"""The decode part: time per token on the pristine release and on the fork, in turn."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from evals.bench.arithmetic import size_label, spread, within_spread
from scripts.fork import ForkError, Layout, say
from scripts.upstream_tests import make_release

WORKER = Path(__file__).with_name("decode_worker.py")
CONTEXTS = (1024, 8192)
NEW_TOKENS = 64
ROUNDS = 3
PRISTINE, FORK = "pristine", "fork, no flag"
DENSE, PRUNED = "fork, flag, dense", "fork, flag, pruned"
# On a GPU: FULL graphs of decodes as a server has them, without the minute that torch.compile takes.
GPU_COMPILATION = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4]}


def write_pristine(folder: Path) -> Path:
    """The release itself, importable from the folder returned; for a CPU only."""
    return make_release(Layout(), folder)


def programs(
    engine: dict[str, Any],
    prompts: Mapping[str, list[int]],
    selection_layers: Sequence[int] | str,
    pruning: dict[str, Any],
    pristine: Path | None,
    repeats: int,
) -> list[tuple[dict[str, Any], Path | None]]:
    """The jobs of one round, each with the folder whose vllm it runs on (None: installed)."""
    job = {"prompts": prompts, "new_tokens": NEW_TOKENS, "repeats": repeats}
    flag = engine | {"uniprefill_config": {"selection_layers": selection_layers}}
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


def measure_decode(jobs: Sequence[tuple[dict[str, Any], Path | None]], rounds: int = ROUNDS) -> dict[str, Any]:
    """Run the jobs in turn, `rounds` times; one process gives one median per request.

    With a single round there is one process of a kind, and its repetitions are the values.
    """
    medians: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    packages: dict[str, str] = {}
    for number in range(rounds):
        for index in range(len(jobs)):
            job, release = jobs[(index + number) % len(jobs)]
            found = run_worker(job, release)
            line = []
            for context, requests in found["seconds"].items():
                for request, seconds in requests.items():
                    packages[request] = found["package"]
                    median = statistics.median(seconds)
                    medians[context][request] += seconds if rounds == 1 else [median]
                    line.append(f"{request} {context} {median * 1e3:.2f} ms")
            say(f"decode, round {number + 1}/{rounds}: {', '.join(line)}")
    return {
        "new_tokens": NEW_TOKENS,
        "rounds": rounds,
        "engine": jobs[0][0]["engine"].get("compilation_config"),
        "packages": packages,
        "contexts": [
            {
                "context": context,
                "seconds_per_token": {name: spread(values) for name, values in requests.items()},
                "compared": comparisons(requests),
            }
            for context, requests in medians.items()
        ],
    }


def comparisons(medians: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """Whom to hold against whom, of those that ran."""
    pairs = [(FORK, PRISTINE), (DENSE, PRISTINE), (PRUNED, DENSE)]
    return {
        f"{ours} / {reference}": within_spread(medians[ours], medians[reference])
        for ours, reference in pairs
        if ours in medians and reference in medians
    }


def decode_prompts(prompts: Any, contexts: Sequence[int] = CONTEXTS) -> dict[str, list[int]]:
    return {size_label(tokens): prompts.ids(tokens, 1) for tokens in contexts}
