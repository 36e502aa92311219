"""Check the series: seconds, offline once `make source` has run.

Series and files one to one; headers complete and their tests there; canonical format; exact
application to the verified release; patched Python parses and passes ruff with vLLM's own
settings, where ruff is; patches/README.md and the operator's page up to date; a refresh changes
nothing; the locks made from the requirements. Every problem names the patch, the place and the
command that mends it.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import functools
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts import lock, operator_page, patch_table, patchfile, tree
from scripts.fetch_source import fetch, unpack
from scripts.fork import AREAS, ForkError, Layout, read_series, read_upstream, read_version, run_main, say

FIELDS = ("Description", "Origin", "Forwarded", "Remove-when", "Test", "Last-Update")
MOOD = re.compile(r"(Adds|Added|Adding|Fixes|Fixed|Makes|Lets|Allows|Changes|This)\b")
LARGE = 150  # changed lines in existing files that want a reason


def check_series(layout: Layout) -> list[str]:
    """Series and files one to one, names well formed, each under its area's section."""
    problems, seen = [], set()
    entries = read_series(layout.series)
    order = [section for _, section in entries]
    for name, section in entries:
        where = f"patches/series: {name}"
        if name in seen:
            problems.append(f"{where}: listed twice; delete one line.")
        seen.add(name)
        if not re.fullmatch(r"[a-z]+(-[a-z0-9]+){2,}\.patch", name):
            problems.append(f"{where}: expected area-verb-object.patch; rename it (`quilt rename`).")
        area = name.split("-")[0]
        if area not in AREAS:
            problems.append(f"{where}: expected an area of {', '.join(AREAS)}, found {area!r}.")
        elif section != area:
            problems.append(
                f"{where}: stands under section {section or '(none)'!r}, expected {area!r}; move the "
                f"line under '# {area}: …'."
            )
        if not (layout.patches / name).is_file():
            problems.append(f"{where}: no such file in patches/; delete the line or bring the file.")
    ranks = [AREAS.index(section) for section in order if section in AREAS]
    if ranks != sorted(ranks):
        problems.append(f"patches/series: expected the sections in the order {', '.join(AREAS)}.")
    for path in sorted(layout.patches.iterdir()):
        if path.name in ("series", "README.md", operator_page.COPY) or path.name.startswith("."):
            continue
        if path.name not in seen:
            problems.append(f"patches/{path.name}: not in patches/series; add the line or delete the file.")
    return problems


def check_header(patch: patchfile.Patch, root: Path, today: datetime.date) -> list[str]:
    problems = []
    fields, name = patch.fields, patch.name
    mend = "mend it with `quilt header -e`"
    for number, line in enumerate(patch.header.splitlines(), 1):
        if line.strip() and not line.startswith(" ") and not re.match(r"[A-Z][A-Za-z-]*:( |$)", line):
            problems.append(f"{name}:{number}: expected 'Field: text' or an indented line, found {line!r}; {mend}.")
        if line != line.rstrip():
            problems.append(f"{name}:{number}: blanks at the end of the line; {mend}.")
    for field in FIELDS:
        if not fields.get(field):
            problems.append(f"{name}:1: the header lacks {field}:; {mend}.")
    title, _, why = fields.get("Description", "").partition("\n")
    if len(title) > 72:
        problems.append(f"{name}:1: the description has {len(title)} characters, expected at most 72; {mend}.")
    if title and (MOOD.match(title) or title.endswith(".") or not title[0].isupper()):
        problems.append(f"{name}:1: expected an imperative description without a full stop, found {title!r}; {mend}.")
    if title and not why.strip():
        problems.append(f"{name}:1: the description does not say why; {mend}.")
    elif title and "plugin" not in why:
        problems.append(f"{name}:1: the description does not say why a patch rather than a plugin; {mend}.")
    for test in fields.get("Test", "").split():
        if not (root / test).is_file():
            problems.append(f"{name}:1: Test: names {test}, which is not there; write it or {mend}.")
    mirror = mirror_of(name)
    if fields.get("Test") and mirror not in fields["Test"].split():
        problems.append(f"{name}:1: Test: expected {mirror} among its tests; {mend}.")
    update = fields.get("Last-Update", "")
    try:
        if update and datetime.date.fromisoformat(update) > today + datetime.timedelta(days=1):
            problems.append(f"{name}:1: Last-Update: {update} is in the future; {mend}.")
    except ValueError:
        problems.append(f"{name}:1: Last-Update: expected YYYY-MM-DD, found {update!r}; {mend}.")
    large = sum(diff.changed for diff in patch.files if not diff.created)
    if large > LARGE and not fields.get("Size"):
        problems.append(
            f"{name}:1: {large} changed lines in existing files (over {LARGE}) want a reason in a "
            f"'Size:' field, or logic moved to a new file; {mend}."
        )
    return problems


