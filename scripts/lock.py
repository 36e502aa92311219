"""Resolve the requirements of both environments into scripts/lock-*.txt, for Python 3.11 to 3.14, with hashes.

Versions that are locked stay where they still fit; `--upgrade` or `--upgrade-package NAME` (uv's own
options) lets them move. Needs the package index and no environment; a GPU neither.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from pathlib import Path

from scripts import make_tree, package_index
from scripts.fork import ROOT, ForkError, Layout, run_main, say, write_if_changed

DEVICES = ("cpu", "cuda")
TOOLS = "requirements-dev.txt"
# NIXL asks for its libraries for two versions of CUDA, of which one does on a CPU.
LEFT_OUT = {"cpu": "nixl-cu13", "cuda": "nixl-cu12"}
HEAD = """\
# The {device} environment, Python 3.11 to 3.14: written by `make lock`, not by hand.
# requirements: {digest}
"""


@dataclass(frozen=True)
class Pin:
    """One package of a lock."""

    name: str
    text: str  # the requirement with marker and hashes, as pip reads it
    via: frozenset[str]  # who asks for it: packages, or "-r FILE"


def path_of(device: str, root: Path = ROOT) -> Path:
    return root / "scripts" / f"lock-{device}.txt"


def read(path: Path) -> list[Pin]:
    """The pins of a lock; a package with several markers has several."""
    pins = []
    for block in re.split(r"^(?=[A-Za-z0-9])", path.read_text(), flags=re.MULTILINE)[1:]:
        lines = block.splitlines(keepends=True)
        notes = [line.strip("# \n").removeprefix("via").strip() for line in lines if line.startswith("    #")]
        text = "".join(line for line in lines if not line.lstrip().startswith("#"))
        pins.append(Pin(re.match(r"[A-Za-z0-9._-]+", block)[0], text, frozenset(filter(None, notes))))
    return pins


def without_tools(pins: list[Pin], keep: Container[str] = ()) -> list[Pin]:
    """What the package itself and those in `keep` need: no pin that only the tests' and evaluations' tools ask for."""
    wanted = {
        pin.name
        for pin in pins
        if pin.name in keep or any(who.startswith("-r ") and not who.endswith(TOOLS) for who in pin.via)
    }
    while more := {pin.name for pin in pins if pin.name not in wanted and pin.via & wanted}:
        wanted |= more
    return [pin for pin in pins if pin.name in wanted]


def requirements(device: str, read_file: Callable[[str], str]) -> list[str]:
    """Every requirement of an environment, comments and order aside; `read_file` has a path below the root."""
    pending, found = [f"scripts/requirements-{device}.txt"], set()
    while pending:
        path = pending.pop()
        for line in read_file(path).splitlines():
            line = re.sub(r"(^|\s)#.*", "", line).strip()
            if line.startswith("-r "):
                pending.append(os.path.normpath(os.path.join(os.path.dirname(path), line[3:].strip())))
            elif line:
                found.add(" ".join(line.split()))
    return sorted(found)


def digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def check(root: Path, read_file: Callable[[str], str]) -> list[str]:
    """Whether each lock was made from the requirements as they are."""
    problems = []
    for device in DEVICES:
        path = path_of(device, root)
        if not path.is_file() or f"# requirements: {digest(requirements(device, read_file))}\n" not in path.read_text():
            problems.append(f"scripts/{path.name} was not made from the requirements as they are; `make lock`.")
    return problems


def add_hashes(text: str, lines: Iterable[str]) -> str:
    """The lock with the hashes that requirements name themselves, of files that the resolver's index lacks."""
    for line in lines:
        pin, *hashes = line.split(" --hash=")
        for value in hashes:
            option = f"    --hash={value.strip()}"
            if option not in text:
                text = re.sub(rf"^({re.escape(pin)}(?: ;.*)? \\\n)", rf"\1{option} \\\n", text, flags=re.MULTILINE)
            if option not in text:
                raise ForkError(f"The lock has no {pin} to take the hash beside it; correct its requirement.")
    return text


def find_uv(layout: Layout) -> Path:
    """The pinned uv: that of build/venv, else one installed for this alone."""
    pin = re.search(r"^uv==(\S+)", (layout.root / "scripts" / TOOLS).read_text(), re.MULTILINE)
    if not pin:
        raise ForkError(f"scripts/{TOOLS} pins no uv; add uv==X.Y.Z.")
    own = layout.build / "uv"
    for folder in (layout.venv, own):
        uv = folder / "bin" / "uv"
        if uv.is_file():
            shown = subprocess.run([uv, "--version"], capture_output=True, text=True).stdout
            if shown.split()[1:2] == [pin[1]]:
                return uv
    say(f"installing {pin[0]} in build/uv")
    shutil.rmtree(own, ignore_errors=True)
    for command in (["-m", "venv", own], ["-m", "pip", "--python", own, "install", "-q", pin[0]]):
        done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
        if done.returncode:
            raise ForkError(f"Installing {pin[0]} failed:\n{done.stdout[-500:]}{done.stderr[-1500:]}")
    return own / "bin" / "uv"


def index_environment() -> dict[str, str]:
    """The package index and certificates that pip is configured for, as uv reads them."""
    config = package_index.pip_config()
    settings = {"UV_DEFAULT_INDEX": config["index-url"]}
    if config.get("cert"):
        settings["SSL_CERT_FILE"] = config["cert"]
    return os.environ | settings


def lock(device: str, layout: Layout, options: list[str]) -> bool:
    """Write one lock; whether it changed."""
    target = path_of(device, layout.root)
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copyfile(target, fresh) if target.is_file() else fresh.touch()  # what it holds, uv prefers
    lines = requirements(device, lambda path: (layout.root / path).read_text())
    command = [find_uv(layout), "pip", "compile", "-q", f"requirements-{device}.txt", "-o", fresh.name]
    command += ["--no-emit-package", LEFT_OUT[device], *options]
    try:
        done = subprocess.run(command, cwd=target.parent, env=index_environment(), capture_output=True, text=True)
        if done.returncode:
            raise ForkError(f"The {device} requirements do not resolve:\n{done.stderr[-3000:]}")
        text = HEAD.format(device=device, digest=digest(lines)) + add_hashes(fresh.read_text(), lines)
    finally:
        fresh.unlink(missing_ok=True)
    return write_if_changed(target, text.encode())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _, options = parser.parse_known_args()
    layout = Layout()
    make_tree.make_tree(layout)
    for device in DEVICES:
        changed = lock(device, layout, options)
        say(f"scripts/lock-{device}.txt: {'written' if changed else 'unchanged'}")
    return 0


if __name__ == "__main__":
    run_main(main)
