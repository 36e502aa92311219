"""Make our wheel out of one that exists: replace what the patches change, copy the rest as it is.

The base is the release's own wheel (CUDA) or one packed from the sdist and the library
compiled here (CPU). Unchanged members are copied in their compressed form, so the release's
kernels stay what they were, bit for bit, and the work takes seconds.
"""

from __future__ import annotations

import base64
import copy
import csv
import hashlib
import io
import json
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

from scripts.fork import ForkError

NAME = "vllm"
PROVENANCE = "uniprefill.json"
_WHEEL = re.compile(r"vllm-(?P<version>[^-]+)-(?P<tags>[^-]+-[^-]+-[^-]+)\.whl")
_FIXED_TIME = (2026, 1, 1, 0, 0, 0)  # the same input makes the same wheel


def record_hash(data: bytes) -> str:
    digest = hashlib.sha256(data).digest()
    return "sha256=" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def split_name(filename: str) -> tuple[str, str]:
    match = _WHEEL.fullmatch(filename)
    if not match:
        raise ForkError(f"{filename} is not named like a vLLM wheel.")
    return match["version"], match["tags"]


def version_file(original: str, old: str, new: str) -> str:
    """`_version.py` with our version; the commit it names stays the release's."""
    parts = [int(p) if p.isdigit() else p for p in old.split(".")]
    local = new.partition("+")[2]
    changes = [
        (f"__version__ = version = '{old}'", f"__version__ = version = '{new}'"),
        (
            f"__version_tuple__ = version_tuple = {tuple(parts)!r}",
            f"__version_tuple__ = version_tuple = {(*parts, local)!r}",
        ),
    ]
    for before, after in changes:
        if original.count(before) != 1:
            raise ForkError(f"vllm/_version.py: expected the line {before!r}; correct UPSTREAM.")
        original = original.replace(before, after)
    return original


def rewrite_metadata(text: str, version: str, drop: set[str], add: list[str]) -> str:
    """METADATA with our version, without some requirements and with others."""
    head, gap, body = text.partition("\n\n")
    lines = []
    for line in head.split("\n"):
        if line.startswith("Version: "):
            line = f"Version: {version}"
        if line.startswith("Requires-Dist: "):
            name = re.match(r"Requires-Dist: ([A-Za-z0-9._-]+)", line)
            if name and normalise(name[1]) in drop and "extra ==" not in line:
                continue
        if line.startswith("Provides-Extra: ") and add:
            lines += [f"Requires-Dist: {requirement}" for requirement in add]
            add = []
        lines.append(line)
    lines += [f"Requires-Dist: {requirement}" for requirement in add]
    return "\n".join(lines) + gap + body


def normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_names(text: str) -> set[str]:
    """The project names in a requirements file."""
    names = set()
    for line in text.splitlines():
        match = re.match(r"([A-Za-z0-9][A-Za-z0-9._-]*)", line.strip())
        if match:
            names.add(normalise(match[1]))
    return names


def copy_member(source: zipfile.ZipFile, info: zipfile.ZipInfo, out: zipfile.ZipFile) -> None:
    """One member as it is, still compressed (zipfile itself can only recompress)."""
    stream = source.fp
    stream.seek(info.header_offset)
    fixed = stream.read(30)
    if fixed[:4] != b"PK\x03\x04":
        raise ForkError(f"{info.filename}: not a zip member; fetch the wheel again.")
    name_length, extra_length = struct.unpack("<HH", fixed[26:30])
    stream.seek(name_length + extra_length, io.SEEK_CUR)
    new = copy.copy(info)
    new.flag_bits &= ~0x08  # sizes stand in the header, not behind the data
    new.extra = b""
    out.fp.seek(out.start_dir)
    new.header_offset = out.fp.tell()
    out.fp.write(new.FileHeader())
    left = info.compress_size
    while left:
        chunk = stream.read(min(left, 1 << 20))
        if not chunk:
            raise ForkError(f"{info.filename}: the wheel is cut short; fetch it again.")
        out.fp.write(chunk)
        left -= len(chunk)
    out.start_dir = out.fp.tell()
    out.filelist.append(new)
    out.NameToInfo[new.filename] = new
    out._didModify = True


def add_member(out: zipfile.ZipFile, name: str, data: bytes, mode: int = 0o644) -> None:
    info = zipfile.ZipInfo(name, _FIXED_TIME)
    info.external_attr = (0o100000 | mode) << 16
    info.compress_type = zipfile.ZIP_DEFLATED
    out.writestr(info, data, compresslevel=1)


def read_record(wheel: zipfile.ZipFile, version: str) -> dict[str, tuple[str, str]]:
    text = wheel.read(f"{NAME}-{version}.dist-info/RECORD").decode()
    return {row[0]: (row[1], row[2]) for row in csv.reader(io.StringIO(text)) if row}


