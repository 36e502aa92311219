"""The patched tree in build/tree and quilt's notes in it (.pc): what is applied, what is edited.

quilt keeps, for each applied patch, each of its files as it was before that patch
(.pc/<patch>/<file>; empty: not there). So the pristine file is the first patch's copy, and
what a patch does is the step from its copy to the next patch's, or to the working file.
"""

from __future__ import annotations

import filecmp
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from scripts import patchfile
from scripts.fork import ForkError, Layout, read_series, write_if_changed

# what running or testing leaves in a tree
_LITTER_FOLDERS = {"__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache", ".pc", "vllm.egg-info"}
_LITTER_ENDINGS = (".orig", ".rej", "~", ".swp")


def read_text(path: Path) -> str | None:
    """A file's text, byte for byte; None where there is none (or, as in quilt, it is empty)."""
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            return stream.read() or None
    except FileNotFoundError:
        return None


def load_series(layout: Layout) -> list[patchfile.Patch]:
    patches = []
    for name, _ in read_series(layout.series):
        path = layout.patches / name
        if not path.is_file():
            raise ForkError(
                f"patches/series names {name}, which patches/ does not hold; delete the line or bring the file."
            )
        patches.append(patchfile.parse(name, path.read_text(encoding="utf-8")))
    return patches


@dataclass
class Steps:
    """The series applied in memory: for each patch, each file before and after it."""

    steps: dict[str, dict[str, tuple[str | None, str | None]]]

    @property
    def first(self) -> dict[str, str | None]:
        files: dict[str, str | None] = {}
        for changes in self.steps.values():
            for path, (before, _) in changes.items():
                files.setdefault(path, before)
        return files

    @property
    def final(self) -> dict[str, str | None]:
        return {path: after for changes in self.steps.values() for path, (_, after) in changes.items()}


def apply_series(patches: list[patchfile.Patch], pristine: Path, named=lambda name: None) -> Steps:
    """Apply at exact lines, in memory, reading only the files touched."""
    now: dict[str, str | None] = {}
    steps: dict[str, dict[str, tuple[str | None, str | None]]] = {}
    for patch in patches:
        named(patch.name)
        changes = steps[patch.name] = {}
        for diff in patch.files:
            if diff.path not in now:
                now[diff.path] = read_text(pristine / diff.path)
            if diff.path in changes:
                raise patchfile.PatchError(f"{patch.name}:{diff.line}: {diff.path} stands twice; run `make refresh`.")
            before = now[diff.path]
            now[diff.path] = patchfile.apply_file(patch.name, diff, before) or None
            changes[diff.path] = (before, now[diff.path])
    return Steps(steps)


def applied_names(layout: Layout) -> list[str]:
    text = read_text(layout.tree / ".pc" / "applied-patches")
    return text.split() if text else []


def working_steps(layout: Layout) -> Steps:
    """What the tree says each applied patch does: quilt's copies and the working files."""
    pc = layout.tree / ".pc"
    steps: dict[str, dict[str, tuple[str | None, str | None]]] = {}
    after: dict[str, str | None] = {}
    for name in reversed(applied_names(layout)):
        changes: dict[str, tuple[str | None, str | None]] = {}
        folder = pc / name
        for copy in sorted(folder.rglob("*")):
            path = copy.relative_to(folder).as_posix()
            if copy.is_file() and path != ".timestamp":
                if path not in after:
                    after[path] = read_text(layout.tree / path)
                changes[path] = (read_text(copy), after[path])
        after |= {path: before for path, (before, _) in changes.items()}
        steps[name] = changes
    return Steps(dict(reversed(steps.items())))


