"""A result as Markdown, and the trade-off curve as a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from evals.bench.arithmetic import size_label
from evals.bench.report import draw, draw_range, gain, of_gain, table
from evals.lm.arithmetic import BOOTSTRAP, SCORE, pooled

METHOD = f"""\
- Dense and pruned answer the same samples; scores are the harness's, by its own functions.
- Difference: pruned minus dense in percentage points [95 % interval of the paired difference: {SCORE} where every score
  is 0 or 1 or no sample differs, else {BOOTSTRAP}, 10,000 resamples, marked *].
- Better, worse: samples that pruning answered better, worse.
- Kept: share of the prompt alive after the first and after the last cut, mean over the pruned prompts.
- Computed: share of the prompt's tokens that the average layer computed, mean over all prompts.
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
        f"{row['computed']:.2f}" if row["computed"] is not None else "–",
        gain(row["ttft"]) if row["ttft"] else "–",
    )


def result_table(rows: Sequence[dict[str, Any]]) -> str:
    head = "task|length|prune by|samples|dense|pruned|difference|better, worse|kept|computed|TTFT".split("|")
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
        *(
            (f"config {name}".rstrip(), f"`{json.dumps(config)}`")
            for name, config in settings["uniprefill_config"].items()
        ),
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
        parts.insert(3, f"![accuracy and TTFT against what is computed]({result['plotted']})")
    return "\n\n".join(filter(None, parts)) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Against the computed share, a line a method: for each length the mean score and the TTFT ratio of all tasks."""
    rows = result["rows"]
    lengths = sorted({row["length"] for row in rows})
    panels = [partial(draw_score, length=length, rows=rows) for length in lengths]
    panels += [partial(draw_ttft, length=length, rows=rows) for length in lengths if any(row["ttft"] for row in rows)]
    machine = result["about"]["machine"]
    samples = " and ".join(dict.fromkeys(str(row["samples"]) for row in sorted(rows, key=itemgetter("length"))))
    title = (
        f"{result['settings']['name']}, vLLM {result['about']['package']}, {machine['gpu'] or machine['cpu']}, "
        f"{samples} samples of each task and length, {len({row['task'] for row in rows})} tasks"
    )
    draw(panels, title, path)


def by_method(length: int, rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Of each method the line of all tasks for each of its settings, in the order of what they compute."""
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["length"] == length:
            lines.setdefault((row["method"], row["setting"]), []).append(row)
    methods: dict[str, list[dict[str, Any]]] = {}
    for (method, _), found in lines.items():
        methods.setdefault(method or "pruned", []).append(pooled(found))
    return {method: sorted(found, key=lambda row: row["computed"]) for method, found in methods.items()}


def draw_score(axis: Any, length: int, rows: Sequence[dict[str, Any]]) -> None:
    methods = by_method(length, rows)
    axis.plot([1], [next(iter(methods.values()))[0]["dense"]], "s", color="black", label="dense")
    for i, (method, found) in enumerate(methods.items()):
        axis.plot(
            [row["computed"] for row in found], [row["pruned"] for row in found], "o-", color=f"C{i}", label=method
        )
    axis.set_ylim(0, 1.05)
    draw_computed(axis, f"{size_label(length)}: mean score")


def draw_ttft(axis: Any, length: int, rows: Sequence[dict[str, Any]]) -> None:
    axis.axhline(1, color="black", linewidth=0.8)
    for i, (method, found) in enumerate(by_method(length, rows).items()):
        timed = [row for row in found if row["ttft"]]
        draw_range(
            axis, [row["computed"] for row in timed], [of_gain(row["ttft"]) for row in timed], method, color=f"C{i}"
        )
    draw_computed(axis, f"{size_label(length)}: time to first token, dense over pruned")


def draw_computed(axis: Any, title: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlim(0, 1.05)
    axis.set_xlabel("share of the tokens that the average layer computed")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
