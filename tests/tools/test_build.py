"""Choosing what to build for, and what the environment depends on."""

import pytest

from scripts import build, environment, fork, lock


@pytest.mark.parametrize(
    "asked, gpu, device",
    [("", True, "cuda"), ("", False, "cpu"), ("cpu", True, "cpu"), ("cuda", False, "cuda")],
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


def test_the_environment_key_follows_the_lock(monkeypatch, tmp_path):
    monkeypatch.setattr(lock, "path_of", lambda device: tmp_path / device)
    for device in lock.DEVICES:
        (tmp_path / device).write_text("regex==1\n")
    first = environment.environment_key("cpu")
    assert environment.environment_key("cpu") == first
    assert environment.environment_key("cuda").split()[0] == "cuda"
    (tmp_path / "cpu").write_text("regex==2\n")
    assert environment.environment_key("cpu") != first


def test_gpu_only_requirements_are_the_releases_cuda_ones():
    drop = build.gpu_only(fork.Layout())
    assert {"flashinfer-python", "tilelang", "nvidia-cutlass-dsl", "torchvision", "torchaudio"} <= drop
    assert not drop & {"torch", "numba", "transformers", "regex"}
