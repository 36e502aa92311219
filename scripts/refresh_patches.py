"""Write the edits of build/tree into their patches, in the canonical form.

The same bytes that `quilt refresh` writes with scripts/quiltrc, for every applied patch at
once and without quilt; running it again changes nothing. Regenerates patches/README.md and the
operator's page, patches/uniprefill.md.
Ends with status 1 where the tree holds edits that no patch owns.
"""

from __future__ import annotations

import argparse

from scripts import operator_page, patch_table, patchfile, tree
from scripts.fork import ForkError, Layout, read_series, run_main, say, write_if_changed
from scripts.make_tree import OWN


def header_of(layout: Layout, name: str) -> str:
    text = tree.read_text(layout.patches / name) or ""
    return text.removesuffix(body_of(text))


def body_of(text: str) -> str:
    lines = patchfile.split_lines(text)
    start = next((i for i, line in enumerate(lines) if line.startswith("--- ")), len(lines))
    return "".join(lines[start:])


def conflicts(layout: Layout, steps: tree.Steps) -> list[str]:
    """Patches whose diff came from elsewhere (a pull) after they were applied to the tree.

    quilt stamps a patch it refreshed; a file that is newer than its stamp and does not say
    what the tree says would be undone by a refresh.
    """
    found = []
    for name, changes in steps.steps.items():
        path, stamp = layout.patches / name, layout.tree / ".pc" / name / ".timestamp"
        current, applied = tree.read_text(path), tree.read_text(layout.applied / name)
        if current is None or applied is None or body_of(current) == body_of(applied):
            continue
        if stamp.is_file() and path.stat().st_mtime_ns <= stamp.stat().st_mtime_ns:
            continue
        real = {p: step for p, step in changes.items() if step[0] != step[1]}
        if tree.explains(current, name, real) != set(real):
            found.append(name)
    return found


def refresh(layout: Layout) -> list[str]:
    """Rewrite what is not canonical; the names of the patches that changed."""
    names = [name for name, _ in read_series(layout.series)]
    applied = tree.applied_names(layout)
    if not (layout.tree / ".pc").is_dir():
        raise ForkError("build/tree is not there; run `make tree`.")
    if applied != names[: len(applied)]:
        raise ForkError("build/tree has other patches applied than patches/series starts with: run `make tree` first.")
    operator_page.update_tree(layout)
    steps = tree.working_steps(layout)
    lost = conflicts(layout, steps)
    if lost:
        raise ForkError(
            f"{', '.join(lost)} changed in patches/ since the tree was made, and refreshing would "
            "undo that: keep the new file with `make tree` (it says which edits stand in the way)."
        )
    changed = []
    for name, changes in steps.steps.items():
        real = {path: step for path, step in changes.items() if step[0] != step[1]}
        if not real:
            raise ForkError(f"{name} changes nothing; remove it (`quilt delete -r {name}`).")
        text = patchfile.render(header_of(layout, name), real)
        if write_if_changed(layout.patches / name, text.encode()):
            changed.append(name)
            (layout.tree / ".pc" / name / ".timestamp").touch()
    if applied == names:
        tree.record_applied(layout, names)
    patch_table.write(layout)
    operator_page.write_copy(layout)
    return changed


def unowned(layout: Layout) -> list[str]:
    """Files of the tree that differ from the release and belong to no applied patch."""
    return tree.unpatched_edits(layout, set(tree.working_steps(layout).first))


def add_to(layout: Layout, name: str) -> list[str]:
    """Give every unowned file to an applied patch, as `quilt add` before the edit would have; the files."""
    if name not in tree.applied_names(layout):
        raise ForkError(f"{name} is not applied to build/tree; name one of `quilt applied`, or `quilt new {name}`.")
    files = unowned(layout)
    for path in files:
        tree.write_file(layout.tree / ".pc" / name / path, tree.read_text(layout.pristine / path) or "")
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add-to", metavar="PATCH", help="give the files that no patch owns to this one")
    args = parser.parse_args()
    layout = Layout()
    for path in add_to(layout, args.add_to) if args.add_to else ():
        say(f"{path}: now of {args.add_to}")
    changed = refresh(layout)
    for name in changed:
        say(f"refreshed {name}")
    left = len(read_series(layout.series)) - len(tree.applied_names(layout))
    note = f"; {left} not applied, left as they are" if left else ""
    say(f"{len(changed)} of {len(tree.applied_names(layout))} patches changed{note}")
    if stray := unowned(layout):
        raise ForkError(f"build/tree holds edits that no patch owns: {', '.join(stray)}; {OWN}.")
    return 0


if __name__ == "__main__":
    run_main(main)
