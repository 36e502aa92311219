"""Two engines of a dense model behind one server prune alike, and each counts its own requests."""

from __future__ import annotations

import json
import os
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import pytest
from prometheus_client.parser import text_string_to_metric_families

from evals.live_server import NAME, live_server
from evals.needle.prompts import is_correct, make_prompt

LENGTHS = (1500, 700, 2048, 3000)


@pytest.mark.slow
@pytest.mark.skipif(not version("vllm").endswith(".cpu"), reason="binds the engines to CPU cores")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_two_engines_prune_and_count(tmp_path) -> None:
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    options: dict[str, str | None] = {
        "--uniprefill-config": '{"top_p": 0.99}',
        "--data-parallel-size": "2",
        "--distributed-executor-backend": "mp",
        "--api-server-count": "1",
        "--max-model-len": "4096",
        "--max-num-batched-tokens": "4352",
        "--max-num-seqs": "16",
        "--kv-cache-memory-bytes": "128M",
    }

    def ask(url: str, engine: int, seed: int) -> dict:
        prompt = make_prompt("multikey", LENGTHS[seed], seed)
        body = {"model": NAME, "prompt": prompt.text, "max_tokens": 4, "temperature": 0}
        request = urllib.request.Request(
            f"{url}/v1/completions",
            json.dumps(body | {"vllm_xargs": {"uniprefill_report": 1}}).encode(),
            {"Content-Type": "application/json", "X-data-parallel-rank": str(engine)},
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            answer = json.loads(response.read())
        assert is_correct(prompt, answer["choices"][0]["text"])
        return answer["choices"][0]["uniprefill"]

    asked = [(0, seed) for seed in range(4)] + [(1, seed) for seed in range(3)]
    with live_server(options, tmp_path / "log", environment=environment) as live:
        with ThreadPoolExecutor(len(asked)) as pool:
            reports = list(pool.map(lambda pair: ask(live.url, *pair), asked))
        metrics = urllib.request.urlopen(f"{live.url}/metrics", timeout=30).read().decode()
    assert reports[:3] == reports[4:], "the engines keep different tokens"

    counted: Counter[tuple] = Counter()
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name in ("vllm:uniprefill_requests_total", "vllm:uniprefill_kept_tokens_total"):
                label = sample.labels.get("segment") or sample.labels["outcome"]
                counted[int(sample.labels["engine"]), label] += int(sample.value)
    expected: Counter[tuple] = Counter()
    for (engine, _), report in zip(asked, reports, strict=True):
        expected[engine, report["outcome"]] += 1
        if report["outcome"] == "pruned":
            for segment, entered in enumerate(report["segments"][1:], start=1):
                expected[engine, str(segment)] += entered["tokens_in"]
    assert {engine for engine, _ in expected} == {0, 1}
    assert counted == expected
