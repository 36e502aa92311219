"""Engines in this process, the requests that are timed in them, and what every part measures with."""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.bench import hooks
from evals.bench.arithmetic import rotated, size_label
from evals.bench.shapes import ModelShape, Prompts, Shape, read_config
from scripts.fork import ForkError, say

if TYPE_CHECKING:
    from vllm import LLM


def prepare_environment() -> None:
    """Before vLLM is imported: one process, and no log lines between the progress lines."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


MIN_LENGTH = 1024  # shorter prompts are prefilled densely

# On a GPU: a server's budget, compiled and captured as stock does by default, but for few sizes, since each takes time.
GPU_DEFAULTS = {"max_num_batched_tokens": 8192, "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8]}}


@dataclass(frozen=True)
class EngineSpec:
    """An engine of the benchmark.

    Attributes:
        cuts: its selection layers.
        max_prompt: tokens of the longest prompt.
        new: tokens to generate.
        seqs: requests that run together.
        resident: how many of the longest prompts the KV cache holds.
        budget: tokens a step, longer prompts take several; None: vLLM's default.

    """

    cuts: tuple[int, ...]
    max_prompt: int
    new: int = 1
    seqs: int = 8
    resident: int = 1
    budget: int | None = None

    def arguments(self, model: Path, load_format: str) -> dict[str, Any]:
        """Of LLM(...), but for UniPrefill's config."""
        max_model_len = self.max_prompt + self.new
        config = read_config(model)
        # A prompt of the model's full length still gets its tokens.
        positions = max(config["max_position_embeddings"], max_model_len)
        tokens = max_model_len * self.resident * 9 // 8 + 4096
        budget = {} if self.budget is None else {"max_num_batched_tokens": self.budget}
        return budget | {
            "model": str(model),
            "load_format": load_format,
            "dtype": "bfloat16",
            "skip_tokenizer_init": True,
            "use_tqdm_on_load": False,
            "hf_overrides": {"max_position_embeddings": positions},
            "max_model_len": max_model_len,
            "max_num_seqs": self.seqs,
            "kv_cache_memory_bytes": ModelShape.from_config(config).kv_bytes_per_token * tokens,
            "enable_prefix_caching": False,
            "distributed_executor_backend": "uni",
            "seed": 0,
        }


def resolved_cuts(arguments: Mapping[str, Any]) -> tuple[int, ...]:
    """The layers that the engine chooses to cut after.

    Raises:
        ForkError: if it refuses the model, in its own sentence.

    """
    from vllm.engine.arg_utils import EngineArgs

    known = {name: value for name, value in arguments.items() if name != "use_tqdm_on_load"}
    try:
        made = EngineArgs(**known, uniprefill_config={}).create_engine_config()
    except ValueError as error:
        _, flag, sentence = str(error).partition("--uniprefill-config")
        if not flag:
            raise
        raise ForkError(flag + sentence.partition("\n")[0].partition(" [type=")[0]) from None
    return tuple(entry.layer for entry in made.uniprefill_config.selection_layers)


@contextmanager
def engine(arguments: dict[str, Any]) -> Iterator[LLM]:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(**arguments)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


@dataclass(frozen=True)
class Sample:
    """One request: seconds from submission to its output, that output, and the report."""

    seconds: float
    first_token: int
    report: dict[str, Any]

    @property
    def segments(self) -> list[tuple[int, int]]:
        """(layers, prompt tokens alive) of each segment."""
        return [(s["layers"][1] - s["layers"][0] + 1, s["tokens_in"]) for s in self.report["segments"]]


@dataclass(frozen=True)
class Variant:
    """One way to prefill: the request's `extra_args`, and the engine's `top_p_over`."""

    name: str
    extra_args: dict[str, Any]
    top_p_over: str = "all"

    @property
    def pruned(self) -> bool:
        return bool(self.extra_args["uniprefill"])


DENSE = Variant("dense", {"uniprefill": 0})


def top_p_variants(top_p: float) -> list[Variant]:
    arguments = {"uniprefill": 1, "uniprefill_top_p": top_p}
    return [Variant(f"top_p {top_p:g} {over}", arguments, over) for over in ("all", "middle")]


def keep_ratio_variant(keep_ratio: float) -> Variant:
    return Variant(f"keep_ratio {keep_ratio:g}", {"uniprefill": 1, "uniprefill_keep_ratio": keep_ratio})


