"""The locks: what they hold for each Python, that they follow the requirements, and what is installed of them."""

import email
import subprocess
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts import environment, fork, lock

PYTHONS = ("3.11", "3.12", "3.13", "3.14")
LAYOUT = fork.Layout()


def markers(python):
    return {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}


def pinned(device, python):
    """Normalised name -> version of what the lock installs on that Python."""
    found = {}
    for pin in lock.read(lock.path_of(device)):
        requirement = Requirement(pin.text.split(" \\")[0])
        if requirement.marker is None or requirement.marker.evaluate(markers(python)):
            assert pin.name not in found, f"{pin.name} twice on {python}"
            (specifier,) = requirement.specifier
            assert specifier.operator == "==" and "--hash=sha256:" in pin.text
            found[pin.name] = specifier.version
    return found


def assert_satisfied(lines, device, python):
    have = pinned(device, python)
    for line in lines:
        requirement = Requirement(line.split(" --hash=")[0])
        if requirement.marker is None or requirement.marker.evaluate(markers(python)):
            found = have[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(found, prereleases=True), f"{line}: {found}"


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("device", lock.DEVICES)
def test_every_requirement_has_a_pin_that_satisfies_it(device, python):
    assert_satisfied(lock.requirements(device, lambda path: (LAYOUT.root / path).read_text()), device, python)


@pytest.mark.parametrize("python", PYTHONS)
def test_the_cuda_wheels_own_requirements_are_satisfied(python):
    upstream = fork.read_upstream()
    wheel = LAYOUT.archives / upstream.wheel
    if not wheel.is_file():
        pytest.skip("the release's CUDA wheel is not in build/archives")
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read(f"vllm-{upstream.version}.dist-info/METADATA"))
    assert_satisfied(metadata.get_all("Requires-Dist"), "cuda", python)


@pytest.mark.parametrize("device", lock.DEVICES)
def test_the_locks_follow_the_requirements(device, tmp_path):
    def read(path):
        return (LAYOUT.root / path).read_text()

    assert lock.check(LAYOUT.root, read) == []
    edited = lock.check(LAYOUT.root, lambda path: read(path) + (f"added-{device}\n" if device in path else ""))
    assert f"scripts/lock-{device}.txt was not made from the requirements as they are; `make lock`." in edited
    commented = lock.check(LAYOUT.root, lambda path: "# a comment\n" + read(path))
    assert commented == []


@pytest.mark.parametrize("device", lock.DEVICES)
def test_no_index_is_named(device):
    assert "://" not in lock.path_of(device).read_text()


def test_the_cpu_lock_has_of_cuda_only_what_the_indexs_torch_needs():
    for pin in lock.read(lock.path_of("cpu")):
        if pin.name.startswith(environment.CUDA_LIBRARIES):
            assert all(who == "torch" or who.startswith(environment.CUDA_LIBRARIES) for who in pin.via), pin
        for name in ("flashinfer", "cutlass", "tilelang", "torchvision", "torchaudio", "torchcodec"):
            assert name not in pin.name


def test_a_hash_named_in_the_requirements_is_in_the_lock():
    (line,) = [
        line for line in (environment.SCRIPTS / "requirements-cpu.txt").read_text().splitlines() if "--hash" in line
    ]
    (torch,) = [pin for pin in lock.read(lock.path_of("cpu")) if pin.name == "torch"]
    assert f"--hash={line.split('--hash=')[1]}" in torch.text
    text = "torch==1 ; python_version > '3' \\\n    --hash=sha256:aa\n"
    added = lock.add_hashes(text, ["regex", "torch==1 --hash=sha256:bb"])
    assert added.splitlines()[1:] == ["    --hash=sha256:bb \\", "    --hash=sha256:aa"]
    assert lock.add_hashes(added, ["torch==1 --hash=sha256:bb"]) == added
    with pytest.raises(fork.ForkError, match="no torch==2 to take the hash"):
        lock.add_hashes(text, ["torch==2 --hash=sha256:bb"])


LOCK = """\
# head
both==1 \\
    --hash=sha256:aa
    # via
    #   -r requirements-dev.txt
    #   ours
ours==2 ; python_version < '3.12' \\
    --hash=sha256:bb
    # via -r ../build/tree/requirements/common.txt
tool==3 \\
    --hash=sha256:cc
    # via -r requirements-dev.txt
used==4 \\
    --hash=sha256:dd
    # via tool
"""


def test_the_image_gets_no_tools(tmp_path):
    (tmp_path / "lock").write_text(LOCK)
    pins = lock.read(tmp_path / "lock")
    assert [pin.name for pin in pins] == ["both", "ours", "tool", "used"]
    assert pins[1].text == "ours==2 ; python_version < '3.12' \\\n    --hash=sha256:bb\n"
    assert [pin.name for pin in lock.without_tools(pins)] == ["both", "ours"]
    assert [pin.name for pin in lock.without_tools(pins, keep=("tool",))] == ["both", "ours", "tool", "used"]
    names = {pin.name for pin in lock.without_tools(lock.read(lock.path_of("cpu")), keep=environment.SERVING)}
    assert {"torch", "triton", "transformers", "numpy", "nixl", "nixl-cu12", "vllm-router", "orjson"} <= names
    assert not names & {"pytest", "ruff", "lm-eval", "uv", "schemathesis"}


@pytest.mark.parametrize("cpu_build", [True, False])
def test_cudas_libraries_come_only_with_a_torch_that_needs_them(monkeypatch, tmp_path, cpu_build):
    """A CPU build of torch is taken where one is offered, else the index's, which needs CUDA's libraries."""
    pins = [lock.Pin(name, f"{name}==1\n", frozenset()) for name in ("nvidia-x", "ours", "torch")]
    monkeypatch.setattr(lock, "read", lambda path: pins)
    monkeypatch.setattr(environment, "torch_needs_cuda", lambda python: not cpu_build)
    ran = []

    def run(command, what):
        assert {"--require-hashes", "--no-deps"} <= set(command)
        ran.append(command[command.index("-r") + 1].read_text().split())
        if ran[-1] == ["torch==1+cpu"] and not cpu_build:
            raise fork.ForkError("No matching distribution")

    monkeypatch.setattr(environment, "run", run)
    environment.install_lock(tmp_path, "cpu")
    if cpu_build:
        assert ran == [["torch==1+cpu"], ["ours==1", "torch==1"]]
    else:
        assert ran == [["torch==1+cpu"], ["torch==1"], ["nvidia-x==1", "ours==1", "torch==1"]]


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("device", lock.DEVICES)
def test_the_index_offers_every_pin_for_every_python(device, python, tmp_path):
    """A dry run: the lock is complete and each file's hash is its own; the requirements agree with it."""
    options = ["--target", tmp_path, "--python-version", python, "--python-platform", "x86_64-manylinux_2_28"]
    left_out = tmp_path / "left_out.txt"
    left_out.write_text(f"{lock.LEFT_OUT[device]} ; sys_platform == 'never'\n")
    options += ["--override", left_out]
    command = [lock.find_uv(LAYOUT), "pip", "install", "-q", "--dry-run", "-r", lock.path_of(device), *options]
    for more in (["--require-hashes"], ["-r", environment.SCRIPTS / f"requirements-{device}.txt"]):
        done = subprocess.run([*command, *more], env=lock.index_environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
