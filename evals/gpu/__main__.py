"""Everything that wants a GPU, in one call of under 8 minutes: `make bench-gpu`.

Parts, the most telling first, each in a process of its own with a time limit:
  checks      our Triton kernels against plain torch, with guard bands
  kernels     the selection alone against its floors and against plain torch
  ttft        dense and pruned prefills at 32K, 64K and 128K, and where the time goes
  graphs      decode with FULL CUDA graphs: the same tokens as eager
  decode      time per token: the release, the fork without and with its flag
  sanitizer   small checks under compute-sanitizer
  traffic     many requests together, and a random mix
Each writes what it has as it goes, so a part that is stopped, and a run that ends early, lose
nothing measured; the summary names what is missing. Exit status 0: all parts ran and the kernels
agree; 1: not all.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from scripts.fork import ROOT, run_main, say

SECONDS = 455  # of the 8 minutes; the rest is for starting and writing
STOCK = Path("/tmp/uniprefill/stock")  # where install.py puts the release
KEEP_EVERY = 15  # seconds between looks at what a part has written
LEAST = 15  # seconds under which no part is started
GRACE = 8  # seconds for a stopped part to end by itself


@dataclass(frozen=True)
class Part:
    """One process: its arguments behind `python -m`, and how long it may take at most."""

    name: str
    command: tuple[str, ...]
    seconds: float
    output: str  # how the command names the file of its result


def bench(name: str, seconds: float, *arguments: str) -> Part:
    return Part(name, ("evals.bench", *arguments), seconds, "{}")


def all_parts(shape: str, small: bool, stock: Path) -> list[Part]:
    at = ("--shape", shape)
    slower = 4 if small else 1  # what is tried small is tried on a CPU
    pristine = ("--pristine", str(stock)) if (stock / "vllm").is_dir() else ()
    lengths = ("--lengths", "2048,3000") if small else ()
    parts = [
        Part("checks", ("evals.gpu.checks", *(["--small"] if small else []), "--seconds", "80"), 110, "{}.json"),
        bench("kernels", 45, *at, "--parts", "kernels", "--repeats", "1" if small else "7"),
        bench("ttft", 190, *at, "--parts", "ttft,breakdown", "--repeats", "1" if small else "2"),
        Part("graphs", ("evals.gpu.graphs", *lengths), 70, "{}.json"),
        bench(
            "decode",
            140,
            *at,
            *("--parts", "decode", "--decode-rounds", "1", "--repeats", "1" if small else "7"),
            *pristine,
        ),
        Part("sanitizer", ("evals.gpu.checks", "--small", "--seconds", "30"), 60, "{}.json"),
        bench("traffic", 110, *at, "--parts", "concurrency,poisson", "--repeats", "1", "--arrivals", "16"),
    ]
    return [replace(part, seconds=slower * part.seconds) for part in parts]


def sanitizer(environment: Mapping[str, str] = os.environ) -> str | None:
    """compute-sanitizer, on the path or beside CUDA's compiler."""
    folders = [environment.get("PATH", ""), "/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer"]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def command_of(part: Part, folder: Path) -> tuple[list[str], dict[str, str]]:
    """The process to start, and its environment."""
    environment = dict(os.environ)
    output = part.output.format(folder / part.name)
    command = [sys.executable, "-m", *part.command, "--output", output]
    if part.name == "sanitizer" and (tool := sanitizer()):
        command = [tool, "--tool", "memcheck", "--error-exitcode", "99", *command]
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # an allocation each, so that its end is known
    return command, environment


def run(part: Part, folder: Path, seconds: float, meanwhile: Callable[[], None]) -> tuple[str | None, str]:
    """Run it for at most so many seconds: what went wrong (None: nothing), and the end of its output.

    Args:
        meanwhile: called now and then, to keep what the part has written.

    """
    command, environment = command_of(part, folder)
    log = folder / f"{part.name}.log"
    deadline = time.monotonic() + seconds
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        problem: str | None = f"stopped after {seconds:.0f} s"
        try:
            while (left := deadline - time.monotonic()) > 0:
                try:
                    code = process.wait(min(left, KEEP_EVERY))
                except subprocess.TimeoutExpired:
                    meanwhile()
                    continue
                problem = f"ended with status {code}" if code else None
                break
        finally:
            end(process)
    return problem, log.read_text(errors="replace")[-2000:]


