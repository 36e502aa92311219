"""What is installed in build/venv is the patched package of this checkout, whole and consistent."""

import json
import subprocess
import sys
from importlib.metadata import distribution, files, version
from pathlib import Path

import pytest

from scripts import fork, lock, tree, wheels

LAYOUT = fork.Layout()
DEVICE = "cpu" if version("vllm").endswith(".cpu") else "cuda"


def test_version():
    expected = fork.read_version().package(DEVICE)
    assert version("vllm") == expected
    import vllm

    assert vllm.__version__ == expected
    assert vllm.__version_tuple__[:3] == (0, 32, 0)


def test_the_commit_is_the_pinned_one():
    import vllm._version

    assert vllm._version.__commit_id__ == "g" + fork.read_upstream().commit


def test_it_runs_from_the_projects_environment():
    import vllm

    assert Path(vllm.__file__).is_relative_to(LAYOUT.venv)
    assert Path(sys.prefix) == LAYOUT.venv


def provenance() -> dict:
    return json.loads(distribution("vllm").read_text(wheels.PROVENANCE))


def test_provenance_names_version_commit_and_series():
    found, upstream = provenance(), fork.read_upstream()
    assert found["package"] == version("vllm") and found["device"] == DEVICE
    assert found["upstream"] == {"tag": upstream.tag, "commit": upstream.commit}
    assert found["series_sha256"] == fork.series_sha256(LAYOUT)


def test_every_patched_file_is_installed_as_the_tree_has_it():
    site = Path(distribution("vllm").locate_file(""))
    steps = tree.working_steps(LAYOUT)
    patched = [path for path in steps.final if path.startswith("vllm/")]
    assert patched
    for path in patched:
        assert tree.read_text(site / path) == tree.read_text(LAYOUT.tree / path), path


def test_every_file_of_the_package_is_what_record_says():
    site = Path(distribution("vllm").locate_file(""))
    checked = 0
    for entry in files("vllm"):
        if entry.hash and entry.suffix != ".pyc" and not str(entry).startswith(".."):
            assert wheels.record_hash((site / entry).read_bytes()) == f"sha256={entry.hash.value}", entry
            checked += 1
    assert checked > 2500


def test_the_requirements_are_satisfied():
    """But for NIXL's libraries for another CUDA, which it asks for too."""
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    missing = [line for line in done.stdout.splitlines() if lock.LEFT_OUT[DEVICE] not in line]
    assert missing in ([], ["No broken requirements found."])


def test_the_console_script_is_ours():
    done = subprocess.run([LAYOUT.venv / "bin" / "vllm", "--version"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == version("vllm")


@pytest.mark.skipif(DEVICE != "cpu", reason="the package is not a CPU build")
class TestCpu:
    def test_no_gpu_only_package_is_installed(self):
        done = subprocess.run([sys.executable, "-m", "pip", "freeze"], capture_output=True, text=True, check=True)
        names = {wheels.normalise(line.split("==")[0].split(" @ ")[0]) for line in done.stdout.splitlines()}
        gpu = {"flashinfer-python", "tilelang", "nvidia-cutlass-dsl", "nvidia-cudnn-frontend", "quack-kernels"}
        assert not names & (gpu | {"torchvision", "torchaudio", "torchcodec", "fastsafetensors"})
        assert "triton" in names

    def test_the_platform_and_its_kernels(self):
        from vllm.platforms import current_platform

        assert current_platform.is_cpu()
        import torch

        current_platform.import_kernels()
        for op in ("cpu_attention_with_kv_cache", "rotary_embedding", "silu_and_mul"):
            assert hasattr(torch.ops._C, op), op

    def test_one_openmp_runtime(self):
        """Two would share the cores badly; ours must be the one that torch brings.

        In a process of its own: other tests may have loaded libraries that bring theirs.
        """
        code = (
            "import torch\n"
            "from vllm.platforms import current_platform\n"
            "current_platform.import_kernels()\n"
            "print(open('/proc/self/maps').read())\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        runtimes = {line.split()[-1] for line in done.stdout.splitlines() if "libgomp" in line or "libiomp" in line}
        assert len({name for name in runtimes if "scikit" not in name}) == 1, runtimes
