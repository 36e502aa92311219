"""make tree and make refresh on a toy fork, and quilt on what they leave."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import fork, make_tree, patchfile, refresh_patches, tree

from .conftest import FIRST, SECOND, patch_text, write_series

SCRIPTS = Path(make_tree.__file__).parent


def tick(path: Path) -> None:
    """A later time stamp than any before, whatever the file system's clock."""
    path.touch()
    later = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))


def test_applies_the_series_and_says_so(toy, capfd):
    assert make_tree.make_tree(toy) is True
    assert (toy.tree / "vllm/core.py").read_text().startswith("# first\n# line 1\n")
    assert (toy.tree / "vllm/core.py").read_text().endswith("answer = 42\n")
    assert (toy.tree / "vllm/helper.py").is_file()
    assert (toy.pristine / "vllm/core.py").read_text().endswith("answer = 41\n")
    named = [line for line in capfd.readouterr().err.splitlines() if "applying" in line]
    assert [line.split()[-1] for line in named] == [FIRST, SECOND]


def test_a_second_run_writes_nothing(toy):
    make_tree.make_tree(toy)
    before = {p: p.stat().st_mtime_ns for p in toy.tree.rglob("*")}
    assert make_tree.make_tree(toy) is False
    assert before == {p: p.stat().st_mtime_ns for p in toy.tree.rglob("*")}


def test_a_shorter_series_takes_the_patch_out_and_leaves_other_files_alone(toy):
    make_tree.make_tree(toy)
    untouched = (toy.tree / "vllm/data.json").stat()
    write_series(toy, [FIRST])
    assert make_tree.make_tree(toy) is True
    assert not (toy.tree / "vllm/helper.py").exists()
    assert not (toy.tree / "vllm/core.py").read_text().startswith("# first")
    assert tree.applied_names(toy) == [FIRST]
    after = (toy.tree / "vllm/data.json").stat()
    assert (after.st_mtime_ns, after.st_ino) == (untouched.st_mtime_ns, untouched.st_ino)


def test_a_patch_that_does_not_fit_leaves_the_tree_as_it_was(toy):
    make_tree.make_tree(toy)
    (toy.patches / SECOND).write_text(patch_text(SECOND).replace(" # line 2", " # line two"))
    with pytest.raises(
        patchfile.PatchError, match=r"worker-add-helper.patch:\d+: vllm/core.py line 2: expected '# line two'"
    ):
        make_tree.make_tree(toy)
    assert (toy.tree / "vllm/helper.py").is_file()


def test_edits_that_no_patch_has_stop_it_and_survive(toy):
    make_tree.make_tree(toy)
    helper = toy.tree / "vllm/helper.py"
    helper.write_text("def help():\n    return 2\n")
    assert make_tree.make_tree(toy) is False  # same series: nothing to do, nothing lost
    write_series(toy, [FIRST])
    with pytest.raises(fork.ForkError, match=r"vllm/helper.py \(worker-add-helper.patch\); `make refresh`"):
        make_tree.make_tree(toy)
    assert helper.read_text().endswith("return 2\n")


def test_an_edit_outside_any_patch_is_kept_and_named(toy, capfd):
    make_tree.make_tree(toy)
    (toy.tree / "vllm/data.json").write_text("[]\n")
    write_series(toy, [FIRST])
    make_tree.make_tree(toy)
    assert (toy.tree / "vllm/data.json").read_text() == "[]\n"
    assert "vllm/data.json" in capfd.readouterr().err


def test_an_edit_of_a_file_that_a_new_patch_touches_stops_it(toy):
    write_series(toy, [])
    make_tree.make_tree(toy)
    (toy.tree / "vllm/core.py").write_text("mine\n")
    write_series(toy, [FIRST])
    with pytest.raises(fork.ForkError, match="vllm/core.py; move them aside"):
        make_tree.make_tree(toy)
    assert (toy.tree / "vllm/core.py").read_text() == "mine\n"


