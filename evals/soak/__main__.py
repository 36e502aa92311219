"""Soak the server for some minutes, and write what came of it; exit status 1 if anything was wrong.

build/venv/bin/python -m evals.soak --minutes 30 --output evals/results/soak
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evals.provenance import provenance
from evals.soak.driver import GROWTH_MIB, OPTIONS, problems, soak
from evals.soak.watch import growth
from scripts.fork import ROOT, run_main, say


def markdown(result: dict[str, Any], found: list[str], origin: dict[str, Any], command: str) -> str:
    machine, stop = origin["machine"], result["stop"]
    tally = [f"| {kind} | {count:,} |" for kind, count in result["done"].items()]
    quarters = [
        f"| {name} | {' | '.join(f'{value:,.0f}' for value in values)} | {growth(values):+.1f} |"
        for name, values in result["memory"]["quarters_mib"].items()
    ]
    checked = ", ".join(f"{count:,} {variant}" for variant, count in result["checked"].items())
    outcomes = ", ".join(f"{count:,.0f} {outcome}" for outcome, count in result["outcomes"].items())
    questions = result["questions"]
    return "\n".join(
        [
            "# Soak",
            "",
            f"{origin['package']}, series {origin['series_sha256'][:12]}, on {machine['cpu']}, cores: "
            f"{machine['cores']}. Made by `{command}`.",
            "",
            f"`vllm serve evals/needle/model {' '.join(f'{k} {v}' if v else k for k, v in OPTIONS.items())}`",
            "",
            "## Verdict",
            *([f"- {problem}" for problem in found] or ["Nothing was wrong."]),
            "",
            "## Traffic",
            f"{result['seconds'] / 60:.1f} minutes, at most {result['most_at_once']} requests at once, "
            f"{result['preemptions']:.0f} preemptions, prompts prefilled: {outcomes}.",
            "",
            f"{len(result['wrong'])} wrong among {sum(result['checked'].values()):,} checked answers ({checked}); "
            f"{questions['answered alone']} of {questions['asked']} questions are answered right alone and were used.",
            "",
            "| requests | |",
            "|---|---|",
            *tally,
            "",
            "## Left at the end",
            f"Running {result['left']['running']:.0f}, waiting {result['left']['waiting']:.0f}, "
            f"{result['left']['share of the KV cache']:.0%} of the KV cache in use; a prompt that takes all of it "
            f"{'was' if result['whole_cache_answered'] else 'was not'} answered right.",
            "",
            f"Resident memory, MiB, median of each quarter of the time; the first is warm-up, at most {GROWTH_MIB:.0f} "
            "may be gained after the second, all together:",
            "",
            "| process | 1st | 2nd | 3rd | 4th | 2nd to 4th |",
            "|---|---|---|---|---|---|",
            *quarters,
            "",
            "## SIGTERM under load",
            f"{stop['running_before']:.0f} of {sum(stop['clients'].values())} requests ran; exit code "
            f"{stop['exit_code']} and every process gone after {stop['seconds']:.1f} s; left running: "
            f"{', '.join(stop['left_running']) or 'none'}. "
            f"Their clients got: {', '.join(f'{name} ({count})' for name, count in sorted(stop['clients'].items()))}.",
            "",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evals.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30, help="of traffic (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the traffic (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "results" / "soak", help="without suffix")
    args = parser.parse_args(argv)
    origin = provenance()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        say(f"{args.minutes:g} minutes of traffic")
        result = soak(args.minutes * 60, Path(folder) / "server.log", seed=args.seed)
    found = problems(result)
    command = f"python -m evals.soak --minutes {args.minutes:g} --seed {args.seed}"
    text = markdown(result, found, origin, command)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{args.output}.json").write_text(
        json.dumps({"provenance": origin, "problems": found} | result, indent=1) + "\n"
    )
    Path(f"{args.output}.md").write_text(text)
    print(text)
    return 1 if found else 0


if __name__ == "__main__":
    run_main(main)
