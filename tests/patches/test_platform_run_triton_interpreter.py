"""platform-run-triton-interpreter.patch: when the interpreter is chosen, and that it runs kernels."""

import ast
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

TREE = Path(__file__).parents[2] / "build/tree"

cpu_build = pytest.mark.skipif("cpu" not in version("vllm"), reason="the package is not a CPU build")


def choose(monkeypatch, tmp_path, package, backends, preset=None):
    """What _maybe_choose_triton_interpreter leaves in the environment."""
    module = ast.parse((TREE / "vllm/env_override.py").read_text())
    (function,) = [n for n in module.body if getattr(n, "name", "") == "_maybe_choose_triton_interpreter"]
    triton = tmp_path / "triton"
    for backend in backends:
        (triton / "backends" / backend).mkdir(parents=True)
    spec = SimpleNamespace(origin=str(triton / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)

    def fake_version(name):
        if package is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return package

    monkeypatch.setattr(importlib.metadata, "version", fake_version)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if preset is not None:
        monkeypatch.setenv("TRITON_INTERPRET", preset)
    namespace = {"importlib": importlib, "os": os}
    exec(compile(ast.Module([function], []), "env_override.py", "exec"), namespace)
    namespace["_maybe_choose_triton_interpreter"]()
    return os.environ.get("TRITON_INTERPRET")


CPU, CUDA = "0.32.0+uniprefill.1.cpu", "0.32.0+uniprefill.1"


@pytest.mark.parametrize(
    "package, backends, preset, expected",
    [
        (CPU, ["nvidia", "amd"], None, "1"),
        (CPU, ["nvidia", "amd"], "0", "0"),
        (CPU, ["nvidia", "cpu"], None, None),
        (CUDA, ["nvidia", "amd"], None, None),
        (None, ["nvidia"], None, None),
    ],
)
def test_only_a_cpu_build_without_triton_cpu_interprets(monkeypatch, tmp_path, package, backends, preset, expected):
    assert choose(monkeypatch, tmp_path, package, backends, preset) == expected


def test_the_choice_comes_before_torch_is_imported():
    body = ast.parse((TREE / "vllm/env_override.py").read_text()).body
    lines = [ast.unparse(node) for node in body]
    assert lines.index("_maybe_choose_triton_interpreter()") < lines.index("import torch")


def in_python(code: str, **env: str) -> dict:
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=kept | env)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@cpu_build
def test_a_kernel_with_library_functions_runs_on_cpu_tensors(tmp_path):
    script = tmp_path / "kernel.py"  # the interpreter reads the kernel's source
    script.write_text(
        """
import json, torch
from vllm.triton_utils import HAS_TRITON, tl, triton

@triton.jit
def row_max(x, out, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    values = tl.load(x + row * n + at, mask=at < n, other=-1e9)
    tl.store(out + row, tl.max(values, axis=0) + tl.cdiv(n, 2))

x = torch.arange(12.).reshape(3, 4)
out = torch.zeros(3)
row_max[(3,)](x, out, 4, BLOCK=8)
print(json.dumps({"triton": HAS_TRITON, "out": out.tolist()}))
"""
    )
    done = in_python(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')")
    assert done == {"triton": True, "out": [5.0, 9.0, 13.0]}


@cpu_build
def test_zero_restores_the_releases_behaviour():
    code = "import json; from vllm.triton_utils import HAS_TRITON; print(json.dumps({'triton': HAS_TRITON}))"
    assert in_python(code, TRITON_INTERPRET="0") == {"triton": False}
