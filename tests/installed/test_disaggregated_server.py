"""Servers that prefill and decode apart, over HTTP: behind vllm-router, and a decode server whose clients forge."""

from __future__ import annotations

import json
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import psutil
from test_server import complete

from evals.live_server import LiveServer, apart_server, free_port, router
from evals.needle.prompts import NeedlePrompt, is_correct, make_prompt
from scripts.serve import session_members

OPTIONS = {
    "--uniprefill-config": '{"top_p": 0.9}',
    "--block-size": "32",
    "--kv-cache-memory-bytes": "256M",
    "--max-model-len": "16384",
}
PREFILL_OPTIONS = OPTIONS | {"--uniprefill-config": '{"top_p": 0.9, "decline_below_tokens": 1536}'}
SECONDS = 240  # for a state to come


def wait_until(holds: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + SECONDS
    while not (found := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def running(server: LiveServer) -> float:
    return server.metrics().total("vllm:num_requests_running")


def ask(url: str, prompt: NeedlePrompt, **body: Any) -> tuple[int, dict[str, Any]]:
    """Status and the answer's choice; {} with an error, which the router does not say as JSON."""
    sent = {"model": "needle", "prompt": prompt.text, "max_tokens": 4, "temperature": 0}
    sent |= {"vllm_xargs": {"uniprefill_report": 1}} | body
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(sent).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            return response.status, json.load(response)["choices"][0]
    except urllib.error.HTTPError as error:
        return error.code, {}


def check(asked: NeedlePrompt, answer: tuple[int, dict[str, Any]], remote: bool) -> None:
    """Right; by the decode server's report its KV came from the prefill server, or it pruned the prompt itself."""
    status, choice = answer
    assert status == 200 and is_correct(asked, choice["text"])
    report = choice["uniprefill"]
    assert report["outcome"] == ("received" if remote else "pruned")
    assert (report.get("transfer", {}).get("bytes_moved", 0) > 0) is remote


def test_long_prompts_are_prefilled_apart_and_a_dead_prefill_server_takes_nothing_else_with_it(tmp_path) -> None:
    port = str(free_port())
    remote = [make_prompt("multikey", tokens, seed) for seed, tokens in enumerate((1600, 3000, 6000, 8000))]
    local = [make_prompt("multikey", tokens, seed) for seed, tokens in enumerate((1100, 1300, 1500))]
    slow = make_prompt("multikey", 16000, 7)

    def prefill_server(name: str):
        return apart_server("kv_producer", PREFILL_OPTIONS | {"--port": port}, tmp_path / name)

    with (
        apart_server("kv_consumer", OPTIONS, tmp_path / "decode") as decode,
        prefill_server("prefill") as prefill,
        router([prefill.url], [decode.url], tmp_path / "router") as url,
        ThreadPoolExecutor(8) as pool,
    ):
        asked = [(prompt, pool.submit(ask, url, prompt)) for prompt in remote + local]
        for prompt, answer in asked:
            check(prompt, answer.result(), remote=prompt in remote)

        decoded = pool.submit(ask, url, remote[1], max_tokens=200, ignore_eos=True)
        wait_until(lambda: running(decode) == 1 and running(prefill) == 0)
        lost = pool.submit(ask, url, slow, vllm_xargs={"uniprefill": 0})
        wait_until(lambda: running(prefill) == 1)
        for member in session_members(prefill.process.pid):
            with suppress(psutil.Error):
                member.send_signal(signal.SIGKILL)
        assert lost.result()[0] >= 500, "what was in flight on it"
        check(remote[1], decoded.result(), remote=True)
        assert decoded.result()[1]["finish_reason"] == "length"
        assert ask(url, remote[2])[0] >= 500, "no prefill server"

        with prefill_server("again") as again:
            assert again.url == prefill.url
            wait_until(lambda: ask(url, local[0])[0] == 200)
            for prompt in remote[:2]:
                check(prompt, ask(url, prompt), remote=True)
            wait_until(lambda: running(again) == running(decode) == 0)
            wait_until(lambda: decode.metrics().total("vllm:kv_cache_usage_perc") == 0)


def test_a_server_goes_on_after_forged_parameters(tmp_path) -> None:
    """HTTP 400 by name, though the server tells the prefill server of every request that it refuses."""
    options = OPTIONS | {"--kv-cache-memory-bytes": "128M", "--max-model-len": "4096"}
    text = make_prompt("multikey", 1500, 0).text
    address = {
        "remote_engine_id": "forged",
        "remote_request_id": "0",
        "remote_host": "127.0.0.1",
        "remote_port": free_port(),
        "remote_block_ids": [[1], [1], [1], [1]],
    }
    offer = {"alive": [1500, 2, 2, 2], "plan": "0" * 32}
    forged = [
        ({"uniprefill": offer}, "uniprefill.plan"),
        ({"uniprefill": []}, "uniprefill"),
        ({"uniprefill": offer, "remote_engine_id": ["no", "key"]}, "remote_engine_id"),
        ({"remote_block_ids": [1]}, "remote_block_ids"),
        ({"remote_port": None}, "remote_port"),
    ]
    with apart_server("kv_consumer", options, tmp_path / "log") as live:
        for changed, name in forged:
            params = {"do_remote_prefill": True, **address, **changed}
            status, answer = complete(live.url, text, kv_transfer_params=params)
            assert (status, answer["error"]["param"]) == (400, f"kv_transfer_params.{name}")
        # Nobody answers for these: the prompt is prefilled here.
        params = {"do_remote_prefill": True, **address}
        status, answer = complete(live.url, text, kv_transfer_params=params)
        assert status == 200 and answer == complete(live.url, text)[1] | {
            name: answer[name] for name in ("id", "created")
        }
