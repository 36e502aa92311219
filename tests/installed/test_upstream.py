"""The fast part of vLLM's own CPU tests: what passes on the release passes on the fork."""

import re
import subprocess
import sys
from importlib.metadata import version

import pytest

from scripts import fork


@pytest.mark.slow
@pytest.mark.skipif(not version("vllm").endswith(".cpu"), reason="compares CPU builds")
def test_the_fast_part_shows_no_difference():
    command = [sys.executable, "-m", "scripts.upstream_tests", "--fast"]
    done = subprocess.run(command, cwd=fork.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "difference: none" in done.stdout
    assert int(re.search(r"patched: (\d+) passed", done.stdout)[1]) >= 140, done.stdout
