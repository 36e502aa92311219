"""A prefill and a decode server, each with its engine, over NIXL on a CPU: answers as of one engine, and what travels.

The decode server's engine runs in this process, the other one in prefill_server.py.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from engines import engine, scheduler_of
from vllm import SamplingParams, TokensPrompt
from vllm.config import KVTransferConfig
from vllm.exceptions import VLLMValidationError

from evals.live_server import NEEDLE_MODEL, free_port
from evals.needle.prompts import encode, make_prompt

BLOCK_SIZE = 32
LAYERS = 8  # in segments of 2, each a KV cache group
BLOCK_BYTES = BLOCK_SIZE * 2 * 2 * 64 * 4  # of a layer: keys and values, two heads of 64, float32
DECLINED_BELOW = 600
LEASE = 8  # seconds
NEW = 12
# Prompts of over 2,048 tokens are pruned over several steps.
ENGINE = {
    "dtype": "float32",
    "block_size": BLOCK_SIZE,
    "max_num_batched_tokens": 2048,
    "kv_cache_memory_bytes": 1 << 28,
    "async_scheduling": True,
}
PRUNE = {"top_p": 0.9}


def token_ids(length: int, seed: int) -> list[int]:
    return list(encode(make_prompt("multikey", length, seed).text))


def transfer(role: str, **settings: Any) -> dict[str, Any]:
    return {"kv_connector": "NixlConnector", "kv_role": role, "kv_buffer_device": "cpu", **settings}


class PrefillServer:
    """Its process; `ask` sends a request and waits for the answer."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("prefill_server.py"))]
        environment = os.environ | {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)
        self.ask(
            model=str(NEEDLE_MODEL),
            uniprefill=PRUNE | {"decline_below_tokens": DECLINED_BELOW},
            kv_transfer_config=transfer("kv_producer", kv_connector_extra_config={"kv_lease_duration": LEASE}),
            enable_prefix_caching=True,
            **ENGINE,
        )

    def ask(self, **values: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(values) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the prefill server ended"
        return json.loads(line)

    def prefill(self, prompt: list[int], **extra: Any) -> dict[str, Any]:
        return self.ask(prompt=prompt, extra={"kv_transfer_params": {"do_remote_decode": True}} | extra)

    def await_idle(self, seconds: float) -> None:
        """Until it holds no request, and no block but its prefix cache's, which are free too."""
        end = time.monotonic() + seconds
        while (state := self.ask(state=1))["requests"]:
            assert time.monotonic() < end, state
            time.sleep(0.05)
        assert state["free"] == state["blocks"] - 1


@pytest.fixture(scope="module")
def prefill_server() -> Iterator[PrefillServer]:
    server = PrefillServer()
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture(scope="module")
def decode_server(prefill_server) -> Iterator[Any]:
    config = KVTransferConfig(**transfer("kv_consumer", kv_load_failure_policy="recompute"))
    with (
        patch.dict(os.environ, {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}),
        engine(NEEDLE_MODEL, uniprefill=PRUNE, kv_transfer_config=config, enable_prefix_caching=True, **ENGINE) as llm,
    ):
        yield llm


@pytest.fixture
def bytes_read(decode_server, monkeypatch) -> list[int]:
    """What NIXL says of each transfer that ends."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats

    found: list[int] = []
    record = NixlKVConnectorStats.record_transfer
    monkeypatch.setattr(
        NixlKVConnectorStats, "record_transfer", lambda self, res: (found.append(res.totalBytes), record(self, res))[1]
    )
    return found


def decode(llm: Any, prompt: list[int], params: dict[str, Any], **extra: Any) -> Any:
    return generate_with(llm, [(prompt, {"kv_transfer_params": params} | extra)])[0]


def generate_with(llm: Any, requests: list[tuple[list[int], dict[str, Any]]]) -> list[Any]:
    params = [
        SamplingParams(
            temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=5, extra_args={"uniprefill_report": 1} | extra
        )
        for _, extra in requests
    ]
    return llm.generate([TokensPrompt(prompt_token_ids=p) for p, _ in requests], params, use_tqdm=False)


def answer(output: Any) -> list[dict[int, float]]:
    """The best tokens and their logprobs at each step, the chosen one first."""
    (choice,) = output.outputs
    return [
        {token: found[token].logprob for token in (chosen, *found)}
        for chosen, found in zip(choice.token_ids, choice.logprobs, strict=True)
    ]


def alone(llm: Any, prompt: list[int], **extra: Any) -> Any:
    """The same of one engine."""
    return generate_with(llm, [(prompt, extra)])[0]


def assert_nothing_held(llm: Any) -> None:
    scheduler = scheduler_of(llm)
    pool = scheduler.kv_cache_manager.block_pool
    assert not scheduler.requests and pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


def blocks_of(alive: list[int]) -> int:
    per_segment = LAYERS // len(alive)
    return sum(per_segment * math.ceil(n / BLOCK_SIZE) for n in alive)


@pytest.mark.parametrize("length", [1500, 3333, 8000], ids=["one-step", "lane", "long-lane"])
def test_a_pruned_prompt_is_decoded_as_by_one_engine(prefill_server, decode_server, bytes_read, length) -> None:
    """With a part of the bytes, and nothing of the prompt computed again but its last token.

    Bit by bit; but where one engine computes that token in a step with others, up to rounding.
    """
    prompt = token_ids(length, seed=length)
    sent = prefill_server.prefill(prompt)
    output = decode(decode_server, prompt, sent["kv_transfer_params"])
    single = alone(decode_server, prompt)
    assert output.outputs[0].token_ids == single.outputs[0].token_ids
    for ours, theirs in zip(answer(output), answer(single), strict=True):
        assert ours == (theirs if length > ENGINE["max_num_batched_tokens"] else pytest.approx(theirs, abs=1e-4))
    assert sent["tokens"] == list(single.outputs[0].token_ids[:1])
    alive = [segment["tokens_in"] for segment in single.uniprefill["segments"]]
    assert alive[1] < length / 2
    report = output.uniprefill
    # Of one token each; the engine is a step ahead of its outputs.
    assert (report["outcome"], report["steps"]) == ("received", 2)
    assert [segment["tokens_in"] for segment in report["segments"]] == alive
    assert report["kv_blocks"] == single.uniprefill["kv_blocks"]
    moved, dense = (blocks_of(counts) * BLOCK_BYTES for counts in (alive, [length] * len(alive)))
    assert bytes_read == [moved] and moved < 0.55 * dense
    assert report["transfer"] == sent["report"]["transfer"] == {"bytes_moved": moved, "bytes_spared": dense - moved}
    assert_nothing_held(decode_server)
    prefill_server.await_idle(LEASE)


def test_dense_prompts_travel_as_in_stock(prefill_server, decode_server, bytes_read) -> None:
    """Short ones and those that want it, whole."""
    for length, extra in ((900, {}), (2000, {"uniprefill": 0})):
        prompt = token_ids(length, seed=3)
        sent = prefill_server.prefill(prompt, **extra)
        assert "uniprefill" not in sent["kv_transfer_params"]
        output = decode(decode_server, prompt, sent["kv_transfer_params"], **extra)
        assert (output.uniprefill["outcome"], output.uniprefill["reason"]) == ("dense", "remote_prefill")
        assert bytes_read.pop() == LAYERS * math.ceil(length / BLOCK_SIZE) * BLOCK_BYTES and not bytes_read
        # What was received is in the prefix cache now, and read again.
        single = alone(decode_server, prompt, **extra)
        assert single.num_cached_tokens > 0
        assert output.outputs[0].token_ids == single.outputs[0].token_ids


def test_a_short_prompt_is_declined_and_prefilled_where_it_is_decoded(prefill_server, decode_server) -> None:
    prompt = token_ids(DECLINED_BELOW - 100, seed=4)
    sent = prefill_server.prefill(prompt)
    assert sent["tokens"] == [] and sent["kv_transfer_params"] is None
    assert (sent["finish_reason"], sent["stop_reason"]) == ("stop", "declined: few_tokens")
    # What a router sends on then.
    assert answer(decode(decode_server, prompt, {})) == answer(alone(decode_server, prompt))
    prefill_server.await_idle(1)


def test_received_and_own_prompts_side_by_side(prefill_server, decode_server) -> None:
    """In one batch: received, dense received, declined and pruned here."""
    prompts = [token_ids(n, seed=10 + i) for i, n in enumerate((3000, 900, 400, 1700, 2600))]
    requests: list[tuple[list[int], dict[str, Any]]] = []
    for i, prompt in enumerate(prompts):
        params = {} if i == 3 else prefill_server.prefill(prompt)["kv_transfer_params"] or {}
        requests.append((prompt, {"kv_transfer_params": params} if params else {}))
    together = generate_with(decode_server, requests)
    outcomes = [output.uniprefill["outcome"] for output in together]
    assert outcomes == ["received", "dense", "dense", "pruned", "received"]
    for output, prompt in zip(together, prompts, strict=True):
        assert output.outputs[0].token_ids == alone(decode_server, prompt).outputs[0].token_ids
    assert_nothing_held(decode_server)
    prefill_server.await_idle(LEASE)


def test_a_preempted_prompt_is_pruned_again_here(prefill_server, decode_server) -> None:
    prompt = token_ids(2500, seed=5)
    params = prefill_server.prefill(prompt)["kv_transfer_params"]
    scheduler = scheduler_of(decode_server)
    schedule, preempted = scheduler.schedule, []

    def preempt_once(*args: Any) -> Any:
        if not preempted and any(request.num_output_tokens >= 3 for request in scheduler.running):
            preempted.append(scheduler.running.pop())
            scheduler._preempt_request(preempted[0], time.monotonic())
        return schedule(*args)

    with patch.object(scheduler, "schedule", preempt_once):
        output = decode(decode_server, prompt, params)
    assert output.uniprefill["outcome"] == "received"
    (request,) = preempted
    assert request.prefill_decision.pruned and not request.prefill_decision.alive
    single = alone(decode_server, prompt)
    assert output.outputs[0].token_ids == single.outputs[0].token_ids
    assert_nothing_held(decode_server)


@pytest.mark.parametrize("enabled", [1, 0])
def test_blocks_that_cannot_be_read_are_computed_here(prefill_server, decode_server, bytes_read, enabled) -> None:
    """Pruned or dense, as is asked of this server."""
    prompt = token_ids(1600, seed=6)
    params = prefill_server.prefill(prompt)["kv_transfer_params"]
    forged = params | {"remote_block_ids": [ids[:-1] for ids in params["remote_block_ids"]]}
    with patch.object(scheduler_of(decode_server).ledger.policy.config, "enabled", bool(enabled)):
        output = decode(decode_server, prompt, forged)
        single = alone(decode_server, prompt)
    assert output.uniprefill["outcome"] == single.uniprefill["outcome"] == ("pruned" if enabled else "dense")
    assert output.outputs[0].token_ids == single.outputs[0].token_ids and not bytes_read
    assert_nothing_held(decode_server)


def test_foreign_parameters_are_refused_by_name(prefill_server, decode_server) -> None:
    prompt = token_ids(1600, seed=7)
    params = prefill_server.prefill(prompt)["kv_transfer_params"]
    offer = params["uniprefill"]
    for changed, name in (
        ({"alive": [1600, 1601, 1, 1]}, "alive"),
        ({"alive": offer["alive"][1:]}, "alive"),
        ({"plan": "of another model"}, "plan"),
    ):
        with pytest.raises(VLLMValidationError, match=f"^kv_transfer_params.uniprefill.{name} .* drop ") as error:
            decode(decode_server, prompt, params | {"uniprefill": offer | changed})
        assert error.value.parameter == f"kv_transfer_params.uniprefill.{name}"
    with pytest.raises(VLLMValidationError, match=r"the prompt's length \(1601\)"):
        decode(decode_server, [*prompt, 1], params)
    assert_nothing_held(decode_server)


def test_an_aborted_transfer_and_an_unread_lease_hold_nothing(prefill_server, decode_server) -> None:
    """The first as soon as it is over, the second when it expires."""
    prefill_server.await_idle(2 * LEASE)
    unread = prefill_server.prefill(token_ids(1400, seed=8))
    assert unread["kv_transfer_params"] and prefill_server.ask(state=1)["requests"] == 1
    prompt = token_ids(3000, seed=9)
    params = prefill_server.prefill(prompt)["kv_transfer_params"]
    running = decode_server.llm_engine
    sampling = SamplingParams(max_tokens=NEW, extra_args={"kv_transfer_params": params})
    running.add_request("aborted", TokensPrompt(prompt_token_ids=prompt), sampling)
    running.step()
    running.abort_request(["aborted"])
    end = time.monotonic() + 20
    while scheduler_of(decode_server).requests:
        assert time.monotonic() < end
        running.engine_core.get_output()
    assert_nothing_held(decode_server)
    prefill_server.await_idle(2 * LEASE)


def test_a_dead_prefill_server_does_not_hold_up_the_decode_server(prefill_server, decode_server, bytes_read) -> None:
    """One that is known, and one that never answered: the prompt is pruned here."""
    prompt = token_ids(1600, seed=20)
    params = prefill_server.prefill(prompt)["kv_transfer_params"]
    single = alone(decode_server, prompt)
    unknown = params | {"remote_engine_id": "never-met", "remote_port": free_port()}
    prefill_server.process.kill()
    prefill_server.process.wait()
    for offered in (params, unknown):
        output = decode(decode_server, prompt, offered)
        assert output.uniprefill["outcome"] == "pruned" and not bytes_read
        assert answer(output) == answer(single)
    assert_nothing_held(decode_server)
