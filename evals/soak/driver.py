"""One soak: serve, warm up, send the traffic, look for what is left, stop under load."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from evals.bench.engine import MIN_LENGTH
from evals.live_server import LiveServer, live_server
from evals.needle.prompts import make_prompt
from evals.soak.traffic import COMPLETIONS, CROWD_CLIENTS, TASK, VARIANTS, Traffic, chunks, make_questions
from evals.soak.watch import Memory, growth, open_files, processes_of, settle, stop

MAX_MODEL_LEN = 8192
CACHE_TOKENS = 8704
OPTIONS: dict[str, str | None] = {
    "--uniprefill-config": json.dumps({"top_p": 0.99, "min_prompt_tokens": MIN_LENGTH}),
    "--max-model-len": str(MAX_MODEL_LEN),
    "--max-num-seqs": "16",
    "--block-size": "32",
    "--dtype": "float32",
    "--kv-cache-memory-bytes": "68M",  # CACHE_TOKENS: a few long requests fill it, so some are preempted
    "--enable-scale-out": None,  # has the route that aborts requests
    # By default the release kills its engine at once, and its HTTP server then waits for clients that nobody answers.
    "--shutdown-timeout": "600",
}
# What else would look like a leak, of the release too: glibc keeps freed tensors in its heap, and oneDNN the code of
# 1,024 matrix products, one for each number of rows that it has seen (half a GB until that is full).
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "LRU_CACHE_CAPACITY": "64",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
}
# Most that the resident memory of all processes together may grow after the warm-up, in MiB.
GROWTH_MIB = 16.0
MORE_FILES = 16  # connections that the server has not closed yet
LANE_SECONDS = "vllm:uniprefill_lane_busy_seconds_total"
# Longer is a hang, however busy the machine.
SETTLE_SECONDS = 120.0
STOP_SECONDS = 660.0
STOP_LENGTHS = (*[300] * 12, 3000, 3000)  # prompt tokens of the requests under way when the server is stopped
STOP_TOKENS = 80  # that each of them generates


def soak(seconds: float, log: Path, *, seed: int = 0, questions: int = 18) -> dict[str, Any]:
    """Run one soak; what came of it, for `problems`."""
    with live_server(OPTIONS, log, environment=ENVIRONMENT) as server:
        result = asyncio.run(run(server, seconds, seed, questions))
        # what the server writes while it is stopped is another matter
        result["tracebacks"] = log.read_text(errors="replace").count("Traceback (most recent call last)")
        result["stop"] = asyncio.run(stop_under_load(server))
    return result


async def run(server: LiveServer, seconds: float, seed: int, count: int) -> dict[str, Any]:
    asked = make_questions(count)
    async with Traffic(server.url, asked, seed) as traffic:
        # Only what a request answers right alone can be held against it in a crowd.
        known = [q for q in asked if all([await traffic.ask_alone(q, variant) for variant in VARIANTS])]
        traffic.questions = known
        # the largest steps first, and many at once: buffers that only grow have grown then
        longest = make_prompt(TASK, MAX_MODEL_LEN - 8, 1)
        whole = [await traffic.ask_alone(longest, variant) for variant in VARIANTS]
        await asyncio.gather(*(traffic.ask_alone(question, "dense") for question in known * 2))
        files = open_files(server)
        before = await asyncio.to_thread(server.metrics)
        memory = Memory(processes_of(server))
        watch = asyncio.create_task(memory.watch(min(2.0, seconds / 100)))
        started = time.monotonic()
        await traffic.run(seconds)
        await traffic.outgrow(CACHE_TOKENS)
        lasted = time.monotonic() - started
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch
        left = await settle(server, SETTLE_SECONDS)
        after = await asyncio.to_thread(server.metrics)
        # takes all blocks of the KV cache but a few: a leaked one would keep it waiting
        whole.append(await traffic.ask_alone(longest, "pruned"))
        tally = traffic.tally
    return {
        "seconds": lasted,
        "questions": {"asked": len(asked), "answered alone": len(known)},
        "done": dict(tally.done.most_common()),
        "most_at_once": tally.most_at_once,
        "checked": dict(tally.checked),
        "wrong": tally.wrong,
        "failures": tally.failures,
        "preemptions": after.total("vllm:num_preemptions_total") - before.total("vllm:num_preemptions_total"),
        "lane_seconds": after.total(LANE_SECONDS) - before.total(LANE_SECONDS),
        "outcomes": after.by_label("vllm:uniprefill_requests_total", "outcome"),
        "left": left,
        "whole_cache_answered": all(whole),
        "open_files": {"before": files, "after": open_files(server)},
        "memory": {
            "samples": len(memory.seconds),
            "quarters_mib": memory.medians(4),
            "course_mib": memory.medians(20)["all"],
        },
    }


async def stop_under_load(server: LiveServer) -> dict[str, Any]:
    """SIGTERM while requests are under way; what became of both sides.

    The server has --shutdown-timeout, so what its engine has is to be answered to its end. What the engine gets after
    the signal the release refuses, so the signal waits for the engine to have all.
    """
    async with Traffic(server.url, [], 0) as traffic:

        async def client(tokens: int, number: int) -> str:
            body = traffic.body(make_prompt(TASK, tokens, number), VARIANTS["pruned"], STOP_TOKENS) | {"stream": True}
            reason = None
            try:
                async with traffic.session.post(COMPLETIONS, json=body) as response:
                    async for chunk in chunks(response):
                        reason = chunk["choices"][0]["finish_reason"]
            except Exception as error:  # whatever way the connection ends
                return f"{type(error).__name__}: {error}"[:200]
            return "whole answer" if reason == "length" else f"ended by {reason}"

        before = await asyncio.to_thread(server.metrics)
        clients = [asyncio.create_task(client(tokens, number)) for number, tokens in enumerate(STOP_LENGTHS)]
        deadline = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < deadline:
            now = await asyncio.to_thread(server.metrics)
            running, waiting = (now.total(f"vllm:num_requests_{state}") for state in ("running", "waiting"))
            ended = now.total("vllm:request_success_total") - before.total("vllm:request_success_total")
            if running + waiting + ended >= len(clients):
                break
        result = await asyncio.to_thread(stop, server, STOP_SECONDS)
        _, open_ended = await asyncio.wait(clients, timeout=SETTLE_SECONDS)
        for task in open_ended:
            task.cancel()
    return result | {
        "running_before": running,
        "clients": dict(Counter("no end" if task in open_ended else task.result() for task in clients)),
    }


def problems(result: dict[str, Any]) -> list[str]:
    """What must not be, each in one sentence."""
    found = [f"Wrong answer: {wrong}." for wrong in result["wrong"]]
    found += [f"Failed {count} times: {failure}." for failure, count in Counter(result["failures"]).items()]
    for name, value in result["left"].items():
        if value:
            found.append(f"With no request under way, {name} is {value:g}.")
    if not result["whole_cache_answered"]:
        found.append("A prompt that takes the whole KV cache was not answered right.")
    grown = growth(result["memory"]["quarters_mib"]["all"])
    if grown > GROWTH_MIB:
        found.append(f"Memory grew by {grown:.0f} MiB after the warm-up, more than {GROWTH_MIB:.0f}.")
    files = result["open_files"]
    for name, before in files["before"].items():
        if files["after"][name] > before + MORE_FILES:
            found.append(f"Open files of the {name} grew from {before} to {files['after'][name]}.")
    if result["tracebacks"]:
        found.append(f"The server's log has {result['tracebacks']} tracebacks.")
    stopped = result["stop"]
    if stopped["exit_code"] != 0:
        found.append(f"SIGTERM under load ended the server with exit code {stopped['exit_code']}, not 0.")
    if stopped["left_running"]:
        found.append(f"{STOP_SECONDS:.0f} s after SIGTERM still there: {', '.join(stopped['left_running'])}.")
    for outcome, count in stopped["clients"].items():
        if outcome != "whole answer":
            found.append(f"SIGTERM left {count} clients without their whole answer: {outcome}.")
    return found + untested(result)


def untested(result: dict[str, Any]) -> list[str]:
    """What the soak was to do and did not, so that its silence proves nothing."""
    found = []
    known, asked = result["questions"]["answered alone"], result["questions"]["asked"]
    if known < 0.9 * asked:
        found.append(f"Only {known} of {asked} questions are answered right by a request alone.")
    if result["preemptions"] < 1:
        found.append("No request was preempted; the KV cache is too large for this.")
    if not result["lane_seconds"]:
        found.append("No prompt was in the lane; none is longer than a step.")
    if result["most_at_once"] < CROWD_CLIENTS:
        found.append(f"Only {result['most_at_once']} requests were under way at once, not {CROWD_CLIENTS}.")
    expected = {*Traffic("", [], 0).actions, "aborted, ended by abort"}
    found += [f"Nothing of the kind {kind!r} was done." for kind in sorted(expected - set(result["done"]))]
    found += [f"No answer was checked of the variant {v}." for v in VARIANTS if not result["checked"].get(v)]
    if not result["stop"]["running_before"]:
        found.append("Nothing ran when the server was stopped.")
    return found
