"""make check: each rule, on a toy fork that breaks it."""

import contextlib

import pytest

from scripts import check_patches, fork, make_tree, operator_page, patch_table, patchfile, refresh_patches, tree

from .conftest import FIRST, HEADER, SECOND, mirror, patch_text, write_series


@pytest.fixture
def good(toy, monkeypatch):
    patch_table.write(toy)
    assert check_patches.check(toy) == []
    return toy


def rewrite(layout, name, before, after, count=1):
    path = layout.patches / name
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, count))
    with contextlib.suppress(fork.ForkError):  # a patch that does not parse has no row to change
        patch_table.write(layout)


def only_problem(layout) -> str:
    problems = check_patches.check(layout)
    assert len(problems) == 1, problems
    return problems[0]


@pytest.mark.parametrize(
    "before, after, said",
    [
        ("Origin: fork\n", "", "lacks Origin:"),
        ("Forwarded: no\n", "Forwarded:\n", "lacks Forwarded:"),
        ("Remove-when: never\n", "", "lacks Remove-when:"),
        ("Last-Update: 2026-01-02\n", "", "lacks Last-Update:"),
        ("2026-01-02", "02.01.2026", "expected YYYY-MM-DD, found '02.01.2026'"),
        ("2026-01-02", "2999-01-02", "in the future"),
        ("Raise the answer", "Raise the answer " + "very " * 12 + "high", "expected at most 72"),
        ("Raise the answer", "Raises the answer.", "imperative"),
        ("Raise the answer", "Adds the answer", "imperative"),
        (" Because the toy wants it; a plugin cannot, and never could.\n", "", "does not say why"),
        ("a plugin cannot, and never could", "really", "rather than a plugin"),
        ("Origin: fork\n", "Origin: fork\nloose words\n", "core-raise-answer.patch:4: expected 'Field: text'"),
        ("Origin: fork\n", "Origin: fork \n", "blanks at the end"),
    ],
)
def test_headers(good, before, after, said):
    rewrite(good, FIRST, before, after)
    problem = only_problem(good)
    assert problem.startswith(FIRST) and said in problem and "quilt header -e" in problem


def test_a_header_names_a_test_that_is_there_and_mirrors_it(good):
    rewrite(good, FIRST, "Test: tests/patches/test_core_raise_answer.py", "Test: tests/patches/test_other.py")
    problems = check_patches.check(good)
    assert any("names tests/patches/test_other.py, which is not there" in p for p in problems)
    assert any("expected tests/patches/test_core_raise_answer.py" in p for p in problems)


def test_a_test_that_mirrors_no_patch(good):
    (good.root / "tests/patches/test_core_gone.py").write_text("")
    assert "test_core_gone.py: mirrors no patch" in only_problem(good)


def test_series_and_files_are_one_to_one(good):
    (good.patches / "core-left-over.patch").write_text("x")
    assert "patches/core-left-over.patch: not in patches/series" in only_problem(good)
    (good.patches / "core-left-over.patch").unlink()
    write_series(good, [FIRST, SECOND, FIRST])
    assert any("listed twice" in p for p in check_patches.check(good))
    (good.patches / SECOND).unlink()
    write_series(good, [FIRST, SECOND])
    assert "no such file" in only_problem(good)


def test_sections_and_names(good):
    good.series.write_text(f"# core: toys\n{FIRST}\n{SECOND}\n")
    assert "stands under section 'core', expected 'worker'" in only_problem(good)
    good.series.write_text(f"# worker: toys\n{SECOND}\n# core: toys\n{FIRST}\n")
    assert "in the order" in only_problem(good)
    (good.patches / FIRST).rename(good.patches / "0001-core.patch")
    write_series(good, ["0001-core.patch", SECOND])
    assert any("expected area-verb-object.patch" in p for p in check_patches.check(good))


