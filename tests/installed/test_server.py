"""The served API: pruned answers, reports, HTTP 400 for bad arguments, and a server that goes on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from evals.live_server import NEEDLE_MODEL, LiveServer, live_server
from evals.needle.prompts import is_correct, make_prompt

NUM_TOKENS = 4096
OPTIONS = {
    "--uniprefill-config": '{"top_p": 0.99}',
    "--max-model-len": "8192",
    "--max-num-batched-tokens": "8448",
    "--kv-cache-memory-bytes": "256M",
    "--max-num-seqs": "16",
}
ENVIRONMENT = {"VLLM_LOG_STATS_INTERVAL": "1", "VLLM_LOGGING_LEVEL": "INFO"}


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    with live_server(OPTIONS, tmp_path_factory.mktemp("server") / "log", environment=ENVIRONMENT) as live:
        yield live


@pytest.fixture(scope="module")
def url(live) -> str:
    return live.url


def post(url: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Status and JSON, or the list of a stream's chunks."""
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            text = response.read().decode()
            status = response.status
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())
    if body.get("stream"):
        events = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
        return status, [json.loads(event) for event in events if event != "[DONE]"]
    return status, json.loads(text)


def complete(url: str, prompt: str | list[str], xargs: dict | None = None, **body) -> tuple[int, Any]:
    body = {"model": "needle", "prompt": prompt, "max_tokens": 4, "temperature": 0} | body
    if xargs is not None:
        body["vllm_xargs"] = xargs
    return post(url, "/v1/completions", body)


@pytest.fixture(scope="module")
def prompt():
    return make_prompt("multikey", NUM_TOKENS, seed=1)


def test_pruned_answer_with_report(url, prompt) -> None:
    status, response = complete(url, prompt.text, {"uniprefill_report": 1})
    assert status == 200 and is_correct(prompt, response["choices"][0]["text"])
    report = response["choices"][0]["uniprefill"]
    assert (report["outcome"], report["reason"]) == ("pruned", None)
    assert report["prompt_tokens"] == NUM_TOKENS == response["usage"]["prompt_tokens"]
    segments = report["segments"]
    assert segments[0]["layers"][0] == 0 and segments[-1]["layers"][1] == 7
    assert [s["tokens_in"] for s in segments[1:]] == [s["tokens_kept"] for s in segments[:-1]]
    assert segments[-1]["tokens_kept"] < NUM_TOKENS / 2


def test_dense_by_request(url, prompt) -> None:
    status, response = complete(url, prompt.text, {"uniprefill": 0, "uniprefill_report": 1})
    assert status == 200 and is_correct(prompt, response["choices"][0]["text"])
    report = response["choices"][0]["uniprefill"]
    assert (report["outcome"], report["reason"]) == ("dense", "disabled")
    assert {s["tokens_kept"] for s in report["segments"]} == {NUM_TOKENS}


def test_no_report_unless_asked(url, prompt) -> None:
    _, response = complete(url, prompt.text)
    assert "uniprefill" not in response["choices"][0]


def test_per_request_share(url, prompt) -> None:
    def kept(**xargs) -> list[int]:
        _, response = complete(url, prompt.text, {"uniprefill_report": 1, **xargs})
        return [s["tokens_kept"] for s in response["choices"][0]["uniprefill"]["segments"]]

    assert kept(uniprefill_top_p=1.0) == [NUM_TOKENS] * len(kept())
    assert kept(uniprefill_keep_ratio=0.5)[0] == NUM_TOKENS // 2
    assert kept(uniprefill_keep_ratio=1) == [NUM_TOKENS] * len(kept())


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_stream_reports_on_the_chunk_that_ends_a_choice(url, prompt, path) -> None:
    body: dict[str, Any] = {"model": "needle", "max_tokens": 4, "temperature": 0, "stream": True}
    if "chat" in path:
        body["messages"] = [{"role": "user", "content": prompt.text}]
    else:
        body["prompt"] = prompt.text
    status, chunks = post(url, path, body | {"vllm_xargs": {"uniprefill_report": 1}})
    assert status == 200
    [ended] = [chunk["choices"][0] for chunk in chunks if "uniprefill" in chunk["choices"][0]]
    assert ended["finish_reason"] is not None
    assert ended["uniprefill"]["outcome"] == "pruned"
    _, silent = post(url, path, body)
    assert not [chunk for chunk in silent if "uniprefill" in chunk["choices"][0]]


def test_each_choice_reports_its_own_prompt(url, prompt) -> None:
    """A list of prompts, two samples of each: in the order of the prompts, streamed or not."""
    prompts = [make_prompt("multikey", 2048, seed=2).text, prompt.text, "what is k1 ?"]
    expected = [("pruned", 2048)] * 2 + [("pruned", NUM_TOKENS)] * 2 + [("dense", 5)] * 2
    body = {"n": 2, "temperature": 1.0, "top_k": 1}
    status, response = complete(url, prompts, {"uniprefill_report": 1}, **body)
    assert status == 200 and [c["index"] for c in response["choices"]] == list(range(6))
    reports = [choice["uniprefill"] for choice in response["choices"]]
    assert [(r["outcome"], r["prompt_tokens"]) for r in reports] == expected
    _, chunks = complete(url, prompts, {"uniprefill_report": 1}, stream=True, **body)
    choices = [choice for chunk in chunks for choice in chunk["choices"] if "uniprefill" in choice]
    streamed = {choice["index"]: choice["uniprefill"] for choice in choices}
    assert len(choices) == 6 and [streamed[i] for i in range(6)] == reports


