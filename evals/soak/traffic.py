"""Clients of the soak: what they send, when they leave, and what they hold against the answers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from evals.bench.engine import MIN_LENGTH
from evals.live_server import NAME
from evals.needle.prompts import NeedlePrompt, is_correct, make_prompt

LENGTHS = (300, 700, 1100, 1500, 2048, 3000)  # prompt tokens; the first two are dense by length
TASK = "multiquery"  # its answer is three tokens: the last two need a right decode after the prefill
VARIANTS: dict[str, dict[str, float]] = {
    "dense": {"uniprefill": 0},
    "pruned": {"uniprefill": 1},
    "keep_ratio": {"uniprefill": 1, "uniprefill_keep_ratio": 0.5},
}
STEADY_CLIENTS = 12  # send one request after the other
CROWD_CLIENTS = 100  # send one request each at the start of every window
WINDOW_SECONDS = 20.0
OUTGROWING_TOKENS = 300
PATIENCE_SECONDS = 1800.0  # an answer that takes longer counts as a hang, on a busy machine too
COMPLETIONS = "/v1/completions"

MALFORMED: dict[str, tuple[str, bytes, int]] = {
    "cut JSON": (COMPLETIONS, b'{"model": "needle", "prompt": "what is', 400),
    "no JSON": (COMPLETIONS, b"\xff\xfe\x00", 400),
    "an empty body": (COMPLETIONS, b"", 400),
    "a list": (COMPLETIONS, b"[1, 2]", 400),
    "a prompt that is an object": (COMPLETIONS, b'{"model": "needle", "prompt": {"a": 1}}', 400),
    "another model": (COMPLETIONS, b'{"model": "other", "prompt": "what"}', 404),
    "negative max_tokens": (COMPLETIONS, b'{"model": "needle", "prompt": "what", "max_tokens": -1}', 400),
    "a token id out of range": (COMPLETIONS, b'{"model": "needle", "prompt": [999999]}', 400),
    "too long a prompt": (COMPLETIONS, b'{"model": "needle", "prompt": "' + b"what " * 20_000 + b'"}', 400),
    "top_p of 2": (COMPLETIONS, b'{"model": "needle", "prompt": "a", "vllm_xargs": {"uniprefill_top_p": 2}}', 400),
    "top_p NaN": (COMPLETIONS, b'{"model": "needle", "prompt": "a", "vllm_xargs": {"uniprefill_top_p": NaN}}', 400),
    "an unknown argument": (COMPLETIONS, b'{"model": "needle", "prompt": "a", "vllm_xargs": {"uniprefill_x": 1}}', 400),
    "chat without messages": ("/v1/chat/completions", b'{"model": "needle"}', 400),
    "an unknown route": ("/v1/nothing", b"{}", 404),
}


def make_questions(count: int) -> list[NeedlePrompt]:
    """`count` prompts, the lengths in turn."""
    lengths = itertools.cycle(LENGTHS)
    return [make_prompt(TASK, next(lengths), 5000 + i) for i in range(count)]


@dataclass
class Tally:
    """What happened.

    Attributes:
        done: requests that ended as they should, by kind.
        checked: answers held against the right one, by variant.
        wrong: those that differed.
        failures: anything else that must not happen: statuses, hangs, broken connections.
        most_at_once: requests under way at one moment, at most.

    """

    done: Counter[str] = field(default_factory=Counter)
    checked: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    under_way: int = 0
    most_at_once: int = 0


class Traffic:
    """Random requests against one server; the seed determines what is sent, not when it arrives."""

    def __init__(self, url: str, questions: Sequence[NeedlePrompt], seed: int) -> None:
        self.url = url
        self.questions = questions
        self.seed = seed
        self.tally = Tally()
        self.names = itertools.count()
        # kind -> (weight, what to do)
        self.actions: dict[str, tuple[int, Callable[[random.Random], Awaitable[None]]]] = {
            "completion": (36, self.complete),
            "chat": (6, self.chat),
            "stream": (14, self.stream),
            "several choices": (8, self.several),
            "left before the first token": (10, self.leave_early),
            "left within the stream": (10, self.leave_stream),
            "aborted": (6, self.abort),
            "malformed body": (7, self.malformed),
            "half a body": (3, self.half_body),
        }

    async def __aenter__(self) -> Traffic:
        self.session = aiohttp.ClientSession(
            self.url,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=PATIENCE_SECONDS),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()

    async def ask_alone(self, question: NeedlePrompt, variant: str) -> bool:
        """Whether the server answers right with nothing beside the request."""
        body = self.body(question, VARIANTS[variant], max_tokens=4)
        async with self.session.post(COMPLETIONS, json=body) as response:
            response.raise_for_status()
            return is_correct(question, (await response.json())["choices"][0]["text"])

    async def outgrow(self, cache_tokens: int) -> None:
        """Long answers to questions that just fit the KV cache: however slow the machine, one is preempted."""
        together: list[NeedlePrompt] = []
        for question in sorted(self.questions, key=lambda q: q.num_tokens, reverse=True):
            if sum(q.num_tokens for q in together) + question.num_tokens <= cache_tokens:
                together.append(question)

        async def ask(question: NeedlePrompt) -> None:
            body = self.body(question, VARIANTS["dense"], max_tokens=OUTGROWING_TOKENS)
            async with self.session.post(COMPLETIONS, json=body) as response:
                self.check(question, "dense", (await read(response))["choices"][0]["text"])

        await asyncio.gather(*map(ask, together))

    async def run(self, seconds: float) -> None:
        """All clients, until the time is over and their last requests are answered."""
        deadline = time.monotonic() + seconds
        steady = [self.client(f"steady {i}", deadline, 0) for i in range(STEADY_CLIENTS)]
        crowd = [self.client(f"crowd {i}", deadline, WINDOW_SECONDS) for i in range(CROWD_CLIENTS)]
        await asyncio.gather(*steady, *crowd)

    async def client(self, name: str, deadline: float, window: float) -> None:
        """Requests one after the other, at most one a window, if there are windows."""
        rng = random.Random(f"{self.seed}/{name}")
        kinds, weights = list(self.actions), [weight for weight, _ in self.actions.values()]
        while time.monotonic() < deadline:
            sent = time.monotonic()
            await self.act(rng.choices(kinds, weights)[0], rng)
            if window:
                await asyncio.sleep(max(0.0, min(sent + window, deadline) - time.monotonic()))

    async def act(self, kind: str, rng: random.Random) -> None:
        tally = self.tally
        tally.under_way += 1
        tally.most_at_once = max(tally.most_at_once, tally.under_way)
        try:
            await self.actions[kind][1](rng)
        except TimeoutError:
            tally.failures.append(f"{kind}: no answer within {PATIENCE_SECONDS:.0f} s")
        except Exception as error:  # any, so that one client's trouble is told and the others go on
            tally.failures.append(f"{kind}: {type(error).__name__}: {error}"[:300])
        else:
            tally.done[kind] += 1
        finally:
            tally.under_way -= 1

    # --- what clients do

    async def complete(self, rng: random.Random) -> None:
        question, variant = self.choose(rng)
        async with self.session.post(COMPLETIONS, json=self.random_body(question, variant, rng)) as response:
            self.check(question, variant, (await read(response))["choices"][0]["text"])

    async def chat(self, rng: random.Random) -> None:
        question, variant = self.choose(rng)
        body = self.random_body(question, variant, rng)
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
        async with self.session.post("/v1/chat/completions", json=body) as response:
            self.check(question, variant, (await read(response))["choices"][0]["message"]["content"])

    async def stream(self, rng: random.Random) -> None:
        question, variant = self.choose(rng)
        body = self.random_body(question, variant, rng) | {"stream": True}
        body["vllm_xargs"] = VARIANTS[variant] | {"uniprefill_report": 1}
        async with self.session.post(COMPLETIONS, json=body) as response:
            text, reports = "", []
            async for chunk in chunks(response):
                choice = chunk["choices"][0]
                text += choice["text"]
                reports += [choice["uniprefill"]] if "uniprefill" in choice else []
        self.check(question, variant, text)
        pruned = variant != "dense" and question.num_tokens >= MIN_LENGTH
        if [report["outcome"] for report in reports] != ["pruned" if pruned else "dense"]:
            raise RuntimeError(f"reports {reports} of a {variant} request of {question.num_tokens} tokens")

    async def several(self, rng: random.Random) -> None:
        """Choices that must agree: sampling among one token."""
        question, variant = self.choose(rng)
        count = rng.randint(2, 3)
        body = self.random_body(question, variant, rng) | {"n": count, "temperature": 1.0, "top_k": 1}
        async with self.session.post(COMPLETIONS, json=body) as response:
            choices = (await read(response))["choices"]
        if len(choices) != count:
            raise RuntimeError(f"{len(choices)} choices, not {count}")
        for choice in choices:
            self.check(question, variant, choice["text"])

    async def leave_early(self, rng: random.Random) -> None:
        """Close the connection while the request waits or is prefilled."""
        question, variant = self.choose(rng)
        post = self.session.post(COMPLETIONS, json=self.random_body(question, variant, rng))
        task = asyncio.ensure_future(post)
        await asyncio.sleep(rng.uniform(0.005, 0.5))
        task.cancel()
        if isinstance(response := (await asyncio.gather(task, return_exceptions=True))[0], aiohttp.ClientResponse):
            response.close()

    async def leave_stream(self, rng: random.Random) -> None:
        question, variant = self.choose(rng)
        body = self.random_body(question, variant, rng) | {"stream": True}
        stay = rng.randint(1, 20)
        async with self.session.post(COMPLETIONS, json=body) as response:
            async for _ in chunks(response):
                stay -= 1
                if stay == 0:
                    break
            response.close()

    async def abort(self, rng: random.Random) -> None:
        """Have the server abort the request, which must still be answered."""
        question, variant = self.choose(rng)
        name = f"soak-{next(self.names)}"
        body = self.random_body(question, variant, rng) | {"max_tokens": 200}
        post = self.session.post(COMPLETIONS, json=body, headers={"X-Request-Id": name})
        task = asyncio.ensure_future(post)
        await asyncio.sleep(rng.uniform(0.02, 2.0))
        async with self.session.post(
            "/inference/v1/abort_requests", json={"request_ids": [f"cmpl-{name}-0"]}
        ) as response:
            response.raise_for_status()
        async with await task as response:
            reason = (await read(response))["choices"][0]["finish_reason"]
        if reason not in ("abort", "length"):
            raise RuntimeError(f"finish_reason {reason!r} of an aborted request")
        self.tally.done[f"aborted, ended by {reason}"] += 1

    async def malformed(self, rng: random.Random) -> None:
        name = rng.choice(list(MALFORMED))
        path, body, expected = MALFORMED[name]
        headers = {"Content-Type": "application/json"}
        async with self.session.post(path, data=body, headers=headers) as response:
            if response.status != expected:
                raise RuntimeError(f"{name} gave HTTP {response.status}, not {expected}")

    async def half_body(self, rng: random.Random) -> None:
        """Promise more than is sent, then go away."""
        address = urlsplit(self.url)
        _, writer = await asyncio.open_connection(address.hostname, address.port)
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: soak\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: 100000\r\n\r\n".encode() + b'{"model": "needle", "prompt": "what')
        await writer.drain()
        await asyncio.sleep(rng.uniform(0, 0.2))
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    # --- what they need for it

    def choose(self, rng: random.Random) -> tuple[NeedlePrompt, str]:
        return rng.choice(self.questions), rng.choice(list(VARIANTS))

    def random_body(self, question: NeedlePrompt, variant: str, rng: random.Random) -> dict[str, Any]:
        return self.body(question, VARIANTS[variant], max_tokens=rng.choice((4, 4, 8, 30)))

    def body(self, question: NeedlePrompt, xargs: dict[str, float], max_tokens: int) -> dict[str, Any]:
        return {
            "model": NAME,
            "prompt": question.text,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "vllm_xargs": xargs,
        }

    def check(self, question: NeedlePrompt, variant: str, text: str) -> None:
        self.tally.checked[variant] += 1
        if not is_correct(question, text):
            where = f"{question.num_tokens} tokens, seed {question.seed}, {variant}"
            self.tally.wrong.append(f"{where}: {text[:60]!r}, not {question.answer!r}")


async def read(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """The JSON of an answer that must be 200."""
    if response.status != 200:
        raise RuntimeError(f"HTTP {response.status}: {(await response.text())[:200]}")
    return await response.json()


async def chunks(response: aiohttp.ClientResponse) -> Any:
    """The chunks of a stream that must be 200 and end with [DONE]."""
    if response.status != 200:
        raise RuntimeError(f"HTTP {response.status}: {(await response.text())[:200]}")
    async for line in response.content:
        if not line.startswith(b"data: "):
            continue
        if line.strip() == b"data: [DONE]":
            return
        chunk = json.loads(line[6:])
        if "error" in chunk:
            raise RuntimeError(f"the stream ended with {chunk['error']}")
        yield chunk
    raise RuntimeError("the stream ended without [DONE]")
