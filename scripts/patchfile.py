"""Patches as data: read a .patch, apply it at exact lines in memory, write it canonically.

Canonical is what quilt writes with scripts/quiltrc: -p1 with a/ and b/, three lines of
context, files sorted by name, no time stamps, no index lines.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from scripts.fork import ForkError

_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@(.*)")
_FIELD = re.compile(r"([A-Z][A-Za-z-]+):(?: (.*))?$")


class PatchError(ForkError):
    """A patch that is malformed or does not fit; says patch, file, line, expected, found."""


@dataclass
class Hunk:
    line: int  # where its @@ stands in the .patch
    start: int
    old_count: int
    new_start: int
    new_count: int
    section: str = ""
    body: list[str] = field(default_factory=list)  # ' ', '-' or '+', then text with its newline

    @property
    def old(self) -> list[str]:
        return [text[1:] for text in self.body if text[0] in " -"]

    @property
    def new(self) -> list[str]:
        return [text[1:] for text in self.body if text[0] in " +"]


@dataclass
class FileDiff:
    line: int
    path: str
    created: bool
    deleted: bool
    hunks: list[Hunk] = field(default_factory=list)

    @property
    def changed(self) -> int:
        return sum(text[0] in "+-" for hunk in self.hunks for text in hunk.body)


@dataclass
class Patch:
    name: str
    header: str
    files: list[FileDiff]

    @property
    def fields(self) -> dict[str, str]:
        return parse_fields(self.header)

    @property
    def paths(self) -> list[str]:
        return [diff.path for diff in self.files]


def parse_fields(header: str) -> dict[str, str]:
    """DEP-3 fields; a line that starts with a blank continues the field, ' .' is an empty line."""
    fields: dict[str, str] = {}
    current = None
    for line in header.splitlines():
        match = _FIELD.match(line)
        if match:
            current = match[1]
            fields[current] = (match[2] or "").strip()
        elif current and line.startswith(" "):
            text = "" if line.strip() == "." else line.strip()
            fields[current] += "\n" + text
        else:
            current = None
    return {key: value.strip() for key, value in fields.items()}


def split_lines(text: str) -> list[str]:
    """Lines with their newline, split at newlines only (not at form feeds and the like)."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def _path_of(line: str, prefix: str, name: str, number: int) -> str:
    path = line[4:].rstrip("\n")
    if "\t" in path:
        path = path.split("\t")[0]
    if path == "/dev/null":
        return path
    if not path.startswith(prefix) or ".." in Path(path).parts:
        raise PatchError(f"{name}:{number}: expected a path under {prefix}, found {path!r}; run `make refresh`.")
    return path[len(prefix) :]


def parse(name: str, text: str) -> Patch:
    lines = split_lines(text)
    first = next((i for i, line in enumerate(lines) if line.startswith("--- ")), len(lines))
    files: list[FileDiff] = []
    i = first
    while i < len(lines):
        if not lines[i].startswith("--- "):
            raise PatchError(f"{name}:{i + 1}: expected '--- a/…', found {lines[i].rstrip()!r}; run `make refresh`.")
        if i + 1 >= len(lines) or not lines[i + 1].startswith("+++ "):
            raise PatchError(f"{name}:{i + 2}: expected '+++ b/…'; run `make refresh`.")
        old = _path_of(lines[i], "a/", name, i + 1)
        new = _path_of(lines[i + 1], "b/", name, i + 2)
        path = new if old == "/dev/null" else old
        if "/dev/null" not in (old, new) and old != new:
            raise PatchError(f"{name}:{i + 2}: expected b/{old}, found b/{new}; run `make refresh`.")
        diff = FileDiff(i + 1, path, old == "/dev/null", new == "/dev/null")
        i += 2
        while i < len(lines) and lines[i].startswith("@@"):
            hunk, i = _parse_hunk(name, lines, i)
            diff.hunks.append(hunk)
        if not diff.hunks:
            raise PatchError(f"{name}:{diff.line}: no hunk for {path}; run `make refresh`.")
        # a hunk that starts at line 0 makes the file, as quilt writes it: without /dev/null
        diff.created = diff.created or (diff.hunks[0].start == 0 and not diff.hunks[0].old_count)
        diff.deleted = diff.deleted or (diff.hunks[0].new_start == 0 and not diff.hunks[0].new_count)
        files.append(diff)
    return Patch(name, "".join(lines[:first]), files)


