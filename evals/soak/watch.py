"""What a soak sees of the server from outside: memory, open files, what is left, how it stops."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import psutil

from evals.live_server import LiveServer, Metrics

MIB = 1 << 20


def role(process: psutil.Process) -> str:
    """ "api server" for the first process, else the title that vLLM gave it."""
    title = " ".join(process.cmdline()).strip()
    return title.removeprefix("VLLM::").lower() if title.startswith("VLLM::") else "api server"


def processes_of(server: LiveServer) -> list[psutil.Process]:
    """The server's process and all below it that vLLM named; helpers of the interpreter are left out."""
    first = psutil.Process(server.process.pid)
    named = [process for process in first.children(recursive=True) if role(process) != "api server"]
    return [first, *named]


@dataclass
class Memory:
    """Resident memory of the server's processes over time, in MiB.

    Attributes:
        seconds: when each sample was taken, since the first.
        resident: by role, one value a sample.

    """

    processes: Sequence[psutil.Process]
    seconds: list[float] = field(default_factory=list)
    resident: dict[str, list[float]] = field(default_factory=dict)

    def sample(self, now: float) -> None:
        self.seconds.append(now)
        for process in self.processes:
            self.resident.setdefault(role(process), []).append(process.memory_info().rss / MIB)

    async def watch(self, every: float) -> None:
        """Sample until cancelled."""
        started = time.monotonic()
        while True:
            self.sample(time.monotonic() - started)
            await asyncio.sleep(every)

    def medians(self, parts: int) -> dict[str, list[float]]:
        """By role and for all together, the median of each of so many equal parts of the time."""
        total = [sum(values) for values in zip(*self.resident.values(), strict=True)]
        return {name: part_medians(values, parts) for name, values in {**self.resident, "all": total}.items()}


def part_medians(values: Sequence[float], parts: int) -> list[float]:
    """The median of each of `parts` equal parts, in order; there are at least as many values."""
    edges = [len(values) * i // parts for i in range(parts + 1)]
    return [statistics.median(values[a:b]) for a, b in pairwise(edges)]


def growth(quarters: Sequence[float]) -> float:
    """From the second quarter, the first after the warm-up, to the last."""
    return quarters[3] - quarters[1]


def open_files(server: LiveServer) -> dict[str, int]:
    """Open files and sockets by role."""
    return {role(process): process.num_fds() for process in processes_of(server)}


def in_use(metrics: Metrics) -> dict[str, float]:
    """What must be nothing while no request is under way."""
    return {
        "running": metrics.total("vllm:num_requests_running"),
        "waiting": metrics.total("vllm:num_requests_waiting"),
        "share of the KV cache": metrics.total("vllm:kv_cache_usage_perc"),
    }


async def settle(server: LiveServer, seconds: float) -> dict[str, float]:
    """What is in use once nothing is any more, or after that time."""
    deadline = time.monotonic() + seconds
    while True:
        found = in_use(await asyncio.to_thread(server.metrics))
        if not any(found.values()) or time.monotonic() > deadline:
            return found
        await asyncio.sleep(0.25)


def stop(server: LiveServer, patience: float) -> dict[str, Any]:
    """Ask the server to end, by SIGTERM to its first process alone.

    Returns:
        exit_code (None if it did not end), seconds until all its processes were gone, and the
        roles of those that were not.

    """
    first = psutil.Process(server.process.pid)
    family = [first, *first.children(recursive=True)]
    roles = {process.pid: role(process) for process in family}
    started = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    with contextlib.suppress(Exception):
        server.process.wait(patience)
    rest = patience - (time.monotonic() - started)
    _, alive = psutil.wait_procs(family, timeout=max(0.0, rest))
    return {
        "exit_code": server.process.poll(),
        "seconds": time.monotonic() - started,
        "left_running": sorted(roles[process.pid] for process in alive),
    }
