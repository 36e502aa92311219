"""The fork's own programs are clean for ruff, and each tells what it does."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts import check_patches, fork

SCRIPTS = Path(fork.__file__).parent
PROGRAMS = sorted(p for p in SCRIPTS.glob("*.py") if "argparse.ArgumentParser(" in p.read_text())


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["lint", "format"])
def test_ruff(command):
    ruff = check_patches.find_ruff(fork.Layout())
    folders = [str(SCRIPTS), str(Path(__file__).parent)]
    done = subprocess.run(
        [ruff, *command, "--no-cache", "--config", str(SCRIPTS / "ruff.toml"), *folders], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("program", PROGRAMS, ids=[p.stem for p in PROGRAMS])
def test_help_reads_well(program):
    command = [sys.executable, "-m", f"scripts.{program.stem}", "--help"]
    done = subprocess.run(command, cwd=fork.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ") and len(done.stdout.split("\n\n")[1]) > 40


def test_make_help_lists_every_task():
    makefile = (fork.ROOT / "Makefile").read_text()
    tasks = set(makefile.split(".PHONY:")[1].split("\n\n")[0].replace("\\\n", " ").split())
    shown = subprocess.run(["make", "-s", "-C", str(fork.ROOT), "help"], capture_output=True, text=True).stdout
    listed = {line.split()[0] for line in shown.splitlines() if line.startswith("  ")}
    assert listed == tasks
    assert {"help", "source", "tree", "refresh", "check", "build", "serve", "demo", "test", "test-upstream"} <= tasks
    assert {"bench", "clean", "rebase-check"} <= tasks
