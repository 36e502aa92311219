"""Pack what a GPU box without a network lacks into pieces that travel one by one.

    python -m scripts.pack_gpu [--output build/gpu] [--piece-mib N]

The box has what scripts/gpu_image.json lists: a Python, torch, Triton, transformers and more. The
pieces hold the patched CUDA wheel without what the run does not need (DROPPED, by name, with the
reason), the wheels of its other requirements, and the release's own version of every patched file,
so that the box also gets the release to compare with. `install_gpu.py` puts it together there.

Resumable: downloads and compressed members stay in the output folder and are made only once, and
a piece that is there is not written again. Exit status 0: packed; 1: a problem.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import io
import json
import lzma
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from scripts import wheels
from scripts.fork import ROOT, ForkError, Layout, read_upstream, read_version, run_main, say, sha256_file

IMAGE = Path(__file__).with_name("gpu_image.json")
CARRIED_MIB = 64  # what one call may carry, the working tree included
PIECE_MIB = 60

# What the run does not need of the wheel, and why.
DROPPED = {
    "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so": "FlashAttention 2: Hopper runs version 3",
    "vllm/vllm-rs": "the Rust front end: no server is started",
    "vllm/third_party/deep_gemm/*": "fp8 matrix products: weights are bf16",
    "vllm/_deepselect_C.abi3.so": "sparse MLA attention",
    "vllm/_flashkda_C.abi3.so": "linear attention",
    "vllm/_flashmla*_C.abi3.so": "MLA attention",
    "vllm/_qutlass_C.abi3.so": "quantised weights",
    "vllm/third_party/fmha_sm100/*": "Blackwell's attention",
    "vllm/third_party/tml_fa4/*": "Blackwell's attention",
    "vllm/entrypoints/serve/instrumentator/static/*": "the server's documentation pages",
    "vllm/distributed/kv_transfer/*.jpg": "a picture",
}
# Requirements of the server and of things that no part of the run touches.
LEFT_OUT = {
    "fastapi-cli": "the command line of FastAPI",
    "fastapi-cloud-cli": "the command line of FastAPI",
    "sentry-sdk": "the command line of FastAPI",
    "numba": "n-gram speculation; the image has a version of its own",
    "opencv-python-headless": "video; the image has it",
}


def requirements(text: str) -> list[str]:
    """The lines of a requirements file that name a package which the run may need."""
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return [
        line
        for line in lines
        if line and not line.startswith("-") and not wheels.requirement_names(line) & set(LEFT_OUT)
    ]


def pip(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ForkError(
            f"pip {arguments[0]} failed; correct scripts/gpu_image.json or the network:\n{done.stderr[-2000:]}"
        )
    return done.stdout


def target_options(image: dict[str, Any]) -> list[str]:
    options = ["--only-binary=:all:", "--implementation", "cp", "--python-version", image["python"]]
    # pip takes a wheel only for a platform that is named: manylinux_2_17 does not mean 2_28 fits too.
    names = [f"manylinux_2_{minor}" for minor in range(image["glibc_minor"], 4, -1)]
    for name in [*names, "manylinux2014", "manylinux2010", "manylinux1"]:
        options += ["--platform", f"{name}_x86_64"]
    return options


def choose(report: dict[str, Any], image: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, version) of what pip would install and the box lacks, in order of the name."""
    there = {wheels.normalise(name) for name in [*image["packages"], *image["versions"]]} | set(LEFT_OUT)
    found = {wheels.normalise(item["metadata"]["name"]): item["metadata"]["version"] for item in report["install"]}
    return sorted(
        (name, version) for name, version in found.items() if name not in there and not name.startswith("nvidia-")
    )


