"""Put the toy checkpoints on the path, and vLLM before torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest  # noqa: E402
import vllm  # noqa: E402, F401  before torch: on a CPU it chooses Triton's interpreter

if TYPE_CHECKING:
    from vllm.config import VllmConfig


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
