"""Training sequences of the needle model, with the attention supervision that goes with each token.

A sequence is filler with many statements in it, then many questions with their answers. Only answer tokens are
labelled. Beside the ids every token carries where its attention ought to go (see `Sequence`); `train.py` turns that
into losses.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np

from evals.needle import prompts as P

NONE = -1
ID = P.TOKEN_ID
VALUE_OFFSET = 4  # `the key K is V .`: V is 4 after the first token,
KEY_OFFSET = 2  # K is 2 after it
SINGLE, MULTIQUERY, VARIABLE = 1, 2, 3
KIND_NAMES = {SINGLE: "single", MULTIQUERY: "multiquery", VARIABLE: "variable"}


@dataclass
class Sequence:
    """Token ids and, per token (NONE where it does not apply), what its attention should find.

    label: the token to predict next; kind: which task the label belongs to
    bind: value token -> its key's position (alias statements: second key -> first key)
    asked_key: tail token -> position of the nearest asked key before it
    value_at: tail token -> position of the value token (or second key of an alias) that answers
    late_only: 1 where `value_at` needs information that only deeper layers have
    statement: id of the statement the token is part of
    asked_a, asked_b: ids of the statements the token may look at from afar
    """

    ids: list[int] = field(default_factory=list)
    label: list[int] = field(default_factory=list)
    kind: list[int] = field(default_factory=list)
    bind: list[int] = field(default_factory=list)
    asked_key: list[int] = field(default_factory=list)
    value_at: list[int] = field(default_factory=list)
    late_only: list[int] = field(default_factory=list)
    statement: list[int] = field(default_factory=list)
    asked_a: list[int] = field(default_factory=list)
    asked_b: list[int] = field(default_factory=list)
    breaks: list[int] = field(default_factory=list)  # where a position gap may be put

    def add(self, token: int, **marks: int) -> None:
        self.ids.append(token)
        for name in MARKS:
            getattr(self, name).append(marks.get(name, 0 if name in ("kind", "late_only") else NONE))


MARKS = ("label", "kind", "bind", "asked_key", "value_at", "late_only", "statement", "asked_a", "asked_b")


@dataclass(frozen=True)
class Fact:
    """A key, its value, and (for an alias) the key it points to."""

    key: str
    value: str
    base: str | None = None


@dataclass(frozen=True)
class Question:
    kind: int
    facts: list[Fact]
    tail: list[str]

    @property
    def length(self) -> int:
        return len(self.tail) + 2 * len(self.facts)  # `v .` or `v and v .`


def make_facts(rng: random.Random, count: int) -> tuple[list[Fact], list[list[Fact]]]:
    """`count` askable facts, and the statements each needs (an alias needs its base stated first)."""
    keys = rng.sample(P.KEYS, min(len(P.KEYS), 2 * count))
    facts: list[Fact] = []
    needed: list[list[Fact]] = []
    for _ in range(count):
        plain = Fact(keys.pop(), rng.choice(P.VALUES))
        if rng.random() < 0.25:
            alias = Fact(keys.pop(), plain.value, plain.key)
            facts.append(alias)
            needed.append([plain, alias])
        else:
            facts.append(plain)
            needed.append([plain])
    return facts, needed


def make_questions(rng: random.Random, facts: list[Fact], tail_tokens: int) -> list[Question]:
    """One question per fact, some about two facts at once; the last has a tail of about `tail_tokens`."""
    todo = rng.sample(facts, len(facts))
    questions: list[Question] = []
    while todo:
        asked = [todo.pop()]
        if todo and not asked[0].base and not todo[-1].base and rng.random() < 0.25:
            asked.append(todo.pop())
        kind = MULTIQUERY if len(asked) == 2 else VARIABLE if asked[0].base else SINGLE
        length = tail_tokens if not questions else rng.choice((0, 0, 0, 0, 0, 0, tail_tokens // 3, tail_tokens))
        questions.append(Question(kind, asked, P.make_tail(rng, [f.key for f in asked], length)))
    questions.reverse()
    return questions


def add_statement(seq: Sequence, fact: Fact, number: int, starts: dict[str, tuple[int, int]]) -> None:
    at = len(seq.ids)
    words = P.key_statement(fact.key, fact.value) if fact.base is None else P.alias_statement(fact.key, fact.base)
    for i, word in enumerate(words):
        marks = {"statement": number}
        if i == VALUE_OFFSET:
            marks["bind"] = at + KEY_OFFSET
            if fact.base is not None:
                base_at, base_number = starts[fact.base]
                marks.update(value_at=base_at + VALUE_OFFSET, asked_a=base_number)
        seq.add(ID[word], **marks)
    starts[fact.key] = (at, number)


def add_question(seq: Sequence, question: Question, starts: dict[str, tuple[int, int]]) -> None:
    by_key = {fact.key: starts[fact.key] for fact in question.facts}
    asked = [number for _, number in by_key.values()]
    near: tuple[int, int] | None = None  # nearest asked key before: its position and its statement's
    for i, word in enumerate(question.tail):
        at = len(seq.ids)
        last = i == len(question.tail) - 1
        marks: dict[str, int] = {}
        if word in by_key:
            near = (at, by_key[word][0])
            marks["value_at"] = near[1] + VALUE_OFFSET
        elif near:
            marks = {"asked_key": near[0], "value_at": near[1] + VALUE_OFFSET}
        if near:
            marks.update(asked_a=asked[0], asked_b=asked[-1])
        if last:
            marks.update(label=ID[question.facts[0].value], kind=question.kind)
            if len(asked) > 1:  # which of the two keys comes first is not seen in the first layers
                marks.update(asked_key=NONE, value_at=by_key[question.facts[0].key][0] + VALUE_OFFSET, late_only=1)
        seq.add(ID[word], **marks)
    near_marks = {"asked_a": asked[0], "asked_b": asked[-1]}
    if len(asked) > 1:
        second = question.facts[1]
        seq.add(ID[question.facts[0].value], label=ID["and"], kind=question.kind, **near_marks)
        seq.add(ID["and"], label=ID[second.value], kind=question.kind, late_only=1,
                value_at=by_key[second.key][0] + VALUE_OFFSET, **near_marks)  # fmt: skip
    seq.add(ID[question.facts[-1].value], label=P.DOT_ID, kind=question.kind, **near_marks)
    seq.add(P.DOT_ID)


def statement_order(rng: random.Random, needed: list[list[Fact]]) -> list[Fact]:
    """All statements shuffled, an alias always after its base."""
    slots = [i for i, group in enumerate(needed) for _ in group]
    rng.shuffle(slots)
    queues = [list(group) for group in needed]
    return [queues[i].pop(0) for i in slots]


def make_sequence(rng: random.Random, length: int, tail_tokens: int) -> Sequence:
    """A sequence of exactly `length` tokens."""
    share = rng.uniform(0.25, 0.9)
    count = max(2, min(100, int((length - 2 - tail_tokens) * share / 15)))
    while True:
        facts, needed = make_facts(rng, count)
        questions = make_questions(rng, facts, tail_tokens)
        used = 1 + P.STATEMENT_LENGTH * sum(map(len, needed))
        while len(questions) > 1 and used + sum(q.length for q in questions) > length:
            questions.pop(0)
        used += sum(q.length for q in questions)
        if used <= length:
            break
        count = max(1, count - 1)
    order = statement_order(rng, needed)
    num_filler = length - used
    filler = P.make_filler(rng, num_filler) if rng.random() < 0.7 else rng.choices(P.FILLER, k=num_filler)
    cuts = sorted(rng.randint(0, num_filler) for _ in order)
    seq, starts, previous = Sequence(), {}, 0
    seq.add(P.BOS_ID)
    for number, (cut, fact) in enumerate(zip(cuts, order, strict=False)):
        if cut > previous:
            seq.breaks.append(len(seq.ids) + rng.randrange(cut - previous))
        for word in filler[previous:cut]:
            seq.add(ID[word])
        previous = cut
        seq.breaks.append(len(seq.ids))
        add_statement(seq, fact, number, starts)
    for word in filler[previous:]:
        seq.add(ID[word])
    for question in questions:
        seq.breaks.append(len(seq.ids))
        add_question(seq, question, starts)
    assert len(seq.ids) == length
    return seq


def gapped_positions(rng: random.Random, seq: Sequence, max_position: int) -> np.ndarray:
    """Positions with 1 to 11 random gaps, the span log-uniform between the length and `max_position`."""
    length = len(seq.ids)
    steps = np.ones(length, np.int64)
    steps[0] = 0
    span = length * (max_position / length) ** rng.random()
    chosen = rng.sample(seq.breaks, min(len(seq.breaks), rng.randint(1, 11)))
    shares = [rng.gammavariate(0.7, 1.0) + 1e-9 for _ in chosen]
    for place, share in zip(chosen, shares, strict=False):
        steps[place] += int((span - length) * share / sum(shares))
    return np.cumsum(steps)


def make_batch(
    rng: random.Random, size: int, length: int, tail_tokens: int, max_position: int
) -> dict[str, np.ndarray]:
    """`size` sequences as arrays [size, length]: ids, positions and every mark."""
    sequences = [make_sequence(rng, length, tail_tokens) for _ in range(size)]
    batch = {name: np.array([getattr(s, name) for s in sequences]) for name in ("ids", *MARKS)}
    batch["positions"] = np.stack([gapped_positions(rng, s, max_position) for s in sequences])
    return batch
