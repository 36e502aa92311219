"""Fetch the pinned release (sdist, for CUDA also its wheel), verify it, unpack the sdist.

Looks in build/archives, then in the user's cache, then in the package index that pip is
configured for; a file whose sha256 is not the one in UPSTREAM is refused.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import tarfile
from pathlib import Path

from scripts import package_index
from scripts.fork import (
    ForkError,
    Layout,
    Upstream,
    cache_dir,
    read_upstream,
    read_version,
    run_main,
    say,
    sha256_file,
)


def verify(path: Path, expected: str) -> None:
    found = sha256_file(path)
    if found != expected:
        raise ForkError(
            f"{path.name}: expected sha256 {expected} (UPSTREAM), found {found}; delete {path} and run `make source`."
        )


def link_or_copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    shutil.copyfile(source, partial)
    partial.replace(target)


def fetch(filename: str, sha256: str, layout: Layout, cache: Path | None = None, *, project: str = "vllm") -> Path:
    """A project's verified file in build/archives."""
    target = layout.archives / filename
    stamp = layout.state / f"{filename}.verified"
    cached = (cache or cache_dir()) / "archives" / sha256 / filename
    if target.is_file():
        seen = f"{sha256} {target.stat().st_size} {target.stat().st_mtime_ns}"
        if stamp.is_file() and stamp.read_text() == seen:
            return target
    elif cached.is_file():
        say(f"{filename}: from the cache")
        link_or_copy(cached, target)
    else:
        say(f"{filename}: downloading")
        package_index.download(project, filename, target)
    verify(target, sha256)
    if not cached.is_file():
        link_or_copy(target, cached)
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stat = target.stat()
    stamp.write_text(f"{sha256} {stat.st_size} {stat.st_mtime_ns}")
    return target


def named_commit(version_file: str) -> str | None:
    """The commit that a release's `_version.py` names (it writes a g before it)."""
    match = re.search(r"__commit_id__ = commit_id = '(g?)([0-9a-f]+)'", version_file)
    return match[2] if match else None


def extract(tar: tarfile.TarFile, folder: Path) -> None:
    """Unpack a verified archive; Python before 3.11.4 (Debian 12's, too) has no extraction filters."""
    tar.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))


def unpack(archive: Path, upstream: Upstream, layout: Layout) -> bool:
    """Unpack the sdist to build/pristine, once; False when it was there."""
    stamp = layout.state / "pristine"
    if stamp.is_file() and stamp.read_text() == upstream.sdist_sha256 and layout.pristine.is_dir():
        return False
    say(f"{archive.name}: unpacking")
    fresh = layout.build / f".pristine.{os.getpid()}"
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        with tarfile.open(archive) as tar:
            extract(tar, fresh)
        (inner,) = fresh.iterdir()
        version_file = inner / "vllm" / "_version.py"
        commit = named_commit(version_file.read_text()) if version_file.is_file() else None
        if commit != upstream.commit:
            raise ForkError(
                f"{archive.name}: expected commit {upstream.commit} (UPSTREAM) in "
                f"vllm/_version.py, found {commit}; correct UPSTREAM."
            )
        shutil.rmtree(layout.pristine, ignore_errors=True)
        inner.replace(layout.pristine)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.write_text(upstream.sdist_sha256)
    return True


def ensure_source(layout: Layout, upstream: Upstream, wheel: bool = False) -> Path:
    """Everything verified and unpacked; returns the pristine tree."""
    archive = fetch(upstream.sdist, upstream.sdist_sha256, layout)
    unpack(archive, upstream, layout)
    if wheel:
        fetch(upstream.wheel, upstream.wheel_sha256, layout)
    return layout.pristine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheel", action="store_true", help="also the release's CUDA wheel")
    args = parser.parse_args()
    layout, upstream = Layout(), read_upstream()
    if read_version().upstream != upstream.version:
        raise ForkError("VERSION and the tag in UPSTREAM name different releases; correct one.")
    ensure_source(layout, upstream, args.wheel)
    say(f"vLLM {upstream.version} ({upstream.commit}) verified in {layout.build.name}/")
    return 0


if __name__ == "__main__":
    run_main(main)
