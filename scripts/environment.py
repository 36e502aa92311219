"""build/venv: the project's environment, made once and kept at what the requirements say."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import wheels
from fork import ForkError, Layout, say

SCRIPTS = Path(__file__).resolve().parent


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


def requirement_files(device: str, layout: Layout) -> list[Path]:
    files = [SCRIPTS / f"requirements-{device}.txt", SCRIPTS / "requirements-dev.txt"]
    files += [SCRIPTS / f"constraints-{device}.txt"]
    files += [layout.tree / "requirements" / "common.txt"]
    return [file for file in files if file.is_file()]


def environment_key(device: str, layout: Layout) -> str:
    digest = hashlib.sha256(f"{device} {sys.version_info[:3]}".encode())
    for file in requirement_files(device, layout):
        digest.update(file.read_bytes())
    return f"{device} {sys.version_info[0]}.{sys.version_info[1]} {digest.hexdigest()}"


def ensure_venv(device: str, layout: Layout) -> bool:
    """Create or update build/venv; False when it was as it should be."""
    check_python()
    stamp = layout.state / "venv"
    key = environment_key(device, layout)
    seen = stamp.read_text() if stamp.is_file() else ""
    if seen == key and layout.python.exists():
        return False
    if layout.venv.exists() and seen and seen.split()[:2] != key.split()[:2]:
        say("build/venv: made for another device or Python, starting anew")
        shutil.rmtree(layout.venv)
    if not layout.python.exists():
        say("build/venv: creating")
        run(
            [sys.executable, "-m", "venv", layout.venv],
            "Creating build/venv (Debian and Ubuntu: install python3-venv)",
        )
    say(f"build/venv: installing the {device} requirements with pip")
    stamp.unlink(missing_ok=True)
    pip = [layout.python, "-m", "pip", "install", "--disable-pip-version-check", "-q"]
    run([*pip, "-r", SCRIPTS / f"requirements-{device}.txt"], "pip install")
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


def install(wheel: Path, device: str, layout: Layout) -> None:
    site = site_packages(layout)
    written = sync(wheel, site)
    if written is not None:
        say(f"build/venv: {written} file(s) of vLLM brought up to date")
        return
    say(f"build/venv: installing {wheel.name}")
    pip = [layout.python, "-m", "pip", "install", "--disable-pip-version-check", "-q"]
    options = ["--force-reinstall", "--no-deps", "--no-compile"]
    if device == "cuda":  # first what it needs, by its own pins
        constraints = SCRIPTS / "constraints-cuda.txt"
        limit = ["-c", constraints] if constraints.is_file() else []
        run([*pip, *limit, wheel], "pip install")
    run([*pip, *options, wheel], "pip install")
    run([layout.python, "-m", "compileall", "-q", "-j", "0", site / "vllm"], "compileall")
