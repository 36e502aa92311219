"""Documents of a wanted length: the search for how much text fits, and the harness's document format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

DEFAULT_NUM_SAMPLES = 500  # as the harness's RULER
SHRINK = 100  # a sample that is too long loses this part of its size at a time


@dataclass(frozen=True)
class Sample:
    """A prompt and its answers. The model continues `text`, a delimiter, `answer_prefix`."""

    text: str
    answer_prefix: str
    answers: list[str]


@dataclass(frozen=True)
class Budget:
    """How long a prompt may be, in tokens of `tokenizer`.

    `max_length` holds the prompt as the model gets it (special tokens and the start of the answer included), the
    `answer_tokens` that may follow, and `reserved` tokens for what is put around the prompt, as a chat template.
    """

    tokenizer: Callable[[str], Any]
    max_length: int
    answer_tokens: int
    delimiter: str = " "
    reserved: int = 0

    def length(self, sample: Sample) -> int:
        """Tokens of the prompt and of the longest answer."""
        prompt = f"{sample.text}{self.delimiter}{sample.answer_prefix}"
        return len(self.tokenizer(prompt).input_ids) + self.answer_tokens + self.reserved


def largest_fit(fits: Callable[[int], bool], smallest: int, largest: int | None = None) -> int | None:
    """The largest size that fits, supposing that what is smaller fits too; None if `smallest` does not."""
    if not fits(smallest):
        return None
    low, step = smallest, max(1, smallest)
    while True:  # low fits
        high = low + step if largest is None else min(low + step, largest)
        if high == low:
            return low
        if not fits(high):
            break
        low, step = high, 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def make_documents(
    task: str,
    make: Callable[[Random, int], Sample],
    budget: Budget,
    num_samples: int,
    smallest: int,
    largest: int | None = None,
) -> Iterator[dict[str, Any]]:
    """`num_samples` documents, each as large as the budget allows, in the format of the harness's RULER.

    `make(rng, size)` makes a sample of `size` units (sentences, words, …). Sample i depends on the task's name, the
    length, i and the tokenizer alone: not on how many samples are made, nor on what was made before.

    Raises:
        ValueError: if not even the smallest sample fits.

    """

    def attempt(index: int, size: int) -> tuple[Sample, int]:
        sample = make(Random(f"{task}/{budget.max_length}/{index}"), size)
        return sample, budget.length(sample)

    size = largest_fit(lambda n: attempt(-1, n)[1] <= budget.max_length, smallest, largest)
    for index in range(num_samples):
        used = size
        while used is not None:
            sample, length = attempt(index, used)
            if length <= budget.max_length:
                break
            used = None if used == smallest else max(smallest, used - max(1, size // SHRINK))
        if used is None:
            raise ValueError(
                f"{task} does not fit into {budget.max_length} tokens, of which {budget.answer_tokens} are for the "
                "answer; choose a greater length."
            )
        yield {
            "index": index,
            "input": sample.text,
            "outputs": sample.answers,
            "length": length,
            "max_length": budget.max_length,
            "gen_prefix": sample.answer_prefix,
        }