@pytest.mark.parametrize(
    "before, after, said",
    [
        ("--- a/vllm/core.py\n", "--- a/vllm/core.py\t2020-01-01 00:00:00\n", "time stamp"),
        ("--- a/vllm/core.py\n", "Index: vllm/core.py\n--- a/vllm/core.py\n", "'Index:' line"),
        ("+# first\n", "+# first  \n", "adds blanks at the end of a line"),
        (
            "@@ -1,3 +1,4 @@\n",
            "@@ -1,3 +1,4 @@ def x():\n",
            "not canonical: expected '@@ -1,3 +1,4 @@', found '@@ -1,3 +1,4 @@ def x():'",
        ),
    ],
)
def test_canonical_format(good, before, after, said):
    rewrite(good, SECOND, before, after)
    problems = check_patches.check(good)
    assert any(p.startswith(SECOND) and said in p and "make refresh" in p for p in problems), problems


def test_files_are_sorted(good):
    text = patch_text(SECOND)
    core, helper = text.index("--- a/vllm/core.py"), text.index("--- /dev/null")
    (good.patches / SECOND).write_text(text[:core] + text[helper:] + text[core:helper])
    assert any("files sorted" in p for p in check_patches.check(good))


def test_fewer_lines_of_context_are_not_canonical(good):
    rewrite(
        good,
        SECOND,
        "@@ -1,3 +1,4 @@\n+# first\n # line 1\n # line 2\n # line 3\n",
        "@@ -1,2 +1,3 @@\n+# first\n # line 1\n # line 2\n",
    )
    assert f"{SECOND}:11: not canonical" in only_problem(good)


def test_exact_application(good):
    rewrite(good, FIRST, "@@ -6,4 +6,4 @@", "@@ -5,4 +5,4 @@")
    problem = only_problem(good)
    assert f"{FIRST}:11: vllm/core.py line 5: expected '# line 6', found '# line 5'" in problem


def test_a_hand_edited_patch(good):
    rewrite(good, FIRST, "+answer = 42\n", "+answer = 42\n+more = 1\n")
    assert any("make refresh" in p for p in check_patches.check(good))


def test_patched_python_parses(good):
    rewrite(good, SECOND, "+    return 1\n", "+    return (\n")
    problem = only_problem(good)
    assert problem.startswith(f"{SECOND}: vllm/helper.py:2: ")


def test_patched_python_passes_ruff_with_the_releases_settings(good):
    rewrite(good, SECOND, "@@ -0,0 +1,2 @@\n+def help():\n", "@@ -0,0 +1,3 @@\n+import os\n+def help():\n")
    problems = check_patches.check(good)
    assert any(p.startswith(f"{SECOND}: ruff check: vllm/helper.py:1:") and "F401" in p for p in problems)
    assert any(p.startswith(f"{SECOND}: ruff format: vllm/helper.py") for p in problems)


IMPORTS = "+from vllm.helper import help\n+\n"


def test_a_patch_may_not_import_what_a_later_one_adds(good):
    """core-raise-answer would use the helper of worker-add-helper: that prefix does not import."""
    rewrite(good, FIRST, "@@ -6,4 +6,4 @@\n", "@@ -6,4 +6,6 @@\n")
    rewrite(good, FIRST, "-answer = 41\n+answer = 42\n", f"-answer = 41\n{IMPORTS}+answer = help()\n")
    steps = tree.apply_series(tree.load_series(good), good.pristine)
    found = check_patches.check_prefixes(good, steps)
    assert found == [f"{FIRST}: vllm/core.py:9: no module vllm.helper after this patch."]


def test_a_patch_may_import_what_an_earlier_one_adds_and_only_that(good):
    text = patch_text(SECOND)
    body = "--- /dev/null\n+++ b/vllm/use.py\n@@ -0,0 +1,3 @@\n+from vllm.helper import {}\n+\n+print({})\n"
    for name, expected in (("help", []), ("lost", ["vllm.helper has no lost after this patch"])):
        (good.patches / SECOND).write_text(text + body.format(name, name))
        steps = tree.apply_series(tree.load_series(good), good.pristine)
        found = check_patches.check_prefixes(good, steps)
        assert len(found) == len(expected)
        assert all(said in problem for said, problem in zip(expected, found, strict=True))


def test_without_ruff_only_style_goes_unchecked(good, monkeypatch, capfd):
    monkeypatch.setattr(check_patches, "find_ruff", lambda layout: None)
    assert check_patches.check(good) == []
    assert "style not checked, for want of ruff; `make build` installs it" in capfd.readouterr().err
    rewrite(good, SECOND, "+    return 1\n", "+    return (\n")
    assert only_problem(good).startswith(f"{SECOND}: vllm/helper.py:2: ")


