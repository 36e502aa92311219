"""Make build/tree: the pinned release with every patch of the series applied, in order.

Patches apply at exact lines (no offset, no fuzz). When the series changed since, only the
files that differ are rewritten. Edits that no patch holds yet are never thrown away.
"""

from __future__ import annotations

import argparse

from scripts import tree
from scripts.fetch_source import ensure_source
from scripts.fork import ForkError, Layout, read_upstream, run_main, say

_KEEP = "`make refresh` puts them into their patches, `make discard-edits` throws them away"
OWN = '`make refresh ARGS="--add-to NAME.patch"` gives them to a patch'


def refuse_to_lose(layout: Layout, working: tree.Steps, wanted: dict[str, str | None]) -> None:
    """Raise where rewriting the tree would lose edits."""
    edited = {
        path: name
        for name, paths in tree.unrefreshed(layout, working).items()
        for path in paths
        if tree.read_text(layout.tree / path) != wanted.get(path, ...)
    }
    if edited:
        listed = ", ".join(f"{path} ({name})" for path, name in sorted(edited.items()))
        raise ForkError(f"build/tree holds edits that no patch has: {listed}; {_KEEP}.")


def warn_unpatched(layout: Layout, known: set[str]) -> list[str]:
    stray = tree.unpatched_edits(layout, known)
    if stray:
        say(
            f"note: {len(stray)} file(s) of build/tree differ from the release and belong to no "
            f"patch ({', '.join(stray[:5])}{', …' if len(stray) > 5 else ''}): kept as they are; {OWN}."
        )
    return stray


def make_tree(layout: Layout, discard: bool = False) -> bool:
    """Bring build/tree to what the series says; False when nothing had to be written."""
    ensure_source(layout, read_upstream(layout.root / "UPSTREAM"))
    patches = tree.load_series(layout)
    names = [patch.name for patch in patches]
    if discard:
        for path in unsaved_edits(layout):
            say(f"thrown away: {path}")
    if discard or not (layout.tree / ".pc").is_dir():
        tree.copy_pristine(layout)
    elif tree.recorded_is_current(layout, names):
        return False
    count = len(patches)
    steps = tree.apply_series(
        patches,
        layout.pristine,
        lambda name: say(f"applying {names.index(name) + 1}/{count} {name}"),
    )
    wanted = steps.final
    working = tree.working_steps(layout)
    refuse_to_lose(layout, working, wanted)
    clash = [
        path
        for path, before in steps.first.items()
        if path not in working.first
        and (found := tree.read_text(layout.tree / path)) not in (before, wanted[path])
        and found is not None
    ]
    if clash:
        raise ForkError(
            f"build/tree holds edits, outside any applied patch, of files that a patch touches: "
            f"{', '.join(clash)}; move them aside or `make discard-edits`."
        )
    for path, before in (working.first | steps.first).items():
        tree.write_file(layout.tree / path, wanted.get(path, before))
    tree.write_pc(layout, steps)
    tree.record_applied(layout, names)
    warn_unpatched(layout, steps.first.keys() | wanted.keys())
    return True


def unsaved_edits(layout: Layout) -> list[str]:
    """Every file of the tree whose content no patch accounts for."""
    if not (layout.tree / ".pc").is_dir() or not layout.pristine.is_dir():
        return []
    steps = tree.working_steps(layout)
    owned = {path for paths in tree.unrefreshed(layout, steps).values() for path in paths}
    return sorted(owned | set(tree.unpatched_edits(layout, set(steps.first))))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--discard", action="store_true", help="throw away every edit in build/tree and start anew")
    parser.add_argument(
        "--refuse-edits", action="store_true", help="do nothing, but fail where an edit would be lost with the tree"
    )
    args = parser.parse_args()
    layout = Layout()
    if args.refuse_edits:
        if found := unsaved_edits(layout):
            raise ForkError(f"build/tree holds edits that no patch has: {', '.join(found)}; {_KEEP}.")
        return 0
    if not make_tree(layout, args.discard):
        edits = tree.unrefreshed(layout, tree.working_steps(layout))
        held = f"; edited, not yet refreshed: {sum(map(len, edits.values()))} file(s)" if edits else ""
        say(f"build/tree is up to date with the series{held}")
    else:
        say(f"build/tree: {len(tree.applied_names(layout))} patches applied")
    return 0


if __name__ == "__main__":
    run_main(main)
