"""Everything that wants a GPU, in calls of under 8 minutes: `make bench-gpu`.

What one call has no time for, a second one measures: ARGS='--only lane,graphs,kernels,flashinfer', and
`--shape` another model's shape: qwen3-30b-a3b, gemma-3-12b, or 16 layers of Qwen3-Next.

Parts, the most telling first, each in a process of its own with a time limit:
  checks      our Triton kernels against plain torch, with guard bands (tests/gpu)
  decode      prompts of 1K to 128K, each in its turn: first token, time per token, the first run of a length, memory:
              the release as it is by default, the fork without its flag, with it dense and pruned
  ttft        dense and pruned prefills at 8K to 128K in one engine, where the time goes, the waits at cuts
  lane        a 128K prompt at a server's budget and in one step, alone and beside decodes
  graphs      decode with FULL CUDA graphs: the same tokens as eager (tests/gpu)
  kernels     the selection alone against its floors and against plain torch
  flashinfer  as decode, on that backend
  sanitizer   small checks under compute-sanitizer
  traffic     many requests together, and a random mix
Each writes what it has as it goes, so a part that is stopped, and a run that ends early, lose
nothing measured; the summary names what is missing. Exit status 0: all parts ran and the tests
pass; 1: not all.
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
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from evals.bench import report
from evals.bench.__main__ import PARTS
from evals.provenance import RESULTS, command_line, provenance
from scripts.fork import ROOT, run_main, say

SECONDS = 455  # of the 8 minutes; the rest is for starting and writing
STOCK = Path("/tmp/uniprefill/stock")  # where install_gpu.py puts the release
KEEP_EVERY = 15  # seconds between looks at what a part has written
LEAST = 15  # seconds under which no part is started
GRACE = 8  # seconds for a stopped part to end by itself


@dataclass(frozen=True)
class Part:
    """One process: its arguments behind `python -m`, and how long it may take at most.

    In `command`, FOLDER stands for the folder that its results go to.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)


def bench(name: str, seconds: float, *arguments: str) -> Part:
    return Part(name, ("evals.bench", *arguments, "--results", "FOLDER"), seconds)


def tests(name: str, seconds: float, *arguments: str, **environment: str) -> Part:
    """Some of tests/gpu; those that do not fit the time skip themselves, so that the result is written."""
    command = ("pytest", "-q", "-p", "no:cacheprovider", "--junitxml=FOLDER/junit.xml", *arguments)
    return Part(name, command, seconds, {"GPU_TEST_SECONDS": f"{0.7 * seconds:.0f}", **environment})


