"""A result as Markdown and as a plot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from evals.bench.arithmetic import size_label


def markdown(result: dict[str, Any]) -> str:
    sections = [
        heading(result),
        section("Expectations", expectation_table(result["expectations"])),
        section("Time to first token", ttft_table(result.get("ttft", []))),
        section(
            "Gain against the gain at the kept lengths",
            efficiency_table(result.get("efficiency", [])),
        ),
        section("Where a pruned prefill's time goes", breakdown_table(result.get("breakdown", []))),
        section("Prompts sent together", concurrency_table(result.get("concurrency", []))),
        section("A random mix of short and long prompts", poisson_table(result.get("poisson", []))),
        section("The selection alone", kernels_table(result)),
        section("Decode, milliseconds a token", decode_table(result.get("decode", {}))),
        section("Triton kernels against torch", checks_table(result.get("gpu", {}))),
        section("Decode with CUDA graphs against eager", graphs_table(result.get("gpu", {}))),
    ]
    missing = [f"- {line}" for line in result["not_measured"]]
    sections.append("## Not measured\n" + "\n".join(missing or ["- nothing was left out"]))
    return "\n\n".join(filter(None, sections)) + "\n"


def heading(result: dict[str, Any]) -> str:
    origin, settings = result["provenance"], result["settings"]
    machine = origin["machine"]
    hardware = f"{machine['cpu']}, {machine['cores']} cores"
    if machine["gpu"]:
        hardware = f"{machine['gpu']} ({hardware})"
    rows = [
        ("machine", hardware),
        ("load before the run", f"{result['load_average']:.1f} on {machine['cores']} cores"),
        ("package", f"{origin['package']}, torch {origin['torch']}"),
        ("release", f"{origin['upstream']}, commit {origin['upstream_commit']}"),
        ("series", f"sha256 {origin['series_sha256'][:16]}"),
        ("finished", result["finished"]),
        ("command", f"`{settings['command']}`"),
    ]
    title = f"# Benchmark: {settings['shape']} on {machine['gpu'] or 'a CPU'}"
    method = (
        f"Medians of {settings['repeats']} repetitions [range], dense and pruned in turn in one "
        "process, a warm-up before; gains are ratios of medians [range of the paired ratios]."
    )
    return "\n\n".join([title, table(("", ""), rows), method])


def section(title: str, body: str) -> str:
    return f"## {title}\n{body}" if body else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if len(lines) > 2 else ""


def seconds(value: dict[str, Any]) -> str:
    return f"{value['median']:.3f} s [{value['min']:.3f}–{value['max']:.3f}]"


def gain(value: dict[str, Any]) -> str:
    paired = value["paired"]
    return f"{value['ratio']:.2f}x [{paired['min']:.2f}–{paired['max']:.2f}]"


def right(value: dict[str, int] | None) -> str:
    return f"{value['right']}/{value['asked']}" if value else "–"


def kept(segments: Sequence[dict[str, Any]]) -> str:
    return " ".join(f"{segment['share']['median']:.0%}" for segment in segments[1:])


def expectation_table(rows: Sequence[dict[str, Any]]) -> str:
    marks = {True: "met", False: "**missed**"}
    return table(
        ("expectation", "measured", ""),
        ((row["expectation"], row["measured"], marks[row["met"]]) for row in rows),
    )


def ttft_table(rows: Sequence[dict[str, Any]]) -> str:
    def lines() -> Iterator[tuple[str, ...]]:
        for row in rows:
            tokens, dense = size_label(row["tokens"]), row["dense"]
            yield tokens, "dense", seconds(dense["seconds"]), "1", "", right(dense["answered"]), ""
            for name, pruned in row["pruned"].items():
                yield (
                    tokens,
                    name,
                    seconds(pruned["seconds"]),
                    gain(pruned["gain"]),
                    kept(pruned["kept"]),
                    right(pruned["answered"]),
                    f"{pruned['flop_model_gain']:.2f}x",
                )

    head = ("prompt", "prefill", "time", "gain", "kept after the cuts", "answered", "FLOP model")
    return table(head, lines())


def efficiency_table(rows: Sequence[dict[str, Any]]) -> str:
    def lines() -> Iterator[tuple[str, ...]]:
        for row in rows:
            spread = row["paired_efficiency"]
            yield (
                size_label(row["tokens"]),
                ", ".join(map(str, row["selection_layers"])),
                ", ".join(f"{s['layers']} at {s['tokens']}" for s in row["segments"]),
                gain(row["gain"]),
                f"{row['expected_gain']:.2f}x",
                f"{row['efficiency']:.2f} [{spread['min']:.2f}–{spread['max']:.2f}]",
            )

    head = ("prompt", "cuts after", "layers at tokens", "gain", "expected gain", "share of it")
    return table(head, lines())


def breakdown_table(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    # Rows of fewer cuts have fewer segments, so the widest names the columns.
    names = list(max((row["parts_seconds"] for row in rows), key=len))

    def lines() -> Iterator[list[str]]:
        for row in rows:
            cuts = row["selection_seconds_per_cut"]
            share = row["overhead_share"]
            yield [
                size_label(row["tokens"]),
                ", ".join(map(str, row["selection_layers"])),
                *(milliseconds(row["parts_seconds"].get(name)) for name in names),
                f"{share['median']:.1%} [{share['min']:.1%}–{share['max']:.1%}]",
                ", ".join(f"{cut['median'] * 1e3:.2f}" for cut in cuts),
            ]

    head = ("prompt", "cuts after", *(f"{name} ms" for name in names))
    note = (
        "\n\nThe overhead is score, select, compact, metadata and rows (gathering rows, "
        "scattering them back); selection is score and select."
    )
    return table((*head, "overhead", "selection ms per cut"), lines()) + note


def milliseconds(value: dict[str, Any] | None) -> str:
    return f"{value['median'] * 1e3:.1f}" if value else ""


def millisecond_range(value: dict[str, Any], digits: int = 1) -> str:
    median, low, high = (f"{value[key] * 1e3:.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} [{low}–{high}]"


def concurrency_table(rows: Sequence[dict[str, Any]]) -> str:
    head = ("prompts", "prefill", "mean ms to first token", "all prompts' ms: median [range]", "gain in the mean")

    def lines() -> Iterator[tuple[str, ...]]:
        for row in rows:
            prompts = f"{row['together']} of {size_label(row['tokens'])}"
            for name in ("dense", "pruned"):
                label = row["variant"] if name == "pruned" else name
                shown = gain(row["gain"]) if name == "pruned" else "1"
                yield (
                    prompts,
                    label,
                    millisecond_range(row["mean_ttft"][name]),
                    millisecond_range(row["ttft"][name]),
                    shown,
                )

    return table(head, lines())


def poisson_table(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""

    def lines() -> Iterator[tuple[str, ...]]:
        for row in rows:
            throughput = row["throughput"]
            shown = [f"{throughput[way]['median']:.0f}" for way in ("dense", "pruned")]
            yield "all: tokens a second", *shown, gain(throughput["gain"])
            for kind in ("short", "long"):
                for name, value in row[kind].items():
                    what, _, share = name.partition("_")
                    label = "to first token" if what == "ttft" else "between tokens"
                    yield (
                        f"{kind}: ms {label}, {share}",
                        millisecond_range(value["dense"]),
                        millisecond_range(value["pruned"]),
                        gain(value["gain"]),
                    )

    row = rows[0]
    note = (
        f"{row['requests']} requests at {row['requests_per_second']:.2f} a second on average, one in four of "
        f"{size_label(row['tokens'])}, the others of {row['short_tokens']} tokens, {row['new_tokens']} new tokens "
        f"each; the long ones alone would take {row['load']:.0%} of a dense engine. Pruned is {row['variant']}; "
        "short prompts are dense in both.\n\n"
    )
    return note + table(("", "dense", "pruned", "gain"), lines())


def kernels_table(result: dict[str, Any]) -> str:
    rows = result.get("kernels", [])
    if not rows:
        return ""
    rates = result["ceilings"]

    def lines() -> Iterator[tuple[str, ...]]:
        for row in rows:
            seconds, floor, over = row["seconds"], row["floor_seconds"], row["over_floor"]
            peak = row["peak_bytes"]
            yield (
                size_label(row["tokens"]),
                millisecond_range(seconds["mass"], 3),
                millisecond_range(seconds["selection"], 3),
                millisecond_range(seconds["plain"], 3),
                gain(row["against_plain"]),
                f"{floor['memory'] * 1e3:.3f}",
                f"{floor['compute'] * 1e3:.3f}",
                f"{over['median']:.1f} [{over['min']:.1f}–{over['max']:.1f}]",
                f"{peak['mass'] / 2**20:.0f} / {peak['plain'] / 2**20:.0f}" if peak else "–",
                f"{row['difference_to_plain']:.1e}",
            )

    head = (
        "keys",
        "masses ms",
        "whole selection ms",
        "plain torch ms",
        "gain over plain",
        "memory floor ms",
        "compute floor ms",
        "masses over floor",
        "peak MiB, masses / plain",
        "difference",
    )
    note = (
        f"One layer, one prompt, {rows[0]['implementation']}. Measured here: "
        f"{rates['bytes_per_second'] / 1e12:.2f} TB/s copying, {rates['flops_per_second'] / 1e12:.2f} TFLOP/s in "
        f"{rates['dtype']}; the floors are keys and queries read once, and q·k, at these. The whole selection adds "
        "choosing blocks and finding rows. Difference: relative, of our masses and plain torch's.\n\n"
    )
    return note + table(head, lines())


def decode_table(decode: dict[str, Any]) -> str:
    rows = []
    for row in decode.get("contexts", []):
        for name, value in row["seconds_per_token"].items():
            shown = (value["median"], value["min"], value["max"])
            median, low, high = (f"{number * 1e3:.2f}" for number in shown)
            rows.append((row["context"], name, f"{median} [{low}–{high}]"))
        for pair, value in row["compared"].items():
            rows.append((row["context"], pair, f"{value['ratio']:.3f}, spread {value['spread']:.3f}"))
    return table(("context", "", "median of processes [range]"), rows)


def checks_table(gpu: dict[str, Any]) -> str:
    def lines() -> Iterator[tuple[str, ...]]:
        for name in ("checks", "sanitizer"):
            if checks := gpu.get(name):
                cases = checks["cases"]
                worst = max((case["error"] for case in cases if "error" in case), default=0.0)
                yield (
                    "compute-sanitizer, small cases" if name == "sanitizer" else "random cases between guard bands",
                    checks["device"],
                    f"{len(cases)} of {checks['planned']}",
                    f"{len(checks['failed'])}",
                    f"{worst:.1e}",
                    f"{checks['seed']}",
                )

    return table(("", "device", "cases run", "failed", "largest error of masses", "seed"), lines())


def graphs_table(gpu: dict[str, Any]) -> str:
    graphs = gpu.get("graphs", {})
    rows = (
        (
            size_label(row["tokens"]),
            row["variant"],
            f"{row['same_tokens']} of {row['of']}",
            " and ".join("right" if right else "wrong" for right in row["answered"]),
        )
        for row in graphs.get("rows", [])
    )
    note = "Without a GPU there are no graphs: both engines were eager.\n\n" if graphs.get("device") == "cpu" else ""
    return note + table(("prompt", "prefill", "same tokens", "answer eager and with graphs"), rows)


def require_matplotlib() -> None:
    """Fail before the measuring, not after it.

    Raises:
        ModuleNotFoundError: if there is no matplotlib.

    """
    import matplotlib

    matplotlib.use("Agg")


def plot(result: dict[str, Any], path: Path) -> None:
    """One panel per part that was measured."""
    import matplotlib.pyplot as plt

    panels = [
        (draw, result[part])
        for part, draws in (
            ("ttft", (draw_times, draw_gains, draw_kept)),
            ("efficiency", (draw_efficiency,)),
            ("breakdown", (draw_breakdown,)),
            ("concurrency", (draw_concurrency,)),
            ("poisson", (draw_poisson,)),
            ("kernels", (draw_kernels,)),
            ("decode", (draw_decode,)),
        )
        for draw in draws
        if result.get(part)
    ]
    if not panels:
        return
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(5.2 * columns, 3.8 * lines), squeeze=False, layout="constrained"
    )
    for axis, (draw, data) in zip(axes.flat[: len(panels)], panels, strict=True):
        draw(axis, data)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    origin = result["provenance"]
    machine = origin["machine"]
    figure.suptitle(
        f"{result['settings']['shape']}, vLLM {origin['package']}, "
        f"{machine['gpu'] or machine['cpu']}, medians of {result['settings']['repeats']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def by_length(axis: Any, rows: Sequence[dict[str, Any]], title: str, unit: str) -> list[int]:
    """A panel whose x axis is the prompt's length; returns the lengths."""
    lengths = [row["tokens"] for row in rows]
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [size_label(tokens) for tokens in lengths])
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("prompt tokens")
    axis.set_ylabel(unit)
    axis.grid(alpha=0.3)
    return lengths


