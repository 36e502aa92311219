"""The load part's result: what is expected of it, as Markdown, as a plot."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from evals.bench.arithmetic import size_label, spread
from evals.bench.report import expectation_table, section, table

SHORT, LONG = "short", "long"
DENSE, PRUNED, NO_FLAG = "dense", "pruned", "no flag"
ALLOWED = 1.05  # p99 of one way over the other's; less than this is not told from noise
MEASURES = (("ttft", "p50"), ("ttft", "p99"), ("itl", "p50"), ("itl", "p99"))


def paired(row: dict[str, Any], name: str, what: str, percentile: str, reference: str) -> dict[str, Any]:
    """Pruned over the reference, round by round: under 1 is faster."""
    ours, theirs = (row["ways"][way]["classes"][name][what][percentile]["values"] for way in (PRUNED, reference))
    return spread(a / b for a, b in zip(ours, theirs, strict=True))


def expectations(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "expectation": f"{rate_label(row['rate'])}: short requests' {what.upper()} p99: pruned at most "
            f"{ALLOWED:g} of dense, median of the rounds",
            "measured": f"{ratio['median']:.2f} [{ratio['min']:.2f}–{ratio['max']:.2f}]",
            "met": ratio["median"] <= ALLOWED,
        }
        for row in rows
        for what in ("ttft", "itl")
        for ratio in [paired(row, SHORT, what, "p99", DENSE)]
    ]


def rate_label(rate: str) -> str:
    return "all at once" if rate == "inf" else f"{rate} requests/s"


def markdown(result: dict[str, Any]) -> str:
    origin, mix = result["provenance"], result["load"][0]["mix"]
    machine = origin["machine"]
    facts = [
        ("machine", f"{machine['cpu']}, {machine['cores']} cores"),
        ("load before the run", f"{result['load_average']:.1f} on {machine['cores']} cores"),
        ("package", f"{origin['package']}, torch {origin['torch']}"),
        ("series", f"sha256 {origin['series_sha256'][:16]}"),
        ("finished", result["finished"]),
        ("command", f"`{result['settings']['command']}`"),
    ]
    method = (
        f"`vllm bench serve`, {result['settings']['rounds']} rounds, dense, pruned and no flag in turn: "
        f"{mix['requests']} requests a run, {mix['long']} of them with {size_label(mix['long_tokens'])} prompt tokens, "
        f"the others with {mix['short_tokens']}; {mix['new_tokens']} tokens generated. The same prompts and arrivals "
        "for all ways of a round, no prefix cache. Numbers are medians of the rounds [range]; a round's p99 is "
        f"of about {mix['requests'] - mix['long']} first tokens, so nearly its slowest. Dense and pruned share a "
        "server, whose budget takes a whole prompt in one step; no flag is a server without UniPrefill, which "
        "prefills in chunks of vLLM's own budget."
    )
    return (
        "\n\n".join(
            [
                "# Load: short and long prompts together",
                table(("", ""), facts),
                method,
                section("Expectations", expectation_table(result["expectations"])),
                section("Latency", latency_table(result["load"])),
                section("Pruned over the others, round by round", ratio_table(result["load"])),
                section("Throughput and answers", throughput_table(result["load"])),
            ]
        )
        + "\n"
    )


def shown(value: dict[str, Any], what: str) -> str:
    """Seconds to a first token, milliseconds between tokens."""
    scale, digits = (1, 2) if what == "ttft" else (1e3, 0)
    middle, low, high = (f"{value[key] * scale:.{digits}f}" for key in ("median", "min", "max"))
    return f"{middle} [{low}–{high}]"


def latency_table(rows: Sequence[dict[str, Any]]) -> str:
    def lines() -> Iterator[list[str]]:
        for row in rows:
            for name in (SHORT, LONG):
                for way, found in row["ways"].items():
                    measured = found["classes"][name]
                    cells = [shown(measured[what][key], what) for what, key in (*MEASURES, ("itl", "max"))]
                    yield [rate_label(row["rate"]), name, way, *cells]

    head = ("rate", "class", "way", "TTFT p50 s", "TTFT p99 s", "ITL p50 ms", "ITL p99 ms", "longest gap ms")
    return table(head, lines())


def ratio_table(rows: Sequence[dict[str, Any]]) -> str:
    def lines() -> Iterator[list[str]]:
        for row in rows:
            for name in (SHORT, LONG):
                for reference in (DENSE, NO_FLAG):
                    ratios = [paired(row, name, what, key, reference) for what, key in MEASURES]
                    cells = [f"{r['median']:.2f} [{r['min']:.2f}–{r['max']:.2f}]" for r in ratios]
                    yield [rate_label(row["rate"]), name, f"pruned / {reference}", *cells]

    return table(("rate", "class", "", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99"), lines())


def throughput_table(rows: Sequence[dict[str, Any]]) -> str:
    def lines() -> Iterator[list[str]]:
        for row in rows:
            for way, found in row["ways"].items():
                speed = found["requests_per_second"]
                right = [f"{c['right']}/{c['requests']}" for c in (found["classes"][n] for n in (SHORT, LONG))]
                span = f"{speed['median']:.3f} [{speed['min']:.3f}–{speed['max']:.3f}]"
                yield [rate_label(row["rate"]), way, span, *right]

    return table(("rate", "way", "requests/s", "short answered", "long answered"), lines())


def plot(result: dict[str, Any], path: Path) -> None:
    """A line of panels per rate: TTFT and ITL of both classes, and the throughput."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["load"]
    figure, axes = plt.subplots(
        len(rows), 5, figsize=(19, 3.8 * len(rows)), squeeze=False, layout="constrained", width_ratios=[2, 2, 2, 2, 1]
    )
    for line, row in zip(axes, rows, strict=True):
        panels = [(name, what) for what in ("ttft", "itl") for name in (SHORT, LONG)]
        for axis, (name, what) in zip(line, panels, strict=False):
            draw_percentiles(axis, row, name, what)
        draw_throughput(line[4], row)
    origin = result["provenance"]
    figure.suptitle(
        f"Load, vLLM {origin['package']}, {origin['machine']['cpu']}: medians of {result['settings']['rounds']} "
        "rounds, bars from the lowest to the highest",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_percentiles(axis: Any, row: dict[str, Any], name: str, what: str) -> None:
    ways = row["ways"]
    for at, (way, found) in enumerate(ways.items()):
        spreads = [found["classes"][name][what][key] for key in ("p50", "p99")]
        middle = [s["median"] for s in spreads]
        ends = [[m - s["min"] for m, s in zip(middle, spreads, strict=True)]]
        ends.append([s["max"] - m for m, s in zip(middle, spreads, strict=True)])
        places = [p + (at - (len(ways) - 1) / 2) * 0.26 for p in range(2)]
        axis.bar(places, middle, 0.24, yerr=ends, capsize=3, label=way)
    axis.set_xticks(range(2), ["p50", "p99"])
    axis.set_yscale("log")
    axis.set_ylabel("seconds")
    axis.set_title(f"{rate_label(row['rate'])}: {name}, {what.upper()}", fontsize=10)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=8)


def draw_throughput(axis: Any, row: dict[str, Any]) -> None:
    for way, found in row["ways"].items():
        values = found["requests_per_second"]["values"]
        axis.bar([way], [statistics.median(values)])
        axis.plot([way] * len(values), values, ".", color="black", markersize=4)
    axis.set_ylabel("requests/s")
    axis.set_title(f"{rate_label(row['rate'])}: throughput", fontsize=10)
    axis.tick_params(axis="x", labelsize=8)
