"""Metrics and the log clause count what the scheduler's reports say."""

from __future__ import annotations

import time
from types import SimpleNamespace

import prometheus_client
import pytest
import vllm  # noqa: F401  before torch
from vllm.v1.uniprefill.policy import Decision, PrunePolicy
from vllm.v1.uniprefill.segments import SegmentPlan
from vllm.v1.uniprefill.stats import (
    EndedPrefill,
    UniPrefillLogging,
    UniPrefillProm,
    UniPrefillStats,
    keep_ratio,
)

PLAN = SegmentPlan(num_layers=8, selection_layers=(1, 5))
CONFIG = SimpleNamespace(
    uniprefill_config=SimpleNamespace(selection_layers=[1, 5]),
    model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: 8),
    observability_config=SimpleNamespace(custom_histogram_buckets=None),
)
STATS = UniPrefillStats(
    [
        EndedPrefill("short_prompt", [20, 20, 20], 0.1),
        EndedPrefill("short_prompt", [30, 30, 30], 0.2),
        EndedPrefill("disabled", [4000, 4000, 4000], 30),
        EndedPrefill(None, [1000, 500, 100], 1),
        EndedPrefill(None, [2000, 200, 200], 3),
    ]
)


def test_keep_ratio_weighs_segments_by_layers() -> None:
    """2 of 8 layers see all, 4 see half, 2 see a tenth: (2 + 2 + .2) / 8."""
    assert keep_ratio(PLAN.segments, [1000, 500, 100]) == pytest.approx(0.525)
    assert keep_ratio(PLAN.segments, [700, 700, 700]) == 1


@pytest.fixture
def registry(monkeypatch):
    """Metrics that register here instead of in the process-wide registry."""
    registry = prometheus_client.CollectorRegistry()

    def on_registry(cls):
        return lambda **kwargs: cls(registry=registry, **kwargs)

    monkeypatch.setattr(UniPrefillProm, "_counter_cls", staticmethod(on_registry(prometheus_client.Counter)))
    monkeypatch.setattr(UniPrefillProm, "_histogram_cls", staticmethod(on_registry(prometheus_client.Histogram)))
    return registry


def test_prometheus_counts(registry) -> None:
    """Two engines count apart; labels are outcome and reason, and the segment."""
    prom = UniPrefillProm(CONFIG, ["model_name", "engine"], {0: ["m", "0"], 1: ["m", "1"]})
    prom.observe(STATS, 1)
    prom.observe(UniPrefillStats([EndedPrefill(None, [10, 10, 10], 0.5)]), 0)

    def value(name: str, engine: str = "1", **labels: str) -> float | None:
        return registry.get_sample_value(f"vllm:uniprefill_{name}", {"model_name": "m", "engine": engine, **labels})

    assert value("requests_total", outcome="dense", reason="short_prompt") == 2
    assert value("requests_total", outcome="dense", reason="disabled") == 1
    assert value("requests_total", outcome="pruned", reason="") == 2
    assert value("requests_total", "0", outcome="pruned", reason="") == 1
    assert value("prompt_tokens_total") == 3000
    assert value("kept_tokens_total", segment="1") == 700
    assert value("kept_tokens_total", segment="2") == 300
    assert value("kept_tokens_total", segment="0") is None
    assert value("keep_ratio_count") == 2
    assert value("keep_ratio_sum") == pytest.approx(0.525 + (2 * 2000 + 6 * 200) / (8 * 2000))
    assert value("keep_ratio_bucket", le="0.4") == 1
    assert value("time_to_first_token_seconds_sum", outcome="pruned") == 4
    assert value("time_to_first_token_seconds_count", outcome="pruned") == 2
    assert value("time_to_first_token_seconds_sum", outcome="dense") == pytest.approx(30.3)
    assert value("time_to_first_token_seconds_sum", "0", outcome="pruned") == 0.5


def test_nothing_registered_without_the_flag(registry) -> None:
    config = SimpleNamespace(uniprefill_config=None)
    UniPrefillProm(config, ["model_name", "engine"], {0: ["m", "0"]})
    assert list(registry.collect()) == []


def test_log_clause_covers_one_interval() -> None:
    log = UniPrefillLogging(CONFIG)
    assert log.take_clause() is None
    log.observe(STATS)
    text, arguments = log.take_clause()
    assert text % tuple(arguments) == "UniPrefill: 2 pruned (42.5% computed), 3 dense"
    assert log.take_clause() is None


def test_scheduler_counts_each_request_once() -> None:
    """At its first output, whether or not the request wants a report."""
    policy = PrunePolicy.__new__(PrunePolicy)
    policy.segments, policy.stats, policy.log_stats = PLAN.segments, UniPrefillStats(), True

    def request(name: str, reason: str | None, wants_report: bool) -> SimpleNamespace:
        decision = Decision(600, reason, 0.9, None, wants_report)
        return SimpleNamespace(request_id=name, uniprefill=decision, arrival_time=time.time() - 5)

    pruned, dense = request("a", None, False), request("b", "disabled", True)
    kept = {"a": [600, 300, 100]}
    reports = []
    for _ in range(3):  # outputs of three steps; only the first carries what was kept
        assert policy.take_report(pruned, kept) is None
        reports.append(policy.take_report(dense, kept))
        kept = None
    assert [report and report["reason"] for report in reports] == ["disabled", None, None]
    first, second = policy.take_stats().prefills
    assert (first.dense_reason, first.alive) == (None, [600, 300, 100])
    assert (second.dense_reason, second.alive) == ("disabled", [600, 600, 600])
    assert 5 <= first.time_to_first_token <= second.time_to_first_token < 6
    assert policy.take_stats() == UniPrefillStats()


def test_nothing_piles_up_where_nobody_takes_it() -> None:
    """With --disable-log-stats the scheduler never asks."""
    policy = PrunePolicy.__new__(PrunePolicy)
    policy.segments, policy.stats, policy.log_stats = PLAN.segments, UniPrefillStats(), False
    decision = Decision(600, None, 0.9, None, wants_report=True)
    request = SimpleNamespace(request_id="a", uniprefill=decision, arrival_time=time.time())
    assert policy.take_report(request, {"a": [600, 300, 100]})["outcome"] == "pruned"
    assert policy.stats == UniPrefillStats()
