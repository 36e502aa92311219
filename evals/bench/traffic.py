"""The parts concurrency and poisson: several requests at once, in one engine in this process.

Both play a list of arrivals. A request's time to first token counts from when it was due, also
when it became due while a step ran, so a long prefill that holds others up shows in theirs.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from evals.bench.arithmetic import compare, size_label, spread
from evals.bench.engine import DENSE, Variant
from evals.bench.parts import Bench
from scripts.fork import say

if TYPE_CHECKING:
    from vllm import LLM

CONCURRENCY = (1, 4, 16)
SHORT_TOKENS = 200
SHORT, LONG = "short", "long"


@dataclass(frozen=True)
class Arrival:
    """A request: when it is due (seconds), its prompt, what kind it is, tokens to generate."""

    due: float
    ids: list[int]
    kind: str
    new_tokens: int


@dataclass
class Served:
    """What became of it: seconds after the start at which each of its tokens was there."""

    arrival: Arrival
    token_times: list[float] = field(default_factory=list)
    outcome: str = ""

    @property
    def ttft(self) -> float:
        return self.token_times[0] - self.arrival.due

    @property
    def gaps(self) -> list[float]:
        """Between one token and the next."""
        return [b - a for a, b in pairwise(self.token_times)]


def play(llm: LLM, arrivals: Sequence[Arrival], variant: Variant) -> list[Served]:
    """Send each request when it is due; step until all are served."""
    from vllm import SamplingParams, TokensPrompt

    engine = llm.llm_engine
    waiting = sorted(range(len(arrivals)), key=lambda index: arrivals[index].due)
    served = [Served(arrival) for arrival in arrivals]
    started = time.perf_counter()
    while waiting or engine.has_unfinished_requests():
        now = time.perf_counter() - started
        while waiting and arrivals[waiting[0]].due <= now:
            index = waiting.pop(0)
            params = SamplingParams(
                max_tokens=arrivals[index].new_tokens,
                temperature=0,
                ignore_eos=True,
                detokenize=False,
                extra_args=variant.extra_args | {"uniprefill_report": 1},
            )
            engine.add_request(str(index), TokensPrompt(prompt_token_ids=arrivals[index].ids), params)
        if not engine.has_unfinished_requests():
            time.sleep(max(0.0, arrivals[waiting[0]].due - (time.perf_counter() - started)))
            continue
        for output in engine.step():
            done = served[int(output.request_id)]
            now = time.perf_counter() - started
            new = len(output.outputs[0].token_ids) - len(done.token_times)
            done.token_times += [now] * new
            if output.finished:
                done.outcome = output.uniprefill["outcome"]
    return served


def check_outcomes(served: Sequence[Served], variant: Variant) -> None:
    """Long prompts were prefilled as asked."""
    wanted = "pruned" if variant.pruned else "dense"
    wrong = [one for one in served if one.arrival.kind == LONG and one.outcome != wanted]
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {len(served)} prompts were not {wanted}")


def measure_concurrency(bench: Bench, tokens: int, together: int, variant: Variant) -> dict[str, Any]:
    """So many prompts at once: times to first token of all of them, dense and pruned in turn."""
    seconds: dict[str, list[float]] = {"dense": [], "pruned": []}
    means: dict[str, list[float]] = {"dense": [], "pruned": []}
    for repetition in range(bench.repeats + 1):
        jobs = [("dense", DENSE), ("pruned", variant)]
        for name, way in jobs[repetition % 2 :] + jobs[: repetition % 2]:
            arrivals = [
                Arrival(0.0, bench.prompts.ids(tokens, 100 * repetition + place), LONG, 1) for place in range(together)
            ]
            served = play(bench.llm, arrivals, way)
            check_outcomes(served, way)
            if repetition > 0:
                times = [one.ttft for one in served]
                seconds[name] += times
                means[name].append(statistics.fmean(times))
    row = {
        "tokens": tokens,
        "together": together,
        "variant": variant.name,
        "ttft": {name: spread(values) for name, values in seconds.items()},
        "mean_ttft": {name: spread(values) for name, values in means.items()},
        "gain": compare(means["dense"], means["pruned"]),
    }
    say(f"concurrency {size_label(tokens)} x {together}: {row['gain']['ratio']:.2f}x in the mean time")
    return row


def poisson_arrivals(bench: Bench, tokens: int, rate: float, count: int, new_tokens: int, seed: int) -> list[Arrival]:
    """Three short prompts to one long one in random order; exponential gaps at `rate` a second."""
    source = random.Random(seed)
    kinds = [LONG if place % 4 == 0 else SHORT for place in range(count)]
    source.shuffle(kinds)
    due, arrivals = 0.0, []
    for place, kind in enumerate(kinds):
        due += source.expovariate(rate)
        length = tokens if kind == LONG else SHORT_TOKENS
        arrivals.append(Arrival(due, random_ids(bench, length, 1000 * seed + place), kind, new_tokens))
    return arrivals


def random_ids(bench: Bench, tokens: int, seed: int) -> list[int]:
    """A prompt of any length; needle prompts only come long."""
    return bench.prompts.ids(tokens, seed) if tokens >= 1024 else bench.prompts.ids(1024, seed)[-tokens:]


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 100) * len(ordered) // 100) - 1))]


def summary(served: Sequence[Served]) -> dict[str, Any]:
    """Throughput of one run, and times by kind of prompt."""
    span = max(one.token_times[-1] for one in served) - min(one.arrival.due for one in served)
    kinds = {}
    for kind in (SHORT, LONG):
        group = [one for one in served if one.arrival.kind == kind]
        gaps = [gap for one in group for gap in one.gaps]
        kinds[kind] = {
            "ttft_p50": percentile([one.ttft for one in group], 0.5),
            "ttft_p99": percentile([one.ttft for one in group], 0.99),
            "itl_p50": percentile(gaps, 0.5),
            "itl_p99": percentile(gaps, 0.99),
        }
    tokens = sum(len(one.arrival.ids) + len(one.token_times) for one in served)
    return {"requests_per_second": len(served) / span, "tokens_per_second": tokens / span, **kinds}


def measure_poisson(
    bench: Bench, tokens: int, variant: Variant, *, count: int, new_tokens: int, load: float = 1.2
) -> dict[str, Any]:
    """The same random arrivals dense and pruned, in turn, at `load` of what dense long prefills allow."""
    warm = [Arrival(0.0, bench.prompts.ids(tokens, seed), LONG, new_tokens) for seed in range(2)]
    play(bench.llm, warm[:1], variant)
    single = play(bench.llm, warm[1:], DENSE)[0]
    rate = 4 * load / single.token_times[-1]  # one in four is long
    runs: dict[str, list[dict[str, Any]]] = {"dense": [], "pruned": []}
    for repetition in range(1, bench.repeats + 1):
        arrivals = poisson_arrivals(bench, tokens, rate, count, new_tokens, repetition)
        jobs = [("dense", DENSE), ("pruned", variant)]
        for name, way in jobs[repetition % 2 :] + jobs[: repetition % 2]:
            served = play(bench.llm, arrivals, way)
            check_outcomes(served, way)
            runs[name].append(summary(served))
        say(f"poisson, repetition {repetition}/{bench.repeats}: {rate:.2f} requests a second")

    def values(name: str, *path: str) -> list[float]:
        found = []
        for run in runs[name]:
            value: Any = run
            for key in path:
                value = value[key]
            found.append(value)
        return found

    def both(*path: str, more_is_better: bool = False) -> dict[str, Any]:
        dense, pruned = values("dense", *path), values("pruned", *path)
        gain = compare(pruned, dense) if more_is_better else compare(dense, pruned)
        return {"dense": spread(dense), "pruned": spread(pruned), "gain": gain}

    names = ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99")
    return {
        "tokens": tokens,
        "short_tokens": SHORT_TOKENS,
        "variant": variant.name,
        "requests": count,
        "new_tokens": new_tokens,
        "requests_per_second": rate,
        "load": load,
        "throughput": both("tokens_per_second", more_is_better=True),
        **{kind: {name: both(kind, name) for name in names} for kind in (SHORT, LONG)},
    }
