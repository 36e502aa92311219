"""Two engines of a dense model behind one server prune alike, and each counts its own requests."""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from evals.needle.prompts import is_correct, make_prompt

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from serve import NEEDLE_MODEL, server, wait_until_ready  # noqa: E402

LENGTHS = (1500, 700, 2048, 3000)


@pytest.mark.slow
@pytest.mark.skipif(not version("vllm").endswith(".cpu"), reason="binds the engines to CPU cores")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_two_engines_prune_and_count(tmp_path, unused_tcp_port, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(NEEDLE_MODEL)]
    command += ["--served-model-name", "needle", "--port", str(unused_tcp_port), "--enforce-eager"]
    command += ["--uniprefill-config", '{"top_p": 0.99}', "--data-parallel-size", "2", "--api-server-count", "1"]
    command += ["--max-model-len", "4096", "--max-num-batched-tokens", "4352", "--max-num-seqs", "16"]
    command += ["--kv-cache-memory-bytes", "128M"]
    log = tmp_path / "log"
    url = f"http://127.0.0.1:{unused_tcp_port}"

    def ask(engine: int, seed: int) -> dict:
        prompt = make_prompt("multikey", LENGTHS[seed], seed)
        body = {"model": "needle", "prompt": prompt.text, "max_tokens": 4, "temperature": 0}
        request = urllib.request.Request(
            f"{url}/v1/completions",
            json.dumps(body | {"vllm_xargs": {"uniprefill_report": 1}}).encode(),
            {"Content-Type": "application/json", "X-data-parallel-rank": str(engine)},
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            answer = json.loads(response.read())
        assert is_correct(prompt, answer["choices"][0]["text"])
        return answer["uniprefill"]

    asked = [(0, seed) for seed in range(4)] + [(1, seed) for seed in range(3)]
    with log.open("wb") as stream, server(command, stream.fileno()) as process:
        try:
            wait_until_ready(process, url, 400)
        except Exception as error:
            raise AssertionError(log.read_text()[-3000:]) from error
        with ThreadPoolExecutor(len(asked)) as pool:
            reports = list(pool.map(lambda pair: ask(*pair), asked))
        metrics = urllib.request.urlopen(f"{url}/metrics", timeout=30).read().decode()
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
