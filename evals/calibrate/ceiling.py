"""What no score can beat: answers where the needed blocks come first whatever their mass, by layer and share kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from evals.bench.hooks import ranked_first
from evals.bench.report import table
from evals.calibrate.answers import start_engine
from evals.calibrate.ranks import Sample, progress
from evals.lm.records import Records

SHARES = (0.2, 0.4, 0.6)
METHOD = """\
Prompts of the part `check` that the model answers when nothing is dropped, pruned at one layer each. The blocks that
the answer needs are kept first, then the others by their mass, until the share is full; beside it the same share by the
mass alone: of all heads, asked by the last 128 tokens."""
WAYS = {"needed": "right: needed blocks first", "published": "right: by the published score"}


def measure(
    path: Path, samples: Sequence[Sample], layers: Sequence[int], records: Records, cpu: bool, more: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """A row for each layer, cut there alone, and share kept: how many of the answers stay right, ranked in both ways.

    Args:
        path: the model's folder.
        samples: answered right when nothing is dropped.
        layers: to cut after, one at a time.
        records: of the answers.
        cpu: whether the engine runs on one.
        more: arguments of LLM(...).

    """
    for layer in layers:
        config = {"selection_layers": [layer], "top_p_over": "middle"}
        ask, backend = start_engine(path, config, samples, cpu, more)
        try:
            right = {(share, way): 0 for share in SHARES for way in WAYS}
            for sample in progress(f"layer {layer}", samples, len(samples)):
                for share, way in right:
                    xargs = {"uniprefill": 1, "uniprefill_keep_ratio": share}
                    key = {"prompt": sample.prompt.ids, "ceiling": way, "layer": layer, "xargs": xargs}
                    first = ranked_first(np.flatnonzero(sample.needed).tolist())
                    with first if way == "needed" else nullcontext():
                        answer = records.kept(key, partial(ask, sample, xargs))
                    right[share, way] += answer["score"] == 1
        finally:
            backend.close()
        for share in SHARES:
            yield {
                "layer": layer,
                "keep_ratio": share,
                "asked": len(samples),
                "right": {way: right[share, way] for way in WAYS},
            }


def markdown(name: str, facts: Sequence[tuple[str, str]], rows: Sequence[dict[str, Any]]) -> str:
    lines = (
        (str(row["layer"]), f"{row['keep_ratio']:g}", *(f"{row['right'][way]} of {row['asked']}" for way in WAYS))
        for row in rows
    )
    parts = (
        f"# What a perfect score could drop of {name}'s prompts",
        table(("", ""), facts),
        METHOD,
        table(("cut after layer", "kept", *WAYS.values()), lines),
    )
    return "\n\n".join(parts) + "\n"
