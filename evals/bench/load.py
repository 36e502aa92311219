"""The load part: `vllm bench serve` sends short and long prompts at once, dense and pruned in turn.

Three ways to serve the same requests at the same moments:
  dense    the server runs with --uniprefill-config, and the requests ask for no pruning
  pruned   the same server, and the requests ask for pruning
  no flag  a server without the flag and with vLLM's own token budget, which chunks long prefills

Every round has its own prompts and arrivals, the same for all three. Nothing is reused from the
prefix cache, which is off. Exit status 0: measured, also where an expectation is missed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from evals.bench import load_report
from evals.bench.arithmetic import spread
from evals.bench.load_report import DENSE, LONG, NO_FLAG, PRUNED, SHORT
from evals.bench.parts import rotated
from evals.live_server import NAME, NEEDLE_MODEL, LiveServer, last_lines, live_server
from evals.needle.prompts import (
    KEYS,
    MAX_TOKENS,
    TAIL_TOKENS,
    VALUES,
    key_statement,
    make_filler,
    make_prompt,
    make_tail,
    starts_with_answer,
)
from evals.provenance import provenance
from scripts.fork import ROOT, ForkError, run_main, say

SHORT_TOKENS = 200
NEW_TOKENS = 64
MAX_NUM_SEQS = 16
UNBOUNDED = "inf"
PERCENTILES = (50, 99)
RUN_SECONDS = 1800  # a run that takes longer hangs


@dataclass(frozen=True)
class Mix:
    """What one run sends.

    Attributes:
        requests: how many.
        long_every: one request of so many is long.
        long_tokens: prompt tokens of a long one.

    """

    requests: int
    long_every: int
    long_tokens: int

    def classes(self) -> list[str]:
        """The class of each request, in the order in which they are sent."""
        return [LONG if i % self.long_every == self.long_every // 2 else SHORT for i in range(self.requests)]

    def questions(self, seed: int) -> list[tuple[str, str]]:
        """(prompt, answer) of each request."""
        return [
            long_question(self.long_tokens, 1000 * seed + i) if name == LONG else short_question(1000 * seed + i)
            for i, name in enumerate(self.classes())
        ]


def long_question(tokens: int, seed: int) -> tuple[str, str]:
    made = make_prompt("multikey", tokens, seed)
    return made.text, made.answer


def short_question(seed: int) -> tuple[str, str]:
    """One statement in a little filler: shorter than the needle prompts are."""
    rng = random.Random(f"load/{seed}")
    key, value = rng.choice(KEYS), rng.choice(VALUES)
    tail = make_tail(rng, [key], TAIL_TOKENS)
    statement = key_statement(key, value)
    filler = make_filler(rng, SHORT_TOKENS - 1 - len(tail) - len(statement))
    cut = rng.randint(0, len(filler))
    return " ".join(filler[:cut] + statement + filler[cut:] + tail), value


# --- servers


def server_options(mix: Mix, flag: bool) -> dict[str, str | None]:
    longest = min(mix.long_tokens + NEW_TOKENS, MAX_TOKENS)
    options: dict[str, str | None] = {
        "--max-model-len": str(longest),
        "--max-num-seqs": str(MAX_NUM_SEQS),
        "--no-enable-prefix-caching": None,
        "--kv-cache-memory-bytes": "512M",
    }
    if flag:
        # a pruned prompt prefills in one step
        options |= {
            "--uniprefill-config": '{"top_p": 0.99}',
            "--max-num-batched-tokens": str(longest + MAX_NUM_SEQS),
        }
    return options


@contextmanager
def servers(mix: Mix, model: Path, folder: Path) -> Iterator[dict[str, LiveServer]]:
    """The server of each way to serve; they run side by side, and one of them is asked at a time."""
    with ExitStack() as stack:
        say("load: starting a server with the flag and one without")
        with_flag, without = (
            stack.enter_context(live_server(server_options(mix, flag), folder / f"{flag}.log", model))
            for flag in (True, False)
        )
        yield {DENSE: with_flag, PRUNED: with_flag, NO_FLAG: without}


# --- one run of `vllm bench serve`


def bench_command(url: str, model: Path, dataset: Path, rate: str, seed: int, way: str, result: Path) -> list[str]:
    body: dict[str, Any] = {"temperature": 0}
    if way != NO_FLAG:
        body["vllm_xargs"] = {"uniprefill": int(way == PRUNED)}
    options = {
        "--backend": "openai",
        "--base-url": url,
        "--endpoint": "/v1/completions",
        "--model": str(model),
        "--served-model-name": NAME,
        "--dataset-name": "custom",
        "--dataset-path": str(dataset),
        "--custom-output-len": "-1",  # as the dataset says
        "--num-prompts": str(sum(1 for _ in dataset.open())),
        "--request-rate": rate,
        "--seed": str(seed),
        "--extra-body": json.dumps(body),
        "--result-dir": str(result.parent),
        "--result-filename": result.name,
    }
    alone = ["--skip-chat-template", "--disable-shuffle", "--ignore-eos", "--disable-tqdm"]
    alone += ["--save-result", "--save-detailed"]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", *alone]
    return command + [word for option in options.items() for word in option]


def write_dataset(questions: Sequence[tuple[str, str]], path: Path) -> None:
    lines = [json.dumps({"prompt": prompt, "output_tokens": NEW_TOKENS}) for prompt, _ in questions]
    path.write_text("\n".join(lines) + "\n")


def run_once(server: LiveServer, mix: Mix, model: Path, rate: str, seed: int, way: str, folder: Path) -> dict[str, Any]:
    """One run; what `vllm bench serve` saved of it, in the order of the requests.

    Raises:
        ForkError: if a request failed or the server pruned other requests than it was asked to.

    """
    questions = mix.questions(seed)
    dataset, result, log = folder / "prompts.jsonl", folder / "result.json", folder / "bench.log"
    write_dataset(questions, dataset)
    result.unlink(missing_ok=True)
    before = pruned_so_far(server, way)
    with log.open("wb") as stream:
        command = bench_command(server.url, model, dataset, rate, seed, way, result)
        done = subprocess.run(command, stdout=stream, stderr=stream, timeout=RUN_SECONDS)
    if done.returncode or not result.is_file():
        raise ForkError(f"`vllm bench serve` ended with status {done.returncode}:\n{last_lines(log)}")
    saved = json.loads(result.read_text())
    if failed := [error for error in saved["errors"] if error]:
        raise ForkError(f"load, {way}: {len(failed)} requests failed, the first with {failed[0]!r}.")
    pruned = pruned_so_far(server, way) - before
    if pruned != (mix.classes().count(LONG) if way == PRUNED else 0):
        raise ForkError(f"load, {way}: the server pruned {pruned:.0f} of {mix.classes().count(LONG)} long prompts.")
    saved["answered"] = [
        starts_with_answer(text, answer) for text, (_, answer) in zip(saved["generated_texts"], questions, strict=True)
    ]
    return saved


def pruned_so_far(server: LiveServer, way: str) -> float:
    if way == NO_FLAG:
        return 0.0
    return server.metrics().by_label("vllm:uniprefill_requests_total", "outcome").get("pruned", 0.0)


# --- what a run says


def summary(saved: Mapping[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    """Throughput and, by class, percentiles in seconds and how many were answered right."""
    return {
        "requests_per_second": saved["request_throughput"],
        "classes": {
            name: class_summary(saved, [i for i, c in enumerate(classes) if c == name]) for name in (SHORT, LONG)
        },
    }


def class_summary(saved: Mapping[str, Any], members: Sequence[int]) -> dict[str, Any]:
    first = [saved["ttfts"][i] for i in members]
    gaps = [gap for i in members for gap in saved["itls"][i]]
    return {
        "requests": len(members),
        "prompt_tokens": sorted({saved["input_lens"][i] for i in members}),
        "right": sum(saved["answered"][i] for i in members),
        "ttft": percentiles(first),
        "itl": percentiles(gaps) | {"max": max(gaps)},
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}


def measure_load(mix: Mix, model: Path, rates: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """One row per rate: each way's rounds, and their percentiles over the rounds."""
    with TemporaryDirectory(prefix="bench-load-") as name:
        folder = Path(name)
        with servers(mix, model, folder) as ways:
            warm_up = Mix(requests=4, long_every=2, long_tokens=mix.long_tokens)
            for way, server in ways.items():
                run_once(server, warm_up, model, UNBOUNDED, 0, way, folder)
            return [
                measure_rate(
                    mix,
                    rate,
                    rounds,
                    list(ways),
                    lambda way, seed, rate=rate: run_once(ways[way], mix, model, rate, seed, way, folder),
                )
                for rate in rates
            ]


