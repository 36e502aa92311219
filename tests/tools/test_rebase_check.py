"""make rebase-check on other toy releases."""

from scripts import rebase_check, tree

from .conftest import FIRST, RELEASE, SECOND


def verdicts(toy, tmp_path, **changes):
    source = tmp_path / "other"
    for name, text in (RELEASE | changes).items():
        if text is not None:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_text(text)
    return {v.name: v for v in rebase_check.try_series(tree.load_series(toy), source)}


CORE = RELEASE["vllm/core.py"]


def test_the_same_release_is_clean(toy, tmp_path):
    assert [v.outcome for v in verdicts(toy, tmp_path).values()] == ["clean", "clean"]


def test_lines_above_make_an_offset(toy, tmp_path):
    found = verdicts(toy, tmp_path, **{"vllm/core.py": "# a\n# b\n" + CORE})
    assert found[FIRST].outcome == found[SECOND].outcome == "offset"
    assert found[FIRST].notes == [f"{FIRST}:11: vllm/core.py: +2 lines"]


def test_a_change_on_the_spot_is_a_conflict_with_its_place(toy, tmp_path):
    found = verdicts(toy, tmp_path, **{"vllm/core.py": CORE.replace("answer = 41", "answer = 40")})
    assert found[FIRST].outcome == "conflict"
    assert found[FIRST].notes == [f"{FIRST}:11: vllm/core.py line 6: expected 'answer = 41', found 'answer = 40'"]
    assert found[SECOND].outcome == "clean"


def test_a_file_that_is_gone_is_a_conflict(toy, tmp_path):
    found = verdicts(toy, tmp_path, **{"vllm/core.py": None})
    assert found[FIRST].outcome == "conflict" and "is gone" in found[FIRST].notes[0]


def test_what_the_release_holds_is_already_upstream(toy, tmp_path):
    found = verdicts(toy, tmp_path, **{"vllm/core.py": CORE.replace("answer = 41", "answer = 42")})
    assert [v.outcome for v in found.values()] == ["already upstream", "clean"]


def test_a_hunk_that_only_adds_is_seen_upstream(toy, tmp_path):
    both = {"vllm/core.py": "# first\n" + CORE, "vllm/helper.py": "def help():\n    return 1\n"}
    assert verdicts(toy, tmp_path, **both)[SECOND].outcome == "already upstream"


def test_half_upstream_is_a_conflict(toy, tmp_path):
    assert verdicts(toy, tmp_path, **{"vllm/core.py": "# first\n" + CORE})[SECOND].outcome == "conflict"
