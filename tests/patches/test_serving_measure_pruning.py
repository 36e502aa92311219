"""serving-measure-pruning.patch: metrics and the log clause count what the scheduler's ledger says."""

from __future__ import annotations

import time
from types import SimpleNamespace

import prometheus_client
import pytest
import vllm  # noqa: F401  before torch
from vllm.config import UniPrefillConfig
from vllm.v1.uniprefill.ledger import EndedPrefill, KVBlocks
from vllm.v1.uniprefill.plan import SegmentPlan
from vllm.v1.uniprefill.stats import UniPrefillLogging, UniPrefillProm, UniPrefillStats, computed_share

PLAN = SegmentPlan(num_layers=8, selection_layers=(1, 5))
CONFIG = SimpleNamespace(
    uniprefill_config=UniPrefillConfig(selection_layers=[1, 5]),
    model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: 8),
    observability_config=SimpleNamespace(custom_histogram_buckets=None),
)

KV_BLOCKS = [KVBlocks(2, 63, 0), KVBlocks(6, 20, 43)]


def ended(reason: str | None, alive: list[int], seconds: float) -> EndedPrefill:
    return EndedPrefill(reason, alive, [] if reason else KV_BLOCKS, seconds, steps=1, lane_wait=0.0)


STATS = UniPrefillStats(
    [
        ended("short_prompt", [20, 20, 20], 0.1),
        ended("short_prompt", [30, 30, 30], 0.2),
        ended("disabled", [4000, 4000, 4000], 30),
        ended(None, [1000, 500, 100], 1),
        ended(None, [2000, 200, 200], 3),
    ],
    lane_busy_seconds=2.5,
    lane_waiting=3,
)


def test_computed_share_weighs_segments_by_layers() -> None:
    """2 of 8 layers see all, 4 see half, 2 see a tenth: (2 + 2 + .2) / 8."""
    assert computed_share(PLAN.segments, [1000, 500, 100]) == pytest.approx(0.525)
    assert computed_share(PLAN.segments, [700, 700, 700]) == 1


@pytest.fixture
def registry(monkeypatch):
    """Metrics that register here instead of in the process-wide registry."""
    registry = prometheus_client.CollectorRegistry()

    def on_registry(cls):
        return lambda **kwargs: cls(registry=registry, **kwargs)

    for kind in ("Counter", "Gauge", "Histogram"):
        cls = on_registry(getattr(prometheus_client, kind))
        monkeypatch.setattr(UniPrefillProm, f"_{kind.lower()}_cls", staticmethod(cls))
    return registry


def test_prometheus_counts(registry) -> None:
    """Two engines count apart; labels are outcome and reason, and the segment."""
    prom = UniPrefillProm(CONFIG, ["model_name", "engine"], {0: ["m", "0"], 1: ["m", "1"]})
    prom.observe(STATS, 1)
    prom.observe(UniPrefillStats([ended(None, [10, 10, 10], 0.5)]), 0)

    def value(name: str, engine: str = "1", **labels: str) -> float | None:
        return registry.get_sample_value(f"vllm:uniprefill_{name}", {"model_name": "m", "engine": engine, **labels})

    assert value("requests_total", outcome="dense", reason="short_prompt") == 2
    assert value("requests_total", outcome="dense", reason="disabled") == 1
    assert value("requests_total", outcome="pruned", reason="") == 2
    assert value("requests_total", "0", outcome="pruned", reason="") == 1
    assert value("prompt_tokens_total") == 3000
    assert value("entered_tokens_total", segment="1") == 700
    assert value("entered_tokens_total", segment="2") == 300
    assert value("entered_tokens_total", segment="0") is None
    assert value("kv_blocks_total", group="0", state="held") == 2 * 63
    assert value("kv_blocks_total", group="0", state="returned") == 0
    assert value("kv_blocks_total", group="1", state="returned") == 2 * 43
    assert value("kv_blocks_total", "0", group="1", state="held") == 20
    assert value("computed_share_count") == 2
    assert value("computed_share_sum") == pytest.approx(0.525 + (2 * 2000 + 6 * 200) / (8 * 2000))
    assert value("computed_share_bucket", le="0.4") == 1
    assert value("time_to_first_token_seconds_sum", outcome="pruned") == 4
    assert value("time_to_first_token_seconds_count", outcome="pruned") == 2
    assert value("time_to_first_token_seconds_sum", outcome="dense") == pytest.approx(30.3)
    assert value("time_to_first_token_seconds_sum", "0", outcome="pruned") == 0.5
    assert (value("lane_busy_seconds_total"), value("lane_waiting")) == (2.5, 3)
    prom.observe(UniPrefillStats(lane_busy_seconds=1, lane_waiting=1), 1)
    assert (value("lane_busy_seconds_total"), value("lane_waiting")) == (3.5, 1)
    assert (value("lane_busy_seconds_total", "0"), value("lane_waiting", "0")) == (0, 0)


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


UNIPREFILL = {"selection_layers": [1, 4], "min_prompt_tokens": 64, "pool_tokens": 600}


def test_the_scheduler_counts_each_prefill_once(make_scheduler, make_request, finish_step, monkeypatch) -> None:
    """With its first output, whether or not the request wants a report; and the lane by the clock."""
    now = 100.0
    monkeypatch.setattr(time, "time", lambda: now)
    scheduler = make_scheduler(UNIPREFILL, max_num_batched_tokens=256)
    stats = []

    def record(*args: object) -> object:
        outputs = update_from_output(*args)
        stats.extend(o.scheduler_stats.uniprefill_stats for o in outputs.values() if o.scheduler_stats)
        return outputs

    update_from_output = scheduler.update_from_output
    monkeypatch.setattr(scheduler, "update_from_output", record)
    first, second, dense = make_request(500), make_request(400), make_request(20)
    for request in (first, second, dense):
        request.arrival_time = 99.0
        scheduler.add_request(request)
    for kept in ({}, {}, {first.request_id: [500, 100, 50]}, {}, {}):
        step = scheduler.schedule()
        now += 1
        finish_step(scheduler, step, kept)
    assert [s.lane_busy_seconds for s in stats] == [1] * 5
    assert [s.lane_waiting for s in stats] == [1, 1, 1, 0, 0]
    ends = [(p.dense_reason, p.alive, p.time_to_first_token, p.steps) for s in stats for p in s.prefills]
    assert ends == [(None, [500, 100, 50], 5, 4), ("short_prompt", [20] * 3, 5, 2)]
