"""The one call on a GPU box: time limits, partial results, the kernel checks and what they catch."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
import vllm  # noqa: F401  before torch: on a CPU it chooses Triton's interpreter

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from evals.gpu import __main__ as cli  # noqa: E402
from evals.gpu import checks, guards  # noqa: E402

TOY = """
import json, sys, time
from pathlib import Path
output = Path(sys.argv[sys.argv.index("--output") + 1])
name, seconds, code = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
if name == "bench":
    result = json.loads(Path(sys.argv[4]).read_text())
    output.with_name(output.name + ".json").write_text(json.dumps(result))
else:
    row = {"case": "x", "error": 1e-6, "agrees": True}
    checks = {"device": "cpu", "seed": 1, "planned": 3, "cases": [row], "failed": [], "new_variants": None}
    output.write_text(json.dumps(checks))
print("toy", name, flush=True)
time.sleep(seconds)
sys.exit(code)
"""


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
        "over_floor": {"median": 10, "min": 10, "max": 10},
        "peak_bytes": {},
        "difference_to_plain": 0.0,
    }
    machine = {"device": "cpu", "cpu": "A CPU", "cores": 2, "gpu": None}
    names = ("version", "package", "upstream", "upstream_commit", "series_sha256", "torch", "python")
    result = {
        "provenance": {"machine": machine, **dict.fromkeys(names, "0")},
        "settings": {"command": "x", "shape": "tiny", "parts": ["kernels"], "repeats": 1, "prompts": "random"},
        "load_average": 0.0,
        "ceilings": {"bytes_per_second": 1e9, "flops_per_second": 1e9, "dtype": "float32"},
        "kernels": [row],
    }
    (tmp_path / "bench.json").write_text(json.dumps(result))
    monkeypatch.setattr(cli, "KEEP_EVERY", 0.2)
    monkeypatch.setattr(cli, "LEAST", 0.5)
    monkeypatch.setattr(cli, "GRACE", 1)
    monkeypatch.setattr(cli, "sanitizer", lambda: None)

    def use(*given: tuple[str, float, int], limit: float = 20) -> Path:
        def made(name: str, sleep: float, code: int) -> cli.Part:
            if name == "checks":
                return cli.Part(name, ("toy_part", "checks", str(sleep), str(code)), limit, "{}.json")
            arguments = ("bench", str(sleep), str(code), str(tmp_path / "bench.json"), "--parts", "kernels")
            return cli.Part(name, ("toy_part", *arguments), limit, "{}")

        monkeypatch.setattr(cli, "all_parts", lambda *_: [made(*one) for one in given])
        return tmp_path / "out" / "result"

    return use


def read(output: Path) -> dict:
    return json.loads(output.with_name(output.name + ".json").read_text())


def went_wrong(result: dict) -> list[str]:
    return [line for line in result["cut_short"] if not line.endswith("not asked for")]


def test_the_parts_make_one_summary(toy) -> None:
    output = toy(("checks", 0, 0), ("kernels", 0, 0))
    assert cli.main(["--output", str(output)]) == 0
    result = read(output)
    assert result["gpu"]["checks"]["cases"] and result["kernels"]
    assert went_wrong(result) == []
    text = output.with_name("result.md").read_text()
    assert "1 of 3" in text and "make bench-gpu" in text
    assert output.with_name("result.png").stat().st_size > 5000
    assert sorted(path.name for path in output.parent.iterdir()) == ["result.json", "result.md", "result.png"]


def test_a_part_that_hangs_is_stopped_and_keeps_what_it_wrote(toy) -> None:
    output = toy(("checks", 0, 0), ("kernels", 60, 0), limit=3)
    started = time.monotonic()
    assert cli.main(["--output", str(output)]) == 1
    assert time.monotonic() - started < 20
    result = read(output)
    assert result["kernels"] and result["gpu"]["checks"]
    assert went_wrong(result) == ["kernels: stopped after 3 s"]
    assert "- kernels: stopped after 3 s" in output.with_name("result.md").read_text()


def test_results_are_kept_while_a_part_still_runs(toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a machine that goes away in the middle leaves behind."""
    output = toy(("kernels", 3, 0))
    seen = []
    summarise = cli.summarise

    def watched(*args, with_plot: bool, **kwargs) -> None:
        summarise(*args, with_plot=with_plot, **kwargs)
        seen.append((with_plot, output.with_name("result.json").is_file()))

    monkeypatch.setattr(cli, "summarise", watched)
    assert cli.main(["--output", str(output)]) == 0
    assert (False, True) in seen[:-1] and seen[-1] == (True, True)


