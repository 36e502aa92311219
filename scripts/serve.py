"""Serve a model with UniPrefill on: `vllm serve` of build/venv, and a word when it is ready.

Without --model it serves the needle model of this repository. What follows `--` goes to
`vllm serve` as it is and wins over what is set here, and so does a file that it names by --config.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import yaml

from scripts import compile_cpu, models
from scripts.fork import ROOT, ForkError, run_main, say

NEEDLE_MODEL = ROOT / "evals" / "needle" / "model"
PROFILES = ROOT / "evals" / "profiles"
NEEDLE_OPTIONS = {"--served-model-name": "needle", "--max-model-len": "32768", "--max-num-seqs": "16"}
# small models want little memory; by default vLLM takes nearly all of a CPU's
SMALL_CPU_OPTIONS = {"--kv-cache-memory-bytes": "1G"}


def fast_dtype(cpu: bool) -> str:
    """For `--dtype`: without AVX-512 a CPU multiplies bfloat16 several times slower than float32."""
    if not cpu or compile_cpu.AVX512.needs <= compile_cpu.cpu_flags(Path("/proc/cpuinfo").read_text()):
        return "auto"
    return "float32"


def uniprefill_config(model: str) -> dict[str, float | str]:
    """Of a server that is not told any: the model's profile, if it is one of ours, or the published settings."""
    profile = PROFILES / f"{Path(model).name}.json"
    return {"profile": str(profile)} if models.is_made(model) and profile.is_file() else {"top_p": 0.99}


def given_options(arguments: Sequence[str]) -> dict[str, str]:
    """What the user set, by name without dashes, on the command line or, weaker, in the file of --config.

    vLLM takes - and _ alike, --option=value and, for JSON, --option.key value. Of several values the first is given.
    """
    given: dict[str, str] = {}
    for argument, following in itertools.pairwise([*arguments, "--"]):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            value = value if equals else "" if following.startswith("--") else following
            given[name.partition(".")[0].replace("_", "-")] = value
    with contextlib.suppress(OSError, yaml.YAMLError):  # vLLM says what is wrong with the file
        stored = yaml.safe_load(Path(given["config"]).read_text()) if given.get("config") else {}
        for name, value in (stored if isinstance(stored, dict) else {}).items():
            first = value[0] if isinstance(value, list) and value else value
            given.setdefault(str(name).replace("_", "-"), str(first))
    return given


def serve_arguments(model: str, extra: Sequence[str], cpu: bool, needle: bool) -> list[str]:
    """The arguments of `vllm serve`; nothing that the user set is set again."""
    wanted: dict[str, str | None] = {"--uniprefill-config": json.dumps(uniprefill_config(model))}
    if needle:
        wanted |= NEEDLE_OPTIONS
        wanted["--enforce-eager"] = None
    if cpu and (needle or models.is_made(model)):
        wanted |= SMALL_CPU_OPTIONS | {"--dtype": fast_dtype(cpu)}
    given = given_options(extra)
    arguments = ["serve", model]
    for option, value in wanted.items():
        if option.removeprefix("--") not in given:
            arguments += [option] if value is None else [option, value]
    return arguments + list(extra)


def choose_model(model: str | None) -> tuple[str, bool]:
    """(what to serve, whether it is the needle model)."""
    if model:
        model = models.resolve(model)
        return model, Path(model).resolve() == NEEDLE_MODEL
    if not (NEEDLE_MODEL / "config.json").is_file():
        raise ForkError("evals/needle/model is missing; name another model with MODEL=path-or-name.")
    return str(NEEDLE_MODEL), True


@dataclass(frozen=True)
class Address:
    """Where a server is to listen: on a Unix socket, or on a port of a host (0: any free one)."""

    host: str = ""
    port: int = 8000
    tls: bool = False
    uds: str = ""

    @classmethod
    def of(cls, given: Mapping[str, str]) -> Address:
        """As `vllm serve` reads it from what the user set."""
        port = given.get("port", "8000")
        if not port.isdecimal() or int(port) > 65535:
            raise ForkError(f"--port must be a number from 0 to 65535, not {port!r}.")
        tls = bool(given.get("ssl-keyfile") and given.get("ssl-certfile"))
        return cls(given.get("host", ""), int(port), tls, given.get("uds", ""))

    @property
    def url(self) -> str:
        """For a client on this machine."""
        host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        host = "localhost" if self.uds else f"[{host}]" if ":" in host else host
        return f"http{'s' if self.tls else ''}://{host}" + ("" if self.uds else f":{self.port}")

    @property
    def curl(self) -> str:
        """The command that reaches it; our user's certificate may be signed by nobody that curl knows."""
        return "curl" + (" -k" if self.tls else "") + (f" --unix-socket {shlex.quote(self.uds)}" if self.uds else "")

    def require_free(self) -> None:
        """Raise ForkError if another program listens there, as `vllm serve` would only in a traceback."""
        if self.uds:
            if os.path.lexists(self.uds):
                raise ForkError(f"{self.uds} exists; stop the server that listens there or remove the file.")
            return
        with socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.host, self.port))
            except OSError as error:
                raise ForkError(
                    f"The server cannot listen on port {self.port} ({error.strerror}); choose another with --port."
                ) from None


