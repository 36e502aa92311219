"""The part apart: one server, or a prefill and a decode server behind vllm-router with a link of a given rate between.

`vllm bench serve` sends the same short and long prompts at the same moments, dense and pruned in turn. The prefill and
the decode server have half of the cores each, the one server all of them. The link is this program's loopback device,
in a network namespace of its own (`unshare --map-root-user --net`), slowed down by `tc`; NIXL moves KV over TCP on it.
Short prompts are declined by the prefill server, in both, so the decode server prefills them.

Exit status 0: measured; 1: a problem to mend.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from evals.bench import load
from evals.bench.arithmetic import size_label, spread
from evals.bench.load import DENSE, LONG, PRUNED, SHORT, TIMES, Mix
from evals.bench.report import Panel, Part, Result, draw_range, ranged, require_matplotlib, table, write
from evals.bench.shapes import ModelShape, model_name, read_config
from evals.live_server import (
    LiveServer,
    Metrics,
    apart_server,
    live_server,
    router,
)
from evals.provenance import command_line, provenance
from scripts.fork import ForkError, run_main, say

WAYS = (DENSE, PRUNED)
ONE = "one server"
BURST = "256kb"  # more than a packet of the loopback device
QUEUED = "20s"  # of the link's queue: nothing is lost in it
BLOCK_SIZE = 32
DECLINED = 2 * load.SHORT_TOKENS  # shorter prompts are the decode server's


@dataclass(frozen=True)
class ApartServers:
    """As one server to `evals.bench.load`: the router's URL, and what the prefill server counts."""

    url: str
    prefill: LiveServer
    decode: LiveServer

    def metrics(self) -> Metrics:
        return self.prefill.metrics()


def set_link(rate: str) -> None:
    """Slow the namespace's link down to `rate`, as tc writes it."""
    words = f"tc qdisc replace dev lo root tbf rate {rate} burst {BURST} latency {QUEUED}"
    done = subprocess.run(words.split(), capture_output=True, text=True)
    if done.returncode:
        raise ForkError(f"`{words}` failed: {done.stderr.strip()}")


def require_own_network() -> None:
    """Set the loopback device up, in a network namespace that was just made.

    Raises:
        ForkError: if the network is this machine's, whose link must stay as it is, or cannot be set up.

    """
    if any(state.isup for state in psutil.net_if_stats().values()):
        raise ForkError(
            "This slows its network down, and the machine's must stay as it is; start it with `make bench-apart`, "
            "which gives it one of its own."
        )
    done = subprocess.run(["ip", "link", "set", "lo", "up"], capture_output=True, text=True)
    if done.returncode:
        raise ForkError(f"The loopback device cannot be set up ({done.stderr.strip()}); is unshare allowed here?")


@contextmanager
def one_server(mix: Mix, model: Path, folder: Path) -> Iterator[LiveServer]:
    options = load.server_options(mix, True) | {"--block-size": str(BLOCK_SIZE)}
    with live_server(options, folder / "one.log", model, {"VLLM_HOST_IP": "127.0.0.1"}) as server:
        yield server


