"""Serve a model with UniPrefill on: `vllm serve` of build/venv, and a word when it is ready.

Without --model it serves the needle model of this repository. What follows `--` goes to
`vllm serve` as it is and wins over what is set here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from scripts.fork import ROOT, ForkError, run_main, say

NEEDLE_MODEL = ROOT / "evals" / "needle" / "model"
UNIPREFILL = {"top_p": 0.99}
# the whole prompt prefills in one step, so the token budget exceeds the model's length
NEEDLE_OPTIONS = {
    "--served-model-name": "needle",
    "--max-model-len": "32768",
    "--max-num-batched-tokens": "33024",
    "--max-num-seqs": "16",
}
# a tiny model wants neither compilation nor much memory
NEEDLE_CPU_OPTIONS = {"--kv-cache-memory-bytes": "1G"}


def has_option(arguments: Sequence[str], option: str) -> bool:
    """Whether the user gave the option (vLLM takes - and _ alike, and --option=value)."""

    def plain(text: str) -> str:
        return text.split("=")[0].replace("_", "-")

    return any(plain(argument) == option for argument in arguments)


def option_value(arguments: Sequence[str], option: str, default: str) -> str:
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == option:
            return value if equals else (arguments[i + 1] if i + 1 < len(arguments) else default)
    return default


def serve_arguments(model: str, extra: Sequence[str], cpu: bool, needle: bool) -> list[str]:
    """The arguments of `vllm serve`; nothing that the user set is set again."""
    wanted: dict[str, str | None] = {"--uniprefill-config": json.dumps(UNIPREFILL)}
    if needle:
        wanted |= NEEDLE_OPTIONS
        wanted["--enforce-eager"] = None
        if cpu:
            wanted |= NEEDLE_CPU_OPTIONS
    arguments = ["serve", model]
    for option, value in wanted.items():
        if not has_option(extra, option):
            arguments += [option] if value is None else [option, value]
    return arguments + list(extra)


def choose_model(model: str | None) -> tuple[str, bool]:
    """(what to serve, whether it is the needle model)."""
    if model:
        return model, Path(model).resolve() == NEEDLE_MODEL
    if not (NEEDLE_MODEL / "config.json").is_file():
        raise ForkError("evals/needle/model is missing; name another model with MODEL=path-or-name.")
    return str(NEEDLE_MODEL), True


def base_url(extra: Sequence[str]) -> str:
    host = option_value(extra, "--host", "127.0.0.1")
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{option_value(extra, '--port', '8000')}"


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


def session_members(session: int) -> list[int]:
    """Processes of the session, whatever process group they moved to."""
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == session and fields[0] != "Z":
                    members.append(int(entry.name))
    return members


def stop_session(process: subprocess.Popen, patience: tuple[float, float] = (15, 5)) -> None:
    """Ask the server to stop, then ask all that is left, then end it."""
    steps = [(signal.SIGINT, patience[0], False), (signal.SIGTERM, patience[1], True), (signal.SIGKILL, 5.0, True)]
    for number, seconds, everyone in steps:
        members = session_members(process.pid)
        if not members:
            break
        for pid in members if everyone else [process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and session_members(process.pid):
            process.poll()
            time.sleep(0.1)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1)


def wait_until_ready(process: subprocess.Popen, url: str, seconds: float = 1800) -> None:
    """Until /health answers; a server that ends first is an error."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ForkError(f"vllm serve ended with status {process.returncode}; its last lines say why.")
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        time.sleep(0.5)
    raise ForkError(f"The server was not ready after {seconds:.0f} seconds.")


def ready_text(url: str, name: str) -> str:
    body = json.dumps(
        {
            "model": name,
            "prompt": "…",
            "max_tokens": 16,
            "vllm_xargs": {"uniprefill": 1, "uniprefill_report": 1},
        },
        ensure_ascii=False,
    )
    return (
        f"\nReady: {name} with UniPrefill on, at {url} (Ctrl-C stops it). Send it a request:\n"
        f"  curl {url}/v1/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}\n"
        '"uniprefill": 0 prefills this request densely; prompts under 1024 tokens always are.\n'
    )


def is_cpu_build() -> bool:
    from importlib.metadata import version

    return version("vllm").endswith(".cpu")


def vllm_program() -> str:
    return str(Path(sys.executable).with_name("vllm"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a path or a hub name; default: the needle model")
    parser.add_argument("arguments", nargs="*", metavar="-- ARGUMENT", help="passed on to vllm serve")
    args = parser.parse_args()
    model, needle = choose_model(args.model)
    arguments = serve_arguments(model, args.arguments, is_cpu_build(), needle)
    say(f"vllm {shlex.join(arguments)}")
    url = base_url(arguments)
    with server([vllm_program(), *arguments]) as process:
        wait_until_ready(process, url)
        print(ready_text(url, option_value(arguments, "--served-model-name", model)), flush=True)
        return process.wait()


if __name__ == "__main__":
    run_main(main)