def _parse_hunk(name: str, lines: list[str], i: int) -> tuple[Hunk, int]:
    match = _HUNK.match(lines[i])
    if not match:
        raise PatchError(f"{name}:{i + 1}: not a hunk header: {lines[i].rstrip()!r}.")
    hunk = Hunk(
        i + 1,
        int(match[1]),
        int(match[2] if match[2] is not None else 1),
        int(match[3]),
        int(match[4] if match[4] is not None else 1),
        match[5],
    )
    olds = news = 0
    i += 1
    while olds < hunk.old_count or news < hunk.new_count:
        if i >= len(lines) or lines[i][0] not in " +-":
            found = lines[i].rstrip("\n") if i < len(lines) else "the end of the patch"
            raise PatchError(
                f"{name}:{i + 1}: the hunk of line {hunk.line} says -{hunk.old_count} "
                f"+{hunk.new_count} lines and has -{olds} +{news}, then {found!r}; never edit a "
                ".patch by hand: `make tree`, edit build/tree, `make refresh`."
            )
        text = lines[i]
        olds += text[0] in " -"
        news += text[0] in " +"
        i += 1
        if i < len(lines) and lines[i].startswith("\\ "):
            text = text.rstrip("\n")
            i += 1
        hunk.body.append(text)
    return hunk, i


def apply_file(patch: str, diff: FileDiff, before: str | None) -> str | None:
    """The file after the diff; None is a file that is not there. No offset, no fuzz."""
    where = f"{patch}:{diff.line}: {diff.path}"
    if diff.created and before:  # an empty file counts as absent, as in quilt
        raise PatchError(f"{where}: the patch creates this file, but it is there already.")
    if not diff.created and before is None:
        raise PatchError(f"{where}: the file to change does not exist.")
    lines = split_lines(before or "")
    out: list[str] = []
    at = 0
    for hunk in diff.hunks:
        start = hunk.start - (1 if hunk.old_count else 0)
        if start < at:
            raise PatchError(f"{patch}:{hunk.line}: {diff.path}: hunks overlap or are out of order.")
        out += lines[at:start]
        for offset, expected in enumerate(hunk.old):
            index = start + offset
            found = lines[index] if index < len(lines) else "(end of file)"
            if found != expected:
                raise PatchError(
                    f"{patch}:{hunk.line}: {diff.path} line {index + 1}: expected "
                    f"{expected.rstrip(chr(10))!r}, found {found.rstrip(chr(10))!r}."
                )
        out += hunk.new
        at = start + hunk.old_count
    out += lines[at:]
    return None if diff.deleted else "".join(out)


def find_offset(hunk: Hunk, lines: list[str], start: int) -> int | None:
    """How many lines off the hunk's old text stands, the nearest place; None when nowhere."""
    old = hunk.old
    places = [at - start for at in range(len(lines) - len(old) + 1) if lines[at : at + len(old)] == old]
    return min(places, key=abs) if places else None


def gnu_diff(path: str, before: str | None, after: str | None) -> str:
    """One file's canonical diff by GNU diff; '' when nothing changed."""
    if before == after:
        return ""
    with tempfile.TemporaryDirectory() as folder:
        old, new = Path(folder, "old"), Path(folder, "new")
        old.write_text(before or "", newline="")
        new.write_text(after or "", newline="")
        labels = [
            "/dev/null" if before is None else f"a/{path}",
            "/dev/null" if after is None else f"b/{path}",
        ]
        done = subprocess.run(
            ["diff", "-U3", "--label", labels[0], "--label", labels[1], str(old), str(new)],
            capture_output=True,
            text=True,
        )
    if done.returncode > 1:
        raise ForkError(f"diff failed on {path}: {done.stderr.strip()}")
    return done.stdout


def render(header: str, changes: dict[str, tuple[str | None, str | None]]) -> str:
    """A canonical patch: the header as it is, then each changed file, sorted."""
    body = "".join(gnu_diff(path, *changes[path]) for path in sorted(changes))
    head = header.rstrip("\n")
    return (head + "\n\n" if head else "") + body
