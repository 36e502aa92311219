"""Put the toy checkpoints on the path, and vLLM before torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest  # noqa: E402
import vllm  # noqa: E402, F401  before torch: on a CPU it chooses Triton's interpreter

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.request import Request

KV_BLOCK = 16  # tokens, of the schedulers made here


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], list[Any]]:
    """(module, name of a Triton kernel in it) -> the grids that it is launched with from then on."""

    def watch(module: Any, name: str) -> list[Any]:
        kernel, found = getattr(module, name), []

        class Watched:
            def __getitem__(self, grid: Any) -> Any:
                found.append(grid)
                return kernel[grid]

        monkeypatch.setattr(module, name, Watched())
        return found

    return watch


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 8 layers, small enough to be read at once."""
    from oracle.checkpoints import make_checkpoint

    shape = {"layers": 8, "hidden": 64, "heads": 2, "kv_heads": 1, "head_dim": 32}
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama", intermediate=64, max_positions=8192, **shape)


@pytest.fixture(scope="session")
def configure(llama: Path) -> Callable[..., VllmConfig]:
    """The engine's config for `--uniprefill-config` (None: without it) and other arguments."""
    from vllm.engine.arg_utils import EngineArgs

    def create(uniprefill: dict[str, Any] | None, **arguments: Any) -> VllmConfig:
        settings: dict[str, Any] = {
            "model": str(llama),
            "max_model_len": 2048,
            "max_num_batched_tokens": 2048,
            "max_num_seqs": 4,
        }
        if uniprefill is not None:
            settings["uniprefill_config"] = uniprefill
        return EngineArgs(**(settings | arguments)).create_engine_config()

    return create


@pytest.fixture(scope="session")
def make_request() -> Callable[..., Request]:
    """Makes a request of so many tokens that no other request shares, or of these tokens."""
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    ids = count()

    def make(
        prompt: int | list[int], *, max_tokens: int = 16, extra: dict | None = None, resumable=False, **params: Any
    ) -> Request:
        number = next(ids)
        return Request(
            request_id=str(number),
            prompt_token_ids=[number % 1000] * prompt if isinstance(prompt, int) else prompt,
            sampling_params=SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=extra, **params),
            pooling_params=None,
            block_hasher=get_request_block_hasher(KV_BLOCK, sha256),
            resumable=resumable,
        )

    return make


@pytest.fixture(scope="session")
def make_scheduler(configure: Callable[..., VllmConfig]) -> Callable[..., Scheduler]:
    """Makes the engine's scheduler, or that class, with so many blocks.

    `segments`: of the layers of each KV cache group; later ones than 0 return blocks.
    """
    import torch
    from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
    from vllm.v1.kv_cache_interface import UNIPREFILL_ROLE, FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    def make(
        uniprefill: dict[str, Any] | None,
        num_blocks: int = 1000,
        *,
        cls: type | None = None,
        segments: tuple[int, ...] = (0,),
        **arguments: Any,
    ) -> Scheduler:
        settings = {"block_size": KV_BLOCK, "enable_prefix_caching": True, "async_scheduling": False}
        config = configure(uniprefill, **(settings | arguments))
        config.cache_config.num_gpu_blocks = num_blocks
        register_all_kvcache_specs(config)
        spec = FullAttentionSpec(block_size=KV_BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
        roles = [{"role": UNIPREFILL_ROLE} if segment else {} for segment in segments]
        groups = [
            KVCacheGroupSpec([f"layers.{i}"], spec, segment=segment, **role)
            for i, (role, segment) in enumerate(zip(roles, segments, strict=True))
        ]
        return (cls or config.scheduler_config.get_scheduler_cls())(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups),
            block_size=KV_BLOCK,
            log_stats=True,
            structured_output_manager=StructuredOutputManager(config),
        )

    return make


@pytest.fixture(scope="session")
def finish_step() -> Callable[..., dict[str, EngineCoreOutput]]:
    """Samples a token of every request whose tokens are all computed; outputs by request id."""
    from vllm.v1.outputs import ModelRunnerOutput

    def finish(scheduler: Scheduler, step: SchedulerOutput, kept: dict | None = None) -> dict[str, EngineCoreOutput]:
        requests = [scheduler.requests[req_id] for req_id in step.num_scheduled_tokens]
        sampled = [[7] if r.num_computed_tokens >= r.num_tokens else [] for r in requests]
        index = {request.request_id: i for i, request in enumerate(requests)}
        output = ModelRunnerOutput(list(index), index, sampled_token_ids=sampled)
        if kept:
            output.uniprefill_kept = kept
        of_clients = scheduler.update_from_output(step, output).values()
        return {output.request_id: output for o in of_clients for output in o.outputs}

    return finish


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory, configure: Callable[..., VllmConfig]) -> Iterator[None]:
    """The process groups of a single worker, ended afterwards."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )

    rendezvous = tmp_path_factory.mktemp("ranks") / "rendezvous"
    with set_current_vllm_config(configure(None)):
        init_distributed_environment(
            world_size=1,
            rank=0,
            local_rank=0,
            distributed_init_method=f"file://{rendezvous}",
            backend="gloo",
        )
        ensure_model_parallel_initialized(1, 1)
    yield
    destroy_model_parallel()
    destroy_distributed_environment()
