"""What every head of every layer looks at in each prompt: recorded once, kept on disk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from evals.calibrate.model import BLOCK, Watch, WatchedModel
from evals.calibrate.prompts import Prompt, Span
from evals.lm.records import digest
from tests.oracle.selection import SelectionRule, forced_blocks

RULE = SelectionRule(top_p=1)


@dataclass(frozen=True)
class Sample:
    """A prompt and what the model did with all of it.

    Attributes:
        score: of the dense answer, 0 to 1.
        mass: [layers, heads, windows, blocks] fp32: attention mass of each block from the last queries.
        hops: [layers, heads, asking blocks, blocks] fp32, where a place must be found through another; else None.

    """

    prompt: Prompt
    text: str
    score: float
    mass: np.ndarray
    hops: np.ndarray | None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt.ids)

    @property
    def right(self) -> bool:
        return self.score == 1

    @cached_property
    def middle(self) -> np.ndarray:
        """[blocks] bool: neither among the first nor the last tokens, which are kept anyway."""
        return ~forced_blocks(self.num_tokens, RULE).numpy()

    @cached_property
    def used(self) -> tuple[Span, ...]:
        """The prompt's needed spans that the dense answer came from: of several answers, of those that it gives."""
        prompt = self.prompt
        if self.right:
            return prompt.needed
        if prompt.exact or prompt.followed or len(prompt.answers) != len(prompt.needed):
            return ()
        given = (answer.lower() in self.text.lower() for answer in prompt.answers)
        return tuple(span for span, found in zip(prompt.needed, given, strict=True) if found)

    @cached_property
    def needed(self) -> np.ndarray:
        """[blocks] bool: middle blocks without which the dense answer would not be the same."""
        return self._blocks(self.used)

    @cached_property
    def asked_for(self) -> np.ndarray:
        """[blocks] bool: those of `needed` that the question itself names."""
        return self._blocks(span for span in self.used if span not in self.prompt.followed)

    @property
    def tells(self) -> bool:
        """Whether a setting can lose of this prompt's answer: it has one, and its places are not all kept anyway."""
        return bool(self.needed.any())

    def _blocks(self, spans: Iterable[Span]) -> np.ndarray:
        blocks = np.zeros_like(self.middle)
        for start, end in spans:
            blocks[start // BLOCK : (end - 1) // BLOCK + 1] = True
        return blocks & self.middle


def rank_shares(mass: np.ndarray, needed: np.ndarray, middle: np.ndarray) -> np.ndarray:
    """Share of the other middle blocks that outweigh the lightest needed one: 0 is best, .5 is chance.

    mass [..., blocks], needed and middle [blocks] bool; returns [...].
    """
    others = mass[..., middle & ~needed]
    if not others.shape[-1]:
        return np.zeros(mass.shape[:-1])
    return (others > mass[..., needed].min(-1, keepdims=True)).mean(-1)


def record(model: WatchedModel, prompts: Iterable[Prompt], folder: Path, fingerprint: Any) -> Iterator[Sample]:
    """A sample a prompt, from `folder` where it lies there already."""
    for prompt in prompts:
        key = digest([fingerprint, prompt.ids, prompt.max_new_tokens])[:16]
        path = folder / f"{prompt.name}-{key}.npz"
        if not path.is_file():
            watch = Watch(layers=model.layers, with_hops=bool(prompt.followed))
            text = model.answer(prompt.ids, prompt.max_new_tokens, watch)
            arrays = {"mass": np.stack([watch.mass[i].numpy() for i in model.layers])}
            if watch.hops:
                arrays["hops"] = np.stack([watch.hops[i].numpy() for i in model.layers])
            folder.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".tmp")
            with unfinished.open("wb") as stream:
                np.savez_compressed(stream, text=np.array(json.dumps(text)), **arrays)
            unfinished.rename(path)
        with np.load(path) as stored:
            text = json.loads(str(stored["text"]))
            hops = stored.get("hops")
            yield Sample(prompt, text, prompt.score(text), stored["mass"], hops)


def progress(what: str, things: Iterable[Any], total: int) -> Iterable[Any]:
    return tqdm(things, desc=what, total=total, unit="prompt", disable=False)