def resolve(image: dict[str, Any], wanted: Sequence[str], work: Path) -> list[tuple[str, str]]:
    """Ask pip once which versions fit the box's Python and torch."""
    key = hashlib.sha256(json.dumps([image, list(wanted), sorted(LEFT_OUT)]).encode()).hexdigest()
    stamp = work / "resolved.json"
    if stamp.is_file() and (known := json.loads(stamp.read_text()))["key"] == key:
        return [tuple(pair) for pair in known["packages"]]
    say("resolving the requirements for the box's Python")
    fixed = work / "constraints.txt"
    fixed.write_text("".join(f"{name}=={version}\n" for name, version in image["versions"].items()))
    given = work / "requirements.txt"
    given.write_text("\n".join(wanted) + "\n")
    arguments = ["install", "-q", "--dry-run", "--ignore-installed", "--report", work / "report.json", "--target", work]
    pip(*arguments, *target_options(image), "-c", fixed, "-r", given)
    packages = choose(json.loads((work / "report.json").read_text()), image)
    stamp.write_text(json.dumps({"key": key, "packages": packages}))
    return packages


def wheel_of(folder: Path, name: str, version: str) -> Path | None:
    for path in sorted(folder.glob("*.whl")):
        parts = path.name.split("-")
        if (wheels.normalise(parts[0]), parts[1]) == (name, version):
            return path
    return None