def format_record(rows: Mapping[str, tuple[str, str]]) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for path in sorted(rows):
        writer.writerow([path, *rows[path]])
    return out.getvalue().encode()


def rebuild(
    base: Path,
    folder: Path,
    version: str,
    changes: Mapping[str, bytes | None],
    pristine: Mapping[str, bytes | None],
    provenance: dict[str, object],
    drop: set[str] = frozenset(),
    add: list[str] | None = None,
) -> Path:
    """Write the wheel of `version` into `folder`.

    changes: member -> new bytes, or None to leave it out. pristine: what the release has under
    the same names; a base that has something else is refused.
    """
    old_version, tags = split_name(base.name)
    target = folder / f"{NAME}-{version}-{tags}.whl"
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{target.name}.part"
    old_info, new_info = f"{NAME}-{old_version}.dist-info/", f"{NAME}-{version}.dist-info/"
    with zipfile.ZipFile(base) as source, zipfile.ZipFile(partial, "w") as out:
        old_rows = read_record(source, old_version)
        for name, before in pristine.items():
            row = old_rows.get(name)
            if row and (before is None or record_hash(before) != row[0]):
                raise ForkError(
                    f"{base.name}: {name} is not the sdist's; sdist and wheel in UPSTREAM are not of one release."
                )
        # the commit's file carries the version, so it always changes
        changes = dict(changes)
        own = changes.get("vllm/_version.py") or source.read("vllm/_version.py")
        upstream = old_version.partition("+")[0]
        changes["vllm/_version.py"] = version_file(own.decode(), upstream, version).encode()

        rows: dict[str, tuple[str, str]] = {}
        for info in source.infolist():
            name = info.filename
            if name in changes or name.startswith(old_info):
                continue
            copy_member(source, info, out)
            rows[name] = old_rows[name]
        metadata = {}
        for info in source.infolist():
            if info.filename.startswith(old_info) and not info.filename.endswith("RECORD"):
                metadata[new_info + info.filename.removeprefix(old_info)] = source.read(info)
        text = metadata[new_info + "METADATA"].decode()
        metadata[new_info + "METADATA"] = rewrite_metadata(text, version, set(drop), list(add or [])).encode()
        metadata[new_info + PROVENANCE] = (json.dumps(provenance, indent=2, sort_keys=True) + "\n").encode()
        fresh = {name: data for name, data in changes.items() if data is not None} | metadata
        for name in sorted(fresh):
            add_member(out, name, fresh[name])
            rows[name] = (record_hash(fresh[name]), str(len(fresh[name])))
        rows[new_info + "RECORD"] = ("", "")
        add_member(out, new_info + "RECORD", format_record(rows))
    partial.replace(target)
    return target


def pack_base(pristine: Path, library: Path, version: str, target: Path) -> None:
    """A wheel of the untouched sdist and the library compiled here: the CPU build's base."""
    info = f"{NAME}-{version}.dist-info/"
    egg = pristine / "vllm.egg-info"
    members: dict[str, Path | bytes] = {
        path.relative_to(pristine).as_posix(): path
        for path in sorted((pristine / NAME).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    members[f"{NAME}/{library.name}"] = library
    members[info + "METADATA"] = pristine / "PKG-INFO"
    members[info + "entry_points.txt"] = egg / "entry_points.txt"
    members[info + "top_level.txt"] = egg / "top_level.txt"
    members[info + "licenses/LICENSE"] = pristine / "LICENSE"
    tag = split_name(target.name)[1]
    members[info + "WHEEL"] = (
        f"Wheel-Version: 1.0\nGenerator: uniprefill-vllm\nRoot-Is-Purelib: false\nTag: {tag}\n\n"
    ).encode()
    rows: dict[str, tuple[str, str]] = {}
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.part")
    with zipfile.ZipFile(partial, "w") as out:
        for name, source in members.items():
            data = source if isinstance(source, bytes) else source.read_bytes()
            executable = isinstance(source, Path) and source.stat().st_mode & 0o100
            add_member(out, name, data, 0o755 if executable else 0o644)
            rows[name] = (record_hash(data), str(len(data)))
        rows[info + "RECORD"] = ("", "")
        add_member(out, info + "RECORD", format_record(rows))
    partial.replace(target)


def changed_members(pristine: Path, tree: Path, paths: list[str]) -> tuple[dict, dict]:
    """The package's files among `paths`: their new bytes and the release's (None: not there)."""

    def read(root: Path, path: str) -> bytes | None:
        file = root / path
        return file.read_bytes() if file.is_file() else None

    wanted = [path for path in paths if path.startswith(f"{NAME}/")]
    return {p: read(tree, p) for p in wanted}, {p: read(pristine, p) for p in wanted}
