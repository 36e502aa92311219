"""The part load: `vllm bench serve` sends short and long prompts at once, dense and pruned in turn.

Three ways to serve the same requests at the same moments:
  dense    the server runs with --uniprefill-config, and the requests ask for no pruning
  pruned   the same server, and the requests ask for pruning
  no flag  a server without the flag, else alike: what serving with it costs those that do not prune

Every round has its own prompts and arrivals, the same for all three. Nothing is reused from the
prefix cache, which is off. Exit status 0: measured, also where an expectation is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from evals.bench.arithmetic import rotated, size_label, spread
from evals.bench.engine import MIN_LENGTH
from evals.bench.report import Panel, Part, Result, expectation, ranged, require_matplotlib, table, write
from evals.bench.shapes import model_name, speaks_needle
from evals.live_server import NAME, NEEDLE_MODEL, LiveServer, last_lines, live_server
from evals.needle import prompts as needle
from evals.provenance import add_results_option, command_line, count_argument, provenance
from scripts.fork import ForkError, run_main, say

SHORT, LONG = "short", "long"
DENSE, PRUNED, NO_FLAG = "dense", "pruned", "no flag"
SHORT_TOKENS = 200
NEW_TOKENS = 64
MAX_NUM_SEQS = 16
UNBOUNDED = "inf"
RUN_SECONDS = 1800  # a run that takes longer hangs
CONFIG = {"top_p": 0.99, "min_prompt_tokens": MIN_LENGTH}  # on a GPU too, whose default is longer
LEAST_GAIN = 0.95  # nearer to 1 is not told from noise
TIMES = ("TTFT p50", "TTFT p99", "ITL p50", "ITL p99")


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
    made = needle.make_prompt("multikey", tokens, seed)
    return made.text, made.answer


def short_question(seed: int) -> tuple[str, str]:
    """One statement in a little filler: shorter than the needle prompts are."""
    rng = random.Random(f"load/{seed}")
    key, value = rng.choice(needle.KEYS), rng.choice(needle.VALUES)
    tail = needle.make_tail(rng, [key], needle.TAIL_TOKENS)
    statement = needle.key_statement(key, value)
    filler = needle.make_filler(rng, SHORT_TOKENS - 1 - len(tail) - len(statement))
    cut = rng.randint(0, len(filler))
    return " ".join(filler[:cut] + statement + filler[cut:] + tail), value


# --- measured


def server_options(mix: Mix, flag: bool) -> dict[str, str | None]:
    longest = min(mix.long_tokens + NEW_TOKENS, needle.MAX_TOKENS)
    options: dict[str, str | None] = {
        "--max-model-len": str(longest),
        "--max-num-seqs": str(MAX_NUM_SEQS),
        "--no-enable-prefix-caching": None,
        "--kv-cache-memory-bytes": "512M",
    }
    if flag:
        options["--uniprefill-config"] = json.dumps(CONFIG)
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
    pruned, long = pruned_so_far(server, way) - before, mix.classes().count(LONG)
    if pruned != (long if way == PRUNED else 0):
        raise ForkError(f"load, {way}: the server pruned {pruned:.0f} of {long} long prompts.")
    pairs = zip(saved["generated_texts"], questions, strict=True)
    saved["answered"] = [needle.starts_with_answer(text, answer) for text, (_, answer) in pairs]
    return saved


def pruned_so_far(server: LiveServer, way: str) -> float:
    if way == NO_FLAG:
        return 0.0
    return server.metrics().by_label("vllm:uniprefill_requests_total", "outcome").get("pruned", 0.0)


def summary(saved: Mapping[str, Any], classes: Sequence[str]) -> dict[str, dict[str, float]]:
    """By class, percentiles in seconds and how many were answered right; of all, requests a second."""
    found: dict[str, dict[str, float]] = {"all": {"requests/s": saved["request_throughput"]}}
    for name in (SHORT, LONG):
        members = [i for i, c in enumerate(classes) if c == name]
        gaps = [gap for i in members for gap in saved["itls"][i]]
        times = {"TTFT": [saved["ttfts"][i] for i in members], "ITL": gaps}
        found[name] = {f"{what} p{p}": float(np.percentile(v, p)) for what, v in times.items() for p in (50, 99)}
        right = sum(saved["answered"][i] for i in members)
        found[name] |= {"ITL max": max(gaps), "right": right, "requests": len(members)}
    return found


def measure_load(mix: Mix, model: Path, rates: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """One row per rate: each way's rounds, and the spread of every number over them."""
    with TemporaryDirectory(prefix="bench-load-") as name:
        folder = Path(name)
        with servers(mix, model, folder) as ways:
            for way, server in ways.items():
                run_once(server, Mix(4, 2, mix.long_tokens), model, UNBOUNDED, 0, way, folder)

            def run(rate: str, way: str, seed: int) -> dict[str, Any]:
                return run_once(ways[way], mix, model, rate, seed, way, folder)

            return [measure_rate(mix, rate, rounds, list(ways), partial(run, rate)) for rate in rates]


