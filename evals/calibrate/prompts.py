"""Prompts whose needed places are known, in two parts that share no wording, no haystack and no seed.

`choose`: sentences made here. `check`: the RULER prompts of `evals/tasks`. The needle model gets its own words in
both, in other mixes of tasks. Every prompt is told by part, task, length and index alone, for the model's own tokenizer
and in its chat template where it has one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from evals.needle import prompts as needle
from evals.tasks.generators.datasets import MAKERS
from evals.tasks.generators.documents import largest_fit
from evals.tasks.generators.prose import split_sentences

PARTS = ("choose", "check")
NEEDLE_TASKS = {"choose": ("single", "multikey", "variable"), "check": ("multikey", "multiquery", "variable")}
NEEDLE_SEEDS = {"choose": 1_000_000, "check": 2_000_000}
NEEDLE_ANSWER_TOKENS = 4
CHECK_TASKS = (
    "niah_single_2", "niah_multikey_1", "qa_1", "niah_single_3", "niah_multivalue", "niah_multiquery", "vt",
    "niah_single_1", "qa_2", "cwe",
)  # fmt: skip
ANSWER_ROOM = {"vt": 30, "cwe": 120, "qa_1": 32, "qa_2": 32}  # what the generators leave free for an answer
NIAH_ROOM = 128
ANSWER_TOKENS, FIRST_TOKENS = 9, 12  # of a short answer, at most; and before the first

PLACES = (
    "north tower|old mill|boat house|wine cellar|guest wing|printing room|glass house|station hall|east gate|music room"
).split("|")
NAMES = "Agnes Bruno Clara Dietrich Elsa Fergus Greta Hugo Ingrid Jonas Karin Leopold Mathilda Nikolai".split()
SUBJECTS = "The engineer|A merchant|The old captain|My neighbour|The committee|A young painter|The village".split("|")
VERBS = "carried described forgot measured repaired sold studied welcomed watched built".split()
OBJECTS = (
    "a wooden bridge|the long report|several maps|the garden wall|an unusual clock|the winter harvest|two letters|a "
    "broken engine|the market square|some quiet songs"
).split("|")
ENDS = (
    "before the rain came|in the early morning|without any help|for many years|near the harbour|as everyone expected|"
    "despite the cold|with great care|after the meeting|while the children slept"
).split("|")
OPENING = "Here is a collection of notes. Read them carefully, a question follows.\n\n"

Span = tuple[int, int]


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model gets it.

    Attributes:
        ids: token ids, special tokens included.
        needed: half-open spans of `ids` that the answer cannot be had without.
        followed: those of `needed` that the question does not name, found only through another one.
        answers: strings that a completion must hold; with `exact` it must begin with them.
        max_new_tokens: room for them.

    """

    part: str
    task: str
    length: int
    index: int
    ids: tuple[int, ...]
    needed: tuple[Span, ...]
    followed: tuple[Span, ...]
    answers: tuple[str, ...]
    max_new_tokens: int
    exact: bool = False

    @property
    def name(self) -> str:
        return f"{self.part}-{self.task}-{self.length}-{self.index}"

    def score(self, completion: str) -> float:
        """Share of the answers given."""
        if self.exact:
            return float(needle.starts_with_answer(completion, self.answers[0]))
        return sum(answer.lower() in completion.lower() for answer in self.answers) / len(self.answers)


@dataclass(frozen=True)
class Written:
    """A question over a text, before it is tokens. `needed`, `followed`: substrings that stand once in `body`.

    Of a statement that the question names only the answer in it is needed: its tokens have read the rest before a cut.
    """

    body: str
    start: str
    needed: tuple[str, ...]
    followed: tuple[str, ...]
    answers: tuple[str, ...]


