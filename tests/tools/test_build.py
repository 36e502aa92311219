"""Choosing what to build for, and what the environment depends on."""

import environment
import fork
import lock_environment
import pytest

import build


@pytest.mark.parametrize(
    "asked, gpu, device",
    [("", True, "cuda"), ("", False, "cpu"), ("auto", True, "cuda"), ("cpu", True, "cpu"), ("cuda", False, "cuda")],
)
def test_device(asked, gpu, device):
    assert build.choose_device(asked, gpu) == device


def test_an_unknown_device_is_refused():
    with pytest.raises(fork.ForkError, match="DEVICE=tpu is not known: use DEVICE=cpu"):
        build.choose_device("tpu", False)


def test_what_is_missing_is_said_before_anything_is_fetched(toy, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    for archive in toy.archives.iterdir():
        archive.unlink()
    with pytest.raises(fork.ForkError, match="No C.. compiler"):
        build.build(toy, "cpu", 1)
    assert not toy.venv.exists() and not list(toy.archives.iterdir())


@pytest.mark.parametrize("version, good", [((3, 10), False), ((3, 11), True), ((3, 14), True), ((3, 15), False)])
def test_python_version(version, good):
    if good:
        environment.check_python(version)
    else:
        with pytest.raises(fork.ForkError, match="needs Python 3.11 to 3.14, and this is 3"):
            environment.check_python(version)


def test_the_environment_key_follows_the_requirements(toy):
    common = toy.tree / "requirements" / "common.txt"
    common.parent.mkdir(parents=True)
    common.write_text("regex\n")
    first = environment.environment_key("cpu", toy)
    assert environment.environment_key("cpu", toy) == first
    common.write_text("regex\ntqdm\n")
    assert environment.environment_key("cpu", toy) != first
    assert environment.environment_key("cuda", toy).split()[0] == "cuda"


def test_no_gpu_only_package_is_pinned_for_cpu():
    pinned = (environment.SCRIPTS / "constraints-cpu.txt").read_text().lower()
    for name in ("flashinfer", "cutlass", "tilelang", "nvidia", "torchvision", "torchaudio", "torchcodec", "cuda"):
        assert name not in pinned
    assert "\ntorch==2.13.0\n" in pinned and "\ntriton==3.7.1\n" in pinned


def test_gpu_only_requirements_are_the_releases_cuda_ones():
    drop = build.gpu_only(fork.Layout())
    assert {"flashinfer-python", "tilelang", "nvidia-cutlass-dsl", "torchvision", "torchaudio"} <= drop
    assert not drop & {"torch", "numba", "transformers", "regex"}


def test_a_freeze_becomes_constraints():
    freeze = "torch==2.13.0+cpu\nZed==1\nabc==2.0.post1\nvllm @ file:///x.whl\nvllm==0.32.0\n"
    assert lock_environment.constraints(freeze).splitlines()[1:] == ["abc==2.0.post1", "torch==2.13.0", "Zed==1"]
    with pytest.raises(fork.ForkError, match="mine @ file"):
        lock_environment.constraints("mine @ file:///x.whl\n")
