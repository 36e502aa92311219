"""Build vLLM with the series applied and install it in build/venv.

cuda: the release's own wheel, its compiled kernels untouched, with the patched Python in it.
cpu: the sdist's Python and the C++ CPU backend compiled here with g++.
Each step is skipped when what it depends on has not changed.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import platform
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from scripts import compile_cpu, environment, make_tree, tree, wheels
from scripts.fetch_source import ensure_source
from scripts.fork import (
    ForkError,
    Layout,
    read_upstream,
    read_version,
    run_main,
    say,
    series_sha256,
    sha256_file,
)

CPU_TAGS = "cp311-abi3-linux_x86_64"


def has_nvidia_gpu() -> bool:
    """Whether the NVIDIA driver shows at least one GPU."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and "GPU " in done.stdout


def choose_device(asked: str, gpu: bool) -> str:
    if asked not in ("", "cpu", "cuda"):
        raise ForkError(f"DEVICE={asked} is not known: use DEVICE=cpu, DEVICE=cuda or leave it out.")
    return asked or ("cuda" if gpu else "cpu")


@contextlib.contextmanager
def locked(layout: Layout) -> Iterator[None]:
    """One build at a time in a checkout."""
    layout.state.mkdir(parents=True, exist_ok=True)
    with (layout.state / "lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another build runs in this checkout: waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def triton_pin(requirements: str) -> str:
    match = re.search(r"^triton==\S+", requirements, re.MULTILINE)
    if not match:
        raise ForkError("scripts/requirements-cpu.txt pins no triton; add triton==X.Y.Z.")
    return match[0]


def gpu_only(layout: Layout) -> set[str]:
    """The requirements of the release that only its CUDA build has."""
    folder = layout.pristine / "requirements"
    cuda = wheels.requirement_names((folder / "cuda.txt").read_text())
    common = wheels.requirement_names((folder / "common.txt").read_text())
    return cuda - common - {"torch", "numba", "r"}


def cpu_base(layout: Layout, library: Path, upstream_version: str, sdist_sha256: str) -> tuple[Path, str]:
    """The wheel of the untouched sdist and the compiled library, packed once."""
    key = hashlib.sha256(f"{sdist_sha256} {library.name} {sha256_file(library)} {CPU_TAGS}".encode()).hexdigest()
    base = layout.build / "cpu" / f"vllm-{upstream_version}-{CPU_TAGS}.whl"
    stamp = layout.build / "cpu" / "base"
    if not (base.is_file() and stamp.is_file() and stamp.read_text() == key):
        say("packing the CPU build's base wheel")
        wheels.pack_base(layout.pristine, library, upstream_version, base)
        stamp.write_text(key)
    return base, key


def build_wheel(device: str, layout: Layout, jobs: int) -> tuple[Path, str]:
    """The wheel in build/wheels and a key of its content."""
    upstream, version = read_upstream(layout.root / "UPSTREAM"), read_version(layout.root / "VERSION")
    package = version.package(device)
    steps = tree.working_steps(layout)
    stray = tree.unpatched_edits(layout, set(steps.first))
    edited = sorted({p for paths in tree.unrefreshed(layout, steps).values() for p in paths} | set(stray))
    changes, pristine = wheels.changed_members(layout.pristine, layout.tree, sorted(set(steps.first) | set(stray)))
    provenance = {
        "version": f"{version.upstream}-{version.revision}",
        "package": package,
        "device": device,
        "upstream": {"tag": upstream.tag, "commit": upstream.commit},
        "series_sha256": series_sha256(layout),
        "edited": edited,
    }
    drop: set[str] = set()
    add: list[str] = []
    if device == "cpu":
        library = compile_cpu.build_extension(layout, jobs)
        base, base_key = cpu_base(layout, library, upstream.version, upstream.sdist_sha256)
        provenance["extension"] = library.name
        drop = gpu_only(layout)
        add = [triton_pin((environment.SCRIPTS / "requirements-cpu.txt").read_text())]
    else:
        base, base_key = layout.archives / upstream.wheel, upstream.wheel_sha256

    digest = hashlib.sha256(f"{base_key} {sorted(drop)} {add}".encode())
    digest.update(json.dumps(provenance, sort_keys=True).encode())
    digest.update((environment.SCRIPTS / "wheels.py").read_bytes())
    for name in sorted(changes):
        digest.update(name.encode() + b"\0" + (changes[name] or b"\xff") + b"\0")
    key = digest.hexdigest()
    stamp = layout.state / f"wheel-{device}"
    target = layout.wheels / f"vllm-{package}-{wheels.split_name(base.name)[1]}.whl"
    if target.is_file() and stamp.is_file() and stamp.read_text() == key:
        return target, key
    say(f"packing {target.name}: {sum(c is not None for c in changes.values())} patched file(s)")
    for old in layout.wheels.glob(f"vllm-*uniprefill*{'.cpu' if device == 'cpu' else ''}-*.whl"):
        if (".cpu-" in old.name) == (device == "cpu"):
            old.unlink()
    wheels.rebuild(base, layout.wheels, package, changes, pristine, provenance, drop, add)
    stamp.write_text(key)
    return target, key


def build(layout: Layout, device: str, jobs: int, wheel_only: bool = False) -> Path:
    environment.check_python()
    if device == "cpu":
        compile_cpu.prerequisites()  # before minutes of downloads
    else:
        compile_cpu.check_machine(platform.system(), platform.machine())
    ensure_source(layout, read_upstream(layout.root / "UPSTREAM"), wheel=device == "cuda")
    make_tree.make_tree(layout)
    if not wheel_only or device == "cpu":  # the CPU backend is compiled against its torch
        environment.ensure_venv(device, layout)
    wheel, key = build_wheel(device, layout, jobs)
    stamp = layout.state / "installed"
    if not wheel_only:
        expected = environment.site_packages(layout) / f"vllm-{read_version().package(device)}.dist-info"
        complete = (expected / "RECORD").is_file()
        if not (complete and stamp.is_file() and stamp.read_text() == key):
            environment.install(wheel, layout)
            stamp.write_text(key)
    edited = json.loads(wheel_provenance(wheel))["edited"]
    if edited:
        say(f"note: includes edits of build/tree that no patch has yet: {', '.join(edited[:6])}")
    return wheel


def wheel_provenance(wheel: Path) -> str:
    import zipfile

    version, _ = wheels.split_name(wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(f"vllm-{version}.dist-info/{wheels.PROVENANCE}").decode()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="", help="cpu or cuda; default: cuda where there is a GPU")
    parser.add_argument("--jobs", "-j", type=int, default=compile_cpu.default_jobs(), help="g++ processes")
    parser.add_argument("--wheel-only", action="store_true", help="build the wheel, install nothing")
    args = parser.parse_args()
    layout = Layout()
    device = choose_device(args.device, has_nvidia_gpu())
    with locked(layout):
        wheel = build(layout, device, args.jobs, args.wheel_only)
    say(f"done: {wheel.relative_to(layout.root)}" + ("" if args.wheel_only else ", installed in build/venv"))
    return 0


if __name__ == "__main__":
    run_main(main)