def test_time_that_is_used_up_starts_nothing_more(toy) -> None:
    output = toy(("kernels", 0, 0), ("ttft", 60, 0), ("traffic", 0, 0))
    assert cli.main(["--output", str(output), "--seconds", "4"]) == 1
    stopped, not_started = went_wrong(read(output))
    assert stopped.startswith("ttft: stopped after") and not_started == "traffic: not started, no time left"


def test_a_part_that_fails_shows_its_output_and_stops_nothing(toy, capsys) -> None:
    output = toy(("checks", 0, 3), ("kernels", 0, 0))
    assert cli.main(["--output", str(output)]) == 1
    assert "toy checks" in capsys.readouterr().out
    assert went_wrong(read(output)) == ["checks: ended with status 3"]


def test_no_process_of_a_stopped_part_stays(tmp_path: Path, toy) -> None:
    program = "import subprocess, sys, time; subprocess.Popen(['sleep', '4711']); time.sleep(60)"
    (tmp_path / "forks.py").write_text(program)
    part = cli.Part("x", ("forks",), 1, "{}")
    problem, _ = cli.run(part, tmp_path, 1.5, lambda: None)
    assert problem.startswith("stopped")
    time.sleep(0.3)
    lines = [
        Path(p, "cmdline").read_bytes()
        for p in Path("/proc").iterdir()
        if p.name.isdigit() and Path(p, "cmdline").exists()
    ]
    assert not any(line == b"sleep\x004711\x00" for line in lines)


def test_the_real_parts_fit_eight_minutes_and_can_be_tried_small() -> None:
    parts = cli.all_parts("llama-3.1-8b", False, Path("/nowhere"))
    assert [part.name for part in parts][:3] == ["checks", "kernels", "ttft"] and cli.SECONDS + 2 * cli.GRACE < 480
    assert all(part.seconds < 200 for part in parts)
    from evals.bench.__main__ import make_parser

    for small in (False, True):
        for part in cli.all_parts("tiny", small, Path("/nowhere")):
            if part.command[0] == "evals.bench":
                make_parser().parse_args(part.command[1:])


def test_an_unknown_part_is_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--only", "kernel"])
    assert "'kernel' is none of checks, kernels" in capsys.readouterr().err


# --- guards and checks


def test_a_write_beside_a_buffer_shows() -> None:
    made = guards.Guards("cpu")
    a, b = made.empty(3, 5, dtype=torch.float16), made.holding(torch.arange(4))
    assert a.isnan().all() and b.tolist() == [0, 1, 2, 3] and made.broken() == 0
    a.fill_(1)
    assert made.broken() == 0
    torch.as_strided(b, (1,), (1,), b.storage_offset() + 4).fill_(0)
    assert made.broken() == 1
    torch.as_strided(a, (1,), (1,), a.storage_offset() - 1).fill_(0)
    assert made.broken() == 2


def test_what_the_kernels_callers_allocate_is_guarded() -> None:
    made = guards.Guards("cpu")
    query = guards.GuardedAllocations.of(torch.ones(2, 2), made)
    out = query.new_empty(7, dtype=torch.float32)
    assert out.isnan().all() and out.shape == (7,)
    torch.as_strided(out, (1,), (1,), out.storage_offset() + 7).fill_(0)
    assert made.broken() == 1


CASE = checks.MassCase(torch.float16, 64, 2, 1, ((200, 40), (129, 1)), sinks=True)


@pytest.mark.parametrize("soft_cap", [0.0, 20.0])
def test_our_kernels_pass(soft_cap: float) -> None:
    case = checks.MassCase(torch.float16, 64, 2, 1, ((200, 40), (129, 1)), soft_cap, not soft_cap)
    row = checks.check_mass(case, "cpu", 3)
    assert row["agrees"] and row["error"] < 1e-5, row


def unwritten(mass: torch.Tensor) -> torch.Tensor:
    mass[2] = float("nan")
    return mass


