"""Finding and loading the harness's tasks, ours and its own, and refusing those that pruning cannot help."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from scripts.fork import ForkError

FOLDER = Path(__file__).resolve().parent.parent / "tasks"
LOGPROB_TYPES = ("loglikelihood", "loglikelihood_rolling", "multiple_choice")
FEWSHOT_SEED = 1234  # the harness's default


def refuse_logprobs(name: str, output_type: str | None) -> None:
    """Raises ForkError for a task that scores the prompt's log-probabilities."""
    if output_type in LOGPROB_TYPES:
        raise ForkError(
            f"{name} is scored by log-probabilities of prompt tokens ({output_type}), and a request that asks for them "
            "is prefilled densely, since a dropped token has none: dense and pruned would be the same; choose tasks "
            "that generate (generate_until)."
        )


def leaves(index: Mapping[str, Any], name: str) -> Iterator[str]:
    """The tasks of a task, group or tag, by name, without loading any; tasks with logprobs are refused.

    Raises:
        ForkError: for an unknown name, or a task that uses prompt logprobs.

    """
    entry = index.get(name)
    if entry is None:
        raise ForkError(f"No task is called {name}; `lm_eval ls tasks --include_path evals/tasks` lists them.")
    config = entry.cfg or {}
    if entry.kind.name == "TAG":
        members = sorted(entry.tags)
    elif entry.kind.name == "GROUP":
        found = config["task"]
        members = [m if isinstance(m, str) else m.get("group", m.get("task")) for m in found]
    else:
        refuse_logprobs(name, config.get("output_type"))
        yield name
        return
    for member in members:
        if isinstance(member, str) and member in index:
            yield from leaves(index, member)
        else:
            raise ForkError(f"{name} defines tasks within itself; name single tasks instead.")


class Tasks:
    """The chosen tasks, loaded length by length.

    names: tasks, groups or tags, of evals/tasks or of the harness.
    metadata: what the tasks' generators get: tokenizer, num_samples, reserved_tokens.
    """

    def __init__(self, names: Sequence[str], metadata: Mapping[str, Any]) -> None:
        self.metadata = dict(metadata)
        self.with_defaults = False
        index = self._manager([]).task_index
        if any(name not in index for name in names):  # the harness's own take seconds to list
            self.with_defaults = True
            index = self._manager([]).task_index
        self.names = list(dict.fromkeys(leaf for name in names for leaf in leaves(index, name)))

    def _manager(self, lengths: list[int]) -> TaskManager:
        return TaskManager(
            include_path=str(FOLDER),
            include_defaults=self.with_defaults,
            metadata={**self.metadata, "max_seq_lengths": lengths},
        )

    def load(self, length: int) -> Iterator[tuple[str, Task]]:
        """Each task with prompts of one length.

        Raises:
            ForkError: if a task cannot make its prompts.

        """
        import numpy as np

        manager = self._manager([length])
        for name in self.names:
            random.seed(f"{name}/{length}")  # the harness's own RULER draws from these
            np.random.seed(0)
            try:
                [task] = manager.load(name)["tasks"].values()
            except (ValueError, OSError, ConnectionError) as error:
                raise ForkError(f"{name} cannot be loaded: {error}") from error
            refuse_logprobs(name, task.OUTPUT_TYPE)  # of tasks written in Python only the object knows
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
            yield name, task
