"""Reading, applying and writing patches."""

import pytest

from scripts import patchfile

TEXT = "".join(f"line {n}\n" for n in range(1, 11))


def one(hunk: str, old: str = "a/f.py", new: str = "b/f.py") -> patchfile.Patch:
    return patchfile.parse("core-do-it.patch", f"Description: x\n\n--- {old}\n+++ {new}\n{hunk}")


CHANGE = "@@ -4,3 +4,3 @@\n line 4\n-line 5\n+LINE 5\n line 6\n"


def test_applies_at_exact_lines():
    patch = one(CHANGE)
    assert patchfile.apply_file(patch.name, patch.files[0], TEXT) == TEXT.replace("line 5", "LINE 5")


def test_refuses_an_offset_that_gnu_patch_would_take():
    patch = one(CHANGE)
    with pytest.raises(
        patchfile.PatchError, match=r"core-do-it.patch:5: f.py line 4: expected 'line 4', found 'line 3'"
    ):
        patchfile.apply_file(patch.name, patch.files[0], "new\n" + TEXT)
    assert patchfile.find_offset(patch.files[0].hunks[0], patchfile.split_lines("new\n" + TEXT), 3) == 1


def test_refuses_past_the_end_of_the_file():
    patch = one("@@ -9,3 +9,4 @@\n line 9\n line 10\n line 11\n+line 12\n")
    with pytest.raises(patchfile.PatchError, match="found '\\(end of file\\)'"):
        patchfile.apply_file(patch.name, patch.files[0], TEXT)


def test_creates_and_deletes_files():
    create = one("@@ -0,0 +1,2 @@\n+a\n+b\n", old="/dev/null")
    assert patchfile.apply_file("p", create.files[0], None) == "a\nb\n"
    with pytest.raises(patchfile.PatchError, match="is there already"):
        patchfile.apply_file("p", create.files[0], "x\n")
    delete = one("@@ -1,2 +0,0 @@\n-a\n-b\n", new="/dev/null")
    assert patchfile.apply_file("p", delete.files[0], "a\nb\n") is None
    with pytest.raises(patchfile.PatchError, match="does not exist"):
        patchfile.apply_file("p", delete.files[0], None)


def test_keeps_a_missing_newline_at_the_end():
    patch = one("@@ -1 +1 @@\n-a\n\\ No newline at end of file\n+b\n\\ No newline at end of file\n")
    assert patchfile.apply_file("p", patch.files[0], "a") == "b"
    with pytest.raises(patchfile.PatchError):
        patchfile.apply_file("p", patch.files[0], "a\n")


def test_a_removed_line_that_looks_like_a_file_header_is_part_of_the_hunk():
    patch = one("@@ -1,2 +1 @@\n--- a note\n x\n")
    assert patchfile.apply_file("p", patch.files[0], "-- a note\nx\n") == "x\n"


def test_a_hand_edited_hunk_is_refused_with_the_way_to_do_it():
    with pytest.raises(patchfile.PatchError, match=r"core-do-it.patch:9: the hunk of line 5 .*make refresh"):
        one("@@ -4,4 +4,3 @@\n line 4\n-line 5\n line 6\n")


def test_paths_may_not_leave_the_tree():
    with pytest.raises(patchfile.PatchError, match="expected a path under a/"):
        one(CHANGE, old="a/../f.py")
    with pytest.raises(patchfile.PatchError, match="expected a path under a/"):
        one(CHANGE, old="f.py")


def test_two_hunks_and_form_feeds():
    text = "a\x0cb\n" + TEXT
    patch = one("@@ -1,2 +1,3 @@\n+top\n a\x0cb\n line 1\n@@ -10,2 +11,3 @@\n line 9\n line 10\n+end\n")
    assert patchfile.apply_file("p", patch.files[0], text) == "top\n" + text + "end\n"


def test_fields_continue_on_indented_lines():
    fields = patchfile.parse_fields("Description: Do it\n why\n .\n more\nOrigin: fork\nTest: a\n b\n")
    assert fields == {"Description": "Do it\nwhy\n\nmore", "Origin": "fork", "Test": "a\nb"}


def test_render_is_sorted_and_a_fixed_point():
    changes = {
        "z.py": ("a\n", "b\n"),
        "a.py": (None, "new\n"),
        "same.py": ("x\n", "x\n"),
        "gone.py": ("old\n", None),
        "noeol.py": ("x", "y"),
    }
    text = patchfile.render("Description: x\n", changes)
    patch = patchfile.parse("p", text)
    assert patch.paths == ["a.py", "gone.py", "noeol.py", "z.py"]
    assert "--- /dev/null\n+++ b/a.py" in text and "--- a/gone.py\n+++ /dev/null" in text
    again = {d.path: (changes[d.path][0], patchfile.apply_file("p", d, changes[d.path][0])) for d in patch.files}
    assert again == {p: c for p, c in changes.items() if c[0] != c[1]}
    assert patchfile.render(patch.header, again) == text
