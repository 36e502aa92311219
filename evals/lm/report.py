"""A result as Markdown, and the trade-off curve as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from evals.bench.arithmetic import size_label, spread
from evals.bench.report import draw, draw_lines, gain, of_gain, table
from evals.lm.arithmetic import BOOTSTRAP, SCORE, pooled

METHOD = f"""\
- Dense and pruned answer the same samples; scores are the harness's, by its own functions.
- Difference: pruned minus dense in percentage points [95 % interval of the paired difference: {SCORE} where every score
  is 0 or 1 or no sample differs, else {BOOTSTRAP}, 10,000 resamples, marked *].
- Better, worse: samples that pruning answered better, worse.
- Kept: share of the prompt alive after the first and after the last cut, mean over the pruned prompts.
- TTFT: seconds from sending one prompt, alone, to its first token; dense over pruned, so above 1 is faster; each sample
  in turn dense and pruned, in one server or process, none from the prefix cache. Ratio of medians [range of the
  samples' ratios]."""


def with_totals(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines, and behind each length and setting with several tasks one of all together."""
    place = lambda row: (row["length"], row["setting"])  # noqa: E731
    lines: list[dict[str, Any]] = []
    for _, group in groupby(sorted(rows, key=place), key=place):
        found = list(group)
        lines += [*found, pooled(found)] if len(found) > 1 else found
    return lines


def difference(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    star = "*" if row["interval_method"] == BOOTSTRAP else ""
    return f"{100 * row['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]{star}"


def kept(row: dict[str, Any]) -> str:
    return f"{row['kept'][0]:.1%}, {row['kept'][-1]:.1%}" if row["kept"] else "–"


def line(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["task"],
        f"{row['length']:,}",
        row["setting"],
        str(row["samples"]),
        f"{row['dense']:.1%}",
        f"{row['pruned']:.1%}",
        difference(row),
        f"{row['better_pruned']}, {row['worse_pruned']}",
        kept(row),
        gain(row["ttft"]) if row["ttft"] else "–",
    )


def result_table(rows: Sequence[dict[str, Any]]) -> str:
    head = ("task", "length", "prune by", "samples", "dense", "pruned", "difference", "better, worse", "kept", "TTFT")
    return table(head, map(line, with_totals(rows)))


def not_pruned_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What ran densely though it was asked to be pruned."""
    return [
        f"- {row['task']} at {row['length']:,}, {row['setting']}: {count} of {row['samples']} prompts were prefilled "
        f"densely all the same ({reason})."
        for row in rows
        for reason, count in row["not_pruned"].items()
    ]


def markdown(result: dict[str, Any]) -> str:
    about, settings = result["about"], result["settings"]
    machine = about["machine"]
    hardware = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    facts = [
        ("model", settings["model"]),
        ("machine", f"{hardware}, load {result['load_average']:.1f} before the run"),
        ("package", f"{about['package']} (VERSION {about['version']}), torch {about['torch']}"),
        ("commit", about["commit"]),
        ("release", f"{about['upstream']}, commit {about['upstream_commit']}"),
        ("series", f"sha256 {about['series_sha256'][:16]}"),
        ("harness", f"lm-eval {about['lm_eval']}, {settings['asked']}"),
        ("config", f"`{settings['uniprefill_config']}`"),
        ("finished", result["finished"] if result["complete"] else f"not yet, {result['finished']}"),
        ("command", f"`{settings['command']}`"),
    ]
    parts = [
        f"# Long-context accuracy, dense and pruned: {settings['name']}",
        table(("", ""), facts),
        result_table(result["rows"]),
        METHOD,
        "\n".join(not_pruned_lines(result["rows"])),
    ]
    if result["plotted"]:
        parts.insert(3, f"![accuracy and TTFT against top_p]({result['plotted']})")
    return "\n\n".join(filter(None, parts)) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Against top_p, a line for each length: each task's accuracy, and the TTFT ratio of all tasks together."""
    rows = result["rows"]
    panels = [partial(draw_accuracy, task=task, rows=rows) for task in dict.fromkeys(row["task"] for row in rows)]
    if any(row["ttft"] for row in rows):
        panels.append(partial(draw_ttft, rows=rows))
    machine = result["about"]["machine"]
    title = (
        f"{result['settings']['name']}, vLLM {result['about']['package']}, {machine['gpu'] or machine['cpu']}, "
        f"{rows[0]['samples']} samples of each task and length"
    )
    draw(panels, title, path)


def by_length(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each length, in the order of top_p."""
    ordered = sorted(rows, key=lambda row: (row["length"], row["top_p"]))
    return {size_label(length): list(group) for length, group in groupby(ordered, key=lambda row: row["length"])}


def draw_accuracy(axis: Any, task: str, rows: Sequence[dict[str, Any]]) -> None:
    groups = by_length([row for row in rows if row["task"] == task])
    lines = {length: [spread([row["pruned"]]) for row in group] for length, group in groups.items()}
    axis.set_title(f"{task} (dashed: dense)", fontsize=10)
    axis.set_ylabel("mean score")
    axis.set_ylim(-0.03, 1.03)
    dense = {group[0]["dense"]: f"C{i}" for i, group in reversed(list(enumerate(groups.values())))}
    for score, color in dense.items():  # one line where lengths coincide
        axis.axhline(score, color=color, linestyle="--", linewidth=1, alpha=0.6)
    draw_top_p(axis, [row["top_p"] for row in next(iter(groups.values()))], lines)


def draw_ttft(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    settings = sorted({row["top_p"] for row in rows})
    lines = {
        length: [of_gain(pooled([row for row in group if row["top_p"] == top_p])["ttft"]) for top_p in settings]
        for length, group in by_length(rows).items()
        if all(row["ttft"] for row in group)
    }
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_title("Time to first token, dense over pruned", fontsize=10)
    axis.set_ylabel("times faster (bars: range)")
    draw_top_p(axis, settings, lines)


def draw_top_p(axis: Any, settings: Sequence[float], lines: dict[str, Any]) -> None:
    axis.set_xlabel("top_p")
    axis.grid(alpha=0.3)
    draw_lines(axis, settings, lines, title="length")