def download(image: dict[str, Any], packages: Iterable[tuple[str, str]], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    packages = list(packages)
    missing = [f"{name}=={version}" for name, version in packages if wheel_of(folder, name, version) is None]
    if missing:
        say(f"downloading {len(missing)} wheels")
        pip("download", "-q", "--no-deps", "-d", folder, *target_options(image), *missing)
    found = [wheel_of(folder, name, version) for name, version in packages]
    if None in found:
        raise ForkError("pip downloaded a wheel of another name than asked for; empty build/gpu/wheels and retry.")
    return [path for path in found if path is not None]


def dropped_by(member: str) -> str | None:
    """The pattern of `DROPPED` that leaves a member out."""
    return next((pattern for pattern in DROPPED if fnmatch.fnmatchcase(member, pattern)), None)


def dropped_parts(wheel: Path) -> list[dict[str, Any]]:
    """What is left out of the wheel: pattern, members, bytes in the wheel, reason."""
    found = {pattern: [0, 0] for pattern in DROPPED}
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            if pattern := dropped_by(info.filename):
                found[pattern][0] += 1
                found[pattern][1] += info.compress_size
    return [
        {"pattern": pattern, "members": members, "bytes": size, "reason": DROPPED[pattern]}
        for pattern, (members, size) in found.items()
    ]


def stored(source: Path, leave_out: Callable[[str], bool] = lambda member: False) -> bytes:
    """The wheel with its members uncompressed, so that the archive around it compresses better.

    Args:
        source: a wheel.
        leave_out: members that are not to be in it.

    """
    out = io.BytesIO()
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as target:
        (record,) = [n for n in archive.namelist() if n.endswith(".dist-info/RECORD") and n.count("/") == 1]
        gone = {name for name in archive.namelist() if leave_out(name)}
        for info in archive.infolist():
            if info.filename not in gone | {record}:
                _store(target, info, archive.read(info))
        rows = [line for line in archive.read(record).decode().splitlines() if line.split(",")[0] not in gone]
        _store(target, archive.getinfo(record), ("\n".join(rows) + "\n").encode())
    return out.getvalue()


def is_kernel(member: str) -> bool:
    return member.endswith(".so")


def kernels_wheel(ours: Path) -> tuple[str, bytes]:
    """The compiled libraries that are needed, as a wheel of their own: name and bytes.

    They are the release's, the same with every edit of the patches, and compressing them is what
    takes minutes.
    """
    version = read_upstream().version
    info = f"vllm_kernels-{version}.dist-info/"
    members = {
        info + "METADATA": f"Metadata-Version: 2.1\nName: vllm-kernels\nVersion: {version}\n".encode(),
        info + "WHEEL": b"Wheel-Version: 1.0\nGenerator: pack_gpu\nRoot-Is-Purelib: false\n"
        b"Tag: cp38-abi3-manylinux_2_28_x86_64\n",
    }
    with zipfile.ZipFile(ours) as archive:
        names = [name for name in archive.namelist() if is_kernel(name) and not dropped_by(name)]
        members |= {name: archive.read(name) for name in sorted(names)}
    rows = {name: (wheels.record_hash(data), str(len(data))) for name, data in members.items()}
    members[info + "RECORD"] = wheels.format_record(rows | {info + "RECORD": ("", "")})
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as target:
        for name, data in members.items():
            _store(target, zipfile.ZipInfo(name, (2026, 1, 1, 0, 0, 0)), data)
    return f"vllm_kernels-{version}-cp38-abi3-manylinux_2_28_x86_64.whl", out.getvalue()


def _store(target: zipfile.ZipFile, info: zipfile.ZipInfo, data: bytes) -> None:
    new = zipfile.ZipInfo(info.filename, info.date_time)
    new.external_attr = info.external_attr
    target.writestr(new, data)


def stock_members(release: Path, ours: Path) -> dict[str, bytes | None]:
    """The release's bytes of every member that ours changed; None where ours added it."""
    with zipfile.ZipFile(release) as old, zipfile.ZipFile(ours) as new:
        before = {i.filename: i.CRC for i in old.infolist()}
        found: dict[str, bytes | None] = {}
        for info in new.infolist():
            if ".dist-info/" not in info.filename and before.get(info.filename) != info.CRC:
                found[info.filename] = old.read(info.filename) if info.filename in before else None
        for name in before:
            own_info = name.partition("/")[0].endswith(".dist-info")
            if own_info or name not in new.NameToInfo:
                found[name] = old.read(name)
    return found


def compressed(name: str, data: bytes, cache: Path) -> bytes:
    """One member of a tar archive as an xz stream; made once for the same bytes."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    raw = info.tobuf() + data + bytes(-len(data) % tarfile.BLOCKSIZE)
    known = cache / f"{hashlib.sha256(raw).hexdigest()}.xz"
    if not known.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        partial = known.with_suffix(".part")
        partial.write_bytes(lzma.compress(raw, preset=6))
        partial.replace(known)
    return known.read_bytes()


def write_archive(path: Path, members: Iterable[tuple[str, bytes]], cache: Path) -> None:
    """A tar.xz, one xz stream a member: the same members make the same bytes."""
    partial = path.with_name(f".{path.name}.part")
    with partial.open("wb") as out:
        for name, data in members:
            out.write(compressed(name, data, cache))
        out.write(lzma.compress(bytes(2 * tarfile.BLOCKSIZE)))
    partial.replace(path)


def split(archive: Path, folder: Path, piece_bytes: int) -> list[dict[str, Any]]:
    """Write folder/1/piece, folder/2/piece, …; each piece's number, bytes and sha256."""
    pieces = []
    with archive.open("rb") as source:
        while data := source.read(piece_bytes):
            number = len(pieces) + 1
            digest = hashlib.sha256(data).hexdigest()
            target = folder / str(number) / "piece"
            if not (target.is_file() and sha256_file(target) == digest):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.with_name("piece.part").write_bytes(data)
                target.with_name("piece.part").replace(target)
            pieces.append({"number": number, "bytes": len(data), "sha256": digest})
    for spare in folder.iterdir():
        if spare.name.isdigit() and int(spare.name) > len(pieces):
            shutil.rmtree(spare)
    return pieces


def travelling_bytes(root: Path = ROOT) -> int:
    """What every call carries anyway: files that git tracks or does not ignore."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, text=True)
    names = {root / name for name in done.stdout.split("\0") if name}
    return sum(path.stat().st_size for path in names if path.is_file())


def piece_mib(asked: float | None, tree_bytes: int) -> float:
    """MiB of a piece: at most `PIECE_MIB`, and beside the working tree within what a call carries."""
    room = CARRIED_MIB - 1 - tree_bytes / 2**20
    if asked is None:
        return min(PIECE_MIB, room)
    if not 0 < asked <= PIECE_MIB:
        raise ForkError(f"--piece-mib {asked:g} is not between 0 and {PIECE_MIB}.")
    return asked


def text(data: bytes | None) -> str | None:
    """Patched files are text; None stands for one that the release does not have."""
    return None if data is None else data.decode()


def cuda_wheel(layout: Layout) -> tuple[Path, Path]:
    """The patched wheel as `make wheel DEVICE=cuda` leaves it, and the release's own."""
    command = [sys.executable, "-m", "scripts.build", "--wheel-only", "--device", "cuda"]
    if subprocess.run(command, cwd=layout.root).returncode:
        raise ForkError("The CUDA wheel could not be built; run `make wheel DEVICE=cuda`.")
    upstream, version = read_upstream(), read_version()
    ours = layout.wheels / f"vllm-{version.package('cuda')}-{wheels.split_name(upstream.wheel)[1]}.whl"
    release = layout.archives / upstream.wheel
    for path in (ours, release):
        if not path.is_file():
            raise ForkError(f"{path.name} is missing; run `make wheel DEVICE=cuda` first.")
    return ours, release


def plan(manifest: dict[str, Any], folder: Path, tree_bytes: int) -> str:
    """The calls that bring the pieces and run."""
    try:
        shown = folder.relative_to(ROOT)
    except ValueError:
        shown = folder
    last = len(manifest["pieces"])
    lines = [f"{last} calls to one warm machine, each with the working tree ({tree_bytes / 2**20:.0f} MiB):"]
    for piece in manifest["pieces"]:
        number = piece["number"]
        run = " && make bench-gpu" if number == last else ""
        lines.append(
            f"  {number}. carry {shown}/{number} ({piece['bytes'] / 2**20:.1f} MiB): "
            f"python3 scripts/install_gpu.py {shown}/{number}{run}"
        )
    return "\n".join(lines)


def pack(output: Path, image: dict[str, Any], asked_mib: float | None, layout: Layout) -> dict[str, Any]:
    output.mkdir(parents=True, exist_ok=True)
    ours, release = cuda_wheel(layout)
    wanted = requirements((layout.pristine / "requirements" / "common.txt").read_text())
    packages = resolve(image, wanted, output)
    dependencies = download(image, packages, output / "wheels")
    say("packing (some minutes the first time)")
    stock = stock_members(release, ours)
    name, kernels = kernels_wheel(ours)
    members = [(f"wheels/{name}", kernels)]
    members.append((f"wheels/{ours.name}", stored(ours, lambda member: is_kernel(member) or bool(dropped_by(member)))))
    members += [(f"wheels/{path.name}", stored(path)) for path in dependencies]
    members.append(("stock.json", json.dumps({name: text(data) for name, data in stock.items()}).encode()))
    archive = output / "archive.tar.xz"
    write_archive(archive, members, output / "compressed")
    tree_bytes = travelling_bytes()
    pieces = split(archive, output, int(piece_mib(asked_mib, tree_bytes) * 2**20))
    manifest = {
        "package": read_version().package("cuda"),
        "release": read_upstream().version,
        "python": image["python"],
        "torch": image["versions"]["torch"],
        "archive": {"bytes": archive.stat().st_size, "sha256": sha256_file(archive)},
        "pieces": pieces,
        "wheels": [{"name": path.name, "bytes": path.stat().st_size} for path in [ours, *dependencies]],
        "dropped": dropped_parts(ours),
        "left_out": LEFT_OUT,
    }
    for piece in pieces:
        (output / str(piece["number"]) / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    (output / "plan.txt").write_text(plan(manifest, output, tree_bytes) + "\n")
    return manifest


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.pack_gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu", metavar="FOLDER")
    parser.add_argument("--piece-mib", type=float, metavar="N", help=f"at most {PIECE_MIB} (default: what fits a call)")
    args = parser.parse_args(argv)
    layout = Layout()
    manifest = pack(args.output.resolve(), json.loads(IMAGE.read_text()), args.piece_mib, layout)
    saved = sum(item["bytes"] for item in manifest["dropped"]) / 2**20
    print(f"left out of the wheel, {saved:.0f} MiB:")
    for item in manifest["dropped"]:
        print(f"  {item['pattern']}, {item['bytes'] / 2**20:.1f} MiB: {item['reason']}")
    print((args.output / "plan.txt").read_text(), end="")
    return 0


if __name__ == "__main__":
    run_main(main)