def mirror_of(name: str) -> str:
    return f"tests/patches/test_{name.removesuffix('.patch').replace('-', '_')}.py"


def check_mirrors(layout: Layout, names: list[str]) -> list[str]:
    expected = {mirror_of(name) for name in names}
    folder = layout.root / "tests" / "patches"
    return [
        f"tests/patches/{path.name}: mirrors no patch of the series; rename or delete it."
        for path in sorted(folder.glob("test_*.py"))
        if f"tests/patches/{path.name}" not in expected
    ]


def check_format(patch: patchfile.Patch, text: str) -> list[str]:
    """What can be seen without the source: order, labels, added blanks, no stray lines."""
    problems = []
    name = patch.name
    if patch.paths != sorted(patch.paths):
        problems.append(f"{name}: expected its files sorted ({', '.join(sorted(patch.paths))}); `make refresh`.")
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(r"(---|\+\+\+) \S+\t", line):
            problems.append(f"{name}:{number}: time stamp after the file name; `make refresh`.")
        if line.startswith(("diff --git ", "index ", "Index: ")):
            problems.append(f"{name}:{number}: {line.split(' ')[0]!r} line; `make refresh`.")
        if line.startswith("+") and not line.startswith("+++ ") and re.search(r"[ \t]$", line):
            problems.append(
                f"{name}:{number}: adds blanks at the end of a line; edit the file in build/tree, `make refresh`."
            )
    return problems


def check_refresh(patch: patchfile.Patch, text: str, steps: tree.Steps) -> list[str]:
    """A refresh must give the same bytes."""
    changes = {p: s for p, s in steps.steps[patch.name].items() if s[0] != s[1]}
    canonical = patchfile.render(patch.header, changes)
    if canonical == text:
        return []
    found, expected = text.splitlines(), canonical.splitlines()
    line = next(
        (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b),
        min(len(found), len(expected)),
    )

    def at(lines: list[str]) -> str:
        return repr(lines[line]) if line < len(lines) else "the end of the patch"

    return [
        f"{patch.name}:{line + 1}: not canonical: expected {at(expected)}, found {at(found)}; "
        "`make tree` and `make refresh`."
    ]


def find_ruff(layout: Layout) -> str | None:
    for candidate in (layout.venv / "bin" / "ruff", Path(sys.executable).with_name("ruff")):
        if candidate.is_file():
            return str(candidate)
    return shutil.which("ruff")


def check_python(layout: Layout, steps: tree.Steps, ruff: str | None) -> list[str]:
    """Patched Python parses and is as clean as the release for ruff."""
    problems = []
    owner = {path: name for name, changes in steps.steps.items() for path in changes}
    final = {p: t for p, t in steps.final.items() if t is not None and p.endswith(".py")}
    for path, text in final.items():
        try:
            ast.parse(text)
        except SyntaxError as error:
            problems.append(
                f"{owner[path]}: {path}:{error.lineno}: {error.msg}; edit it in build/tree, `make refresh`."
            )
    if not final or problems:
        return problems
    if ruff is None:
        say("note: style not checked, for want of ruff; `make build` installs it")
        return []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shutil.copyfile(layout.pristine / "pyproject.toml", root / "pyproject.toml")
        for path, text in final.items():
            target = root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, newline="")
            # packages stay packages: ruff looks for __init__.py beside a file
            for parent in Path(path).parents:
                init = parent / "__init__.py"
                there = (layout.pristine / init).is_file() or init.as_posix() in final
                if there and not (root / init).exists():
                    (root / init).touch()
        for arguments, what in (
            (["check", "--output-format", "concise", "--quiet"], "ruff check"),
            (["format", "--check"], "ruff format"),
        ):
            command = [ruff, *arguments, "--no-cache", "--config", "pyproject.toml", *sorted(final)]
            done = subprocess.run(command, cwd=root, capture_output=True, text=True)
            if done.returncode == 0:
                continue
            lines = done.stdout.splitlines() or done.stderr.splitlines()
            for line in lines:
                if re.match(r"\d+ files? ", line):
                    continue  # the summary
                line = line.removeprefix("Would reformat: ")
                path = line.split(":")[0]
                problems.append(f"{owner.get(path, '?')}: {what}: {line}; edit it in build/tree, `make refresh`.")
    return problems