def first_token(llm: LLM, ids: Sequence[int], variant: Variant) -> Sample:
    """Submit one prompt and wait for its first token."""
    from vllm import SamplingParams, TokensPrompt

    hooks.set_top_p_over(llm, variant.top_p_over)
    extra_args = variant.extra_args | {"uniprefill_report": 1}
    params = SamplingParams(max_tokens=1, temperature=0, detokenize=False, extra_args=extra_args)
    prompt = TokensPrompt(prompt_token_ids=list(ids))
    started = time.perf_counter()
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    seconds = time.perf_counter() - started
    report = output.uniprefill
    if (report["outcome"] == "pruned") != variant.pruned:
        raise RuntimeError(
            f"{variant.name} at {len(ids)} tokens: the prefill was {report['outcome']}, reason {report['reason']}"
        )
    return Sample(seconds, output.outputs[0].token_ids[0], report)


@dataclass(frozen=True)
class Bench:
    """What a part measures with.

    Attributes:
        folder: the model's, loaded with `load_format`.
        model: its sizes.
        options: of the command line.
        facts: what a part says beside its rows goes into it.
        llm: the engine, for the parts that ask for one, with its `cuts`.

    """

    shape: Shape
    folder: Path
    load_format: str
    model: ModelShape
    prompts: Prompts
    device: str
    options: argparse.Namespace
    facts: dict[str, Any]
    llm: LLM | None = None
    cuts: tuple[int, ...] = ()

    @property
    def repeats(self) -> int:
        return self.options.repeats

    @property
    def by_ratio(self) -> Variant:
        return keep_ratio_variant(self.shape.keep_ratio)

    @property
    def one_at_a_time(self) -> EngineSpec:
        """The engine for single prompts of every length, with all cuts."""
        return EngineSpec(self.shape.selection_layers or (), self.shape.lengths[-1])

    @property
    def all_and_first_cut(self) -> list[EngineSpec]:
        spec = self.one_at_a_time
        if self.device != "cpu":  # where an engine takes a minute to start
            return [spec]
        return list(dict.fromkeys((spec, replace(spec, cuts=spec.cuts[:1]))))

    def arguments(self, spec: EngineSpec) -> dict[str, Any]:
        arguments = spec.arguments(self.folder, self.load_format)
        return arguments if self.device == "cpu" else GPU_DEFAULTS | arguments

    @contextmanager
    def started(self, spec: EngineSpec) -> Iterator[Bench]:
        """The bench with an engine."""
        budget = f", {spec.budget} tokens a step" if spec.budget else ""
        say(f"starting an engine for {spec.seqs} requests, cuts after {','.join(map(str, spec.cuts))}{budget}")
        config = {"selection_layers": list(spec.cuts), "min_prompt_tokens": MIN_LENGTH}
        with engine(self.arguments(spec) | {"uniprefill_config": config, "enforce_eager": self.device == "cpu"}) as llm:
            yield replace(self, llm=llm, cuts=spec.cuts)
            del llm  # the next engine needs the memory

    def run(self, tokens: int, seed: int, variant: Variant) -> Sample:
        return first_token(self.llm, self.prompts.ids(tokens, seed), variant)

    def place(self, tokens: int) -> dict[str, Any]:
        """What a row of a pruned prefill begins with."""
        return {"tokens": tokens, "selection_layers": list(self.cuts), "variant": self.by_ratio.name}


def place_label(row: Mapping[str, Any]) -> str:
    cuts = ",".join(map(str, row["selection_layers"]))
    return f"{row['variant']} at {size_label(row['tokens'])}, cuts after {cuts}"


def alternate(what: str, bench: Bench, jobs: Sequence[tuple[int, Variant]]) -> list[list[Sample]]:
    """Run the jobs in turn, `repeats` times after one warm-up; the samples of each job.

    Every repetition has its own prompts, and begins with another job.
    """
    samples: list[list[Sample]] = [[] for _ in jobs]
    for repetition in range(bench.repeats + 1):
        line = []
        for index in rotated(range(len(jobs)), repetition):
            tokens, variant = jobs[index]
            sample = bench.run(tokens, repetition, variant)
            line.append(f"{variant.name} {size_label(tokens)} {sample.seconds:.3f} s")
            if repetition > 0:
                samples[index].append(sample)
        step = f"repetition {repetition}/{bench.repeats}" if repetition else "warm-up"
        say(f"{what}, {step}: {', '.join(line)}")
    return samples


def seconds_of(samples: Sequence[Sample]) -> list[float]:
    return [sample.seconds for sample in samples]