def measure_rate(
    mix: Mix, rate: str, rounds: int, ways: Sequence[str], run: Callable[[str, int], dict[str, Any]]
) -> dict[str, Any]:
    """Run the ways in turn, each round beginning with another."""
    found: dict[str, list[dict[str, dict[str, float]]]] = {way: [] for way in ways}
    for number in range(1, rounds + 1):
        line = []
        for way in rotated(ways, number):
            found[way].append(summary(run(way, number), mix.classes()))
            short = found[way][-1][SHORT]
            line.append(f"{way} short TTFT p99 {short['TTFT p99']:.3f} s, ITL p99 {short['ITL p99'] * 1e3:.0f} ms")
        say(f"load at {rate} requests/s, round {number}/{rounds}: {'; '.join(line)}")
    return {
        "rate": rate,
        "mix": asdict(mix) | {"short_tokens": SHORT_TOKENS, "new_tokens": NEW_TOKENS},
        "ways": {
            way: {
                name: {key: spread(one[name][key] for one in runs) for key in values}
                for name, values in runs[0].items()
            }
            for way, runs in found.items()
        },
    }


# --- reported


def gains(row: Mapping[str, Any], name: str, key: str, reference: str) -> dict[str, Any]:
    """The reference's time over pruned, round by round: above 1 pruned is faster."""
    ours, theirs = (row["ways"][way][name][key]["values"] for way in (PRUNED, reference))
    return spread(b / a for a, b in zip(ours, theirs, strict=True))


def expectations(result: Result) -> Iterator[dict[str, Any]]:
    for row in result["load"]:
        for reference, key in product((DENSE, NO_FLAG), ("TTFT p99", "ITL p99")):
            gain = gains(row, SHORT, key, reference)
            yield expectation(
                f"{rate_label(row)}: short requests' {key}: gain of pruned over {reference} at least {LEAST_GAIN:g}, "
                "median of the rounds",
                f"{ranged(gain)}x",
                gain["median"] >= LEAST_GAIN,
            )


def rate_label(row: Mapping[str, Any]) -> str:
    return "all at once" if row["rate"] == UNBOUNDED else f"{row['rate']} requests/s"


def method(mix: Mix, rounds: int) -> str:
    long = mix.classes().count(LONG)
    return (
        f"`vllm bench serve`, {rounds} rounds, dense, pruned and no flag in turn: {mix.requests} requests a run, "
        f"{long} of them with {size_label(mix.long_tokens)} prompt tokens, the others with {SHORT_TOKENS}; "
        f"{NEW_TOKENS} tokens generated. The same prompts and arrivals for all ways of a round, no prefix cache. "
        "Numbers are medians of the rounds [range]; gains are round by round, above 1 pruned is faster; a round's p99 "
        f"is of about {mix.requests - long} first tokens, so nearly its slowest. Dense and pruned share a server; "
        "no flag is one without UniPrefill. Both have vLLM's own number of tokens a step: dense prompts prefill in "
        "chunks, longer pruned ones in the lane."
    )


def section(result: Result) -> str:
    latencies, faster, throughputs = [], [], []
    for row in result["load"]:
        for name in (SHORT, LONG):
            for way, found in row["ways"].items():
                first = [ranged(found[name][key]) for key in TIMES[:2]]
                gaps = [ranged(found[name][key], 0, 1e3) for key in (*TIMES[2:], "ITL max")]
                latencies.append([rate_label(row), name, way, *first, *gaps])
            for reference in (DENSE, NO_FLAG):
                cells = [f"{ranged(gains(row, name, key, reference))}x" for key in TIMES]
                faster.append([rate_label(row), name, f"over {reference}", *cells])
        for way, found in row["ways"].items():
            classes = (found[SHORT], found[LONG])
            right = [f"{sum(c['right']['values'])}/{sum(c['requests']['values'])}" for c in classes]
            throughputs.append([rate_label(row), way, ranged(found["all"]["requests/s"], 3), *right])
    units = [f"{key} {'s' if key.startswith('TTFT') else 'ms'}" for key in TIMES]
    return "\n\n".join(
        (
            table(("rate", "class", "way", *units, "longest gap ms"), latencies),
            table(("rate", "class", "gain of pruned", *TIMES), faster),
            table(("rate", "way", "requests/s", "short answered", "long answered"), throughputs),
        )
    )


