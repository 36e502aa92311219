"""In-process engines, timed requests, and the stopwatch of a pruned prefill's parts."""

from __future__ import annotations

import gc
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.bench.arithmetic import ModelShape

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.v1.worker.gpu.uniprefill.runner import SegmentRunner

MAX_NUM_SEQS = 4


def prepare_environment() -> None:
    """Before vLLM is imported: one process, and no log lines between the progress lines."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def engine_arguments(
    model: Path, load_format: str, max_prompt: int, new: int, seqs: int = MAX_NUM_SEQS, resident: int = 1
) -> dict[str, Any]:
    """Arguments of LLM(...) for prompts that prefill in one step.

    Args:
        max_prompt: tokens of the longest prompt.
        new: tokens to generate.
        seqs: requests that run together.
        resident: how many of the longest prompts the KV cache holds.

    """
    max_model_len = max_prompt + new
    config = json.loads((model / "config.json").read_text())
    # A prompt of the model's full length still gets its tokens.
    positions = max(config["max_position_embeddings"], max_model_len)
    return {
        "model": str(model),
        "load_format": load_format,
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "use_tqdm_on_load": False,
        "hf_overrides": {"max_position_embeddings": positions},
        "max_model_len": max_model_len,
        "max_num_seqs": seqs,
        "max_num_batched_tokens": max_model_len + seqs,
        "kv_cache_memory_bytes": kv_cache_bytes(ModelShape.from_config(config), max_model_len * resident),
        "enable_prefix_caching": False,
        "distributed_executor_backend": "uni",
        "seed": 0,
    }


def kv_cache_bytes(shape: ModelShape, tokens: int) -> int:
    """Room for that many tokens and some more."""
    return shape.kv_bytes_per_token * (tokens * 9 // 8 + 4096)


def refusal(arguments: dict[str, Any]) -> str | None:
    """Why the engine does not prune this model, in its own sentence; None if it does."""
    from vllm.engine.arg_utils import EngineArgs

    known = {name: value for name, value in arguments.items() if name != "use_tqdm_on_load"}
    try:
        EngineArgs(**known, uniprefill_config={}).create_engine_config()
    except ValueError as error:
        text = str(error)
        begin = text.find("--uniprefill-config")
        if begin < 0:
            raise
        return text[begin:].partition("\n")[0].partition(" [type=")[0]
    return None


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


def model_runner_of(llm: LLM) -> Any:
    """vLLM's model runner in this process."""
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    return executor.driver_worker.worker.model_runner


def segment_runner_of(llm: LLM) -> SegmentRunner:
    return model_runner_of(llm).model_state.segment_runner


@dataclass(frozen=True)
class Sample:
    """One request: seconds from submission to its output, that output, and the report."""

    seconds: float
    first_token: int
    report: dict[str, Any]


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

    # The engine reads this at every selection; requests cannot set it.
    segment_runner_of(llm).config.top_p_over = variant.top_p_over
    params = SamplingParams(
        max_tokens=1,
        temperature=0,
        detokenize=False,
        extra_args=variant.extra_args | {"uniprefill_report": 1},
    )
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


@dataclass
class Stopwatch:
    """Named spans of time.

    Attributes:
        mark: takes the time now, in whatever form.
        between: the seconds between two marks.

    """

    mark: Callable[[], Any]
    between: Callable[[Any, Any], float]
    spans: list[tuple[str, Any, Any]] = field(default_factory=list)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = self.mark()
            result = function(*args, **kwargs)
            self.spans.append((name, begin, self.mark()))
            return result

        return call

    def seconds(self) -> dict[str, list[float]]:
        """The durations of each name's spans, in the order in which they ended."""
        found: dict[str, list[float]] = defaultdict(list)
        for name, begin, end in self.spans:
            found[name].append(self.between(begin, end))
        return dict(found)


def host_stopwatch() -> Stopwatch:
    """Wall time; on a GPU every mark waits for it, so the parts do not overlap."""
    import torch

    gpu = torch.cuda.is_available()

    def mark() -> float:
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    return Stopwatch(mark, lambda begin, end: end - begin)


def device_stopwatch() -> Stopwatch:
    """The GPU's own time, by CUDA events, which disturb nothing; wall time without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return host_stopwatch()

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return Stopwatch(mark, between)


@contextmanager
def instrumented(model_runner: Any, stopwatch: Stopwatch) -> Iterator[None]:
    """Time the parts of the pruning steps meanwhile.

    Spans: run (the whole of it), embed (in the first model span), model (once a segment; holds
    score), per cut score, select, compact and metadata; and behind run, sample.
    """
    from vllm.v1.worker.gpu.uniprefill import runner as runner_module
    from vllm.v1.worker.gpu.uniprefill.capture import MassCapture

    runner: SegmentRunner = model_runner.model_state.segment_runner
    inner = runner.bounded_model
    run, build_metadata = runner.run, runner.build_metadata
    compact, score = runner_module._compact, MassCapture._score

    def run_with_timed_model(model: Callable[..., Any], *args: Any) -> Any:
        return run(stopwatch.timed("model", model), *args)

    runner.run = stopwatch.timed("run", run_with_timed_model)
    runner._select = stopwatch.timed("select", runner._select)
    runner.build_metadata = stopwatch.timed("metadata", build_metadata)
    inner.embed_input_ids = stopwatch.timed("embed", inner.embed_input_ids)
    model_runner.sample = stopwatch.timed("sample", model_runner.sample)
    runner_module._compact = stopwatch.timed("compact", compact)
    MassCapture._score = stopwatch.timed("score", score)
    try:
        yield
    finally:
        del runner.run, runner._select, inner.embed_input_ids, model_runner.sample
        runner.build_metadata = build_metadata
        runner_module._compact, MassCapture._score = compact, score
