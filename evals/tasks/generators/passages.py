"""Questions about passages: RULER's QA form, with documents made of generated facts in place of SQuAD and HotpotQA.

Every document tells of one invented town or person. `hops` 1: the question is answered by one document; 2: it names a
person and asks about the town where that person was born, so two documents are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from evals.tasks.generators.documents import Sample
from evals.tasks.generators.prose import articles

ANSWER_TOKENS = 32
INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
TEMPLATE = (
    INSTRUCTION + "\n\nThe following are given documents.\n\n{context}\n\n" + INSTRUCTION + "\n\nQuestion: {query}"
)
ANSWER_PREFIX = "Answer:"
DOCUMENT = "Document {i}:\n{document}"

STARTS = "Bal Cor Dun El Far Gal Hel Ister Jor Kel Lam Mor Nor Ost Per Quen Ras Sel Tor Ul Ver Wes Yar Zel".split()
MIDDLES = "a e i o u an er il on ur ada eni oli".split()
TOWN_ENDS = "burg ford haven mouth stead ton wick dale holm port".split()
NAME_ENDS = "bert dric lan mar nor rick sen vard wyn zel".split()
GOODS = "copper glass linen paper pottery rope salt soap tiles timber tin wine wool cheese honey slate".split()
TRADES = "architect astronomer botanist composer engineer geographer historian painter physician poet".split()
MONTHS = "January February March April May June July August September October November December".split()
INSTRUMENTS = "bassoon cello flute harp lute oboe organ trumpet viola violin".split()


class Names:
    """Names that no two things of a sample share."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.used: set[str] = set()

    def _new(self, make: Callable[[], str]) -> str:
        while (name := make()) in self.used:
            pass
        self.used.add(name)
        return name

    def _word(self, ends: list[str]) -> str:
        middle = "".join(self.rng.choices(MIDDLES, k=self.rng.choice((1, 2))))
        return self.rng.choice(STARTS) + middle + self.rng.choice(ends)

    def town(self) -> str:
        return self._new(lambda: self._word(TOWN_ENDS))

    def river(self) -> str:
        return self._new(lambda: self._word(["a", "ra", "ne", "sk", "va"]))

    def person(self) -> str:
        return self._new(lambda: f"{self._word(NAME_ENDS)} {self._word(NAME_ENDS)}")


@dataclass(frozen=True)
class Town:
    name: str
    river: str
    year: int
    founder: str
    goods: str
    month: str

    @classmethod
    def drawn(cls, rng: Random, names: Names) -> Town:
        return cls(
            names.town(), names.river(), rng.randint(1100, 1899), names.person(), rng.choice(GOODS), rng.choice(MONTHS)
        )

    def text(self) -> str:
        return (
            f"{self.name}\n{self.name} is a town on the river {self.river}. It was founded in {self.year} by "
            f"{self.founder}, who laid out the square and the two streets that lead to the river. The town became "
            f"known for its {self.goods}, which was carried downstream on flat boats and sold as far as the coast. A "
            f"fair is held there every {self.month}, and visitors from the villages around come to it."
        )

    def questions(self) -> list[tuple[str, str]]:
        return [
            (f"On which river does {self.name} lie?", self.river),
            (f"In which year was {self.name} founded?", str(self.year)),
            (f"Who founded {self.name}?", self.founder),
            (f"Which goods was {self.name} known for?", self.goods),
            (f"In which month is the fair of {self.name} held?", self.month),
        ]


@dataclass(frozen=True)
class Person:
    name: str
    trade: str
    birthplace: str
    year: int
    instrument: str

    @classmethod
    def drawn(cls, rng: Random, names: Names, birthplace: str) -> Person:
        return cls(names.person(), rng.choice(TRADES), birthplace, rng.randint(1600, 1950), rng.choice(INSTRUMENTS))

    def text(self) -> str:
        return articles(
            f"{self.name}\n{self.name} was a {self.trade} who was born in {self.birthplace}. The first work that made "
            f"the name known appeared in {self.year}, after a long illness, and was reprinted several times. In later "
            f"years {self.name} travelled little, kept a diary, and played the {self.instrument} in a small orchestra "
            "of friends."
        )

    def questions(self) -> list[tuple[str, str]]:
        return [
            (f"Where was {self.name} born?", self.birthplace),
            (f"In which year did the first known work of {self.name} appear?", str(self.year)),
            (f"Which instrument did {self.name} play?", self.instrument),
        ]


def two_hop_questions(person: Person, town: Town) -> list[tuple[str, str]]:
    return [
        (f"On which river does the town lie in which {person.name} was born?", town.river),
        (f"In which year was the town founded in which {person.name} was born?", str(town.year)),
        (f"Who founded the town in which {person.name} was born?", town.founder),
    ]


def make(hops: int, rng: Random, size: int) -> Sample:
    """`size` documents in random order: towns and persons by turns, each person born in the town before."""
    names = Names(rng)
    towns = [Town.drawn(rng, names) for _ in range((size + 1) // 2)]
    persons = [Person.drawn(rng, names, town.name) for town in towns[: size // 2]]
    if hops == 1:
        query, answer = rng.choice(rng.choice([*towns, *persons]).questions())
    else:
        i = rng.randrange(len(persons))
        query, answer = rng.choice(two_hop_questions(persons[i], towns[i]))
    documents = [thing.text() for thing in (*towns, *persons)]
    rng.shuffle(documents)
    context = "\n\n".join(DOCUMENT.format(i=i, document=text) for i, text in enumerate(documents, 1))
    return Sample(TEMPLATE.format(context=context, query=query), ANSWER_PREFIX, [answer])
