"""serving-count-transfers.patch: what the report and the metrics say of prompts that two servers share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import prometheus_client
import pytest
import vllm  # noqa: F401  before torch
from vllm.config import KVTransferConfig, UniPrefillConfig
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.uniprefill.ledger import EndedPrefill, KVBlocks
from vllm.v1.uniprefill.plan import SegmentPlan
from vllm.v1.uniprefill.policy import Decision
from vllm.v1.uniprefill.report import prefill_report
from vllm.v1.uniprefill.stats import UniPrefillLogging, UniPrefillProm, UniPrefillStats
from vllm.v1.uniprefill.transfer import TransferredBytes

CONFIG = SimpleNamespace(
    uniprefill_config=UniPrefillConfig(selection_layers=[1, 5]),
    model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: 8),
    observability_config=SimpleNamespace(custom_histogram_buckets=None),
)
ALIVE = [1000, 500, 100]


def ended(transfer: tuple[int, int] | None, received: bool) -> EndedPrefill:
    blocks = [KVBlocks(2, 63, 0), KVBlocks(6, 20, 43)]
    bytes_ = TransferredBytes(*transfer) if transfer else None
    return EndedPrefill(None, ALIVE, blocks, 1.0, steps=1, lane_wait=0.0, received=received, transfer=bytes_)


SENT, RECEIVED, ALONE = ended((30, 70), False), ended((40, 160), True), ended(None, False)


@pytest.mark.parametrize(
    ("prefill", "outcome", "transfer"),
    [
        (SENT, "pruned", {"bytes_moved": 30, "bytes_spared": 70}),
        (RECEIVED, "received", {"bytes_moved": 40, "bytes_spared": 160}),
        (ALONE, "pruned", None),
    ],
)
def test_the_report(prefill, outcome, transfer) -> None:
    """Who pruned it, and how, is said only where it was pruned."""
    segments = SegmentPlan(8, (1, 5)).segments
    decision = Decision(1000, None, alive=tuple(ALIVE) if prefill.received else ())
    report = prefill_report(prefill, decision, CONFIG.uniprefill_config, segments)
    assert (report["outcome"], report["reason"], report.get("transfer")) == (outcome, None, transfer)
    assert [segment["tokens_in"] for segment in report["segments"]] == ALIVE
    assert any("scored_by" in segment for segment in report["segments"]) == (outcome == "pruned")


def test_metrics(monkeypatch) -> None:
    registry = prometheus_client.CollectorRegistry()
    for kind in ("_counter_cls", "_gauge_cls", "_histogram_cls"):
        cls = getattr(UniPrefillProm, kind)
        monkeypatch.setattr(UniPrefillProm, kind, staticmethod(lambda cls=cls, **kw: cls(registry=registry, **kw)))
    prom = UniPrefillProm(CONFIG, ["engine"], {0: ["0"]})
    declined = {"few_tokens": 2, "backlog": 1}
    prom.observe(UniPrefillStats([SENT, RECEIVED, RECEIVED, ALONE], declined=declined, backlog_bytes=77), 0)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"vllm:uniprefill_{name}", {"engine": "0", **labels})

    assert value("requests_total", outcome="pruned", reason="") == 2
    assert value("requests_total", outcome="received", reason="") == 2
    assert value("time_to_first_token_seconds_count", outcome="received") == 2
    assert value("transfer_bytes_total", direction="sent", state="moved") == 30
    assert value("transfer_bytes_total", direction="received", state="moved") == 80
    assert value("transfer_bytes_total", direction="received", state="spared") == 320
    assert value("declined_total", reason="few_tokens") == 2
    assert value("declined_total", reason="backlog") == 1
    assert value("backlog_bytes") == 77
    # What another server computed is not this one's.
    assert value("prompt_tokens_total") == 2 * ALIVE[0]
    assert value("computed_share_count") == 2
    prom.observe(UniPrefillStats(), 0)
    assert value("backlog_bytes") == 0

    log = UniPrefillLogging(CONFIG)
    log.observe(UniPrefillStats([SENT, RECEIVED]))
    text, arguments = log.take_clause()
    assert text % tuple(arguments) == "UniPrefill: 1 pruned (52.5% computed), 0 dense"


UNIPREFILL = {"top_p": 0.9, "selection_layers": [1, 4], "min_prompt_tokens": 64}
KEPT = [200, 90, 33]
# Layers 0 and 1 are in segment 0, layer 2 in the next; a page takes 16 tokens x 2 x 4 bytes.
MOVED, SPARED = (13 + 13 + 6) * 128, 7 * 128


def transfer_scheduler(make_scheduler, role: str) -> tuple[Any, list[UniPrefillStats]]:
    """A scheduler, and its stats as they come."""
    transfer = KVTransferConfig(
        kv_connector="NixlConnector", kv_role=role, kv_buffer_device="cpu", kv_load_failure_policy="recompute"
    )
    scheduler = make_scheduler(UNIPREFILL, segments=(0, 1, 2), kv_transfer_config=transfer)
    take, stats = scheduler._take_stats, []
    scheduler._take_stats = lambda *args: (stats.append(take(*args)), stats[-1])[1]
    return scheduler, stats


def nothing_run(scheduler, **finished: Any) -> None:
    step = scheduler.schedule()
    output = ModelRunnerOutput([], {})
    output.kv_connector_output = KVConnectorOutput(**finished)
    scheduler.update_from_output(step, output)


def test_the_prefill_server_counts(make_scheduler, make_request, finish_step) -> None:
    scheduler, stats = transfer_scheduler(make_scheduler, "kv_producer")
    extra = {"kv_transfer_params": {"do_remote_decode": True}, "uniprefill_report": 1}
    request = make_request(200, max_tokens=1, extra=extra)
    scheduler.add_request(request)
    output = finish_step(scheduler, scheduler.schedule(), {request.request_id: KEPT})[request.request_id]
    assert output.uniprefill["transfer"] == {"bytes_moved": MOVED, "bytes_spared": SPARED}
    assert [p.transfer for p in stats[-1].prefills] == [(MOVED, SPARED)] and stats[-1].backlog_bytes == MOVED
    nothing_run(scheduler, finished_sending={request.request_id})
    assert stats[-1].backlog_bytes == 0


@pytest.mark.parametrize("failed", [False, True])
def test_the_decode_server_counts_what_arrived(make_scheduler, make_request, finish_step, failed) -> None:
    prefill, _ = transfer_scheduler(make_scheduler, "kv_producer")
    scheduler, stats = transfer_scheduler(make_scheduler, "kv_consumer")
    asked = make_request(200, max_tokens=1, extra={"kv_transfer_params": {"do_remote_decode": True}})
    prefill.add_request(asked)
    output = finish_step(prefill, prefill.schedule(), {asked.request_id: KEPT})[asked.request_id]
    extra = {"kv_transfer_params": output.kv_transfer_params, "uniprefill_report": 1}
    request = make_request(200, extra=extra)
    scheduler.add_request(request)
    assert scheduler.ledger.count_unstarted(10) == 0, "it waits for no lane"
    ids = {request.request_id}
    nothing_run(scheduler, finished_recving=ids, failed_recving=ids if failed else set())
    kept = {request.request_id: [200, 40, 40]} if failed else None
    output = finish_step(scheduler, scheduler.schedule(), kept)[request.request_id]
    (prefill_end,) = stats[-1].prefills
    if failed:
        assert prefill_end.transfer is None and not prefill_end.received
        assert output.uniprefill["outcome"] == "pruned" and "transfer" not in output.uniprefill
    else:
        assert prefill_end.transfer == (MOVED, SPARED) and prefill_end.received
        assert output.uniprefill["transfer"] == {"bytes_moved": MOVED, "bytes_spared": SPARED}