def test_batched_chat_reports_each_conversation(url, prompt) -> None:
    conversations = [[{"role": "user", "content": text}] for text in (prompt.text, "what is k1 ?")]
    body = {"model": "needle", "messages": conversations, "max_tokens": 2}
    status, response = post(url, "/v1/chat/completions/batch", body | {"vllm_xargs": {"uniprefill_report": 1}})
    assert status == 200, response
    assert [c["uniprefill"]["outcome"] for c in response["choices"]] == ["pruned", "dense"]


def test_chat_report(url, prompt) -> None:
    """The model's own template makes the same tokens of a chat as of a completion's prompt."""
    messages = [{"role": "user", "content": prompt.text}]
    body = {"model": "needle", "messages": messages, "max_tokens": 4, "temperature": 0}
    _, silent = post(url, "/v1/chat/completions", body)
    assert "uniprefill" not in silent["choices"][0]
    body["vllm_xargs"] = {"uniprefill_report": 1}
    status, response = post(url, "/v1/chat/completions", body)
    assert status == 200 and is_correct(prompt, response["choices"][0]["message"]["content"])
    assert response["choices"][0]["uniprefill"]["outcome"] == "pruned"
    assert response["usage"]["prompt_tokens"] == NUM_TOKENS


def test_responses_answer_from_a_pruned_prompt(live, prompt) -> None:
    pruned = live.metrics().total("vllm:uniprefill_requests_total", outcome="pruned")
    body = {"model": "needle", "input": prompt.text, "max_output_tokens": 4, "temperature": 0}
    status, response = post(live.url, "/v1/responses", body)
    assert status == 200, response
    [message] = response["output"]
    assert is_correct(prompt, message["content"][0]["text"])
    assert live.metrics().total("vllm:uniprefill_requests_total", outcome="pruned") == pruned + 1


@pytest.mark.parametrize(
    ("xargs", "name"),
    [
        ({"uniprefill_top_p": 0}, "uniprefill_top_p"),
        ({"uniprefill_top_p": 1.5}, "uniprefill_top_p"),
        ({"uniprefill_top_p": -0.1}, "uniprefill_top_p"),
        ({"uniprefill_top_p": "0.9"}, "uniprefill_top_p"),
        ({"uniprefill_top_p": [0.9]}, "uniprefill_top_p"),
        ({"uniprefill_keep_ratio": 0}, "uniprefill_keep_ratio"),
        ({"uniprefill_keep_ratio": "half"}, "uniprefill_keep_ratio"),
        ({"uniprefill_keep_ratio": 0.5, "uniprefill_top_p": 0.9}, "uniprefill_keep_ratio"),
        ({"uniprefill_top_p": True}, "uniprefill_top_p"),
        ({"uniprefill": 0, "uniprefill_top_p": 0.9}, "uniprefill_top_p"),
        ({"uniprefill": 2}, "uniprefill"),
        ({"uniprefill": "yes"}, "uniprefill"),
        ({"uniprefill_report": 0.5}, "uniprefill_report"),
        ({"uniprefill_topp": 0.9}, "uniprefill_topp"),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_bad_argument_is_http_400(url, path, xargs, name) -> None:
    body: dict[str, Any] = {"model": "needle", "max_tokens": 2, "vllm_xargs": xargs}
    if "chat" in path:
        body["messages"] = [{"role": "user", "content": "what is k1 ?"}]
    else:
        body["prompt"] = "what is k1 ?"
    status, response = post(url, path, body)
    assert status == 400, response
    assert name in response["error"]["message"]
    status, _ = complete(url, "what is k1 ?")
    assert status == 200, "the server must go on"


def test_nan_is_http_400(url) -> None:
    """Python's JSON lets NaN through; the check must not."""
    status, response = complete(url, "what is k1 ?", {"uniprefill_top_p": float("nan")})
    assert status == 400, response


def test_many_at_once(url) -> None:
    """Short, long, dense and pruned requests side by side get their own answers."""
    prompts = [make_prompt("multikey", (512, 2048, 6000)[i % 3], seed=100 + i) for i in range(12)]

    def ask(i: int) -> tuple[str, dict]:
        xargs = {"uniprefill_report": 1, **({"uniprefill": 0} if i % 4 == 3 else {})}
        status, response = complete(url, prompts[i].text, xargs)
        assert status == 200
        return response["choices"][0]["text"], response["choices"][0]["uniprefill"]

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(12)))
    for i, (text, report) in enumerate(answers):
        assert is_correct(prompts[i], text), f"request {i}"
        expected = "disabled" if i % 4 == 3 else "short_prompt" if i % 3 == 0 else None
        assert report["reason"] == expected
        assert report["prompt_tokens"] == prompts[i].num_tokens


