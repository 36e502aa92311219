"""serving-document-uniprefill.patch: the operator's page names what the code has, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import get_args

import prometheus_client
import pytest
import vllm  # noqa: F401  before torch
from vllm.config import UniPrefillConfig
from vllm.v1.uniprefill import policy
from vllm.v1.uniprefill.ledger import EndedPrefill, KVBlocks
from vllm.v1.uniprefill.plan import SegmentPlan
from vllm.v1.uniprefill.report import prefill_report
from vllm.v1.uniprefill.stats import UniPrefillProm

PAGE = Path(__file__).parents[2] / "build" / "tree" / "docs" / "features" / "uniprefill.md"


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text()


def rows(page: str, first_heading: str) -> list[list[str]]:
    """The cells of the table whose first column is headed so."""
    lines = page.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_heading} |"))
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return found


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_every_setting_with_its_default(page) -> None:
    config = UniPrefillConfig()
    described = {code(name)[0]: default for name, default, _ in rows(page, "`--uniprefill-config`")}
    assert described.keys() == {field.name for field in dataclasses.fields(config)}
    for name, default in described.items():
        value = getattr(config, name)
        assert default == ("–" if value is None else f"`{json.dumps(value)}`"), name


def test_every_request_argument(page) -> None:
    described = [name for cell, _ in rows(page, "request, in `vllm_xargs`") for name in code(cell)]
    assert sorted(described) == sorted(policy._ARGS)


def test_every_field_of_the_report(page) -> None:
    """In the example, which is JSON, and in the table."""
    example = re.search(r'```json\n"choices": (.*?)```', page, re.DOTALL)[1]
    shown = json.loads(example)[0]["uniprefill"]
    blocks = [KVBlocks(2, 1000, 0), KVBlocks(2, 24, 976)]
    ended = EndedPrefill(
        dense_reason=None, alive=[16000, 384], kv_blocks=blocks, time_to_first_token=1.0, steps=10, lane_wait=0.0
    )
    config = UniPrefillConfig(selection_layers=[1])
    report = prefill_report(ended, policy.Decision(16000, None), config, SegmentPlan(4, (1,)).segments)
    assert shown.keys() == report.keys()
    assert shown["segments"] == report["segments"] and shown["kv_blocks"] == report["kv_blocks"]
    described = [name for cell, _ in rows(page, "report") for name in code(cell)]
    assert sorted(described) == sorted(report)


def test_every_reason(page) -> None:
    described = [code(cell)[0] for cell, *_ in rows(page, "reason")]
    assert sorted(described) == sorted(get_args(policy.DenseReason))


def test_every_metric(page, configure, monkeypatch) -> None:
    """With its labels beside the model's and the engine's, under its exposed name."""
    registry = prometheus_client.CollectorRegistry()
    for kind in ("_counter_cls", "_gauge_cls", "_histogram_cls"):
        cls = getattr(UniPrefillProm, kind)
        monkeypatch.setattr(UniPrefillProm, kind, staticmethod(lambda cls=cls, **kw: cls(registry=registry, **kw)))
    UniPrefillProm(configure({}), ["model_name", "engine"], {0: ["m", "0"]})
    exposed = {m.name + ("_total" if m.type == "counter" else "") for m in registry.collect()}
    described = [code(cell)[0] for cell, _ in rows(page, "metric")]
    assert {name.split("{")[0] for name in described} == exposed


def test_metrics_it_refers_to_exist(page) -> None:
    """Stock's names too."""
    source = (Path(vllm.__file__).parent / "v1" / "metrics" / "loggers.py").read_text()
    source += (Path(vllm.__file__).parent / "v1" / "uniprefill" / "stats.py").read_text()
    named = set(re.findall(r"vllm:[a-z_]+", page))
    assert len(named) > 6
    for name in named:
        assert f'"{name.removesuffix("_total")}"' in source, name
