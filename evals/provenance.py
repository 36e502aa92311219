"""What every evaluation and benchmark shares: what runs and where, and the command line's common options.

Each calls `provenance()` first, which makes sure that the patched package is what runs, and puts its answer into its
result.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.fork import ROOT, ForkError, Layout, read_upstream, read_version, series_sha256

FEATURE = "vllm.v1.uniprefill"
RESULTS = ROOT / "build" / "results"


def add_results_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        metavar="FOLDER",
        help="where the result goes (default: build/results; evals/results holds those that the README quotes)",
    )


def count_argument(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("at least 1 is needed")
    return value


def numbers_argument(text: str) -> tuple[int, ...]:
    """ "4096,2048" -> (2048, 4096)."""
    try:
        return tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list like 2048,4096") from None


def command_line(task: str, argv: Sequence[str]) -> str:
    """The make command that measures the same: all arguments but where the result goes."""
    words = list(argv)
    if "--results" in words:
        del words[(at := words.index("--results")) : at + 2]
    return shlex.join(["make", task, *([f"ARGS={shlex.join(words)}"] if words else [])]).replace(f"{ROOT}/", "")


def package_problem(version: str, has_feature: bool, expected: set[str]) -> str | None:
    """What is wrong with the installed package, in one sentence; None if nothing is."""
    if "uniprefill" not in version:
        return f"The vllm that runs is {version}, not the patched one; run `make build`."
    if not has_feature:
        return f"The vllm that runs ({version}) has no module {FEATURE}; run `make build`."
    if version not in expected:
        wanted = " or ".join(sorted(expected))
        return f"The vllm that runs is {version}, and VERSION asks for {wanted}; run `make build`."
    return None


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def machine() -> dict[str, Any]:
    """The hardware, without anything that names the host."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": "cuda" if gpu else "cpu",
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": gpu,
    }


def provenance() -> dict[str, Any]:
    """What runs: the fork's version, the release under it, the series, the machine.

    Raises:
        ForkError: if the patched package is not what runs.

    """
    import vllm  # before torch: on a CPU it chooses Triton's interpreter

    version = read_version()
    expected = {version.package(device) for device in ("cpu", "cuda")}
    try:
        has_feature = importlib.util.find_spec(FEATURE) is not None
    except ModuleNotFoundError:
        has_feature = False
    if problem := package_problem(vllm.__version__, has_feature, expected):
        raise ForkError(problem)
    import torch

    upstream = read_upstream()
    return {
        "version": f"{version.upstream}-{version.revision}",
        "package": vllm.__version__,
        "upstream": upstream.tag,
        "upstream_commit": upstream.commit,
        "series_sha256": series_sha256(Layout()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": machine(),
    }