def metrics_of(server: LiveServer) -> dict[str, float]:
    """UniPrefill's samples and stock's sum of TTFT, by name and labels other than model and engine."""
    return {
        " ".join(
            [
                sample.name.removeprefix("vllm:uniprefill_"),
                *(f"{k}={v}" for k, v in sample.labels.items() if k not in ("model_name", "engine")),
            ]
        ): sample.value
        for sample in server.metrics().samples
        if sample.name.startswith(("vllm:uniprefill", "vllm:time_to_first_token_seconds_sum"))
    }


def test_metrics_count_what_the_reports_say(live, url, prompt) -> None:
    before = metrics_of(live)
    reports = []
    for body in ({}, {"uniprefill_keep_ratio": 0.5}, {"uniprefill": 0}):
        _, response = complete(url, prompt.text, {"uniprefill_report": 1} | body)
        reports.append(response["choices"][0]["uniprefill"])
    complete(url, "what is k1 ?")
    after = metrics_of(live)

    def counted(key: str) -> float:
        return after[key] - before.get(key, 0)

    assert counted("requests_total outcome=pruned reason=") == 2
    assert counted("requests_total outcome=dense reason=disabled") == 1
    assert counted("requests_total outcome=dense reason=short_prompt") == 1
    assert counted("prompt_tokens_total") == 2 * NUM_TOKENS
    assert counted("keep_ratio_count") == 2
    for segment in range(1, len(reports[0]["segments"])):
        entered = sum(report["segments"][segment]["tokens_in"] for report in reports[:2])
        assert counted(f"kept_tokens_total segment={segment}") == entered
    shares = [
        sum((s["layers"][1] - s["layers"][0] + 1) * s["tokens_in"] for s in report["segments"]) / (8 * NUM_TOKENS)
        for report in reports[:2]
    ]
    assert counted("keep_ratio_sum") == pytest.approx(sum(shares))
    # Stock's clock stops when the frontend has the token, ours when the scheduler has it.
    ours = {o: counted(f"time_to_first_token_seconds_sum outcome={o}") for o in ("pruned", "dense")}
    assert all(counted(f"time_to_first_token_seconds_count outcome={outcome}") == 2 for outcome in ours)
    assert min(ours.values()) > 0
    assert sum(ours.values()) <= counted("vllm:time_to_first_token_seconds_sum")


def test_log_line_counts_what_ended(live, url, prompt) -> None:
    """Within an interval or two; every prefill is in one clause only."""

    def logged() -> tuple[int, int]:
        clauses = re.findall(r"UniPrefill: (\d+) pruned \([\d.]+% computed\), (\d+) dense", live.log.read_text())
        return sum(int(pruned) for pruned, _ in clauses), sum(int(dense) for _, dense in clauses)

    def settled() -> tuple[int, int]:
        """When the clauses have caught up with the metrics."""
        for _ in range(600):
            counts = metrics_of(live)
            pruned = counts["requests_total outcome=pruned reason="]
            dense = sum(n for key, n in counts.items() if key.startswith("requests_total outcome=dense"))
            if logged() == (pruned, dense):
                return logged()
            time.sleep(0.1)
        raise AssertionError(f"the log says {logged()}, the metrics {(pruned, dense)}")

    complete(url, prompt.text)
    before = settled()
    complete(url, prompt.text)
    complete(url, prompt.text, {"uniprefill": 0})
    complete(url, "what is k1 ?")
    assert settled() == (before[0] + 1, before[1] + 2)


def test_client_that_leaves_frees_its_request(live, url, prompt) -> None:
    """An aborted request leaves the server answering, with nothing running."""
    body = {"model": "needle", "prompt": prompt.text, "max_tokens": 2000, "ignore_eos": True}
    with pytest.raises(TimeoutError):
        request = urllib.request.Request(
            f"{url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request, timeout=2).read()
    status, response = complete(url, prompt.text)
    assert status == 200 and is_correct(prompt, response["choices"][0]["text"])
    for _ in range(600):
        if not live.metrics().total("vllm:num_requests_running"):
            return
        time.sleep(0.1)
    raise AssertionError("the request still runs")


def test_server_without_the_flag_refuses_the_arguments(tmp_path) -> None:
    """A client that asks for pruning on a stock-like server learns that it gets none."""
    code = (
        "import os; os.environ['VLLM_ENABLE_V1_MULTIPROCESSING'] = '0'\n"
        "import vllm, sys\n"
        "llm = vllm.LLM(sys.argv[1], enforce_eager=True, max_model_len=2048, "
        "kv_cache_memory_bytes=1 << 26, distributed_executor_backend='uni')\n"
        "try: llm.generate('what is k1 ?', vllm.SamplingParams(extra_args={'uniprefill': 1}))\n"
        "except Exception as e: print('REFUSED', type(e).__name__, e)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(NEEDLE_MODEL)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "REFUSED VLLMValidationError" in done.stdout, done.stderr[-2000:]
    assert "--uniprefill-config" in done.stdout