def make_prompts(part: str, tokenizer: Any, speaks_needle: bool, length: int, count: int) -> Iterator[Prompt]:
    """`count` prompts of about `length` tokens, the tasks of the part in turn."""
    for place in range(count):
        if speaks_needle:
            tasks = NEEDLE_TASKS[part]
            yield _needle_prompt(part, tasks[place % len(tasks)], length, place // len(tasks))
        else:
            tasks = tuple(CHOOSE_TASKS) if part == "choose" else CHECK_TASKS
            task, index = tasks[place % len(tasks)], place // len(tasks)
            written = (_own if part == "choose" else _ruler)(task, tokenizer, length, index)
            yield _tokenized(part, task, tokenizer, length, index, written)


def _needle_prompt(part: str, task: str, length: int, index: int) -> Prompt:
    made = needle.make_prompt(task, length, NEEDLE_SEEDS[part] + index)
    # Of `the key k1 is v2 .` what answers is v2, which knows its key from the first layer on.
    spans = tuple((at + 4, at + 5) for at in made.needle_tokens)
    followed = spans[:1] if task == "variable" else ()
    ids = tuple(needle.encode(made.text))
    return Prompt(part, task, length, index, ids, spans, followed, (made.answer,), NEEDLE_ANSWER_TOKENS, exact=True)


def _tokenized(part: str, task: str, tokenizer: Any, length: int, index: int, written: Written) -> Prompt:
    text, special = in_template(tokenizer, written.body, written.start)
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]

    def span(words: str) -> Span:
        begin = text.index(words)
        end = begin + len(words)
        inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > begin]
        return inside[0], inside[-1] + 1

    needed, followed = tuple(map(span, written.needed)), tuple(map(span, written.followed))
    room = FIRST_TOKENS + sum(max(ANSWER_TOKENS, len(answer)) for answer in written.answers)
    return Prompt(part, task, length, index, tuple(encoded["input_ids"]), needed, followed, written.answers, room)


def in_template(tokenizer: Any, body: str, start: str) -> tuple[str, bool]:
    """(the text that asks `body` and begins the answer with `start`, whether the tokenizer adds special tokens)."""
    if not tokenizer.chat_template:
        return f"{body} {start}".rstrip(), True
    turn = [{"role": "user", "content": body}]
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) + start, False


# --- choose


def _sentence(rng: Random) -> str:
    return f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(OBJECTS)} {rng.choice(ENDS)}."


@dataclass(frozen=True)
class Asked:
    """Statements for a text, what of them the answer needs, and the question."""

    statements: list[str]
    needed: list[str]
    followed: list[str]
    question: str
    start: str
    answers: list[str]


def _code(rng: Random) -> str:
    return str(rng.randint(100_000, 999_999))


def _serial_number(rng: Random) -> str:
    return "-".join(f"{rng.getrandbits(16):04x}" for _ in range(8))


def _named(rng: Random, count: int, what: str, make: Callable[[Random], str]) -> Asked:
    places = rng.sample(PLACES, count)
    values = [make(rng) for _ in places]
    statements = [f"The {what} of the {p} is {v}." for p, v in zip(places, values, strict=True)]
    ask = f"{what} of the {places[0]}"
    return Asked(statements, values[:1], [], f"What is the {ask}?", f"The {ask} is", values[:1])


def _several(rng: Random) -> Asked:
    places = rng.sample(PLACES, 3)
    codes = [[_code(rng) for _ in range(3)] for _ in places]
    statements = [f"One access code of the {p} is {c}." for p, own in zip(places, codes, strict=True) for c in own]
    ask = f"access codes of the {places[0]}"
    return Asked(statements, codes[0], [], f"What are the three {ask}?", f"The three {ask} are", codes[0])


def _each(rng: Random) -> Asked:
    """The question names several places, the first of them far from its end."""
    places, codes = rng.sample(PLACES, 6), [_code(rng) for _ in range(6)]
    statements = [f"The access code of the {p} is {c}." for p, c in zip(places, codes, strict=True)]
    asked = f"access codes of the {places[0]}, the {places[1]} and the {places[2]}"
    return Asked(statements, codes[:3], [], f"What are the {asked}?", f"The {asked} are", codes[:3])


def _owner(rng: Random) -> Asked:
    places, names = rng.sample(PLACES, 3), rng.sample(NAMES, 3)
    phones = [_code(rng) for _ in names]
    own = [f"The {p} is looked after by {n}." for p, n in zip(places, names, strict=True)]
    call = [f"{n} can be called at {t}." for n, t in zip(names, phones, strict=True)]
    question = f"Which number do I call to reach the person who looks after the {places[0]}?"
    return Asked(own + call, [own[0], phones[0]], [phones[0]], question, "The number to call is", phones[:1])


