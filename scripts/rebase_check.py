"""Try the series on another release, in memory: what would a rebase meet?

For each patch, in order and on top of the ones before it: clean (every line where it was),
offset (the same text a few lines off), already upstream (the release holds what the patch
adds), or conflict (with the place and what stands there). Exit status 0 only when every
patch is clean or offset. Nothing of this checkout changes but build/rebase.
"""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

from scripts import package_index, patchfile, tree
from scripts.fetch_source import extract, named_commit
from scripts.fork import ForkError, Layout, run_main, say, sha256_file

CLEAN, OFFSET, UPSTREAM, CONFLICT = "clean", "offset", "already upstream", "conflict"


@dataclass
class Verdict:
    name: str
    outcome: str
    notes: list[str] = field(default_factory=list)


def locate(lines: list[str], block: list[str], near: int) -> int | None:
    places = [at for at in range(len(lines) - len(block) + 1) if lines[at : at + len(block)] == block]
    return min(places, key=lambda at: abs(at - near)) if places else None


def closest(lines: list[str], hunk: patchfile.Hunk, near: int) -> str:
    """The first line of the hunk's old text that stands elsewhere or nowhere."""
    window = lines[max(0, near - 200) : near + 200]
    for expected in hunk.old:
        if expected.strip() and expected not in window:
            similar = difflib.get_close_matches(expected, window, n=1, cutoff=0.6)
            found = repr(similar[0].rstrip("\n")) if similar else "nothing like it"
            return f"expected {expected.rstrip(chr(10))!r}, found {found}"
    return "its lines are there, but no longer together"


def try_file(name: str, diff: patchfile.FileDiff, before: str | None) -> tuple[str, list[str], str | None]:
    """(outcome, notes, the file after what could be applied)."""
    where = f"{name}:{diff.line}: {diff.path}"
    if diff.created:
        after = "".join(diff.hunks[0].new)
        if before is None:
            return CLEAN, [], after
        same = before == after
        return (UPSTREAM, [], before) if same else (CONFLICT, [f"{where}: is there already"], before)
    if before is None:
        return (UPSTREAM, [], None) if diff.deleted else (CONFLICT, [f"{where}: is gone"], None)
    outcomes, notes = [], []
    lines, shift = patchfile.split_lines(before), 0
    for hunk in diff.hunks:
        near = hunk.start - (1 if hunk.old_count else 0) + shift
        at = near if lines[near : near + len(hunk.old)] == hunk.old else locate(lines, hunk.old, near)
        there = locate(lines, hunk.new, near) if hunk.new else None
        # what a hunk that only adds asks for stays true after it: then the added text decides
        if there is not None and (at is None or there <= at < there + len(hunk.new)):
            outcomes.append(UPSTREAM)
            continue
        if at is None:
            outcomes.append(CONFLICT)
            notes.append(f"{name}:{hunk.line}: {diff.path} line {near + 1}: {closest(lines, hunk, near)}")
            continue
        outcomes.append(CLEAN if at == near else OFFSET)
        if at != near:
            notes.append(f"{name}:{hunk.line}: {diff.path}: {at - near:+d} lines")
        lines[at : at + len(hunk.old)] = hunk.new
        shift += len(hunk.new) - len(hunk.old) + (at - near)
    if CONFLICT in outcomes:
        outcome = CONFLICT
    elif set(outcomes) == {UPSTREAM}:
        outcome = UPSTREAM
    elif UPSTREAM in outcomes:
        outcome, notes = CONFLICT, [*notes, f"{where}: some of its hunks are upstream already"]
    else:
        outcome = OFFSET if OFFSET in outcomes else CLEAN
    after = None if diff.deleted and outcome in (CLEAN, OFFSET) else "".join(lines)
    return outcome, notes, after


def try_series(patches: list[patchfile.Patch], source: Path) -> list[Verdict]:
    now: dict[str, str | None] = {}
    verdicts = []
    for patch in patches:
        outcomes, notes = [], []
        for diff in patch.files:
            if diff.path not in now:
                now[diff.path] = tree.read_text(source / diff.path)
            outcome, more, now[diff.path] = try_file(patch.name, diff, now[diff.path])
            outcomes.append(outcome)
            notes += more
        if CONFLICT in outcomes or (UPSTREAM in outcomes and set(outcomes) != {UPSTREAM}):
            outcome = CONFLICT
        else:
            outcome = next(o for o in (UPSTREAM, OFFSET, CLEAN) if o in outcomes)
        verdicts.append(Verdict(patch.name, outcome, notes))
    return verdicts


def fetch_release(version: str, layout: Layout) -> Path:
    """The other release's sdist, unpacked in build/rebase (its sha256 is printed, not checked)."""
    if not re.fullmatch(r"\d+\.\d+\.\d+(\.?(rc|post|dev)\d+)?", version):
        raise ForkError(f"TO={version} is not a version: use make rebase-check TO=0.33.0.")
    folder = layout.build / "rebase"
    archive, target = folder / f"vllm-{version}.tar.gz", folder / f"vllm-{version}"
    if not archive.is_file():
        say(f"downloading {archive.name}")
        package_index.download("vllm", archive.name, archive)
    if not target.is_dir():
        fresh = folder / ".fresh"
        shutil.rmtree(fresh, ignore_errors=True)
        with tarfile.open(archive) as tar:
            extract(tar, fresh)
        (inner,) = fresh.iterdir()
        inner.replace(target)
        shutil.rmtree(fresh)
    commit = named_commit((target / "vllm" / "_version.py").read_text())
    print(f"vLLM {version}: commit {commit}, sdist sha256 {sha256_file(archive)}")
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", required=True, metavar="X.Y.Z", help="the release to try (make: TO=x.y.z)")
    args = parser.parse_args()
    layout = Layout()
    patches = tree.load_series(layout)
    verdicts = try_series(patches, fetch_release(args.to, layout))
    width = max((len(v.name) for v in verdicts), default=0)
    for verdict in verdicts:
        print(f"{verdict.name:{width}}  {verdict.outcome}")
        for note in verdict.notes:
            print(f"    {note}")
    counts = {o: sum(v.outcome == o for v in verdicts) for o in (CLEAN, OFFSET, UPSTREAM, CONFLICT)}
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return 0 if counts[UPSTREAM] + counts[CONFLICT] == 0 else 1


if __name__ == "__main__":
    run_main(main)
