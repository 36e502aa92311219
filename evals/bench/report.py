"""What the parts share of the report: their interface, tables, plots, and the three files of a result."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.bench.arithmetic import size_label
from scripts.fork import ForkError

if TYPE_CHECKING:
    from evals.bench.engine import Bench, EngineSpec

Result = Mapping[str, Any]
Panel = Callable[[Any], None]
"""Draws on an axis."""


def nothing(_: Any) -> tuple[()]:
    return ()


@dataclass(frozen=True)
class Part:
    """One part of a benchmark: how it is measured, what is expected of it, its share of the report.

    Attributes:
        name: on the command line, and the key of its rows in the result.
        about: a line for --help.
        title: of its section.
        section: its rows as Markdown; "" without any.
        measure: yields the rows; called once for each of `engines`, or once without one.
        engines: what it needs.
        expectations: those that the result can tell about, by `expectation`.
        panels: of the plot.
        lacks: what it could not measure, with the reason.

    """

    name: str
    about: str
    title: str
    section: Callable[[Result], str]
    measure: Callable[[Bench], Iterable[dict[str, Any]]] = nothing
    engines: Callable[[Bench], Sequence[EngineSpec]] = nothing
    expectations: Callable[[Result], Iterable[dict[str, Any]]] = nothing
    panels: Callable[[Result], Iterable[Panel]] = nothing
    lacks: Callable[[Result], Iterable[str]] = nothing


def expectation(what: str, measured: str, met: bool) -> dict[str, Any]:
    return {"expectation": what, "measured": measured, "met": met}


def on_gpu(result: Result) -> bool:
    return result["provenance"]["machine"]["device"] == "cuda"


# --- Markdown


def markdown(result: Result, parts: Iterable[Part]) -> str:
    origin, settings = result["provenance"], result["settings"]
    machine = origin["machine"]
    hardware = f"{machine['cpu']}, {machine['cores']} cores"
    facts = [
        ("machine", f"{machine['gpu']} ({hardware})" if machine["gpu"] else hardware),
        ("load before the run", f"{result['load_average']:.1f} on {machine['cores']} cores"),
        ("package", f"{origin['package']}, torch {origin['torch']}"),
        ("release", f"{origin['upstream']}, commit {origin['upstream_commit']}"),
        ("series", f"sha256 {origin['series_sha256'][:16]}"),
        ("finished", result["finished"]),
        ("command", f"`{settings['command']}`"),
    ]
    marks = {True: "met", False: "**missed**"}
    expected = [(row["expectation"], row["measured"], marks[row["met"]]) for row in result["expectations"]]
    lacks = [f"- {line}" for line in result["not_measured"]] or ["- nothing was left out"]
    sections = [
        f"# {settings['title']} on {machine['gpu'] or 'a CPU'}",
        table(("", ""), facts),
        settings["method"],
        section("Expectations", table(("expectation", "measured", ""), expected)),
        *(section(part.title, part.section(result)) for part in parts),
        section("Not measured", "\n".join(lacks)),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def section(title: str, body: str) -> str:
    return f"## {title}\n{body}" if body else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if len(lines) > 2 else ""


def ranged(value: Mapping[str, float], digits: int = 2, scale: float = 1) -> str:
    """Median [lowest–highest]."""
    median, low, high = (f"{value[key] * scale:.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} [{low}–{high}]"


def milliseconds(value: Mapping[str, float], digits: int = 1) -> str:
    return ranged(value, digits, 1e3)


def gain(value: Mapping[str, Any]) -> str:
    paired = value["paired"]
    return f"{value['ratio']:.2f}x [{paired['min']:.2f}–{paired['max']:.2f}]"


# --- plots


def draw_range(axis: Any, x: Sequence[Any], spreads: Sequence[Mapping[str, float]], label: str, **style: Any) -> None:
    """Medians as a line, the range as bars."""
    middle = [s["median"] for s in spreads]
    below = [max(0, s["median"] - s["min"]) for s in spreads]
    above = [max(0, s["max"] - s["median"]) for s in spreads]
    axis.errorbar(x, middle, yerr=[below, above], marker="o", capsize=3, label=label, **style)


def draw_lines(axis: Any, x: Sequence[Any], lines: Mapping[str, Sequence[Mapping[str, float]]], **legend: Any) -> None:
    """A line a label, and a legend; lines that nobody could tell apart are drawn once, under all their labels."""
    scale = math.log if axis.get_yscale() == "log" else float
    middles = {label: [scale(s["median"]) for s in spreads] for label, spreads in lines.items()}
    every = [value for middle in middles.values() for value in middle]
    near = 0.01 * (max(every) - min(every)) if every else 0
    groups: list[list[str]] = []
    for label, middle in middles.items():
        for group in groups:
            if all(abs(a - b) <= near for a, b in zip(middle, middles[group[0]], strict=True)):
                group.append(label)
                break
        else:
            groups.append([label])
    for group in groups:
        style = {"color": "black"} if group[0] == "dense" else {"color": f"C{list(lines).index(group[0])}"}
        draw_range(axis, x, lines[group[0]], "\n".join(group), **style)
    axis.legend(fontsize=8, **legend)


def of_gain(value: Mapping[str, Any]) -> dict[str, float]:
    """A gain's ratio and its range, to draw."""
    return value["paired"] | {"median": value["ratio"]}


def length_axis(axis: Any, rows: Sequence[Mapping[str, Any]], title: str, unit: str) -> list[int]:
    """A panel whose x axis is the prompt's length; returns the lengths."""
    lengths = [row["tokens"] for row in rows]
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [size_label(tokens) for tokens in lengths])
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("prompt tokens")
    axis.set_ylabel(unit)
    axis.grid(alpha=0.3)
    return lengths


def require_matplotlib() -> None:
    """Fail before the measuring, not after it.

    Raises:
        ForkError: if there is no matplotlib.

    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ForkError("The plot needs matplotlib; run `make build`.") from None
    matplotlib.use("Agg")


def draw(panels: Sequence[Panel], title: str, path: Path) -> None:
    """The panels in rows of three, four in rows of two, under one title."""
    require_matplotlib()
    import matplotlib.pyplot as plt

    columns = 2 if len(panels) == 4 else min(3, len(panels))
    lines = -(-len(panels) // columns)
    size = (5.2 * columns, 3.8 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, panel in zip(axes.flat, panels, strict=False):
        panel(axis)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    figure.suptitle(title, fontsize=10, wrap=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# --- the result


def lacking(result: Result, parts: Iterable[Part]) -> Iterator[str]:
    """What can be measured and this result lacks, each with its reason."""
    for part in parts:
        yield from part.lacks(result)
    yield from result.get("cut_short", [])


def write(result: dict[str, Any], parts: Sequence[Part], output: Path, with_plot: bool = True) -> str:
    """OUTPUT.json, OUTPUT.md and OUTPUT.png with what is known by now; returns the Markdown."""
    result["finished"] = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
    result["expectations"] = [row for part in parts for row in part.expectations(result)]
    result["not_measured"] = list(lacking(result, parts))
    output.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{output}.json").write_text(json.dumps(result, indent=1) + "\n")
    text = markdown(result, parts)
    Path(f"{output}.md").write_text(text)
    panels = [panel for part in parts if result.get(part.name) for panel in part.panels(result)] if with_plot else []
    if panels:
        origin = result["provenance"]
        hardware = origin["machine"]["gpu"] or origin["machine"]["cpu"]
        title = f"{result['settings']['title']}, vLLM {origin['package']}, {hardware}"
        draw(panels, title, Path(f"{output}.png"))
    return text
