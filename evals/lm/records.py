"""What a run has been answered so far, on disk: a run that was ended goes on where it stopped."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scripts.fork import ForkError, sha256_file

HASHED_SIZE = 64 << 20  # of greater files only the size counts


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def model_fingerprint(model: str) -> Any:
    """A local model's files, or a hub name as it is."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [(f.name, f.stat().st_size, sha256_file(f) if f.stat().st_size <= HASHED_SIZE else "") for f in files]


class Records:
    """Answers and times by key, appended to a file of one JSON object a line."""

    def __init__(self, path: Path, lines: list[dict[str, Any]], stream: Any) -> None:
        self.path = path
        self.values = {line["key"]: line["value"] for line in lines}
        self._stream = stream

    def get(self, what: Mapping[str, Any]) -> Any:
        return self.values.get(digest(what))

    def kept(self, what: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """What is recorded, or else made and recorded."""
        if (value := self.get(what)) is None:
            value = make()
            self.add(what, value)
        return value

    def add(self, what: Mapping[str, Any], value: Any) -> None:
        """Kept even if the process is killed right after."""
        key = digest(what)
        self.values[key] = value
        self._stream.write(json.dumps({"key": key, "value": value}) + "\n")
        self._stream.flush()


@contextmanager
def open_records(folder: Path, settings: Mapping[str, Any], fresh: bool) -> Iterator[Records]:
    """The records of runs with these settings; a line that was cut off when its run was killed is dropped.

    Raises:
        ForkError: if another run with the same settings is going on.

    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{digest(settings)[:16]}.jsonl"
    with path.open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ForkError(f"Another run with the same settings writes {path}; wait for it or end it.") from None
        stream.seek(0)
        text = "" if fresh else stream.read()
        whole = text[: text.rfind("\n") + 1]
        stream.seek(0)
        stream.truncate()
        stream.write(whole)
        stream.flush()
        yield Records(path, [json.loads(line) for line in whole.splitlines()], stream)
