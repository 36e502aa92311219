"""What a soak makes of what it saw, without a server."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest

from evals.live_server import Metrics
from evals.needle.prompts import encode
from evals.soak import driver
from evals.soak.traffic import LENGTHS, VARIANTS, Traffic, make_questions
from evals.soak.watch import growth, part_medians

METRICS = """# HELP vllm:num_requests_running Number
vllm:num_requests_running{engine="0",model_name="needle"} 2.0
vllm:num_requests_running{engine="1",model_name="needle"} 1.0
vllm:uniprefill_requests_total{engine="0",model_name="needle",outcome="pruned",reason=""} 3.0
vllm:uniprefill_requests_total{engine="0",model_name="needle",outcome="dense",reason="disabled"} 4.0
vllm:uniprefill_requests_total{engine="0",model_name="needle",outcome="dense",reason="short_prompt"} 5.0
process_resident_memory_bytes 8.0e+08
"""


def good() -> dict[str, Any]:
    """A soak in which nothing was wrong."""
    kinds = [*Traffic("", [], 0).actions, "aborted, ended by abort"]
    quarters = {"api server": [10.0, 11.0, 11.0, 11.0], "all": [20.0, 22.0, 22.0, 23.0]}
    return {
        "questions": {"asked": 18, "answered alone": 18},
        "done": dict.fromkeys(kinds, 3),
        "most_at_once": driver.CROWD_CLIENTS,
        "checked": dict.fromkeys(VARIANTS, 5),
        "wrong": [],
        "failures": [],
        "preemptions": 1.0,
        "left": {"running": 0.0, "waiting": 0.0, "share of the KV cache": 0.0},
        "whole_cache_answered": True,
        "open_files": {"before": {"api server": 20}, "after": {"api server": 21}},
        "memory": {"quarters_mib": quarters},
        "tracebacks": 0,
        "stop": {"exit_code": 0, "left_running": [], "clients": {"whole answer": 9}, "running_before": 2.0},
    }


def test_a_good_soak_has_no_problem() -> None:
    assert driver.problems(good()) == []


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("wrong",), ["x"], "Wrong answer"),
        (("failures",), ["HTTP 500", "HTTP 500"], "Failed 2 times: HTTP 500"),
        (("preemptions",), 0.0, "preempted"),
        (("left", "waiting"), 1.0, "waiting is 1"),
        (("left", "share of the KV cache"), 0.01, "KV cache"),
        (("whole_cache_answered",), False, "whole KV cache"),
        (("memory", "quarters_mib", "all"), [0.0, 10.0, 40.0, 11.0 + driver.GROWTH_MIB], "Memory grew"),
        (("open_files", "after", "api server"), 21 + driver.MORE_FILES, "Open files"),
        (("tracebacks",), 2, "2 tracebacks"),
        (("stop", "exit_code"), None, "exit code None"),
        (("stop", "left_running"), ["worker"], "worker"),
        (("stop", "clients"), {"whole answer": 9, "RuntimeError: HTTP 500": 3}, "3 clients"),
        (("stop", "running_before"), 0.0, "Nothing ran"),
        (("most_at_once",), 99, "99"),
        (("questions", "answered alone"), 10, "10 of 18"),
        (("done", "half a body"), None, "half a body"),
        (("checked", "pruned"), 0, "pruned"),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)
def test_each_fault_is_told(path: tuple[str, ...], value: Any, told: str) -> None:
    result = copy.deepcopy(good())
    place = result
    for key in path[:-1]:
        place = place[key]
    if value is None and path[0] == "done":
        del place[path[-1]]
    else:
        place[path[-1]] = value
    [problem] = driver.problems(result)
    assert told in problem


def test_growth_leaves_the_warm_up_out() -> None:
    assert part_medians([1, 9, 1, 5, 5, 6, 6, 7, 7, 8, 7, 100], 4) == [1, 5, 7, 8]
    assert growth([1.0, 5.0, 7.0, 8.0]) == 3.0


def test_metrics_are_summed_by_label() -> None:
    metrics = Metrics(METRICS)
    assert metrics.total("vllm:num_requests_running") == 3
    assert metrics.total("vllm:num_requests_running", engine="1") == 1
    assert metrics.by_label("vllm:uniprefill_requests_total", "outcome") == {"pruned": 3, "dense": 9}
    assert metrics.total("process_resident_memory_bytes") == 8e8
    with pytest.raises(KeyError):
        metrics.total("vllm:nothing")


def test_questions_have_the_lengths_that_they_say() -> None:
    questions = make_questions(2 * len(LENGTHS))
    assert [q.num_tokens for q in questions] == [*LENGTHS, *LENGTHS]
    assert all(len(encode(q.text)) == q.num_tokens for q in questions)
    assert len({q.text for q in questions}) == len(questions)


def test_the_seed_determines_what_a_client_sends() -> None:
    traffic = Traffic("", make_questions(6), 0)

    def sent(name: str) -> list[Any]:
        rng = random.Random(name)
        return [traffic.random_body(*traffic.choose(rng), rng) for _ in range(5)]

    assert sent("steady 1") == sent("steady 1") != sent("steady 2")


def test_an_answer_is_held_against_the_right_one() -> None:
    [question] = make_questions(1)
    traffic = Traffic("", [question], 0)
    traffic.check(question, "dense", f" {question.answer} .")
    traffic.check(question, "pruned", " v1 and")
    assert traffic.tally.checked == {"dense": 1, "pruned": 1}
    assert len(traffic.tally.wrong) == 1 and "pruned" in traffic.tally.wrong[0]
