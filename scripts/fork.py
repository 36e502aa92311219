"""What every script of the fork shares: where things lie, what is pinned, how errors are said."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
AREAS = ("platform", "core", "worker", "serving")


class ForkError(Exception):
    """A problem the user can mend; its text is one sentence (or one a line) with the remedy."""


@dataclass(frozen=True)
class Layout:
    """The folders of one checkout."""

    root: Path = ROOT

    @property
    def patches(self) -> Path:
        return self.root / "patches"

    @property
    def series(self) -> Path:
        return self.patches / "series"

    @property
    def build(self) -> Path:
        return self.root / "build"

    @property
    def archives(self) -> Path:
        return self.build / "archives"

    @property
    def pristine(self) -> Path:
        """The unpacked sdist, never edited."""
        return self.build / "pristine"

    @property
    def tree(self) -> Path:
        """The sdist with the series applied: quilt's working tree."""
        return self.build / "tree"

    @property
    def applied(self) -> Path:
        """Copies of the patches as they were when they were applied to the tree."""
        return self.build / "state" / "applied"

    @property
    def state(self) -> Path:
        return self.build / "state"

    @property
    def wheels(self) -> Path:
        return self.build / "wheels"

    @property
    def venv(self) -> Path:
        return self.build / "venv"

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"


@dataclass(frozen=True)
class Upstream:
    """The pinned release."""

    tag: str
    commit: str
    sdist: str
    sdist_sha256: str
    wheel: str
    wheel_sha256: str

    @property
    def version(self) -> str:
        return self.tag.removeprefix("v")


def read_upstream(path: Path = ROOT / "UPSTREAM") -> Upstream:
    try:
        fields = {key.replace("-", "_"): value for key, value in tomllib.loads(path.read_text()).items()}
    except tomllib.TOMLDecodeError as error:
        raise ForkError(f"{path.name} is not TOML ({error}); correct it.") from None
    missing = [key for key in Upstream.__dataclass_fields__ if not isinstance(fields.get(key), str)]
    if missing:
        raise ForkError(f"{path.name} lacks {', '.join(m.replace('_', '-') for m in missing)}.")
    return Upstream(**{key: fields[key] for key in Upstream.__dataclass_fields__})


@dataclass(frozen=True)
class Version:
    """VERSION: the upstream version, a dash, our revision."""

    upstream: str
    revision: int

    def package(self, device: str) -> str:
        """The version the built package carries."""
        return f"{self.upstream}+uniprefill.{self.revision}" + (".cpu" if device == "cpu" else "")


def read_version(path: Path = ROOT / "VERSION") -> Version:
    text = path.read_text().strip()
    match = re.fullmatch(r"(\d+\.\d+\.\d+)-(\d+)", text)
    if not match:
        raise ForkError(f"{path.name} must read like 0.32.0-1, found {text!r}.")
    return Version(match[1], int(match[2]))


def read_series(series: Path) -> list[tuple[str, str]]:
    """The patches in order, each with the section (comment line) it stands under."""
    section, entries = "", []
    for line in series.read_text().splitlines():
        if line.startswith("#"):
            section = line.lstrip("# ").split(":")[0].split(" ")[0].strip()
        elif line.strip():
            entries.append((line.strip(), section))
    return entries


def series_sha256(layout: Layout) -> str:
    """One hash of everything the series does: the names in order and each patch's bytes."""
    digest = hashlib.sha256()
    for name, _ in read_series(layout.series):
        digest.update(f"{name}\0".encode() + (layout.patches / name).read_bytes() + b"\0")
    return digest.hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def cache_dir() -> Path:
    """The user's cache for verified archives and compiled objects, keyed by hash."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "uniprefill-vllm"


def write_if_changed(path: Path, data: bytes) -> bool:
    """Write atomically, and leave an identical file (and its time stamp) alone."""
    if path.is_file() and path.read_bytes() == data:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    partial.write_bytes(data)
    if path.exists():
        partial.chmod(path.stat().st_mode & 0o777)
    partial.replace(path)
    return True


_started = time.monotonic()


def say(text: str) -> None:
    """Progress, on stderr, with the seconds since the script began."""
    print(f"[{time.monotonic() - _started:6.1f}s] {text}", file=sys.stderr, flush=True)


def run_main(main: Callable[[], int | None]) -> None:
    """Run a script: 0 done, 1 a problem the user can mend, 130 interrupted."""
    try:
        status = main() or 0
        sys.stdout.flush()
    except ForkError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        status = 141
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)
