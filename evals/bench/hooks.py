"""What the benchmark reads, sets and times inside the engine: the only file that knows the engine's insides."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import LLM

MORE_THAN_ANY_MASS = 1e6  # which is at most heads times queries


def set_top_p_over(llm: LLM, value: str) -> None:
    """The engine reads this at every selection; requests cannot set it."""
    llm.llm_engine.vllm_config.uniprefill_config.top_p_over = value


@contextmanager
def ranked_first(blocks: Sequence[int]) -> Iterator[None]:
    """While a lone prompt is pruned at one layer, these of its blocks outweigh all others."""
    from vllm.v1.worker.gpu.uniprefill import selector

    by_mass = selector.select_blocks

    def select(mass: Any, specs: Any, **settings: Any) -> Any:
        mass = mass.clone()
        mass[list(blocks)] += MORE_THAN_ANY_MASS
        return by_mass(mass, specs, **settings)

    selector.select_blocks = select
    try:
        yield
    finally:
        selector.select_blocks = by_mass


def step_budget(llm: LLM) -> int:
    """Tokens a step."""
    return llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens


def captured_graphs(llm: LLM) -> int:
    """How many CUDA graphs the engine holds."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    return len(worker.model_runner.cudagraph_manager.graphs)


@dataclass
class Stopwatch:
    """Times the spans of pruning steps, as an observer of vllm's uniprefill/events.py.

    Attributes:
        mark: takes the time now, in whatever form.
        between: the seconds between two marks.

    """

    mark: Callable[[], Any]
    between: Callable[[Any, Any], float]
    _ended: list[_Span] = field(default_factory=list)
    _open: list[_Span] = field(default_factory=list)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        entered = _Span(name, self.mark())
        self._open.append(entered)
        try:
            yield
        finally:
            entered.end = self.mark()
            self._open.pop()
            if self._open:
                self._open[-1].inner.append(entered)
            self._ended.append(entered)

    def selected(self, event: Any) -> None:
        """What was selected does not matter here."""

    def seconds(self) -> dict[str, list[float]]:
        """Of each name's spans, in the order in which they ended, without the spans inside them."""
        found: dict[str, list[float]] = defaultdict(list)
        for ended in self._ended:
            inner = sum(self.between(one.begin, one.end) for one in ended.inner)
            found[ended.name].append(self.between(ended.begin, ended.end) - inner)
        return dict(found)


@dataclass
class _Span:
    name: str
    begin: Any
    end: Any = None
    inner: list[_Span] = field(default_factory=list)


def clock() -> Stopwatch:
    """Wall time of the host alone, which waits for nothing."""
    return Stopwatch(time.perf_counter, lambda begin, end: end - begin)


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