@contextmanager
def apart_servers(mix: Mix, model: Path, folder: Path) -> Iterator[ApartServers]:
    options = load.server_options(mix, True) | {"--block-size": str(BLOCK_SIZE)}
    declines = json.dumps(load.CONFIG | {"decline_below_tokens": DECLINED})
    network = {"VLLM_HOST_IP": "127.0.0.1", "UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}
    roles = ("kv_producer", {"--uniprefill-config": declines}), ("kv_consumer", {})
    with ExitStack() as stack:
        prefill, decode = (
            stack.enter_context(apart_server(role, options | more, folder / f"{role}.log", model, network))
            for role, more in roles
        )
        url = stack.enter_context(router([prefill.url], [decode.url], folder / "router.log"))
        yield ApartServers(url, prefill, decode)


def measure(mix: Mix, model: Path, rate: str, links: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """A row for the one server, and one for each rate of the link."""
    with TemporaryDirectory(prefix="bench-apart-") as name:
        folder = Path(name)

        def rows(server: Any, link: str) -> dict[str, Any]:
            def run(way: str, seed: int) -> dict[str, Any]:
                before = moved(server)
                saved = load.run_once(server, mix, model, rate, seed, way, folder)
                moved_bytes.setdefault(way, []).append(moved(server) - before)
                return saved

            moved_bytes: dict[str, list[float]] = {}
            say(f"apart: {link}")
            found = load.measure_rate(mix, rate, rounds, WAYS, run)
            return found | {"link": link, "bytes": {way: spread(values) for way, values in moved_bytes.items()}}

        def warm(server: Any) -> None:
            for way in WAYS:
                load.run_once(server, Mix(4, 2, mix.long_tokens), model, load.UNBOUNDED, 0, way, folder)

        with one_server(mix, model, folder) as server:
            warm(server)
            found = [rows(server, ONE)]
        with apart_servers(mix, model, folder) as servers:
            warm(servers)
            for link in links:
                set_link(link)
                found.append(rows(servers, link))
    return found


def moved(server: Any) -> float:
    """Bytes of KV that came to the decode server, by its own count."""
    if not isinstance(server, ApartServers):
        return 0.0
    try:
        return server.decode.metrics().total("vllm:nixl_bytes_transferred_sum")
    except KeyError:
        return 0.0


# --- reported


def method(mix: Mix, model: Path, rate: str, rounds: int) -> str:
    per_token = ModelShape.from_config(read_config(model)).kv_bytes_per_token
    long = mix.classes().count(LONG)
    return (
        f"`vllm bench serve`, {rounds} rounds, dense and pruned in turn: {mix.requests} requests a run at {rate} a "
        f"second, {long} with {size_label(mix.long_tokens)} prompt tokens, the others with {load.SHORT_TOKENS}; "
        f"{load.NEW_TOKENS} tokens generated. The same prompts and arrivals for all rows of a round, no prefix cache. "
        "*One server* has all cores; *apart* is a prefill and a decode server with half of them each, behind "
        "vllm-router. The prefill server declines the short prompts, and the decode server prefills them. KV travels "
        f"over TCP on a loopback device that is slowed down to the link's rate; {per_token:,} bytes a token. Numbers "
        "are medians of the rounds [range]."
    )


def label(row: Mapping[str, Any]) -> str:
    return ONE if row["link"] == ONE else f"apart, {row['link']}/s"


def section(result: Result) -> str:
    latencies, sent = [], []
    for row in result["apart"]:
        for name in (LONG, SHORT):
            for way, found in row["ways"].items():
                first = [ranged(found[name][key]) for key in TIMES[:2]]
                gaps = [ranged(found[name][key], 0, 1e3) for key in (*TIMES[2:], "ITL max")]
                latencies.append([label(row), name, way, *first, *gaps])
        for way, found in row["ways"].items():
            classes = (found[SHORT], found[LONG])
            right = [f"{sum(c['right']['values'])}/{sum(c['requests']['values'])}" for c in classes]
            megabytes = ranged(row["bytes"][way], 1, 1e-6) if row["link"] != ONE else "–"
            sent.append([label(row), way, ranged(found["all"]["requests/s"], 3), *right, megabytes])
    units = [f"{key} {'s' if key.startswith('TTFT') else 'ms'}" for key in TIMES]
    return "\n\n".join(
        (
            table(("servers", "class", "way", *units, "longest gap ms"), latencies),
            table(("servers", "way", "requests/s", "short answered", "long answered", "MB of KV a run"), sent),
        )
    )


def panels(result: Result) -> Iterator[Panel]:
    for name in (LONG, SHORT):
        for what in ("TTFT p50", "ITL p99"):
            yield partial(draw, rows=result["apart"], name=name, what=what)


def draw(axis: Any, rows: Sequence[Mapping[str, Any]], name: str, what: str) -> None:
    for way in WAYS:
        draw_range(axis, [label(row) for row in rows], [row["ways"][way][name][what] for row in rows], way)
    axis.set_yscale("log")
    axis.set_ylabel("seconds")
    axis.tick_params(axis="x", labelsize=7)
    axis.set_title(f"{name}: {what}", fontsize=10)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=8)


PART = Part("apart", "prefill and decode apart, at several link rates", "Latency and bytes", section, panels=panels)


# --- command line


def links_argument(text: str) -> tuple[str, ...]:
    """ "1gbit,60mbit" -> ("1gbit", "60mbit")."""
    links = tuple(text.split(","))
    for link in links:
        if not re.fullmatch(r"[1-9]\d*[kmg]bit", link):
            raise argparse.ArgumentTypeError(f"{link!r} is no rate of a link; write it as tc does, 250mbit")
    return links


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evals.bench.apart", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    load.add_mix_options(parser, Mix(requests=24, long_every=4, long_tokens=8192), rounds=3)
    add = parser.add_argument
    add("--rate", type=load.rates_argument, default=("0.5",), help="requests a second (default: 0.5)")
    add("--links", type=links_argument, default=("1gbit", "200mbit", "40mbit"), help="(default: 1gbit,200mbit,40mbit)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = make_parser().parse_args(argv)
    mix = load.chosen_mix(args, "bench-apart")
    rate, *more = args.rate
    if more:
        raise ForkError("--rate is one number of requests a second; run the program once for each.")
    require_matplotlib()
    require_own_network()
    load_average, origin = os.getloadavg()[0], provenance()
    output = args.results / f"apart-{model_name(args.model)}-{origin['machine']['device']}"
    result = {
        "provenance": origin,
        "settings": {
            "title": "Prefill and decode apart",
            "method": method(mix, args.model, rate, args.rounds),
            "command": command_line("bench-apart", argv),
            "rounds": args.rounds,
        },
        "load_average": load_average,
        "apart": measure(mix, args.model, rate, args.links, args.rounds),
    }
    print(write(result, [PART], output))
    say(f"written: {output}.json, .md, .png")
    return 0


if __name__ == "__main__":
    run_main(main)