def all_parts(shape: str, small: bool, stock: Path) -> list[Part]:
    at = ("--shape", shape)
    slower = 4 if small else 1  # what is tried small is tried on a CPU
    pristine = ("--pristine", str(stock)) if (stock / "vllm").is_dir() else ()
    once, few = ("1", "1") if small else ("7", "3")
    against_stock = ("--decode-rounds", "1", "--repeats", few, *pristine)
    kernels, only_small = "tests/gpu/test_kernels.py", ("-k", "small")
    return [
        tests("checks", 50 * slower, kernels, *(only_small if small else ())),
        bench("decode", 250 * slower, *at, "--parts", "decode", *against_stock),
        bench("ttft", 160 * slower, *at, "--parts", "ttft,breakdown", "--repeats", "1"),
        bench("lane", 240 * slower, *at, "--parts", "interleave", "--repeats", "1"),
        tests("graphs", 110 * slower, "tests/gpu/test_graphs.py", **({"REHEARSE_GRAPHS": "1"} if small else {})),
        bench("kernels", 45 * slower, *at, "--parts", "kernels", "--repeats", once),
        bench("flashinfer", 150 * slower, *at, "--parts", "flashinfer", *against_stock),
        tests("sanitizer", 60 * slower, kernels, *only_small, PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
        bench("traffic", 110 * slower, *at, "--parts", "concurrency,poisson", "--repeats", "1", "--arrivals", "16"),
    ]


def sanitizer(environment: Mapping[str, str] = os.environ) -> str | None:
    """compute-sanitizer, on the path or beside CUDA's compiler."""
    folders = [environment.get("PATH", ""), "/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer"]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def command_of(part: Part, folder: Path) -> list[str]:
    arguments = [argument.replace("FOLDER", str(folder / part.name)) for argument in part.command]
    command = [sys.executable, "-m", *arguments]
    if part.name == "sanitizer" and (tool := sanitizer()):
        return [tool, "--tool", "memcheck", "--error-exitcode", "99", *command]
    return command


def run(part: Part, folder: Path, seconds: float, meanwhile: Callable[[], None]) -> tuple[str | None, str]:
    """Run it for at most so many seconds: what went wrong (None: nothing), and the end of its output.

    Args:
        meanwhile: called now and then, to keep what the part has written.

    """
    command, environment = command_of(part, folder), {**os.environ, **part.environment}
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
    tail = log.read_text(errors="replace")[-2000:]
    if problem and (last := tail.strip().rpartition("\n")[2].strip()):
        problem += f", its last words: {last[:200]}"
    return problem, tail


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


def test_result(file: Path) -> dict[str, Any]:
    """Of pytest's JUnit file: how many tests ran and were skipped, and the names of those that failed."""
    cases = list(ElementTree.parse(file).iter("testcase"))
    failed = [
        case.attrib["name"] for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"run": len(cases) - skipped, "skipped": skipped, "failed": failed}


def merge(folder: Path, parts: Sequence[Part], problems: Mapping[str, str], command: str) -> dict[str, Any] | None:
    """One result of what the parts wrote; None if none wrote any."""
    found: dict[str, Any] = {}
    for part in parts:
        for file in sorted((folder / part.name).glob("*")):
            try:
                if file.suffix == ".xml":
                    found.setdefault("gpu", {})[part.name] = test_result(file)
                elif file.suffix == ".json":
                    found = json.loads(file.read_text()) | found
            except (ValueError, ElementTree.ParseError):  # being written just now
                continue
    if not found:
        return None
    if "provenance" not in found:  # tests alone
        settings = {"title": "Tests on a GPU", "method": "", "shape": "", "prompts": ""}
        found |= {"provenance": provenance(), "settings": settings, "load_average": os.getloadavg()[0]}
    found["settings"] |= {"parts": benchmarks_of(parts), "command": command}
    found["cut_short"] = [f"{name}: {problem}" for name, problem in problems.items()]
    return found


CHECKED = {
    "checks": "every Triton kernel agrees with torch, bands intact, none compiled anew",
    "graphs": "decode with FULL CUDA graphs: the tokens of eager, and the answers right",
    "sanitizer": "compute-sanitizer finds no access out of bounds",
}


def expectations(result: report.Result) -> Iterator[dict[str, Any]]:
    for name, found in result.get("gpu", {}).items():
        where = "" if report.on_gpu(result) else ", rehearsed without a GPU"
        told = f"{len(found['failed'])} of {found['run']} tests failed" + (
            f": {found['failed'][0]}" if found["failed"] else ""
        )
        stopped = any(line.startswith(f"{name}: ") for line in result.get("cut_short", []))
        met = found["run"] > 0 and not found["failed"] and not stopped
        yield report.expectation(f"{CHECKED[name]}{where}", told, met)


def section(result: report.Result) -> str:
    rows = [
        (name, str(found["run"]), str(found["skipped"]), ", ".join(found["failed"]) or "none")
        for name, found in result.get("gpu", {}).items()
    ]
    return report.table(("tests", "run", "skipped", "failed"), rows)


PART = report.Part("gpu", "the tests that want a GPU", "Tests on this machine", section, expectations=expectations)


def summarise(
    folder: Path, parts: Sequence[Part], problems: Mapping[str, str], output: Path, command: str, with_plot: bool
) -> None:
    if (result := merge(folder, parts, problems, command)) is not None:
        report.write(result, [*PARTS, PART], output, with_plot)


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
    parser.add_argument(
        "--results", type=Path, metavar="FOLDER", help="where the result goes (default: $OUT or build/results)"
    )
    args = parser.parse_args(argv)
    started = time.monotonic()
    output = (args.results or Path(os.environ.get("OUT") or RESULTS)).resolve() / f"bench-gpu-{args.shape}"
    output.parent.mkdir(parents=True, exist_ok=True)
    parts = all_parts(args.shape, args.small, args.stock)
    names = [part.name for part in parts]
    wanted = args.only.split(",") if args.only else names
    if unknown := set(wanted) - set(names):
        parser.error(f"{sorted(unknown)[0]!r} is none of {', '.join(names)}")
    command = command_line("bench-gpu", argv)
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
