"""What the tests do inside every worker process: a vLLM worker extension, called with `collective_rpc`."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from typing import Any

import torch
from engines import Selections, recorded_selections
from vllm.v1.worker.gpu.uniprefill import scoring
from vllm.v1.worker.gpu.uniprefill.selector import Selector


class RankExtension:
    """Mixed into the worker class by `worker_extension_cls`, which wants names the worker does not have."""

    rank: int
    _recorded: Selections
    _mass_dtypes: set[torch.dtype]

    def start_recording(self) -> None:
        """Record what this rank keeps and what it sums over the ranks, until the process ends."""
        self._recording = ExitStack()
        self._recorded = self._recording.enter_context(recorded_selections())
        self._mass_dtypes = set()
        all_reduce = scoring.tensor_model_parallel_all_reduce

        def recorded_all_reduce(mass: torch.Tensor) -> torch.Tensor:
            self._mass_dtypes.add(mass.dtype)
            return all_reduce(mass)

        scoring.tensor_model_parallel_all_reduce = recorded_all_reduce

    def take_kept_sets(self) -> dict[str, list[list[int]]]:
        """Request -> for each cut, the original positions kept; forgotten here."""
        cuts, self._recorded.cuts = self._recorded.cuts, {}
        return {name.rsplit("-", 1)[0]: kept for name, kept in cuts.items()}

    def recorded_mass_dtypes(self) -> list[str]:
        return sorted(map(str, self._mass_dtypes))

    def spoil_masses(self, rank: int) -> None:
        """Let one rank see masses of its own, as if it rounded otherwise, and differently every time."""
        if self.rank != rank:
            return
        all_reduce = scoring.tensor_model_parallel_all_reduce
        scoring.tensor_model_parallel_all_reduce = lambda mass: torch.rand_like(all_reduce(mass))

    def die_before(self, event: str, rank: int | str) -> None:
        """Let one rank be killed (SIGKILL) at the first cut of the next pruned prompt, while the others wait.

        event: "all_reduce" of the masses or "broadcast" of the choice. /collective_rpc sends strings only.
        """
        if self.rank != int(rank):
            return

        def die(*_: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        if event == "all_reduce":
            scoring.tensor_model_parallel_all_reduce = die
        else:
            Selector.choose = die
