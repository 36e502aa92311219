"""Dense answers against pruned ones: by the engine, or by transformers for a model that the engine does not prune."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from evals.bench.engine import MIN_LENGTH
from evals.calibrate.model import Watch, WatchedModel
from evals.calibrate.ranks import Sample, progress
from evals.lm.arithmetic import make_row, pooled
from evals.lm.records import Records
from scripts.fork import ForkError

DENSE, PRUNED = {"uniprefill": 0}, {"uniprefill": 1}
CAN_ANSWER = 0.4  # of a task's prompts of one length, densely
Ask = Callable[[Sample, dict[str, Any]], dict[str, Any]]
"""(sample, request arguments) -> {"score": of the answer, "report": of the prefill}."""


def with_transformers(model: WatchedModel, settings: dict[str, Any]) -> Ask:
    """Its dense answers are those of the samples."""
    cuts = {cut["layer"]: cut for cut in settings["selection_layers"]}
    starts = [0, *(layer + 1 for layer in cuts), model.config.num_hidden_layers]

    def ask(sample: Sample, xargs: dict[str, Any]) -> dict[str, Any]:
        if xargs == DENSE:
            return {"score": sample.score, "report": {}}
        watch = Watch(cuts=cuts, hops_asked=settings["hops"])
        text = model.answer(sample.prompt.ids, sample.prompt.max_new_tokens, watch)
        segments = [
            {"layers": [start, end - 1], "tokens_in": tokens}
            for (start, end), tokens in zip(pairwise(starts), (sample.num_tokens, *watch.kept), strict=True)
        ]
        report = {"outcome": "pruned", "prompt_tokens": sample.num_tokens, "segments": segments}
        return {"score": sample.prompt.score(text), "report": report}

    return ask


def start_engine(
    path: Path, config: dict[str, Any], samples: Sequence[Sample], cpu: bool, more: dict[str, Any]
) -> tuple[Ask, Any]:
    """(its way to ask, the backend): vLLM in this process with the config; every prompt is long enough to prune."""
    from evals.lm.__main__ import engine_arguments
    from evals.lm.backends import REPORT, make_engine_backend

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    longest = max(sample.num_tokens + sample.prompt.max_new_tokens for sample in samples)
    config = {**config, "min_prompt_tokens": min(MIN_LENGTH, *(sample.num_tokens for sample in samples))}
    given = argparse.Namespace(model=str(path), lengths=[longest], uniprefill_config=config, engine_args=more)
    backend = make_engine_backend(str(path), engine_arguments(given, cpu, 1), True, 1)
    import vllm

    def ask(sample: Sample, xargs: dict[str, Any]) -> dict[str, Any]:
        params = vllm.SamplingParams(
            max_tokens=sample.prompt.max_new_tokens, temperature=0, extra_args={**xargs, **REPORT}
        )
        prompt = vllm.TokensPrompt(prompt_token_ids=list(sample.prompt.ids), cache_salt=backend.salt())
        [output] = backend.lm.model.generate([prompt], params, use_tqdm=False)
        return {"score": sample.prompt.score(output.outputs[0].text), "report": output.uniprefill}

    return ask, backend


def compare(
    samples: Sequence[Sample],
    ask: Ask,
    backend: Any,
    *,
    timed: int,
    records: Records,
    settings: dict[str, Any],
    loss: float | None = None,
) -> list[Any] | None:
    """A row of evals.lm's table for each task and length; the first `timed` prompts of each length are timed too.

    With `loss` only prompts that count are asked, and it is None as soon as more than this share of their answers is
    lost, whatever is still to come.
    """

    def answer(sample: Sample, xargs: dict[str, Any]) -> dict[str, Any]:
        key = {"prompt": sample.prompt.ids, "xargs": xargs} | ({"settings": settings} if xargs == PRUNED else {})
        return records.kept(key, lambda: ask(sample, xargs))

    dense = [answer(sample, DENSE) for sample in progress("dense", samples, len(samples))]
    count = counted(samples, [answer["score"] for answer in dense])
    gained = sum(1 - answer["score"] for answer, counts in zip(dense, count, strict=True) if counts)  # at most
    found = []
    seen: dict[int, int] = {}
    for sample, unpruned, counts in zip(progress("pruned", samples, len(samples)), dense, count, strict=True):
        if loss is not None and not counts:
            continue
        pruned = answer(sample, PRUNED)
        gained -= 1 - pruned["score"]
        if loss is not None and gained < -loss * sum(count) - 1e-9:  # not for a rounding error
            return None
        length = sample.prompt.length
        seen[length] = seen.get(length, 0) + 1
        times = None
        if backend is not None and seen[length] <= timed:
            key = {"prompt": sample.prompt.ids, "settings": settings, "timed": True}
            if (times := records.get(key)) is None:
                if seen[length] == 1:  # warm
                    for xargs in (DENSE, PRUNED):
                        backend.first_token(sample.prompt.ids, xargs)
                order = (DENSE, PRUNED) if len(found) % 2 else (PRUNED, DENSE)
                by_way = {xargs["uniprefill"]: backend.first_token(sample.prompt.ids, xargs)[0] for xargs in order}
                times = [by_way[0], by_way[1]]
                records.add(key, times)
        found.append((sample.prompt.task, length, unpruned, pruned, times))
    rows = []
    for (length, task), group in groupby(sorted(found, key=lambda f: (f[1], f[0])), key=lambda f: (f[1], f[0])):
        members = list(group)
        rows.append(
            make_row(
                {"task": task, "length": length, "setting": "profile", "method": "profile"},
                [dense["score"] for _, _, dense, _, _ in members],
                [pruned["score"] for _, _, _, pruned, _ in members],
                [pruned["report"] for _, _, _, pruned, _ in members],
                [tuple(times) for *_, times in members if times],
            )
        )
    return rows


def counted(samples: Sequence[Sample], dense: Sequence[float]) -> list[bool]:
    """Whether each is of a task that the model can answer: by chance right answers to others would hide lost ones.

    Args:
        samples: the prompts.
        dense: scores of their dense answers.

    Raises:
        ForkError: if there are none.

    """
    scores: dict[tuple[str, int], list[float]] = {}
    for sample, score in zip(samples, dense, strict=True):
        scores.setdefault((sample.prompt.task, sample.prompt.length), []).append(score)
    able = {place for place, found in scores.items() if fmean(found) >= CAN_ANSWER}
    if not able:
        raise ForkError(
            f"The model answers no task of the check part to {CAN_ANSWER:.0%}; choose other LENGTHS or a model."
        )
    return [(sample.prompt.task, sample.prompt.length) in able for sample in samples]


def together(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rows that count as one, whatever their length."""
    rows = [row for row in rows if row["dense"] >= CAN_ANSWER]
    return pooled(rows) | {"length": max(row["length"] for row in rows)}
