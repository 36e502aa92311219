"""The needle model served by `vllm serve` on free ports of this machine, in one server or apart, and its metrics."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import psutil
from prometheus_client.parser import text_string_to_metric_families

from scripts.fork import ForkError
from scripts.serve import NEEDLE_MODEL, Address, fast_dtype, is_cpu_build, server, session_members, wait_until_ready

NAME = "needle"
READY_SECONDS = 1200.0


class Metrics:
    """What /metrics said at one moment."""

    def __init__(self, text: str) -> None:
        self.samples = [s for family in text_string_to_metric_families(text) for s in family.samples]

    def total(self, name: str, **labels: str) -> float:
        """The sum over all samples of that name with these labels.

        Raises:
            KeyError: if no sample has that name.

        """
        named = [sample for sample in self.samples if sample.name == name]
        if not named:
            raise KeyError(name)
        return sum(sample.value for sample in named if labels.items() <= sample.labels.items())

    def by_label(self, name: str, label: str) -> dict[str, float]:
        """The sums over the samples of that name, one per value of a label."""
        values = dict.fromkeys(sample.labels[label] for sample in self.samples if sample.name == name)
        return {value: self.total(name, **{label: value}) for value in values}


@dataclass(frozen=True)
class LiveServer:
    """A server that answers; its process leads the session of all that it started."""

    process: subprocess.Popen
    url: str
    log: Path

    def metrics(self) -> Metrics:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as response:
            return Metrics(response.read().decode())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve_command(port: int, options: Mapping[str, str | None], model: Path = NEEDLE_MODEL) -> list[str]:
    """`vllm serve`, reachable from this machine only; an option of value None stands alone."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    fixed = {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--served-model-name": NAME,
        "--enforce-eager": None,
        "--distributed-executor-backend": "uni",
        "--dtype": fast_dtype(is_cpu_build()),
    }
    for option, value in (fixed | options).items():
        command += [option] if value is None else [option, value]
    return command


@contextmanager
def live_server(
    options: Mapping[str, str | None],
    log: Path,
    model: Path = NEEDLE_MODEL,
    environment: Mapping[str, str] | None = None,
) -> Iterator[LiveServer]:
    """Serve until the block ends; then nothing of the server runs.

    Args:
        options: of `vllm serve`; one of value None stands alone. Without --port it is a free one.
        log: where the server's output goes.
        model: a folder.
        environment: set for the server beside what this process has; the engine gets its own process in any case.

    Raises:
        ForkError: if it does not get ready, with the last lines of its log.

    """
    address = Address("127.0.0.1", int(options.get("--port") or free_port()))
    command = serve_command(address.port, options, model)
    with ExitStack() as stack:
        stream = stack.enter_context(log.open("wb"))
        with patch.dict(os.environ, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} | dict(environment or {})):
            process = stack.enter_context(server(command, stream.fileno()))
        try:
            wait_until_ready(process, address, READY_SECONDS)
        except ForkError as error:
            raise ForkError(f"{error}\n{last_lines(log)}") from None
        yield LiveServer(process, address.url, log)


@contextmanager
def apart_server(
    role: str,
    options: Mapping[str, str | None],
    log: Path,
    model: Path = NEEDLE_MODEL,
    environment: Mapping[str, str] | None = None,
) -> Iterator[LiveServer]:
    """As `live_server`, one that prefills (`kv_producer`) or decodes (`kv_consumer`), on half of the cores.

    The release's NIXL connector moves the thread that computes to the machine's last core, in every server, and
    NIXL polls without a pause in a thread of its own, which here gives way to the others.
    """
    transfer = {"kv_connector": "NixlConnector", "kv_role": role, "kv_load_failure_policy": "recompute"}
    cores = own_cores(role)
    own = {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
    }
    options = dict(options) | {"--kv-transfer-config": json.dumps(transfer)}
    with live_server(options, log, model, own | dict(environment or {})) as server:
        keep_to(cores, session_members(server.process.pid))
        yield server


def own_cores(role: str) -> list[int]:
    """The first half of this process's cores for a `kv_producer`, the second for a `kv_consumer`."""
    cores = sorted(os.sched_getaffinity(0))
    middle = len(cores) // 2
    return (cores[:middle] if role == "kv_producer" else cores[middle:]) or cores


def keep_to(cores: Sequence[int], processes: Sequence[psutil.Process], seconds: float = 1.0) -> None:
    """Move idle processes to these cores, and their threads that are busy for all that to the lowest priority."""

    def used() -> dict[int, float]:
        found = {}
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                found |= {thread.id: thread.user_time + thread.system_time for thread in process.threads()}
        return found

    before = used()
    time.sleep(seconds)
    for thread, now in used().items():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(thread, cores)
            if now - before.get(thread, now) > 0.2 * seconds:
                os.setpriority(os.PRIO_PROCESS, thread, 19)


@contextmanager
def router(prefill: Sequence[str], decode: Sequence[str], log: Path) -> Iterator[str]:
    """The URL of vllm-router in front of the servers at these URLs; it takes up a server that is back within seconds.

    Raises:
        ForkError: if it does not get ready, with the last lines of its log.

    """
    address = Address("127.0.0.1", free_port())
    options = ["--host", address.host, "--port", str(address.port), "--prometheus-port", str(free_port())]
    options += ["--policy", "round_robin", "--health-check-interval-secs", "1", "--disable-circuit-breaker"]
    options += ["--disable-retries", "--vllm-pd-disaggregation"]
    for option, urls in (("--prefill", prefill), ("--decode", decode)):
        options += [word for url in urls for word in (option, url)]
    command = [sys.executable, str(Path(sys.executable).with_name("vllm-router")), *options]
    with log.open("wb") as stream, server(command, stream.fileno()) as process:
        try:
            wait_until_ready(process, address, READY_SECONDS)
        except ForkError as error:
            raise ForkError(f"{error}\n{last_lines(log)}") from None
        yield address.url


def last_lines(log: Path, count: int = 15) -> str:
    lines: Sequence[str] = log.read_text(errors="replace").splitlines()
    return "\n".join(line for line in lines[-count:] if line.strip())