def _votes(rng: Random) -> Asked:
    colours = rng.sample(["blue", "green", "yellow", "purple"], 3)
    names = rng.sample(NAMES, 7)
    votes = [
        f"{n} votes for the {c} flag."
        for n, c in zip(names, [colours[0]] * 4 + colours[1:] + colours[1:2], strict=True)
    ]
    question = "Which flag has the most votes?"
    return Asked(votes, votes, [], question, "The flag with the most votes is the", colours[:1])


def _year(rng: Random) -> Asked:
    names, years = rng.sample(NAMES, 4), [str(year) for year in rng.sample(range(1700, 1990), 4)]
    crafts = rng.sample(["organ", "lighthouse", "carriage", "telescope", "fountain", "printing press"], 4)
    told = [
        f"In {y} {n} finished the {c} that people still admire." for y, n, c in zip(years, names, crafts, strict=True)
    ]
    question = f"When did {names[0]} finish the {crafts[0]}? Give the year."
    # The year stands first, before what the question names.
    return Asked(told, told[:1], [], question, f"{names[0]} finished the {crafts[0]} in", years[:1])


CHOOSE_TASKS: dict[str, Callable[[Random], Asked]] = {
    "single": lambda rng: _named(rng, 1, "access code", _code),
    "question": _year,
    "multikey": lambda rng: _named(rng, 6, "access code", _code),
    "several": _several,
    "each": _each,
    "serial": lambda rng: _named(rng, 4, "serial number", _serial_number),
    "two_hops": _owner,
    "votes": _votes,
}


def _own(task: str, tokenizer: Any, length: int, index: int) -> Written:
    """Statements among sentences, in random order. Every other prompt of a chat ends with the question alone."""
    asked = CHOOSE_TASKS[task](Random(f"{task}/{length}/{index}"))
    start = "" if tokenizer.chat_template and index % 2 else asked.start

    def written(size: int) -> Written:
        rng = Random(f"{task}/{length}/{index}/text")
        sentences = [_sentence(rng) for _ in range(size)]
        for statement in rng.sample(asked.statements, len(asked.statements)):
            sentences.insert(rng.randint(0, len(sentences)), statement)
        body = f"{OPENING}{' '.join(sentences)}\n\n{asked.question}"
        return Written(body, start, tuple(asked.needed), tuple(asked.followed), tuple(asked.answers))

    def short(size: int) -> bool:
        text, special = in_template(tokenizer, written(size).body, start)
        return len(tokenizer(text, add_special_tokens=special).input_ids) < length

    return written((largest_fit(short, 1) or 0) + 1)


# --- check


def _ruler(task: str, tokenizer: Any, length: int, index: int) -> Written:
    """A prompt of evals/tasks that is at least about `length` tokens without its answer."""
    room = ANSWER_ROOM.get(task, NIAH_ROOM)
    *_, doc = MAKERS[task](task, tokenizer, length + room + 32, index + 1, 0)
    body, answers = doc["input"], tuple(doc["outputs"])
    needed, followed = _needed(task, body, answers)
    return Written(body, doc["gen_prefix"], needed, followed, answers)


def _needed(task: str, body: str, answers: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What of a RULER prompt answers it: (all, what is found only through another place)."""
    if task.startswith("niah"):
        return answers, ()
    if task == "vt":
        chain = tuple(re.search(rf"VAR {a} = (?:VAR )?\w+", body)[0] for a in answers)
        return chain, chain[1:]
    if task.startswith("qa"):
        context, _, query = body.rpartition("Question: ")
        documents = dict(re.findall(r"Document \d+:\n(.+)\n(.+)", context))
        named = max((title for title in documents if title in query), key=len)
        if task == "qa_1":
            return (_telling(documents[named], answers[0]),), ()
        birth = _telling(documents[named], "was born in")
        town = re.search(r"was born in (\w+)", birth)[1]
        fact = _telling(documents[town], answers[0])
        return (birth, fact), (fact,)
    return (), ()  # the frequency of words is told by the whole list


def _telling(document: str, words: str) -> str:
    return next(sentence for sentence in split_sentences(document) if words in sentence)