@functools.cache
def vllm_imports(text: str) -> list[ast.ImportFrom]:
    """The `from vllm… import …` statements of a module, wherever they stand."""
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and not node.level]
    return [node for node in nodes if (node.module or "").split(".")[0] == "vllm"]


@functools.cache
def module_names(text: str) -> set[str] | None:
    """What a module defines at its top level; None when a star import hides it."""
    names: set[str] = set()
    pending: list[ast.AST] = list(ast.parse(text).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            if any(alias.name == "*" for alias in node.names):
                return None
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        pending += ast.iter_child_nodes(node)
    return None if "__getattr__" in names else names


def check_prefixes(layout: Layout, steps: tree.Steps) -> list[str]:
    """After each patch, what the patched files import from vLLM is there: every prefix imports."""
    problems: list[str] = []
    state: dict[str, str | None] = {}

    def find(module: str) -> str | None:
        stem = module.replace(".", "/")
        for path in (f"{stem}.py", f"{stem}/__init__.py"):
            if state.get(path) or (path not in state and (layout.pristine / path).is_file()):
                return path
        return None

    def is_package(module: str) -> bool:
        folder = module.replace(".", "/")
        return (layout.pristine / folder).is_dir() or any(p.startswith(f"{folder}/") and t for p, t in state.items())

    for name, changes in steps.steps.items():
        state |= {path: after for path, (_, after) in changes.items()}
        sources = {p: t for p, t in state.items() if t and p.endswith(".py")}
        defined = {path: module_names(text) for path, text in sources.items()}
        for path, text in sources.items():
            for node in vllm_imports(text):
                target = find(node.module)
                if target is None and not is_package(node.module):
                    if not (layout.pristine / path).is_file() or path in changes:
                        problems.append(f"{name}: {path}:{node.lineno}: no module {node.module} after this patch.")
                    continue
                known = defined.get(target)
                for alias in node.names if known is not None else ():
                    if alias.name not in known and find(f"{node.module}.{alias.name}") is None:
                        problems.append(
                            f"{name}: {path}:{node.lineno}: {node.module} has no {alias.name} after this patch; "
                            "move the hunk to the patch that adds it, or reorder patches/series."
                        )
    return list(dict.fromkeys(problems))


def check(layout: Layout) -> list[str]:
    upstream = read_upstream(layout.root / "UPSTREAM")
    version = read_version(layout.root / "VERSION")
    problems = []
    if version.upstream != upstream.version:
        problems.append(f"VERSION names {version.upstream}, UPSTREAM {upstream.version}; correct one.")
    problems += check_series(layout)
    if problems:
        return problems
    texts = {n: (layout.patches / n).read_text(encoding="utf-8") for n, _ in read_series(layout.series)}
    patches = []
    for name, text in texts.items():
        try:
            patches.append(patchfile.parse(name, text))
        except ForkError as error:
            problems.append(str(error))
    today = datetime.date.today()
    for patch in patches:
        problems += check_header(patch, layout.root, today)
        problems += check_format(patch, texts[patch.name])
    problems += check_mirrors(layout, list(texts))
    if len(patches) < len(texts):
        return problems

    unpack(fetch(upstream.sdist, upstream.sdist_sha256, layout), upstream, layout)
    try:
        steps = tree.apply_series(patches, layout.pristine)
    except patchfile.PatchError as error:
        return [*problems, f"{error} Mend: `make tree` and see CONTRIBUTING.md, or `make rebase-check`."]
    for patch in patches:
        problems += check_refresh(patch, texts[patch.name], steps)
    python = check_python(layout, steps, find_ruff(layout))
    problems += python or check_prefixes(layout, steps) + operator_page.check(layout, steps.final)
    table = layout.patches / "README.md"
    if not table.is_file() or table.read_text() != patch_table.render(layout):
        problems.append("patches/README.md is out of date; `make refresh`.")
    return problems + check_locks(layout, steps.final)


def check_locks(layout: Layout, patched: dict[str, str | None]) -> list[str]:
    def read_file(path: str) -> str:
        inside = path.removeprefix("build/tree/")
        if inside == path:
            return (layout.root / path).read_text()
        return patched.get(inside) or (layout.pristine / inside).read_text()

    return lock.check(layout.root, read_file)


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    layout = Layout()
    problems = check(layout)
    for problem in problems:
        print(problem, file=sys.stderr)
    count = len(read_series(layout.series))
    say(f"{count} patches and the locks checked, " + (f"{len(problems)} problem(s)" if problems else "all in order"))
    return 1 if problems else 0


if __name__ == "__main__":
    run_main(main)
