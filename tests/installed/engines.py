"""In-process engines for the tests, and what they selected."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams, TokensPrompt
from vllm.config import VllmConfig
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.uniprefill.events import Selected, observed_by

MAX_MODEL_LEN = 8192
# Cuts a model of four layers twice, and prompts of 100 tokens already; how much is kept is added.
SMALL_CUTS = {
    "selection_layers": [1, 2],
    "block_size": 16,
    "num_queries": 16,
    "sink_tokens": 16,
    "recent_tokens": 32,
    "min_prompt_tokens": 100,
}


@contextmanager
def engine(model: Path, *, uniprefill: dict[str, Any] | None, **arguments: Any) -> Iterator[LLM]:
    """A vLLM engine in this process, eager, for prompts that fit one step; ended on exit."""
    settings: dict[str, Any] = {
        "enforce_eager": True,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 16,
        # No more than prompts need: the interpreter pads the slots of every step to this many.
        "max_num_batched_tokens": 8192,
        "kv_cache_memory_bytes": 1 << 30,
        "enable_prefix_caching": False,
        "distributed_executor_backend": "uni",
        "async_scheduling": False,
        "seed": 0,
    }
    with _async_scheduling_on_cpu():
        llm = LLM(str(model), uniprefill_config=uniprefill, **(settings | arguments))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


@contextmanager
def _async_scheduling_on_cpu() -> Iterator[None]:
    """The CPU platform turns async scheduling off, as not required; here it is what GPUs run."""
    check = CpuPlatform.check_and_update_config

    def check_and_keep(vllm_config: VllmConfig) -> None:
        asked = vllm_config.scheduler_config.async_scheduling
        check(vllm_config)
        vllm_config.scheduler_config.async_scheduling = asked

    CpuPlatform.check_and_update_config = staticmethod(check_and_keep)
    try:
        yield
    finally:
        CpuPlatform.check_and_update_config = check


def scheduler_of(llm: LLM) -> Scheduler:
    return llm.llm_engine.engine_core.engine_core.scheduler


def model_runner_of(llm: LLM) -> GPUModelRunner:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def generate(
    llm: LLM, prompts: Sequence[list[int]], *, max_tokens: int = 1, lora_request: Any = None, **arguments: Any
) -> list[Any]:
    """Greedy continuations of token-id prompts, with a UniPrefill report each.

    Arguments named `uniprefill*` go with the requests, others into SamplingParams.
    """
    extra = {k: v for k, v in arguments.items() if k.startswith("uniprefill")}
    rest = {k: v for k, v in arguments.items() if k not in extra}
    params = SamplingParams(
        max_tokens=max_tokens,
        ignore_eos=True,
        extra_args={"uniprefill_report": 1} | extra,
        **({"temperature": 0} | rest),
    )
    tokens = [TokensPrompt(prompt_token_ids=p) for p in prompts]
    return llm.generate(tokens, params, use_tqdm=False, lora_request=lora_request)


@dataclass
class Selections:
    """What each pruned request kept: an observer of the pruning steps.

    cuts: request id -> for each cut, the original prompt positions kept.
    """

    cuts: dict[str, list[list[int]]] = field(default_factory=dict)

    def span(self, name: str) -> nullcontext:
        return nullcontext()

    def selected(self, event: Selected) -> None:
        self.cuts.setdefault(event.req_id, []).append(event.kept.tolist())

    def of(self, outputs: Sequence[Any]) -> list[list[list[int]]]:
        """The cuts of finished requests, in the outputs' order."""
        return [
            next(cuts for name, cuts in self.cuts.items() if name.split("-")[0] == output.request_id)
            for output in outputs
        ]


def recorded_selections() -> AbstractContextManager[Selections]:
    """Record the kept sets of every request that is pruned meanwhile, in this process."""
    return observed_by(Selections())
