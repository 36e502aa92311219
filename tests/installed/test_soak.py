"""Random traffic with faults against a live server: right answers, nothing leaked, a clean end.

The traffic and what is looked at are evals/soak's; `python -m evals.soak` runs the same and writes a result. Of the
worker's own state, which no metric shows, test_random_traffic.py sees in one process that nothing is left of it.
"""

from __future__ import annotations

import pytest

from evals.soak.driver import GROWTH_MIB, MORE_FILES, soak, untested
from evals.soak.watch import growth


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((30, 6), id="short", marks=pytest.mark.slow),
        pytest.param((1800, 18), id="30 minutes", marks=pytest.mark.long),
    ],
)
def result(request, tmp_path_factory):
    seconds, questions = request.param
    return soak(seconds, tmp_path_factory.mktemp("soak") / "log", questions=questions)


def test_everything_that_was_to_happen_did(result) -> None:
    """Every kind of request and fault, preemptions, a hundred at once."""
    assert untested(result) == []


def test_no_checked_answer_is_wrong(result) -> None:
    assert result["wrong"] == []
    assert sum(result["checked"].values()) >= 50


def test_no_request_fails_or_hangs(result) -> None:
    """No status but the expected one, no broken stream, no answer that takes minutes, no traceback in the log."""
    assert result["failures"] == []
    assert result["tracebacks"] == 0


def test_nothing_is_left(result) -> None:
    assert not any(result["left"].values()), result["left"]
    assert result["whole_cache_answered"]


def test_memory_and_open_files_stay(result) -> None:
    files = result["open_files"]
    assert growth(result["memory"]["quarters_mib"]["all"]) <= GROWTH_MIB, result["memory"]
    for name, before in files["before"].items():
        assert files["after"][name] <= before + MORE_FILES, name


def test_sigterm_under_load_answers_all_and_ends(result) -> None:
    stop = result["stop"]
    assert stop["running_before"] and stop["exit_code"] == 0 and not stop["left_running"], stop
    assert set(stop["clients"]) == {"whole answer"}, stop
