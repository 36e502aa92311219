"""Without the flag, or with `enabled: false`, the fork generates what the release does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from oracle.checkpoints import make_checkpoint

from scripts.fork import Layout
from scripts.upstream_tests import make_release

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("llama"), "llama", layers=4, hidden=128, heads=4, head_dim=32, seed=9
    )


def outputs(model: Path, path: Path, *, python_path: Path | None = None, **engine_args) -> dict:
    environment = os.environ | ({"PYTHONPATH": str(python_path)} if python_path else {})
    command = [sys.executable, str(HERE / "stock_outputs.py"), str(model), str(path)]
    command += ["--engine-args", json.dumps(engine_args)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def stock(model, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("stock")
    release = make_release(Layout(), folder)
    found = outputs(model, folder / "stock.json", python_path=release)
    assert Path(found["file"]).is_relative_to(release), "the release itself must have run"
    assert not (release / "vllm" / "v1" / "uniprefill").exists()
    return found["results"]


@pytest.mark.parametrize(
    "engine_args",
    [{}, {"uniprefill_config": {"enabled": False, "min_prompt_tokens": 256}}],
    ids=["flag absent", "enabled false"],
)
def test_same_as_the_release(model, stock, tmp_path, engine_args) -> None:
    """Greedy, seeded, chunked, mixed lengths, prefix caching, n > 1, prompt logprobs."""
    ours = outputs(model, tmp_path / "fork.json", **engine_args)
    assert "uniprefill" in ours["version"]
    assert ours["results"] == stock
    assert any(r["cached"] > 0 for r in stock["again, from the prefix cache"])
