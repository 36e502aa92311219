"""A profile as Markdown, and the heads' ranks as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evals.bench.report import draw, table
from evals.calibrate.ranks import Sample, rank_shares
from evals.lm.report import result_table

METHOD = """\
- **rank**: share of the other blocks in the middle of a prompt that outweigh the lightest one that the answer needs, by
  the attention of the prompt's last tokens: 0 is first, .5 is chance.
- **recall**: prompts of which every needed block is still alive after the last cut. It counts prompts that the model
  answers, wholly or in part, when nothing is dropped, and whose needed blocks are not kept anyway; of several answers
  the blocks of those that it gives.
- **FLOPs**: of the prefill, as a share of the dense ones; scoring is free here.
- The part `choose` made the candidates, by what they save and by recall; the cheapest that loses no more than the limit
  of the answers to `check`, which has other wordings, haystacks and seeds, stands. Tasks that the model does not answer
  densely to two fifths at a length do not count. Since these answers chose it, they flatter it a little: `make eval`
  asks others. Prompts of other kinds (summaries, code, conversations) were not asked.
- Dense and pruned answer the same prompts; columns and intervals as in `evals/README.md`."""


def head_ranks(samples: Sequence[Sample]) -> np.ndarray:
    """[layers, heads]: mean rank over the prompts that tell, at the best window for each head."""
    ranks = [rank_shares(s.mass, s.asked_for, s.middle) for s in samples if s.tells and s.asked_for.any()]
    return np.mean(ranks, axis=0).min(-1)


def cut_lines(profile: dict[str, Any]) -> list[tuple[str, ...]]:
    lines = []
    for cut, rank in zip(profile["settings"]["selection_layers"], profile["evidence"]["ranks"], strict=True):
        amount = f"top_p {cut['top_p']:g}" if "top_p" in cut else f"keep_ratio {cut['keep_ratio']:g}"
        heads = ", ".join(map(str, cut["heads"]))
        ranked = f"{rank['mean']:.2f}, {rank['worst']:.2f}"
        lines.append((str(cut["layer"]), heads, str(cut["num_queries"]), amount, ranked))
    return lines


def part_lines(evidence: dict[str, Any]) -> list[tuple[str, ...]]:
    lines = []
    for name in ("choose", "check"):
        part = evidence[name]
        low, high = part["interval"]
        recall = f"{part['recall']:.1%} [{low:.1%}, {high:.1%}]"
        lines.append((name, str(part["prompts"]), str(part["telling"]), recall, f"{part['computed']:.2f}"))
    return lines


def made_facts(made: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("package", f"{made['package']}, torch {made['torch']}, transformers {made['transformers']}"),
        ("command", f"`{made['command']}`"),
    ]


def markdown(profile: dict[str, Any]) -> str:
    model, made, evidence = profile["model"], profile["made"], profile["evidence"]
    shape = f"{model['num_layers']} layers, {model['num_heads']} heads, {model['num_kv_heads']} KV heads"
    tried = evidence["candidates"]
    facts = [
        ("model", f"{model['name']}: {model['architecture']}, {shape}"),
        ("lengths", ", ".join(f"{length:,}" for length in made["lengths"])),
        ("hops", str(profile["settings"]["hops"])),
        (
            "limit",
            f"{made['loss']:g} points of the answers lost; of {tried['made']} candidates {tried['asked']} were asked",
        ),
        *made_facts(made),
    ]
    parts = [
        f"# What {model['name']} may drop",
        table(("", ""), facts),
        table(("cut after layer", "heads", "last queries", "keep", "rank on `check`: mean, worst"), cut_lines(profile)),
        table(("part", "prompts", "that tell", "recall [95 %]", "FLOPs"), part_lines(evidence)),
        f"![ranks by layer and head]({model['name']}.png)",
    ]
    if answered := evidence["end_to_end"]:
        parts += [f"## Dense against pruned, with {answered['by']}", result_table(answered["rows"])]
    return "\n\n".join([*parts, METHOD]) + "\n"


def plot(profile: dict[str, Any], layers: Sequence[int], samples: Sequence[Sample], path: Path) -> None:
    """Layers × heads by mean rank on the check part; the chosen heads have a mark."""
    ranks = head_ranks(samples)
    chosen = {cut["layer"]: cut["heads"] for cut in profile["settings"]["selection_layers"]}

    def panel(axis: Any) -> None:
        image = axis.imshow(ranks.T, cmap="viridis_r", vmin=0, vmax=0.5, aspect="auto", origin="lower")
        axis.figure.colorbar(image, ax=axis, label="mean rank of the needed blocks (0: first, .5: chance)")
        for layer, heads in chosen.items():
            axis.plot([list(layers).index(layer)] * len(heads), heads, "o", color="red", markersize=4)
        axis.set_xticks(range(len(layers)), layers, fontsize=6)
        axis.set_yticks(range(ranks.shape[1]))
        axis.set_xlabel("full-attention layer (red: heads that score)")
        axis.set_ylabel("head")

    draw(
        [panel], f"{profile['model']['name']}: where heads rank what the answer needs, at each head's best window", path
    )
