"""patches/uniprefill.md: the operator's page, as the patched tree has it.

Its list of refusals comes from the tree's support.py, which imports nothing of vLLM. `make refresh` writes
both, `make check` compares them.
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping

from scripts import tree
from scripts.fork import ForkError, Layout, read_series, write_if_changed

PAGE = "docs/features/uniprefill.md"
SUPPORT = "vllm/v1/uniprefill/support.py"
COPY = "uniprefill.md"
BEGIN = "<!-- refusals: from vllm/v1/uniprefill/support.py, by `make refresh` -->\n"
END = "<!-- end of refusals -->\n"
_NOTE = f"<!-- {PAGE} of the patched tree, by `make refresh`; do not edit -->\n\n"


def refusals(support: str) -> str:
    """The table of what is refused, and the architectures whose layers cannot be run in parts."""
    module = types.ModuleType("support")
    exec(compile(support, SUPPORT, "exec", dont_inherit=True), vars(module))
    rows = [(_options_as_code(refusal.setting), refusal.remedy) for refusal in module.REFUSALS]
    table = "".join(f"| {setting} | {remedy} |\n" for setting, remedy in rows)
    unbounded = ", ".join(f"`{name}`" for name in module.UNBOUNDED_ARCHITECTURES)
    return (
        "| refused | instead |\n| - | - |\n" + table + "\nLayers cannot be run in parts in models that vLLM has no "
        f"pipeline parallelism for, and in {unbounded}.\n"
    )


def _options_as_code(text: str) -> str:
    return re.sub(r"--[a-z-]+( > \d+)?|\w+For\w+", r"`\g<0>`", text)


def with_refusals(page: str, support: str) -> str:
    """The page with the table between its two marks.

    Raises:
        ForkError: if it lacks a mark.

    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ForkError(f"{PAGE} lacks the lines {BEGIN.strip()!r} and {END.strip()!r}; bring them back.")
    return before + begin + refusals(support) + end + after


def update_tree(layout: Layout) -> None:
    """Write the refusals into the tree's page, where its patch is applied."""
    page, support = (tree.read_text(layout.tree / path) for path in (PAGE, SUPPORT))
    if page is not None and support is not None:
        write_if_changed(layout.tree / PAGE, with_refusals(page, support).encode())


def write_copy(layout: Layout) -> None:
    """Copy the tree's page to patches/, if the whole series is applied and has one."""
    page = tree.read_text(layout.tree / PAGE)
    if page is not None and tree.applied_names(layout) == [name for name, _ in read_series(layout.series)]:
        write_if_changed(layout.patches / COPY, (_NOTE + page).encode())


def check(layout: Layout, patched: Mapping[str, str | None]) -> list[str]:
    """What is out of date, given the patched files."""
    page, support = patched.get(PAGE), patched.get(SUPPORT)
    if page is None or support is None:
        return []
    problems = []
    try:
        if with_refusals(page, support) != page:
            problems.append(f"{PAGE} does not list the refusals of {SUPPORT}; `make tree` and `make refresh`.")
    except ForkError as error:
        problems.append(str(error))
    if tree.read_text(layout.patches / COPY) != _NOTE + page:
        problems.append(f"patches/{COPY} is out of date; `make tree` and `make refresh`.")
    return problems