def end(process: subprocess.Popen) -> None:
    """Ask the part to end, then make its whole process group end."""
    for which, wait in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        try:
            os.killpg(process.pid, which)
        except ProcessLookupError:
            return
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            continue


def benchmarks_of(parts: Sequence[Part]) -> list[str]:
    """The parts of evals.bench that these ask for."""
    return [
        name
        for part in parts
        if "--parts" in part.command
        for name in part.command[part.command.index("--parts") + 1].split(",")
    ]


def merge(folder: Path, parts: Sequence[Part], problems: Mapping[str, str], command: str) -> dict[str, Any] | None:
    """One result of what the parts wrote; None if no benchmark wrote any."""
    found: dict[str, Any] = {}
    for name in (part.name for part in parts):
        file = folder / f"{name}.json"
        if not file.is_file():
            continue
        try:
            part = json.loads(file.read_text())
        except ValueError:  # being written just now
            continue
        if name in ("checks", "sanitizer", "graphs"):
            found.setdefault("gpu", {})[name] = part
            continue
        for key, value in part.items():
            found.setdefault(key, value)
    if "provenance" not in found:
        return None
    found["settings"] |= {"parts": benchmarks_of(parts), "command": command}
    found["cut_short"] = [f"{name}: {problem}" for name, problem in problems.items()]
    if "gpu" in found and "sanitizer" in found["gpu"]:
        found["gpu"]["sanitizer"]["tool"] = sanitizer() is not None
    return found


def summarise(
    folder: Path, parts: Sequence[Part], problems: Mapping[str, str], output: Path, command: str, with_plot: bool
) -> None:
    from evals.bench.__main__ import write

    if (result := merge(folder, parts, problems, command)) is not None:
        write(result, output, with_plot)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m evals.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama-3.1-8b", help="as of evals.bench (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="small checks and one repetition, to try the program")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all parts (default: %(default)s)")
    parser.add_argument("--only", metavar="PART,PART", help="these parts")
    parser.add_argument(
        "--stock", type=Path, default=STOCK, metavar="FOLDER", help="the release (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, metavar="PATH", help="without suffix (default: $OUT or evals/results)")
    args = parser.parse_args(argv)
    started = time.monotonic()
    default = Path(os.environ.get("OUT") or ROOT / "evals" / "results") / f"bench-gpu-{args.shape}"
    output = (args.output or default).resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    parts = all_parts(args.shape, args.small, args.stock)
    names = [part.name for part in parts]
    wanted = args.only.split(",") if args.only else names
    if unknown := set(wanted) - set(names):
        parser.error(f"{sorted(unknown)[0]!r} is none of {', '.join(names)}")
    command = "make bench-gpu" + (f" ARGS='{' '.join(argv)}'" if argv else "")
    problems = {name: "not asked for" for name in ("checks", "graphs", "sanitizer") if name not in wanted}
    if "sanitizer" in wanted and sanitizer() is None:
        wanted.remove("sanitizer")
        problems["sanitizer"] = "no compute-sanitizer on this machine"
    failed = False
    asked = [part for part in parts if part.name in wanted]
    with TemporaryDirectory(prefix="bench-gpu-") as work:
        keep = partial(summarise, Path(work), asked, problems, output, command)
        for part in asked:
            left = args.seconds - (time.monotonic() - started)
            if left < LEAST:
                problems[part.name] = "not started, no time left"
                failed = True
                continue
            problem, tail = run(part, Path(work), min(part.seconds, left), partial(keep, with_plot=False))
            say(f"{part.name}: {problem or 'done'}")
            if problem:
                problems[part.name] = problem
                failed = True
                print(tail)
            keep(with_plot=False)
        keep(with_plot=True)
    summary = output.with_name(f"{output.name}.md")
    if summary.is_file():
        print(summary.read_text())
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main)
