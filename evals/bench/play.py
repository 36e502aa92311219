"""Arrivals of several requests at once, played on one engine in this process.

A request's time to first token counts from when it was due, also when it became due while a step
ran, so a long prefill that holds others up shows in theirs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from evals.bench.engine import Bench, EngineSpec, Variant

if TYPE_CHECKING:
    from vllm import LLM

SHORT, LONG = "short", "long"
NEW_TOKENS = 32  # at most, of a request
TOGETHER = 16  # at most


def many_at_once(bench: Bench) -> list[EngineSpec]:
    shape = bench.shape
    return [EngineSpec(shape.selection_layers, shape.traffic_length, NEW_TOKENS, seqs=2 * TOGETHER, resident=4)]


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
    """Send each request when it is due; step until all are served.

    Raises:
        RuntimeError: if a long prompt was not prefilled as asked.

    """
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
            done.token_times += [now] * (len(output.outputs[0].token_ids) - len(done.token_times))
            if output.finished:
                done.outcome = output.uniprefill["outcome"]
    wanted = "pruned" if variant.pruned else "dense"
    if wrong := [one for one in served if one.arrival.kind == LONG and one.outcome != wanted]:
        raise RuntimeError(f"{len(wrong)} of {len(served)} prompts were not {wanted}")
    return served
