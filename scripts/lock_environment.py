"""Write the versions that build/venv has into scripts/constraints-<device>.txt."""

from __future__ import annotations

import argparse
import re
import subprocess

from environment import SCRIPTS
from fork import ForkError, Layout, run_main, say, write_if_changed

from build import choose_device, has_nvidia_gpu


def constraints(freeze: str) -> str:
    """`pip freeze` as constraints: no pip, no vLLM, no local versions, no local paths."""
    lines = []
    for line in freeze.splitlines():
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([^+\s]+)(\+\S+)?", line.strip())
        if match and match[1].lower() not in ("pip", "vllm"):
            lines.append(f"{match[1]}=={match[2]}")
        elif not match and not line.startswith("vllm"):
            raise ForkError(f"build/venv holds {line!r}, which no index serves; remove it first.")
    head = "# Exact versions of the {device} environment, as run. Regenerate: make lock\n"
    return head + "".join(f"{line}\n" for line in sorted(lines, key=str.lower))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="", help="cpu or cuda; default: as `make build` chooses")
    device = choose_device(parser.parse_args().device, has_nvidia_gpu())
    done = subprocess.run([Layout().python, "-m", "pip", "freeze", "--all"], capture_output=True, text=True, check=True)
    target = SCRIPTS / f"constraints-{device}.txt"
    changed = write_if_changed(target, constraints(done.stdout).format(device=device).encode())
    say(f"{target.name}: {'written' if changed else 'unchanged'}")
    return 0


if __name__ == "__main__":
    run_main(main)