def beside(mass: torch.Tensor) -> torch.Tensor:
    torch.as_strided(mass, (1,), (1,), mass.storage_offset() + len(mass)).fill_(0)
    return mass


def shifted(mass: torch.Tensor) -> torch.Tensor:
    return mass.roll(1)


def imprecise(mass: torch.Tensor) -> torch.Tensor:
    return mass * 1.002


@pytest.mark.parametrize("fault", [unwritten, beside, shifted, imprecise])
def test_a_faulty_kernel_does_not_pass(fault, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.uniprefill.selection_kernels import block_mass_triton

    monkeypatch.setattr(checks, "block_mass_triton", lambda *args, **kwargs: fault(block_mass_triton(*args, **kwargs)))
    assert not checks.check_mass(CASE, "cpu", 3)["agrees"]


def test_the_kernel_of_lengths_and_slots_passes_and_a_fault_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = list(checks.state_cases(True, 7))
    assert len(cases) == 4
    name, arguments = cases[0]
    assert checks.check_state(**arguments, device="cpu")["agrees"], name
    update = checks.SegmentState.update_triton

    def off_by_one(self, *args) -> None:
        update(self, *args)
        self.slot_mappings[-1, 0] += 1

    monkeypatch.setattr(checks.SegmentState, "update_triton", off_by_one)
    row = checks.check_state(**arguments, device="cpu")
    assert row["wrong"] == 1 and not row["agrees"]


def test_the_cases_on_a_gpu_cover_what_is_promised() -> None:
    cases = checks.mass_cases(small=False, on_gpu=True, seed=11)
    assert {case.dtype for case in cases} == {torch.bfloat16, torch.float16}
    assert {case.head_dim for case in cases} == {64, 128, 256}
    assert {case.group for case in cases} == {1, 2, 4, 8, 16}
    longest = [max(tokens for tokens, _ in case.prompts) for case in cases]
    assert max(longest) > 131_000 and any(len(case.prompts) == 3 for case in cases)
    assert [case.name for case in cases] == [case.name for case in checks.mass_cases(False, True, 11)]
    assert [case.name for case in cases] != [case.name for case in checks.mass_cases(False, True, 12)]


def test_blocks_that_tie_may_be_chosen_otherwise_and_others_not() -> None:
    spec = checks.SelectionSpec(0, 64 * 40, 0, 1, top_p=0.5)
    expected = torch.linspace(2, 1, 40).double()
    ours = expected.float().clone()
    assert checks.blocks_chosen_otherwise(ours, expected, [spec]) == 0
    ours[[5, 30]] = ours[[30, 5]]
    assert checks.blocks_chosen_otherwise(ours, expected, [spec]) == 2
    flat = torch.ones(40).double()
    nearly = (1 + 1e-6 * torch.arange(40)).float()
    assert checks.blocks_chosen_otherwise(nearly, flat, [spec]) == 0


def test_the_checks_write_as_they_go_and_stop_in_time(tmp_path: Path) -> None:
    found = checks.check_all(tmp_path / "x.json", small=True, seconds=0.0, seed=1)
    assert found["cases"] == [] and found["planned"] == 8 and found["device"] in ("cpu", "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("seed", [1, 2])
def test_every_case_agrees_on_this_gpu(tmp_path: Path, seed: int) -> None:
    found = checks.check_all(tmp_path / "x.json", small=False, seconds=1e9, seed=seed)
    assert found["failed"] == [] and found["new_variants"] == 0 and len(found["cases"]) == found["planned"]


@pytest.mark.slow
def test_the_whole_call_at_a_tiny_size(tmp_path: Path) -> None:
    """Every part on this machine; without a GPU this shows that the program works, no more."""
    options = ["--shape", "tiny", "--small", "--seconds", "900", "--output", str(tmp_path / "x")]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    assert cli.main(options) == 0
    result = read(tmp_path / "x")
    assert {"kernels", "ttft", "breakdown", "decode", "concurrency", "poisson"} <= set(result)
    assert {"checks", "graphs"} <= set(result["gpu"])
    graphs = result["gpu"]["graphs"]["rows"]
    assert all(row["same_tokens"] == row["of"] and all(row["answered"]) for row in graphs)