@contextlib.contextmanager
def server(command: Sequence[str], output: int | None = None) -> Iterator[subprocess.Popen]:
    """Run a server in a session of its own; whatever happens, nothing of it stays running."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    # SIGINT too: a shell starts what it runs in the background with SIGINT ignored
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in stops}
    process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        yield process
    finally:
        for number in stops:
            signal.signal(number, signal.SIG_IGN)  # the clean-up must come to its end
        stop_session(process)
        for number, handler in before.items():
            signal.signal(number, handler)


def session_members(session: int) -> list[psutil.Process]:
    """Processes of the session, whatever process group they moved to."""
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
    return members


def stop_session(process: subprocess.Popen, patience: tuple[float, float] = (15, 5)) -> None:
    """Ask the server to stop, then ask all that is left, then end it."""
    steps = [(signal.SIGINT, patience[0], False), (signal.SIGTERM, patience[1], True), (signal.SIGKILL, 5.0, True)]
    for number, seconds, everyone in steps:
        members = session_members(process.pid)
        if not members:
            break
        for member in members:
            if everyone or member.pid == process.pid:
                with contextlib.suppress(psutil.Error):
                    member.send_signal(number)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and session_members(process.pid):
            process.poll()
            time.sleep(0.1)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1)


def listening(process: subprocess.Popen, address: Address) -> Address | None:
    """Where the server's processes listen, if that is the address; port 0 becomes the real one."""
    if address.uds:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(address.uds)  # nobody else's: it was not there before
            return address
        return None
    for member in session_members(process.pid):
        if address.port == 0 and member.pid != process.pid:
            continue  # its workers listen for each other
        with contextlib.suppress(psutil.Error):
            for found in member.net_connections("tcp"):
                if found.status == psutil.CONN_LISTEN and address.port in (0, found.laddr.port):
                    return replace(address, port=found.laddr.port)
    return None


def wait_until_ready(process: subprocess.Popen, address: Address, seconds: float = math.inf) -> Address:
    """Until the server listens, which it does once its engine runs; where it does.

    Raises:
        ForkError: if it ends first, or the time is over.

    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ForkError(f"vllm serve ended with status {process.returncode}; its last lines say why.")
        if found := listening(process, address):
            return found
        time.sleep(0.5)
    raise ForkError(f"The server was not ready after {seconds:.0f} seconds.")


def ready_text(address: Address, name: str, needle: bool, cpu: bool) -> str:
    """What to do now: a request whose prompt is long enough to be pruned, as a line for the shell."""
    if needle:
        program = os.path.relpath(ROOT / "evals" / "needle" / "prompts.py")
        prompt = f"python3 {shlex.quote(program)} --num-tokens 16000 --request {shlex.quote(name)}"
    else:
        code = (
            f"import json; text = 'The grass is green and the sky is blue. ' * {75 if cpu else 240}; print(json.dumps("
            f"dict(model={name!r}, prompt=text + 'The password is lighthouse. ' + text + 'The password is', "
            "max_tokens=8, temperature=0, vllm_xargs=dict(uniprefill_report=1))))"
        )
        prompt = f"python3 -c {shlex.quote(code)}"
    return (
        f"\nReady: {name} with UniPrefill on, at {address.uds or address.url} (Ctrl-C stops it).\n"
        "Send it a long prompt; the answer says what was kept of it:\n"
        f"  {prompt} | {address.curl} {address.url}/v1/completions -H 'Content-Type: application/json' -d @-\n"
        '"vllm_xargs": {"uniprefill": 0} prefills a request densely; prompts shorter than min_prompt_tokens (by\n'
        "default 1,024 on a CPU, 4,096 on a GPU) always are.\n"
    )


def is_cpu_build() -> bool:
    from importlib.metadata import version

    return version("vllm").endswith(".cpu")


def vllm_program() -> str:
    return str(Path(sys.executable).with_name("vllm"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a path, a hub name or a NAME of make model; default: the needle model")
    parser.add_argument("arguments", nargs="*", metavar="-- ARGUMENT", help="passed on to vllm serve")
    args = parser.parse_args()
    given = given_options(args.arguments)
    model, needle = choose_model(args.model or given.get("model"))
    address = Address.of(given)
    address.require_free()
    cpu = is_cpu_build()
    arguments = serve_arguments(model, args.arguments, cpu, needle)
    say(f"vllm {shlex.join(arguments)}")
    with server([vllm_program(), *arguments]) as process:
        address = wait_until_ready(process, address)
        name = given_options(arguments).get("served-model-name", model)
        print(ready_text(address, name, needle, cpu), flush=True)
        return process.wait()


if __name__ == "__main__":
    run_main(main)