def test_discard_starts_anew_and_lists_what_it_throws_away(toy, capfd):
    make_tree.make_tree(toy)
    (toy.tree / "vllm/helper.py").write_text("x\n")
    (toy.tree / "vllm/data.json").write_text("[]\n")
    capfd.readouterr()
    make_tree.make_tree(toy, discard=True)
    said = capfd.readouterr().err
    thrown = [line.split()[-1] for line in said.splitlines() if "thrown away:" in line]
    assert thrown == ["vllm/data.json", "vllm/helper.py"]
    assert (toy.tree / "vllm/helper.py").read_text().endswith("return 1\n")
    assert (toy.tree / "vllm/data.json").read_text() == "{}\n"


def test_edits_lists_what_clean_would_lose(toy):
    assert make_tree.unsaved_edits(toy) == []
    make_tree.make_tree(toy)
    assert make_tree.unsaved_edits(toy) == []
    (toy.tree / "vllm/helper.py").write_text("x\n")
    (toy.tree / "vllm/fresh.py").write_text("x\n")
    (toy.tree / "vllm/__pycache__").mkdir()
    (toy.tree / "vllm/__pycache__/core.pyc").touch()
    assert make_tree.unsaved_edits(toy) == ["vllm/fresh.py", "vllm/helper.py"]
    make_tree.make_tree(toy, discard=True)
    assert make_tree.unsaved_edits(toy) == []


def test_refresh_of_an_unedited_tree_changes_no_patch(toy):
    make_tree.make_tree(toy)
    before = {name: (toy.patches / name).read_bytes() for name in (FIRST, SECOND)}
    assert refresh_patches.refresh(toy) == []
    assert before == {name: (toy.patches / name).read_bytes() for name in (FIRST, SECOND)}


def test_refresh_puts_each_edit_into_the_patch_that_owns_it(toy):
    make_tree.make_tree(toy)
    core = toy.tree / "vllm/core.py"
    core.write_text(core.read_text().replace("# first", "# the first"))
    assert refresh_patches.refresh(toy) == [SECOND]
    assert "+# the first\n" in (toy.patches / SECOND).read_text()
    assert (toy.patches / SECOND).read_text().startswith("Description: Add a helper\n")
    assert refresh_patches.refresh(toy) == []
    assert make_tree.make_tree(toy) is False


def test_refresh_mends_the_form(toy):
    text = patch_text(SECOND).replace("--- a/vllm/core.py\n", "--- a/vllm/core.py\t2020-01-01\n")
    (toy.patches / SECOND).write_text(text)
    make_tree.make_tree(toy)
    assert refresh_patches.refresh(toy) == [SECOND]
    assert (toy.patches / SECOND).read_text() == patch_text(SECOND)


def test_refresh_never_undoes_a_patch_that_was_pulled(toy):
    make_tree.make_tree(toy)
    pulled = patch_text(SECOND).replace("return 1", "return 7")
    (toy.patches / SECOND).write_text(pulled)
    tick(toy.patches / SECOND)
    with pytest.raises(fork.ForkError, match=f"{SECOND} changed in patches/"):
        refresh_patches.refresh(toy)
    assert (toy.patches / SECOND).read_text() == pulled
    assert make_tree.make_tree(toy) is True
    assert "return 7" in (toy.tree / "vllm/helper.py").read_text()


def test_refresh_fails_where_no_patch_owns_an_edit(toy, monkeypatch):
    monkeypatch.setattr(refresh_patches, "Layout", lambda: toy)
    monkeypatch.setattr(sys, "argv", ["refresh"])
    make_tree.make_tree(toy)
    assert refresh_patches.main() == 0
    helper = toy.tree / "vllm/helper.py"
    helper.write_text(helper.read_text().replace("return 1", "return 7"))
    (toy.tree / "vllm/fresh.py").write_text("x = 1\n")
    with pytest.raises(fork.ForkError, match=r"no patch owns: vllm/fresh.py; `make refresh ARGS=\"--add-to NAME.patch"):
        refresh_patches.main()
    assert "+    return 7" in (toy.patches / SECOND).read_text()  # the owned ones are written all the same


