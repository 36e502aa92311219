"""Evaluate: the same samples dense and pruned, then times to the first token in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate

from evals.lm.arithmetic import make_row
from evals.lm.backends import Backend, Completion
from evals.lm.records import Records
from scripts.fork import ForkError, say, sha256_file

UNKNOWN_SHARE = 0.5  # of a prompt's tokens; with more the model cannot read it


@dataclass(frozen=True)
class Variant:
    """One way to prefill.

    name: of the way; what it shares with others of the same config is its `method`.
    xargs: the request's arguments.
    config: of the engine that is asked; of no consequence for dense ones.
    """

    name: str
    method: str
    xargs: Mapping[str, Any]
    config: Mapping[str, Any]

    def key(self) -> dict[str, Any]:
        """Of its answers' records; a profile counts by what stands in it, wherever it lies."""
        config = dict(self.config)
        if profile := config.get("profile"):
            config["profile"] = sha256_file(Path(profile))
        return {"xargs": dict(self.xargs), "config": config}


DENSE = Variant("dense", "", {"uniprefill": 0}, {})


class RecordedLM(LM):
    """For the harness: answers from the records, and the others from the backend, kept as they come."""

    def __init__(self, backend: Backend, records: Records, batch_size: int, what: str) -> None:
        super().__init__()
        self.backend, self.records, self.batch_size, self.what = backend, records, batch_size, what
        self.variant = DENSE
        self.reports: list[dict[str, Any]] = []

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts in the requests' order; `reports` then holds theirs."""
        keys = [self._key(instance) for instance in requests]
        found = [self.records.get(key) for key in keys]
        missing = [i for i, value in enumerate(found) if value is None]
        done = len(requests) - len(missing)
        if done:
            say(f"{self.what}, {self.variant.name}: {done} of {len(requests)} answered before")
        for i in missing:
            self._check(requests[i])
        for start in range(0, len(missing), self.batch_size):
            batch = missing[start : start + self.batch_size]
            answers = self.backend.complete([requests[i].args for i in batch], self.variant.xargs)
            for i, answer in zip(batch, answers, strict=True):
                found[i] = {"text": answer.text, "report": answer.report}
                self.records.add(keys[i], found[i])
            say(f"{self.what}, {self.variant.name}: {done + start + len(batch)} of {len(requests)} answered")
        completions = [Completion(**value) for value in found]
        self.reports = [completion.report for completion in completions]
        return [completion.text for completion in completions]

    def _key(self, instance: Instance) -> dict[str, Any]:
        prompt, generation = instance.args
        return {"prompt": prompt, "generation": generation, **self.variant.key()}

    def _check(self, instance: Instance) -> None:
        """The harness would cut off the start of a long prompt and go on, and score 0 where no word is known.

        Raises:
            ForkError: if prompt and answer do not fit the model, or the prompt is not in its words.

        """
        prompt, generation = instance.args
        ids = self.backend.encode(prompt)
        tokens = len(ids) + generation.get("max_gen_toks", 0)
        if tokens > self.backend.max_length:
            raise ForkError(
                f"{self.what}: a prompt and its answer take {tokens} tokens, and the model runs with "
                f"{self.backend.max_length}; shorten LENGTHS or raise max_model_len."
            )
        unknown = getattr(self.backend.lm.tokenizer, "unk_token_id", None)
        share = sum(token == unknown for token in ids) / len(ids)
        if share > UNKNOWN_SHARE:
            raise ForkError(
                f"{self.what}: {share:.0%} of the prompt is unknown to the model's tokenizer; the needle model answers "
                "the tasks `needle`, other models `local_ruler`."
            )

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.backend.lm.apply_chat_template(chat_history, add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        return self.backend.lm.tokenizer_name

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("tasks with prompt logprobs are refused")

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError("tasks with prompt logprobs are refused")


@dataclass
class Run:
    """What all tasks of a run share.

    variants: the pruned ones; dense runs always.
    limit: samples of each task and length.
    ttft_samples: how many of them are timed.
    """

    backend: Backend
    records: Records
    variants: Sequence[Variant]
    limit: int
    ttft_samples: int
    batch_size: int
    chat: bool

    def rows(self, name: str, task: Task, length: int, what: str) -> list[dict[str, Any]]:
        """The table's lines of one task and length, one a variant; `what` begins the progress lines."""
        lm = RecordedLM(self.backend, self.records, self.batch_size, what)
        scores: dict[str, list[float]] = {}
        reports: dict[str, list[dict[str, Any]]] = {}
        for variant in (DENSE, *self.variants):
            lm.variant = variant
            scores[variant.name] = self._scores(lm, name, task, length)
            reports[variant.name] = lm.reports
        times = self._times(what, [instance.args[0] for instance in task.instances])
        return [
            make_row(
                {"task": name, "length": length, "setting": variant.name, "method": variant.method},
                scores[DENSE.name],
                scores[variant.name],
                reports[variant.name],
                [(seconds[DENSE.name], seconds[variant.name]) for seconds in times],
            )
            for variant in self.variants
        ]

    def _scores(self, lm: RecordedLM, name: str, task: Task, length: int) -> list[float]:
        """One score a sample, in the task's order, by the harness's own evaluation."""
        result = evaluate(
            lm, {"tasks": {name: task}}, limit=self.limit, bootstrap_iters=0, apply_chat_template=self.chat
        )
        samples = result["samples"][name]
        first = samples[0]
        metric = str(length) if str(length) in first["metrics"] else first["metrics"][0]
        samples = sorted((s for s in samples if s["filter"] == first["filter"]), key=lambda s: s["doc_id"])
        values = [sample[metric] for sample in samples]
        if not all(isinstance(value, (int, float)) and 0 <= value <= 1 for value in values):
            raise ForkError(f"{name} has no score of 0 to 1 for each sample, so nothing can be paired.")
        return [float(value) for value in values]

    def _times(self, what: str, prompts: Sequence[str]) -> list[dict[str, float]]:
        """For each timed sample the seconds to the first token of every variant, one after the other.

        The order rotates from sample to sample; the first sample is run once before, unmeasured.
        """
        order = [DENSE, *self.variants]
        measured: list[dict[str, float]] = []
        warm = False
        for i, prompt in enumerate(prompts[: self.ttft_samples]):
            key = {"ttft": prompt, "variants": [[v.name, v.key()] for v in order]}
            seconds = self.records.get(key)
            if seconds is None:
                ids = self.backend.encode(prompt)
                if not warm:
                    for variant in order:
                        self.backend.first_token(ids, variant.xargs)
                    warm = True
                turn = i % len(order)
                seconds = {v.name: self.backend.first_token(ids, v.xargs)[0] for v in order[turn:] + order[:turn]}
                self.records.add(key, seconds)
                say(f"{what}: time to first token, {i + 1} of {min(len(prompts), self.ttft_samples)}")
            measured.append(seconds)
        return measured
