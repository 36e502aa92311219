"""Needles in a haystack: RULER's retrieval family, eight tasks.

The texts, and the order in which random draws are made, are those of the harness (lm_eval/tasks/ruler/prepare_niah.py,
NVIDIA's RULER before it), so that the same draws give the same prompt; tests/evals/test_lm_tasks.py compares them.
Its essay haystack alone differs: see prose.py.
"""

from __future__ import annotations

import uuid
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from random import Random

from evals.tasks.generators.documents import Sample
from evals.tasks.generators.prose import essay_words, split_sentences

ANSWER_TOKENS = 128
TEMPLATE = (
    "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. I will quiz "
    "you about the {type_needle_v} afterwards.\n{context}\nWhat are all the special magic {type_needle_v} for {query} "
    "mentioned in the provided text?"
)
NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = [round(100 * i / 39) for i in range(40)]
SHUFFLE_SEED = 42


@dataclass(frozen=True)
class Niah:
    """One task of the family. haystack: repeat, essay or needle; keys and values: words, numbers or uuids."""

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    num_keys: int = 1
    values_per_key: int = 1
    num_queries: int = 1

    @property
    def num_needles(self) -> int:
        return self.num_keys * self.values_per_key


TASKS = {
    "niah_single_1": Niah("repeat"),
    "niah_single_2": Niah("essay"),
    "niah_single_3": Niah("essay", values="uuids"),
    "niah_multikey_1": Niah("essay", num_keys=4),
    "niah_multikey_2": Niah("needle"),
    "niah_multikey_3": Niah("needle", keys="uuids", values="uuids"),
    "niah_multivalue": Niah("essay", values_per_key=4),
    "niah_multiquery": Niah("essay", num_keys=4, num_queries=4),
}


class WordPairs(Sequence[str]):
    """The harness's six million keys like "abiding-pasta", in its order (sorted), without making them all."""

    def __init__(self, adjectives: Iterable[str], nouns: Iterable[str]) -> None:
        self.nouns = sorted(set(nouns))
        self.runs: list[list[str]] = []  # adjectives whose pairs stand apart from all others
        for adjective in sorted(set(adjectives), key=lambda word: f"{word}-"):
            if self.runs and adjective.startswith(f"{self.runs[-1][0]}-"):
                self.runs[-1].append(adjective)  # "wide-eyed-x" stands among the pairs of "wide"
            else:
                self.runs.append([adjective])
        self.ends = list(accumulate(len(run) * len(self.nouns) for run in self.runs))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> str:
        i = bisect_right(self.ends, index)
        run = self.runs[i]
        within = index - (self.ends[i - 1] if i else 0)
        if len(run) == 1:
            return f"{run[0]}-{self.nouns[within]}"
        return sorted(f"{adjective}-{noun}" for adjective in run for noun in self.nouns)[within]


@cache
def word_pairs() -> WordPairs:
    import wonderwords

    words = wonderwords.RandomWord()._categories
    return WordPairs(words["adjectives"], words["nouns"])


def draw(rng: Random, kind: str) -> str:
    if kind == "words":
        return rng.choice(word_pairs())
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _with_needles(rng: Random, task: Niah, size: int, needles: list[str]) -> str:
    """The haystack of `size` units (words of the essay, or sentences) with the needles in it."""
    if task.haystack == "essay":
        sentences = split_sentences(" ".join(essay_words()[:size]))
        depths = rng.sample(DEPTHS, len(needles))
        cuts = [0, *sorted(int(len(sentences) * (depth / 100)) for depth in depths), len(sentences)]
        parts: list[str] = []
        for i, (start, end) in enumerate(zip(cuts, cuts[1:], strict=False)):
            parts.append(" ".join(sentences[start:end]))
            parts += needles[i : i + 1]
        return " ".join(parts)
    if task.haystack == "repeat":
        sentences = [NOISE] * size
    else:
        sentences = [
            NEEDLE.format(type_needle_v=task.values, key=draw(rng, task.keys), value=draw(rng, task.values))
            for _ in range(size)
        ]
    places = sorted(rng.sample(range(size), len(needles)), reverse=True)
    for place, needle in zip(places, needles, strict=True):
        sentences.insert(place, needle)
    return "\n".join(sentences)


def make(task: Niah, rng: Random, size: int) -> Sample:
    """A sample with a haystack of `size` units; at least as many as there are needles."""
    keys: list[str] = []
    values: list[list[str]] = []
    needles: list[str] = []
    for _ in range(task.num_keys):
        keys.append(draw(rng, task.keys))
        values.append([draw(rng, task.values) for _ in range(task.values_per_key)])
        needles += [NEEDLE.format(type_needle_v=task.values, key=keys[-1], value=value) for value in values[-1]]
    Random(SHUFFLE_SEED).shuffle(needles)
    context = _with_needles(rng, task, size, needles)
    asked = rng.sample(range(task.num_keys), task.num_queries)
    names = [keys[i] for i in asked]
    query = ", ".join(names[:-1]) + ", and " + names[-1] if len(names) > 1 else names[0]
    template, kind, verb = TEMPLATE, task.values, "are"
    if task.num_queries * task.values_per_key == 1:
        template = template.replace("Some", "A").replace("are all", "is").replace("are", "is")
        kind, verb = kind.removesuffix("s"), "is"
    return Sample(
        text=template.format(type_needle_v=kind, context=context, query=query),
        answer_prefix=f"The special magic {kind} for {query} mentioned in the provided text {verb}",
        answers=[value for i in asked for value in values[i]],
    )