def measure_rate(
    mix: Mix, rate: str, rounds: int, ways: Sequence[str], run: Callable[[str, int], dict[str, Any]]
) -> dict[str, Any]:
    """Run the ways in turn, each round beginning with another."""
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for number in range(1, rounds + 1):
        line = []
        for index in rotated(len(ways), number):
            way = ways[index]
            found[way].append(summary(run(way, number), mix.classes()))
            short = found[way][-1]["classes"][SHORT]
            line.append(
                f"{way} short TTFT p99 {short['ttft']['p99']:.3f} s, ITL p99 {short['itl']['p99'] * 1e3:.0f} ms"
            )
        say(f"load at {rate} requests/s, round {number}/{rounds}: {'; '.join(line)}")
    return {
        "rate": rate,
        "mix": {"requests": mix.requests, "long": mix.classes().count(LONG), "long_tokens": mix.long_tokens}
        | {"short_tokens": SHORT_TOKENS, "new_tokens": NEW_TOKENS},
        "ways": {way: over_rounds(summaries) for way, summaries in found.items()},
    }


def over_rounds(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The spread over the rounds of every number."""
    return {
        "requests_per_second": spread(s["requests_per_second"] for s in summaries),
        "classes": {
            name: {
                "requests": sum(s["classes"][name]["requests"] for s in summaries),
                "right": sum(s["classes"][name]["right"] for s in summaries),
                "ttft": of_rounds(summaries, name, "ttft"),
                "itl": of_rounds(summaries, name, "itl"),
            }
            for name in (SHORT, LONG)
        },
    }


def of_rounds(summaries: Sequence[Mapping[str, Any]], name: str, what: str) -> dict[str, Any]:
    first = summaries[0]["classes"][name][what]
    return {key: spread(s["classes"][name][what][key] for s in summaries) for key in first}


# --- command line


def rates_argument(text: str) -> tuple[str, ...]:
    """ "0.5,inf" -> ("0.5", "inf")."""
    rates = tuple(text.split(","))
    for rate in rates:
        try:
            good = float(rate) > 0
        except ValueError:
            good = False
        if not good:
            raise argparse.ArgumentTypeError(f"{rate!r} is no rate; write requests a second, or inf, as in 0.5,inf")
    return rates


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evals.bench.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rounds", type=positive, default=5, help="(default: %(default)s)")
    add("--requests", type=positive, default=48, help="of one run (default: %(default)s)")
    add("--long-every", type=positive, default=6, help="one request of so many is long (default: %(default)s)")
    add("--long-tokens", type=positive, default=16384, help="prompt tokens of a long one (default: %(default)s)")
    add(
        "--rates",
        type=rates_argument,
        default=("0.6", UNBOUNDED),
        help="requests a second, comma-separated; inf sends all at once (default: 0.6,inf: on two cores dense prefills "
        "keep up with the first, and the second shows the throughput)",
    )
    add("--output", type=Path, default=ROOT / "evals" / "results" / "load-needle-cpu", help="without suffix")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = make_parser().parse_args(argv)
    if not 1024 <= args.long_tokens <= MAX_TOKENS - NEW_TOKENS:
        raise ForkError(f"--long-tokens is 1024 to {MAX_TOKENS - NEW_TOKENS}: shorter prompts are never pruned.")
    if args.requests < args.long_every:
        raise ForkError("--requests must be at least --long-every, so that one is long.")
    mix = Mix(args.requests, args.long_every, args.long_tokens)
    load_average, origin = os.getloadavg()[0], provenance()
    rows = measure_load(mix, NEEDLE_MODEL, args.rates, args.rounds)
    result = {
        "provenance": origin,
        "settings": {"command": shlex.join(["python", "-m", "evals.bench.load", *argv]), "rounds": args.rounds},
        "load_average": load_average,
        "finished": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        "expectations": load_report.expectations(rows),
        "load": rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    json_file, md_file, png_file = (Path(f"{args.output}.{end}") for end in ("json", "md", "png"))
    json_file.write_text(json.dumps(result, indent=1) + "\n")
    md_file.write_text(load_report.markdown(result))
    load_report.plot(result, png_file)
    print(load_report.markdown(result))
    return 0


if __name__ == "__main__":
    run_main(main)
