"""A long plain essay, the haystack in place of Paul Graham's essays, which would need a download.

The sentences are made from forms and word lists by a fixed seed; they hold no digits and no word "magic", so that
nothing in them looks like a needle.
"""

from __future__ import annotations

import re
from functools import cache
from random import Random

NUM_WORDS = 200_000  # more words than 128K tokens of any tokenizer
SENTENCES_PER_THEME = 9

THEMES = (
    "company city school workshop library harbour farm theatre railway laboratory hospital newspaper orchestra museum "
    "kitchen garden market court bank club"
).split()
PEOPLE = (
    "founder teacher engineer writer doctor painter farmer clerk student carpenter lawyer singer sailor editor baker "
    "manager scientist mayor builder critic"
).split()
THINGS = (
    "plan habit problem idea question mistake rule method letter meeting machine promise budget story tool map "
    "schedule project theory argument recipe contract review design draft experiment lesson notebook conversation"
).split()
QUALITIES = (
    "simple careful patient ambitious ordinary strange useful honest slow clever modest expensive familiar quiet early "
    "difficult practical elegant stubborn curious common rare cheap small large"
).split()
GAINS = (
    "time trust money freedom attention experience patience courage knowledge respect luck clarity discipline "
    "imagination energy"
).split()
ACTIONS = (
    "write build explain repair study sell change measure draw teach defend simplify test describe publish plan "
    "compare abandon improve copy"
).split()

FORMS = (
    "Most people in a {theme} think that a {quality} {thing} is worth more than a {quality2} one.",
    "The {person} I knew best used to say that {gain} comes from the {thing} you nearly gave up.",
    "If you want to {action} a {thing}, the first thing to find out is who needs it.",
    "It is easier to {action} a {quality} {thing} than to {action2} one that nobody understands.",
    "When a {person} and a {person2} disagree, the {thing} between them is usually {quality}.",
    "What surprised me about the {theme} was how much {gain} went into every {quality} {thing}.",
    "A {thing} that looks {quality} from outside often feels {quality2} to the {person} who has to {action} it.",
    "You can tell a good {theme} by the way it treats a {quality} {thing}.",
    "There are two kinds of {thing}: the kind you {action}, and the kind you only {action2}.",
    "I have never met a {person} who regretted spending {gain} on a {quality} {thing}.",
    "Nobody told the {person} that the {thing} was {quality}, so it was done by evening.",
    "The trouble with {gain} is that you notice it only when the {thing} is gone.",
    "In a small {theme} every {thing} is {quality}, because the {person} sees it every day.",
    "Perhaps the reason is that {gain} and {gain2} look so much alike at first.",
    "So the {person} began to {action} the {thing} again, this time with more {gain}.",
    "A {quality} {person} will {action} first and ask about the {thing} later.",
    "To {action} well is mostly to {action2} often, and to throw away what is {quality}.",
    "Years later the same {theme} was known for its {quality} {thing}, and hardly anyone remembered why.",
    "One could object that a {person} has no {gain} to spare, and for a while that seemed true.",
    "But the more {quality} the {thing}, the less {gain} it takes to {action} it.",
    "Every {person} learns this, though few of them ever {action} it in a {thing}.",
    "I used to believe that a {theme} ran on {gain}; now I think it runs on {gain2}.",
    "That is why a {quality} {thing} survives in one {theme} and fails in the next.",
    "The {person} shrugged and said that a {thing} is only as {quality} as the {person2} behind it.",
    "Ask a {person} to {action} something, and you learn more about {gain} than about the {thing}.",
    "It would be {quality} to pretend that the {thing} was anything but an accident.",
    "Still, a {theme} without a {quality} {thing} is like a {person} without {gain}.",
    "Some of the best work I have seen began as a {quality} {thing} that a {person} could not stop thinking about.",
    "We tend to {action} what is {quality} and to {action2} what is merely {quality2}.",
    "By then the {thing} had cost more {gain} than anyone in the {theme} would admit.",
)

_SENTENCE_END = re.compile(r"(?<=[.?!])\s+")


def split_sentences(text: str) -> list[str]:
    """At white space behind a full stop, question mark or exclamation mark."""
    return _SENTENCE_END.split(text.strip())


def _pair(rng: Random, words: list[str]) -> tuple[str, str]:
    first, second = rng.sample(sorted(set(words)), 2)
    return first, second


@cache
def essay_words() -> tuple[str, ...]:
    """The essay's words, punctuation attached: the same on every machine."""
    rng = Random("essay")
    words: list[str] = []
    while len(words) < NUM_WORDS:
        theme = rng.choice(THEMES)
        for form in rng.sample(FORMS, SENTENCES_PER_THEME):
            slots = {"theme": theme}
            for name, choices in (
                ("person", PEOPLE),
                ("thing", THINGS),
                ("quality", QUALITIES),
                ("gain", GAINS),
                ("action", ACTIONS),
            ):
                slots[name], slots[f"{name}2"] = _pair(rng, choices)
            words += articles(form.format(**slots)).split(" ")
    return tuple(words[:NUM_WORDS])


def articles(sentence: str) -> str:
    """With "an" for "a" before a vowel."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", sentence)