def draw_range(axis: Any, x: Sequence[Any], spreads: Sequence[dict[str, Any]], label: str, **style: Any) -> None:
    """Medians as a line, the range as bars."""
    middle = [s["median"] for s in spreads]
    below = [max(0, s["median"] - s["min"]) for s in spreads]
    above = [max(0, s["max"] - s["median"]) for s in spreads]
    axis.errorbar(x, middle, yerr=[below, above], marker="o", capsize=3, label=label, **style)


def draw_times(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    lengths = by_length(axis, rows, "Time to first token", "seconds")
    axis.set_yscale("log")
    draw_range(axis, lengths, [row["dense"]["seconds"] for row in rows], "dense", color="black")
    for name in rows[0]["pruned"]:
        draw_range(axis, lengths, [row["pruned"][name]["seconds"] for row in rows], name)
    axis.legend(fontsize=8)


def draw_gains(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    lengths = by_length(axis, rows, "Gain: dense over pruned", "times faster")
    axis.axhline(1, color="black", linewidth=0.8)
    for name in rows[0]["pruned"]:
        gains = [row["pruned"][name]["gain"] for row in rows]
        spreads = [gain["paired"] | {"median": gain["ratio"]} for gain in gains]
        draw_range(axis, lengths, spreads, name)
    axis.legend(fontsize=8)


def draw_kept(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    lengths = by_length(axis, rows, "Tokens kept after the cuts", "share of the prompt")
    axis.set_ylim(0, 1.02)
    for color, name in enumerate(rows[0]["pruned"]):
        for cut in range(1, len(rows[0]["pruned"][name]["kept"])):
            shares = [row["pruned"][name]["kept"][cut]["share"] for row in rows]
            label = f"{name}, cut {cut}"
            draw_range(axis, lengths, shares, label, color=f"C{color}", alpha=1 - 0.25 * (cut - 1))
    axis.legend(fontsize=7)


def place(row: dict[str, Any]) -> str:
    return f"{size_label(row['tokens'])}\ncuts {','.join(map(str, row['selection_layers']))}"


def draw_efficiency(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    names = [place(row) for row in rows]
    places = range(len(rows))
    axis.bar([p - 0.2 for p in places], [row["expected_gain"] for row in rows], 0.4, color="0.7")
    bars = axis.bar([p + 0.2 for p in places], [row["gain"]["ratio"] for row in rows], 0.4)
    axis.bar_label(bars, [f"{row['efficiency']:.2f}" for row in rows], fontsize=8)
    axis.set_xticks(places, names, fontsize=8)
    axis.set_title(f"Gain, {rows[0]['variant']}: grey as at the kept lengths", fontsize=10)
    axis.set_ylabel("times faster")


def draw_breakdown(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    from matplotlib import colormaps

    names = [place(row) for row in rows]
    left = [0.0] * len(rows)
    colors = colormaps["tab20"].colors
    for number, part in enumerate(max((row["parts_seconds"] for row in rows), key=len)):
        values = [row["parts_seconds"].get(part, {"median": 0.0})["median"] for row in rows]
        axis.barh(names, values, left=left, label=part, color=colors[number % len(colors)])
        left = [a + b for a, b in zip(left, values, strict=True)]
    axis.set_xlim(0, 1.4 * max(left))
    axis.set_title("A pruned prefill's time", fontsize=10)
    axis.set_xlabel("seconds")
    axis.legend(fontsize=7, loc="right")


def draw_concurrency(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    together = [row["together"] for row in rows]
    for name, color in (("dense", "black"), ("pruned", "C0")):
        label = rows[0]["variant"] if name == "pruned" else name
        draw_range(axis, together, [row["mean_ttft"][name] for row in rows], label, color=color)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(together, list(map(str, together)))
    axis.set_title(f"Mean time to first token, {size_label(rows[0]['tokens'])} prompts together", fontsize=10)
    axis.set_xlabel("prompts sent together")
    axis.set_ylabel("seconds")
    axis.legend(fontsize=8)


def draw_poisson(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    row = rows[0]
    gains = {"throughput": row["throughput"]["gain"]}
    gains |= {
        f"{kind}\n{name.replace('_', ' ')}": value["gain"]
        for kind in ("short", "long")
        for name, value in row[kind].items()
    }
    spreads = [value["paired"] | {"median": value["ratio"]} for value in gains.values()]
    draw_range(axis, list(gains), spreads, "pruned against dense", linestyle="none")
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_title("Random mix of short and long prompts", fontsize=10)
    axis.set_ylabel("times better")
    axis.tick_params(axis="x", labelsize=6)


def draw_kernels(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    lengths = by_length(axis, rows, f"Selection in one layer, {rows[0]['implementation']}", "seconds")
    axis.set_yscale("log")
    for name, label in (("mass", "masses"), ("selection", "whole selection"), ("plain", "plain torch")):
        draw_range(axis, lengths, [row["seconds"][name] for row in rows], label)
    for name, style in (("memory", ":"), ("compute", "--")):
        values = [row["floor_seconds"][name] for row in rows]
        axis.plot(lengths, values, color="black", linestyle=style, label=f"{name} floor")
    axis.legend(fontsize=7)


def draw_decode(axis: Any, decode: dict[str, Any]) -> None:
    rows = decode["contexts"]
    for row in rows:
        spreads = [{key: s[key] * 1e3 for key in ("median", "min", "max")} for s in row["seconds_per_token"].values()]
        names = [name.replace(", ", "\n") for name in row["seconds_per_token"]]
        draw_range(axis, names, spreads, f"context {row['context']}", linestyle="none")
    axis.set_title("Decode", fontsize=10)
    axis.set_ylabel("ms a token")
    axis.set_ylim(bottom=0)
    axis.tick_params(axis="x", labelsize=7)
    axis.legend(fontsize=8)
