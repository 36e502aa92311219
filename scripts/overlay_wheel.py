"""Write the patched files of our CUDA wheel over the release that this Python has installed.

For the CUDA image: the official vLLM image keeps its own compiled kernels, which were made for its
CUDA and torch, and gets only the Python that the patches change and our metadata.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import io
import py_compile
import shutil
import zipfile
from pathlib import Path

from scripts import wheels
from scripts.fork import ForkError, read_upstream, read_version, run_main, say

VERSION_FILE = "vllm/_version.py"


def changed(release: Path, patched: Path) -> tuple[dict[str, tuple[bytes, str | None]], set[str]]:
    """What the patched wheel has other than the release's, metadata apart.

    Returns member -> (new bytes, the release's record hash or None where it has no such member),
    and the members that the patched wheel has no longer.
    """
    with zipfile.ZipFile(release) as old, zipfile.ZipFile(patched) as new:
        before = wheels.read_record(old, wheels.split_name(release.name)[0])
        after = wheels.read_record(new, wheels.split_name(patched.name)[0])
        rows = {name: row for name, row in after.items() if ".dist-info/" not in name and before.get(name) != row}
        gone = {name for name in before if ".dist-info/" not in name and name not in after}
        return {name: (new.read(name), before.get(name, (None,))[0]) for name in rows}, gone


def overlay(release: Path, patched: Path, site: Path) -> int:
    """Bring the release installed in `site` to the patched wheel; the number of files written.

    Raises ForkError where `site` has another release, or where a file to be replaced is not the release's.
    """
    old_version, new_version = (wheels.split_name(path.name)[0] for path in (release, patched))
    old_info, new_info = (site / f"vllm-{version}.dist-info" for version in (old_version, new_version))
    if not (old_info / "RECORD").is_file():
        found = ", ".join(sorted(path.name for path in site.glob("vllm-*.dist-info"))) or "no vLLM"
        raise ForkError(f"{site} has {found}, and the patches are for {old_version}: set VLLM_IMAGE to that release.")
    files, gone = changed(release, patched)
    for name, (_, expected) in files.items():
        present = site / name
        found = wheels.record_hash(present.read_bytes()) if present.is_file() else None
        if name != VERSION_FILE and found != expected:
            raise ForkError(f"{present} is not as vLLM {old_version} has it: set VLLM_IMAGE to an unchanged image.")
    rows = {row[0]: (row[1], row[2]) for row in csv.reader(io.StringIO((old_info / "RECORD").read_text())) if row}
    rows = {name: row for name, row in rows.items() if not name.startswith(f"{old_info.name}/") and name not in gone}
    for name in gone:
        (site / name).unlink(missing_ok=True)
    for name, (data, _) in files.items():
        target = site / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        rows[name] = (wheels.record_hash(data), str(len(data)))
        if target.suffix == ".py":
            py_compile.compile(str(target), doraise=True)
    with zipfile.ZipFile(patched) as archive:
        for name in archive.namelist():
            if name.startswith(f"{new_info.name}/") and not name.endswith("/RECORD"):
                target = site / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))
                rows[name] = (wheels.record_hash(target.read_bytes()), str(target.stat().st_size))
    for extra in ("INSTALLER", "REQUESTED"):
        if (old_info / extra).is_file():
            shutil.copyfile(old_info / extra, new_info / extra)
            data = (new_info / extra).read_bytes()
            rows[f"{new_info.name}/{extra}"] = (wheels.record_hash(data), str(len(data)))
    rows[f"{new_info.name}/RECORD"] = ("", "")
    (new_info / "RECORD").write_bytes(wheels.format_record(rows))
    shutil.rmtree(old_info)
    return len(files)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("build", type=Path, help="the build folder, in which `make wheel DEVICE=cuda` was run")
    args = parser.parse_args()
    upstream, version = read_upstream(), read_version()
    tags = wheels.split_name(upstream.wheel)[1]
    patched = args.build / "wheels" / f"vllm-{version.package('cuda')}-{tags}.whl"
    try:
        site = Path(str(importlib.metadata.distribution("vllm").locate_file("")))
    except importlib.metadata.PackageNotFoundError:
        raise ForkError("This Python has no vLLM: set VLLM_IMAGE to vLLM's official image.") from None
    written = overlay(args.build / "archives" / upstream.wheel, patched, site)
    say(f"{site}: {written} file(s) of {patched.name} over vLLM {upstream.version}")
    return 0


if __name__ == "__main__":
    run_main(main)