def test_the_locks_follow_the_requirements(good):
    path = good.tree.relative_to(good.root) / "requirements" / "common.txt"
    assert f"-r ../{path}" in (good.root / "scripts/requirements-cpu.txt").read_text()
    requirements = good.root / "scripts" / "requirements-cuda.txt"
    requirements.write_text(requirements.read_text() + "more==1\n")
    assert only_problem(good) == "scripts/lock-cuda.txt was not made from the requirements as they are; `make lock`."


def test_a_large_patch_wants_a_reason(good, monkeypatch):
    monkeypatch.setattr(check_patches, "LARGE", 1)
    problem = only_problem(good)
    assert problem.startswith(f"{FIRST}:1: 2 changed lines in existing files")
    rewrite(good, FIRST, "Origin: fork\n", "Origin: fork\nSize: the toy is indivisible\n")
    assert check_patches.check(good) == []


def test_the_table_is_up_to_date(good):
    (good.patches / "README.md").write_text("old")
    assert only_problem(good) == "patches/README.md is out of date; `make refresh`."


def test_the_table_has_a_row_a_patch(good):
    rows = [line for line in patch_table.render(good).splitlines() if line.startswith("| [")]
    assert len(rows) == 2
    assert "Raise the answer" in rows[0] and "test_core_raise_answer.py" in rows[0]


SUPPORT = """\
from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    setting: str
    remedy: str


UNBOUNDED_ARCHITECTURES = ("OddForCausalLM",)
REFUSALS = (
    Refusal("--odd-size > 1", "set it to 1"),
    Refusal("odd models", "serve another"),
)
"""
DOCUMENT = "serving-document-toys.patch"


@pytest.fixture
def documented(good):
    """The toy fork with an operator's page, refreshed."""
    page = f"# Toys\n\n{operator_page.BEGIN}{operator_page.END}\nThe end.\n"
    header = HEADER.format(title="Document toys", test=mirror(DOCUMENT))
    files = {operator_page.PAGE: (None, page), operator_page.SUPPORT: (None, SUPPORT)}
    (good.patches / DOCUMENT).write_text(patchfile.render(header, files))
    (good.root / mirror(DOCUMENT)).write_text("")
    write_series(good, [FIRST, SECOND, DOCUMENT])
    make_tree.make_tree(good)
    assert refresh_patches.refresh(good) == [DOCUMENT]
    assert check_patches.check(good) == []
    return good


def test_a_refresh_lists_the_refusals_on_the_page_and_copies_it(documented):
    copy = (documented.patches / "uniprefill.md").read_text()
    assert "| `--odd-size > 1` | set it to 1 |\n| odd models | serve another |\n" in copy
    assert "in `OddForCausalLM`." in copy and copy.endswith("\nThe end.\n")
    assert (documented.tree / operator_page.PAGE).read_text() in copy
    assert refresh_patches.refresh(documented) == []


def test_the_copy_of_the_page_is_up_to_date(documented):
    (documented.patches / "uniprefill.md").write_text("old")
    assert only_problem(documented).startswith("patches/uniprefill.md is out of date")


def test_the_page_lists_what_the_code_refuses(documented):
    rewrite(documented, DOCUMENT, 'Refusal("--odd-size', 'Refusal("--even-size')
    assert "does not list the refusals" in only_problem(documented)


def test_the_page_keeps_the_place_of_its_list(documented):
    rewrite(documented, DOCUMENT, f"+{operator_page.END}", "+gone\n")
    assert any("lacks the lines" in problem for problem in check_patches.check(documented))


def test_version_and_pin_agree(good):
    (good.root / "VERSION").write_text("9.9.1-1\n")
    assert only_problem(good).startswith("VERSION names 9.9.1, UPSTREAM 9.9.0")


def test_edits_in_the_tree_do_not_sway_it(good):
    make_tree.make_tree(good)
    (good.tree / "vllm/helper.py").write_text("def (\n")
    assert check_patches.check(good) == []