def test_refresh_gives_unowned_edits_to_a_patch(toy, monkeypatch):
    monkeypatch.setattr(refresh_patches, "Layout", lambda: toy)
    monkeypatch.setattr(sys, "argv", ["refresh", "--add-to", FIRST])
    make_tree.make_tree(toy)
    (toy.tree / "vllm/fresh.py").write_text("x = 1\n")
    (toy.tree / "vllm/data.json").write_text("[]\n")
    (toy.tree / "LICENSE").unlink()
    assert refresh_patches.main() == 0
    files = {diff.path: diff for diff in patchfile.parse(FIRST, (toy.patches / FIRST).read_text()).files}
    assert list(files) == ["LICENSE", "vllm/core.py", "vllm/data.json", "vllm/fresh.py"]
    assert files["vllm/fresh.py"].created and files["LICENSE"].deleted
    assert make_tree.make_tree(toy) is False and make_tree.unsaved_edits(toy) == []
    monkeypatch.setattr(sys, "argv", ["refresh", "--add-to", "core-not-there.patch"])
    with pytest.raises(fork.ForkError, match="core-not-there.patch is not applied"):
        refresh_patches.main()


def test_refresh_without_a_tree_says_what_to_run(toy):
    with pytest.raises(fork.ForkError, match="run `make tree`"):
        refresh_patches.refresh(toy)


def test_a_missing_patch_file_is_named(toy):
    (toy.patches / SECOND).unlink()
    with pytest.raises(fork.ForkError, match=f"series names {SECOND}"):
        make_tree.make_tree(toy)


@pytest.mark.skipif(not shutil.which("quilt"), reason="quilt is not installed")
class TestQuilt:
    """quilt works on the tree as if it had pushed the series itself, and writes the same bytes."""

    def quilt(self, toy, *arguments: str, text: str | None = None) -> str:
        done = subprocess.run(
            ["quilt", "--quiltrc", str(SCRIPTS / "quiltrc"), *arguments],
            cwd=toy.tree,
            input=text,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def test_refresh_is_a_no_op(self, toy):
        make_tree.make_tree(toy)
        assert "unchanged" in self.quilt(toy, "refresh")
        assert "unchanged" in self.quilt(toy, "refresh", "-f", FIRST)

    def test_pop_and_push_come_back_to_the_same_tree(self, toy):
        make_tree.make_tree(toy)
        self.quilt(toy, "pop", "-a")
        assert (toy.tree / "vllm/core.py").read_text().endswith("answer = 41\n")
        self.quilt(toy, "push", "-a")
        assert make_tree.make_tree(toy) is False

    def test_popped_patches_are_applied_again(self, toy):
        make_tree.make_tree(toy)
        self.quilt(toy, "pop")
        assert make_tree.make_tree(toy) is True
        assert (toy.tree / "vllm/helper.py").is_file()

    def test_a_new_patch_by_quilt_is_what_refresh_would_write(self, toy):
        make_tree.make_tree(toy)
        self.quilt(toy, "new", "serving-say-more.patch")
        self.quilt(toy, "add", "vllm/core.py", "vllm/more.py")
        core = toy.tree / "vllm/core.py"
        core.write_text(core.read_text().replace("# line 4\n", "# line four\n"))
        (toy.tree / "vllm/more.py").write_text("more = 1\n")
        self.quilt(toy, "header", "-r", text="Description: Say more\n\n")
        self.quilt(toy, "refresh")
        by_quilt = (toy.patches / "serving-say-more.patch").read_text()
        assert "+# line four" in by_quilt
        assert refresh_patches.refresh(toy) == []
        assert make_tree.make_tree(toy) is False
        # edited on after quilt's refresh: still ours to refresh, not a pull
        core.write_text(core.read_text().replace("# line four\n", "# line IV\n"))
        self.quilt(toy, "refresh")
        core.write_text(core.read_text().replace("# line IV\n", "# line iv\n"))
        assert refresh_patches.refresh(toy) == ["serving-say-more.patch"]
        assert "+# line iv" in (toy.patches / "serving-say-more.patch").read_text()
