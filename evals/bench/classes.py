"""The part classes: time to first token of a small model of every other class of layers, dense and pruned.

The models have the needle model's shape; those without weights prune by keep_ratio, and answer nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from evals.bench import gain
from evals.bench.arithmetic import size_label
from evals.bench.engine import Bench, EngineSpec, resolved_cuts, top_p_variants
from evals.bench.report import Part, Result, expectation, table
from evals.bench.shapes import CLASSES, ModelShape, Prompts, Shape, model_folder, read_config

LENGTHS = (8192, 16384)


def measure(bench: Bench) -> Iterator[dict[str, Any]]:
    """Nothing beside another model than the needle's: that one is then the class to be measured."""
    for shape in CLASSES if bench.shape.name == "needle" else ():
        yield from measure_class(bench, shape)


def measure_class(bench: Bench, shape: Shape) -> Iterator[dict[str, Any]]:
    with model_folder(shape, None) as (folder, load_format):
        model = ModelShape.from_config(read_config(folder))
        longest = EngineSpec((), LENGTHS[-1], resident=4, budget=shape.budgets[0])
        cuts = shape.selection_layers or resolved_cuts(longest.arguments(folder, load_format))
        bench = replace(
            bench, shape=shape, folder=folder, load_format=load_format, model=model, prompts=Prompts.of(folder)
        )
        variants = top_p_variants(bench.options.top_p)[:1] if shape.prune_by == "top_p" else [bench.by_ratio]
        with bench.started(replace(longest, cuts=cuts)) as started:
            for tokens in LENGTHS:
                place = {"model": shape.name, "selection_layers": list(cuts)}
                yield place | gain.measure_length(started, tokens, variants)
            del started


def expectations(result: Result) -> Iterator[dict[str, Any]]:
    for row in result.get("classes", []):
        for name, pruned in row["pruned"].items():
            yield expectation(
                f"{row['model']}, {name} at {size_label(row['tokens'])}: first token sooner",
                f"{pruned['gain']['ratio']:.2f}x",
                pruned["gain"]["ratio"] > 1,
            )


def section(result: Result) -> str:
    rows = result.get("classes", [])
    head = ("model", "cuts after", *gain.HEAD[:-1])
    return table(
        head,
        (
            (row["model"], ", ".join(map(str, row["selection_layers"])), *line[:-1])
            for row in rows
            for line in gain.lines(row)
        ),
    )


PART = Part(
    "classes",
    "time to first token at 8K and 16K of a small model of each other class: windows, recurrent layers, experts, MLA",
    "Other classes of layers",
    section,
    measure,
    expectations=expectations,
)