def explains(text: str | None, name: str, changes: dict[str, tuple[str | None, str | None]]) -> set[str]:
    """The paths whose step is what this text of the patch does."""
    if text is None:
        return set()
    try:
        diffs = {diff.path: diff for diff in patchfile.parse(name, text).files}
    except patchfile.PatchError:
        return set()
    explained = set()
    for path, (before, after) in changes.items():
        if path in diffs:
            try:
                if (patchfile.apply_file(name, diffs[path], before) or None) == after:
                    explained.add(path)
            except patchfile.PatchError:
                pass
    return explained


def unrefreshed(layout: Layout, steps: Steps) -> dict[str, list[str]]:
    """Patch -> files that hold edits which neither the patch nor its applied copy makes."""
    found: dict[str, list[str]] = {}
    for name, changes in steps.steps.items():
        rest = {path for path, (before, after) in changes.items() if before != after}
        for text in (read_text(layout.patches / name), read_text(layout.applied / name)):
            rest -= explains(text, name, changes)
        if rest:
            found[name] = sorted(rest)
    return found


def _walk(root: Path) -> dict[str, os.stat_result]:
    files: dict[str, os.stat_result] = {}
    pending = [(str(root), "")]
    while pending:
        folder, prefix = pending.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if entry.name not in _LITTER_FOLDERS:
                        pending.append((entry.path, f"{prefix}{entry.name}/"))
                elif not entry.name.endswith(_LITTER_ENDINGS):
                    files[prefix + entry.name] = entry.stat(follow_symlinks=False)
    return files


def unpatched_edits(layout: Layout, known: set[str]) -> list[str]:
    """Files of the tree that differ from the release and belong to no applied patch."""
    old, new = _walk(layout.pristine), _walk(layout.tree)
    edits = []
    for path in sorted(old.keys() | new.keys()):
        if path in known or path.endswith("cpu_attn_dispatch_generated.h"):
            continue
        a, b = old.get(path), new.get(path)
        same = a and b and (a.st_size, a.st_mtime_ns) == (b.st_size, b.st_mtime_ns)
        if not same and not (a and b and filecmp.cmp(layout.pristine / path, layout.tree / path, shallow=False)):
            edits.append(path)
    return edits


def copy_pristine(layout: Layout) -> None:
    """A fresh build/tree, its time stamps those of the release."""
    fresh = layout.build / f".tree.{os.getpid()}"
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        shutil.copytree(layout.pristine, fresh, symlinks=True)
        shutil.rmtree(layout.tree, ignore_errors=True)
        fresh.replace(layout.tree)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def write_file(path: Path, text: str | None) -> bool:
    if text is None:
        existed = path.exists()
        path.unlink(missing_ok=True)
        return existed
    return write_if_changed(path, text.encode())


def write_pc(layout: Layout, steps: Steps) -> None:
    """quilt's notes, as if quilt had pushed the whole series."""
    pc = layout.tree / ".pc"
    shutil.rmtree(pc, ignore_errors=True)
    for name, changes in steps.steps.items():
        for path, (before, _) in changes.items():
            copy = pc / name / path
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(before or "", encoding="utf-8", newline="")
        (pc / name).mkdir(parents=True, exist_ok=True)
        (pc / name / ".timestamp").touch()
    pc.mkdir(exist_ok=True)
    (pc / ".version").write_text("2\n")
    (pc / ".quilt_patches").write_text("../../patches\n")
    (pc / ".quilt_series").write_text("series\n")
    (pc / "applied-patches").write_text("".join(f"{name}\n" for name in steps.steps))


def record_applied(layout: Layout, names: list[str]) -> None:
    """Keep the patches as they are applied now, to tell an edit of the tree from one of patches/."""
    shutil.rmtree(layout.applied, ignore_errors=True)
    layout.applied.mkdir(parents=True)
    for name in names:
        shutil.copyfile(layout.patches / name, layout.applied / name)


def recorded_is_current(layout: Layout, names: list[str]) -> bool:
    """Whether the series on disk is, byte for byte, the one that was applied."""
    return applied_names(layout) == names and all(
        read_text(layout.applied / name) == read_text(layout.patches / name) for name in names
    )
