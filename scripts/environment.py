"""build/venv: the project's environment, made once and kept at what its lock says.

As a program: an environment of its own for the container image, without the tests' tools but for two that serve too.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from scripts import lock, wheels
from scripts.fork import ForkError, Layout, run_main, say

SCRIPTS = Path(__file__).resolve().parent
CUDA_LIBRARIES = ("cuda-", "nvidia-")
# for prefill and decode apart
SERVING = ("nixl", "vllm-router")


def check_python(version: tuple[int, int] = sys.version_info[:2]) -> None:
    if not (3, 11) <= version < (3, 15):
        raise ForkError(
            f"vLLM 0.32.0 needs Python 3.11 to 3.14, and this is {version[0]}.{version[1]}: "
            "`make PYTHON=python3.11 …` names another."
        )


def run(command: list[str | Path], what: str) -> None:
    """Run quietly; on failure show the end of what it printed."""
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise ForkError(f"{what} failed:\n{done.stdout[-3000:]}")


def environment_key(device: str) -> str:
    digest = hashlib.sha256(f"{device} {sys.version_info[:3]}".encode())
    digest.update(lock.path_of(device).read_bytes())
    return f"{device} {sys.version_info[0]}.{sys.version_info[1]} {digest.hexdigest()}"


def create(venv: Path) -> None:
    run([sys.executable, "-m", "venv", venv], f"Creating {venv} (Debian and Ubuntu: install python3-venv)")


def torch_needs_cuda(python: Path) -> bool:
    """Whether the torch installed there is a build that does not load without CUDA's libraries."""
    code = "import importlib.metadata as m; print(*(line.split()[0] for line in m.requires('torch') or []))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return any(name.startswith(CUDA_LIBRARIES) for name in done.stdout.split())


def install_lock(python: Path, device: str, tools: bool = True) -> None:
    """Install what the lock of `device` says, hashes required, with or without the tests' tools that do not serve."""
    pins = lock.read(lock.path_of(device))
    if not tools:
        pins = lock.without_tools(pins, keep=SERVING)
    # the lock is complete; and pip before 24 refuses, with hashes, a dependency that names an extra
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "-q", "--require-hashes", "--no-deps", "-r"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "requirements.txt"
        if device == "cpu":
            (torch,) = [pin.text for pin in pins if pin.name == "torch"]
            file.write_text(re.sub(r"^(torch==\S+)", r"\1+cpu", torch))
            try:  # pip itself would take a file whose hash its index names over a CPU build in a folder
                run([*pip, file], "pip install")
            except ForkError:
                file.write_text(torch)
                run([*pip, file], "pip install")
            if not torch_needs_cuda(python):
                pins = [pin for pin in pins if not pin.name.startswith(CUDA_LIBRARIES)]
        file.write_text("".join(pin.text for pin in pins))
        run([*pip, file], "pip install")


def ensure_venv(device: str, layout: Layout) -> bool:
    """Create or update build/venv; False when it was as it should be."""
    check_python()
    stamp = layout.state / "venv"
    key = environment_key(device)
    seen = stamp.read_text() if stamp.is_file() else ""
    if seen == key and layout.python.exists():
        return False
    if layout.venv.exists() and seen and seen.split()[:2] != key.split()[:2]:
        say("build/venv: made for another device or Python, starting anew")
        shutil.rmtree(layout.venv)
    if not layout.python.exists():
        say("build/venv: creating")
        create(layout.venv)
    say(f"build/venv: installing scripts/{lock.path_of(device).name} with pip")
    stamp.unlink(missing_ok=True)
    install_lock(layout.python, device)
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.write_text(key)
    return True


def site_packages(layout: Layout) -> Path:
    (site,) = layout.venv.glob("lib/python3.*/site-packages")
    return site


def installed_info(site: Path) -> Path | None:
    found = sorted(site.glob("vllm-*.dist-info"))
    return found[0] if len(found) == 1 else None


def sync(wheel: Path, site: Path) -> int | None:
    """Bring an installed wheel of the same version to this one; the number of files written.

    None when that is not possible and pip must install it. Much faster than pip, which
    removes and writes every file, for the edit of one.
    """
    version, _ = wheels.split_name(wheel.name)
    info = site / f"vllm-{version}.dist-info"
    if installed_info(site) != info or not (info / "RECORD").is_file():
        return None
    text = (info / "RECORD").read_text()
    old = {row[0]: (row[1], row[2]) for row in csv.reader(io.StringIO(text)) if row}
    with zipfile.ZipFile(wheel) as archive:
        new = wheels.read_record(archive, version)
        members = {member.filename: member for member in archive.infolist()}
        record = f"{info.name}/RECORD"
        # what pip added: scripts, compiled files, INSTALLER, REQUESTED, direct_url.json
        kept = {
            path: row
            for path, row in old.items()
            if path.startswith("../") or path.endswith(".pyc") or (path.startswith(f"{info.name}/") and path not in new)
        }
        gone = [path for path in old if path not in new and path not in kept]
        fresh = [path for path in new if path != record and (old.get(path) != new[path] or not (site / path).exists())]
        (info / "RECORD").unlink()  # an interrupted run must not look complete
        for path in fresh:
            target = site / path
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.{os.getpid()}.part")
            partial.write_bytes(archive.read(path))
            partial.chmod(0o755 if members[path].external_attr >> 16 & 0o100 else 0o644)
            partial.replace(target)
        for path in gone:
            (site / path).unlink(missing_ok=True)
    partial = info / ".RECORD.part"
    partial.write_bytes(wheels.format_record(kept | new))
    partial.replace(info / "RECORD")
    return len(fresh) + len(gone)


def install_wheel(wheel: Path, python: Path) -> None:
    """Install the wheel, whose requirements the lock has brought."""
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "-q"]
    run([*pip, "--force-reinstall", "--no-deps", "--no-compile", wheel], "pip install")


def install(wheel: Path, layout: Layout) -> None:
    site = site_packages(layout)
    written = sync(wheel, site)
    if written is not None:
        say(f"build/venv: {written} file(s) of vLLM brought up to date")
        return
    say(f"build/venv: installing {wheel.name}")
    install_wheel(wheel, layout.python)
    run([layout.python, "-m", "compileall", "-q", "-j", "0", site / "vllm"], "compileall")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("venv", type=Path, help="the environment to make")
    parser.add_argument("wheel", type=Path, help="the CPU wheel to install there")
    args = parser.parse_args()
    check_python()
    create(args.venv)
    python = args.venv / "bin" / "python"
    install_lock(python, "cpu", tools=False)
    install_wheel(args.wheel, python)
    return 0


if __name__ == "__main__":
    run_main(main)
