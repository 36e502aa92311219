"""The one call on a GPU box: time limits, partial results, one summary."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from evals import gpu as cli
from scripts.fork import ROOT

TOY = """
import sys, time
from pathlib import Path
kind, seconds, code, folder = sys.argv[1:]
Path(folder).mkdir(parents=True)
given = Path(__file__).with_name(kind)
Path(folder, kind).write_text(given.read_text())
print("toy", kind, flush=True)
time.sleep(float(seconds))
sys.exit(int(code))
"""
JUNIT = (
    """<testsuites><testsuite><testcase name="a"/><testcase name="b"><skipped/></testcase>{}</testsuite></testsuites>"""
)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes the parts of a run out of (name, sleep, exit code)."""
    (tmp_path / "toy_part.py").write_text(TOY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    row = {
        "tokens": 1024,
        "implementation": "toy",
        "seconds": {n: {"median": 1e-3, "min": 1e-3, "max": 1e-3} for n in ("mass", "selection", "plain")},
        "against_plain": {"ratio": 1.0, "paired": {"min": 1.0, "max": 1.0}},
        "floor_seconds": {"memory": 1e-4, "compute": 1e-4, "floor": 1e-4},
        "share_of_floor": {"median": 0.1, "min": 0.1, "max": 0.1},
        "peak_bytes": {},
        "difference_to_plain": 0.0,
    }
    machine = {"device": "cpu", "cpu": "A CPU", "cores": 2, "gpu": None}
    names = ("version", "package", "upstream", "upstream_commit", "series_sha256", "torch", "python")
    result = {
        "provenance": {"machine": machine, **dict.fromkeys(names, "0")},
        "settings": {
            "title": "x",
            "method": "",
            "command": "x",
            "shape": "tiny",
            "parts": ["kernels"],
            "repeats": 1,
            "prompts": "random",
        },
        "load_average": 0.0,
        "ceilings": {"bytes_per_second": 1e9, "flops_per_second": 1e9, "dtype": "float32"},
        "kernels": [row],
    }
    (tmp_path / "bench.json").write_text(json.dumps(result))
    (tmp_path / "junit.xml").write_text(JUNIT.format(""))
    monkeypatch.setattr(cli, "KEEP_EVERY", 0.2)
    monkeypatch.setattr(cli, "LEAST", 0.5)
    monkeypatch.setattr(cli, "GRACE", 1)
    monkeypatch.setattr(cli, "sanitizer", lambda: None)

    def use(*given: tuple[str, float, int], limit: float = 20) -> Path:
        def made(name: str, sleep: float, code: int) -> cli.Part:
            kind = "junit.xml" if name in cli.CHECKED else "bench.json"
            return cli.Part(name, ("toy_part", kind, str(sleep), str(code), "FOLDER"), limit)

        monkeypatch.setattr(cli, "all_parts", lambda *_: [made(*one) for one in given])
        return tmp_path / "out" / "bench-gpu-llama-3.1-8b"

    return use


def read(output: Path) -> dict:
    return json.loads(output.with_name(output.name + ".json").read_text())


def went_wrong(result: dict) -> list[str]:
    return [line for line in result["cut_short"] if not line.endswith("not asked for")]


def test_the_parts_make_one_summary(toy) -> None:
    output = toy(("checks", 0, 0), ("kernels", 0, 0))
    assert cli.main(["--results", str(output.parent)]) == 0
    result = read(output)
    assert result["gpu"]["checks"] == {"run": 1, "skipped": 1, "failed": []} and result["kernels"]
    assert went_wrong(result) == []
    text = output.with_name(output.name + ".md").read_text()
    assert "0 of 1 tests failed" in text and "make bench-gpu" in text
    assert output.with_name(output.name + ".png").stat().st_size > 5000
    assert sorted(path.name.removeprefix(output.name) for path in output.parent.iterdir()) == [".json", ".md", ".png"]


def test_a_part_that_hangs_is_stopped_and_keeps_what_it_wrote(toy) -> None:
    output = toy(("checks", 0, 0), ("kernels", 60, 0), limit=3)
    started = time.monotonic()
    assert cli.main(["--results", str(output.parent)]) == 1
    assert time.monotonic() - started < 20
    result = read(output)
    assert result["kernels"] and result["gpu"]["checks"]
    assert went_wrong(result) == ["kernels: stopped after 3 s, its last words: toy bench.json"]
    assert "- kernels: stopped after 3 s" in output.with_name(output.name + ".md").read_text()


def test_results_are_kept_while_a_part_still_runs(toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a machine that goes away in the middle leaves behind."""
    output = toy(("kernels", 3, 0))
    seen = []
    summarise = cli.summarise

    def watched(*args, with_plot: bool, **kwargs) -> None:
        summarise(*args, with_plot=with_plot, **kwargs)
        seen.append((with_plot, output.with_name(output.name + ".json").is_file()))

    monkeypatch.setattr(cli, "summarise", watched)
    assert cli.main(["--results", str(output.parent)]) == 0
    assert (False, True) in seen[:-1] and seen[-1] == (True, True)


def test_time_that_is_used_up_starts_nothing_more(toy) -> None:
    output = toy(("kernels", 0, 0), ("ttft", 60, 0), ("traffic", 0, 0))
    assert cli.main(["--results", str(output.parent), "--seconds", "4"]) == 1
    stopped, not_started = went_wrong(read(output))
    assert stopped.startswith("ttft: stopped after") and not_started == "traffic: not started, no time left"


def test_a_part_that_fails_shows_its_output_and_stops_nothing(toy, capsys) -> None:
    output = toy(("checks", 0, 3), ("kernels", 0, 0))
    assert cli.main(["--results", str(output.parent)]) == 1
    assert "toy junit.xml" in capsys.readouterr().out
    assert went_wrong(read(output)) == ["checks: ended with status 3, its last words: toy junit.xml"]


def test_no_process_of_a_stopped_part_stays(tmp_path: Path, toy) -> None:
    program = "import subprocess, sys, time; subprocess.Popen(['sleep', '4711']); time.sleep(60)"
    (tmp_path / "forks.py").write_text(program)
    part = cli.Part("x", ("forks",), 1)
    problem, _ = cli.run(part, tmp_path, 1.5, lambda: None)
    assert problem.startswith("stopped")
    killed = [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "4711"]]
    _, alive = psutil.wait_procs(killed, timeout=30)  # a killed process takes a moment to go
    assert not alive


@pytest.mark.parametrize("outcome", ["failure", "error"])
def test_a_failed_test_is_named_and_missed(tmp_path: Path, outcome: str) -> None:
    (tmp_path / "junit.xml").write_text(JUNIT.format(f'<testcase name="mass"><{outcome}/></testcase>'))
    found = cli.test_result(tmp_path / "junit.xml")
    assert found == {"run": 2, "skipped": 1, "failed": ["mass"]}
    machine = {"machine": {"device": "cuda"}}
    (row,) = cli.expectations({"provenance": machine, "gpu": {"checks": found}})
    assert not row["met"] and row["measured"] == "1 of 2 tests failed: mass"
    nothing = {"run": 0, "skipped": 3, "failed": []}
    assert not next(cli.expectations({"provenance": machine, "gpu": {"checks": nothing}}))["met"]


def test_the_real_parts_fit_eight_minutes_and_can_be_tried_small() -> None:
    parts = cli.all_parts("llama-3.1-8b", False, Path("/nowhere"))
    assert [part.name for part in parts][:3] == ["checks", "decode", "ttft"] and cli.SECONDS + 2 * cli.GRACE < 480
    assert sum(part.seconds for part in parts[:3]) <= cli.SECONDS + cli.LEAST, "the first call holds these"
    assert all(part.seconds < 0.55 * cli.SECONDS for part in parts), "none takes the others' time"
    from evals.bench.__main__ import make_parser

    for small in (False, True):
        for part in cli.all_parts("tiny", small, Path("/nowhere")):
            if part.command[0] == "evals.bench":
                make_parser().parse_args(part.command[1:])
            else:
                (file,) = [word for word in part.command if word.startswith("tests/")]
                assert (cli.ROOT / file).is_file()


def test_the_checks_need_no_plugin_that_the_box_lacks() -> None:
    """Its image has pytest alone."""
    image = json.loads((ROOT / "scripts" / "gpu_image.json").read_text())["packages"]
    tools = (ROOT / "scripts" / "requirements-dev.txt").read_text().split()
    plugins = [name for name in tools if name.startswith("pytest-") and name not in image]
    lacking = sorted(("xdist" if name == "pytest-xdist" else name.replace("-", "_")) for name in plugins)
    assert "xdist" in lacking
    code = f"import sys, pytest; sys.modules |= dict.fromkeys({lacking}); "
    code += "sys.exit(pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', 'tests/gpu']))"
    alone = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def test_an_unknown_part_is_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--only", "kernel"])
    assert "'kernel' is none of checks, decode" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("only", "measured", "shown"),
    [
        pytest.param(["--only", "checks,ttft"], {"ttft"}, {"checks"}, id="two parts", marks=pytest.mark.slow),
        pytest.param(
            [],
            {"kernels", "ttft", "breakdown", "interleave", "decode", "flashinfer", "concurrency", "poisson"},
            {"checks", "graphs"},
            id="all parts",
            marks=pytest.mark.long,
        ),
    ],
)
def test_the_whole_call_at_a_tiny_size(only: list[str], measured: set[str], shown: set[str], tmp_path: Path) -> None:
    """Its parts on this machine; without a GPU this shows that the program works, no more."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    call = ["--shape", "tiny", "--small", "--seconds", "3600", "--results", str(tmp_path)]
    assert cli.main([*call, *only]) == 0
    result = read(tmp_path / "bench-gpu-tiny")
    assert measured <= set(result)
    assert shown <= set(result["gpu"])
    assert all(found["run"] and not found["failed"] for found in result["gpu"].values())