def panels(result: Result) -> Iterator[Panel]:
    """Of each rate TTFT and ITL of both classes, and the throughput."""
    for row in result["load"]:
        for what in ("TTFT", "ITL"):
            yield from (partial(draw_percentiles, row=row, name=name, what=what) for name in (SHORT, LONG))
        yield partial(draw_throughput, row=row)


def draw_percentiles(axis: Any, row: Mapping[str, Any], name: str, what: str) -> None:
    for at, (way, found) in enumerate(row["ways"].items()):
        spreads = [found[name][f"{what} {key}"] for key in ("p50", "p99")]
        middle = [s["median"] for s in spreads]
        ends = [[s["median"] - s["min"] for s in spreads], [s["max"] - s["median"] for s in spreads]]
        places = [p + (at - (len(row["ways"]) - 1) / 2) * 0.26 for p in range(2)]
        axis.bar(places, middle, 0.24, yerr=ends, capsize=3, label=way)
    axis.set_xticks(range(2), ["p50", "p99"])
    axis.set_yscale("log")
    axis.set_ylabel("seconds")
    axis.set_title(f"{rate_label(row)}: {name}, {what}", fontsize=10)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=8)


def draw_throughput(axis: Any, row: Mapping[str, Any]) -> None:
    for way, found in row["ways"].items():
        values = found["all"]["requests/s"]["values"]
        axis.bar([way], [statistics.median(values)])
        axis.plot([way] * len(values), values, ".", color="black", markersize=4)
    axis.set_ylabel("requests/s")
    axis.set_title(f"{rate_label(row)}: throughput", fontsize=10)


ABOUT = "short and long prompts at once, with vllm bench serve"
PART = Part("load", ABOUT, "Latency, gain and throughput", section, expectations=expectations, panels=panels)


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


def add_mix_options(parser: argparse.ArgumentParser, mix: Mix, rounds: int) -> None:
    """What is sent to which model, how often, and where the result goes; `mix` and `rounds` by default."""
    add, count = parser.add_argument, count_argument
    add("--rounds", type=count, default=rounds, help="(default: %(default)s)")
    add("--requests", type=count, default=mix.requests, help="of one run (default: %(default)s)")
    add(
        "--long-every", type=count, default=mix.long_every, help="one request of so many is long (default: %(default)s)"
    )
    add("--long-tokens", type=count, default=mix.long_tokens, help="prompt tokens of a long one (default: %(default)s)")
    add("--model", type=Path, default=NEEDLE_MODEL, metavar="FOLDER", help="another one with the needle's vocabulary")
    add_results_option(parser)


def chosen_mix(args: argparse.Namespace, task: str) -> Mix:
    """Raises ForkError for what cannot be sent, or a model that `make TASK` cannot ask."""
    longest = needle.MAX_TOKENS - NEW_TOKENS
    if not MIN_LENGTH <= args.long_tokens <= longest:
        raise ForkError(f"--long-tokens is {MIN_LENGTH} to {longest}: shorter prompts are not pruned here.")
    if args.requests < args.long_every:
        raise ForkError("--requests must be at least --long-every, so that one is long.")
    if not speaks_needle(args.model):
        raise ForkError(
            f"make {task} asks the needle model's questions and {args.model} does not know its words; measure "
            "another model with `vllm bench serve --extra-body`."
        )
    return Mix(args.requests, args.long_every, args.long_tokens)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evals.bench.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_mix_options(parser, Mix(requests=48, long_every=6, long_tokens=16384), rounds=5)
    parser.add_argument(
        "--rates",
        type=rates_argument,
        default=("0.6", UNBOUNDED),
        help="requests a second, comma-separated; inf sends all at once (default: 0.6,inf: on two cores dense prefills "
        "keep up with the first, and the second shows the throughput)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = make_parser().parse_args(argv)
    mix = chosen_mix(args, "bench-load")
    require_matplotlib()
    load_average, origin = os.getloadavg()[0], provenance()
    output = args.results / f"load-{model_name(args.model)}-{origin['machine']['device']}"
    result = {
        "provenance": origin,
        "settings": {
            "title": "Load: short and long prompts together",
            "method": method(mix, args.rounds),
            "command": command_line("bench-load", argv),
            "rounds": args.rounds,
        },
        "load_average": load_average,
        "load": measure_load(mix, args.model, args.rates, args.rounds),
    }
    print(write(result, [PART], output))
    say(f"written: {output}.json, .md, .png")
    return 0


if __name__ == "__main__":
    run_main(main)
