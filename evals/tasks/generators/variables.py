"""Variable tracking: RULER's `vt`, one chain of five variables in noise, an example of the task before it.

Texts and order of draws as in the harness (lm_eval/tasks/ruler/vt_utils.py).
"""

from __future__ import annotations

import string
from random import Random

from evals.tasks.generators.documents import Budget, Sample, largest_fit

ANSWER_TOKENS = 30
NUM_HOPS = 4
EXAMPLE_TOKENS = 500
TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find "
    "all variables that are assigned the value {query} in the text above."
)
ANSWER_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are assgined the "
    "value {query}, they are: "
)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"


def make_chain(rng: Random, name_length: int) -> tuple[list[str], list[str]]:
    """(variables, assignments): `VAR A = 12345`, `VAR B = VAR A`, …"""

    def name() -> str:
        return "".join(rng.choices(string.ascii_uppercase, k=name_length))

    variables = [name() for _ in range(NUM_HOPS + 1)]
    while len(set(variables)) < NUM_HOPS + 1:
        variables.append(name())
    variables = list(dict.fromkeys(variables))[: NUM_HOPS + 1]
    assignments = [f"VAR {variables[0]} = {rng.randrange(10000, 99999)}"]
    assignments += [f"VAR {b} = VAR {a} " for a, b in zip(variables, variables[1:], strict=False)]
    return variables, assignments


def make_text(rng: Random, size: int, name_length: int) -> tuple[str, list[str]]:
    """(prompt with the start of its answer, the variables to name); `size` lines of noise."""
    variables, chain = make_chain(rng, name_length)
    lines = [NOISE] * size
    if len(lines) <= len(chain):
        lines = [part + "." if part.strip() else part for line in lines for part in line.split(".")]
        chain = chain[: len(lines) - 1]
    places = sorted(rng.sample(range(len(lines)), len(chain)))
    for i, (place, assignment) in enumerate(zip(places, chain, strict=True)):
        lines.insert(place + i, assignment)
    context = " ".join(lines).replace(". \n", ".\n")
    value = chain[0].split("=")[-1].strip()
    text = (TEMPLATE + ANSWER_PREFIX).format(context=context, query=value, num_v=NUM_HOPS + 1)
    return text, variables


def make_example(budget: Budget) -> str:
    """The worked example that stands before every prompt, with its answer, of at most `EXAMPLE_TOKENS` tokens."""

    def example(size: int) -> str:
        text, variables = make_text(Random("vt/example"), size, name_length=3)
        return f"{text} {' '.join(variables)}\n\n"

    def fits(size: int) -> bool:
        return len(budget.tokenizer(example(size)).input_ids) <= EXAMPLE_TOKENS

    return example(largest_fit(fits, smallest=1) or 1)


def rename_answers(rng: Random, example: str) -> str:
    """The example with other names for its variables."""
    end = ANSWER_PREFIX[-10:]
    for variable in example[example.index(end) + len(end) :].split():
        example = example.replace(variable, "".join(rng.choices(string.ascii_uppercase, k=len(variable))))
    return example


def make(example: str, rng: Random, size: int) -> Sample:
    text, variables = make_text(rng, size, name_length=5)
    cut = text.rfind(" Answer: According to the chain(s) of variable assignment")
    return Sample(
        text=rename_answers(rng, example) + "\n\n" + text[:cut],
        answer_prefix=text[cut:].strip(),
        answers=variables,
    )
