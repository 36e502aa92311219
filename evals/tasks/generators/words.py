"""Common words and frequent words: RULER's aggregation tasks `cwe` and `fwe`.

Texts and order of draws as in the harness (lm_eval/tasks/ruler/cwe_utils.py, fwe_utils.py), but for the worked example
of `cwe`, which the harness makes, counts and does not put into the prompt: here it is not made.
"""

from __future__ import annotations

import string
from functools import cache
from random import Random

from evals.tasks.generators.documents import Sample

CWE_ANSWER_TOKENS = 120
CWE_TEMPLATE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
CWE_ANSWER_PREFIX = "Answer: The top 10 words that appear most often in the list are:"
NUM_COMMON = 10
SHORT = 4096  # shorter prompts repeat their words less often

FWE_ANSWER_TOKENS = 50
FWE_TEMPLATE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text?"
)
FWE_ANSWER_PREFIX = "Answer: According to the coded text above, the three most frequently appeared words are:"
FWE_SMALLEST = 200  # with fewer words the third and the fourth word are as frequent
TOKENS_PER_FWE_WORD = 50
WORD_LENGTH = 6
ALPHA = 2.0
SEED = 42


@cache
def vocabulary() -> list[str]:
    """The harness's words, in its order."""
    import wonderwords

    categories = wonderwords.RandomWord()._categories
    words = sorted({word for kind in ("noun", "adjective", "verb") for word in categories[kind]})
    Random(SEED).shuffle(words)
    return words


def common_words(rng: Random, num_words: int, common_repeats: int, uncommon_repeats: int) -> tuple[str, list[str]]:
    """(numbered list, the ten words that are repeated more often)."""
    words = rng.sample(vocabulary(), num_words)
    common, uncommon = words[:NUM_COMMON], words[NUM_COMMON:]
    listed = common * common_repeats + uncommon * uncommon_repeats
    rng.shuffle(listed)
    return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1)), common


def make_cwe(max_length: int, rng: Random, size: int) -> Sample:
    """`size` different words, ten of them common."""
    repeats = (6, 1) if max_length < SHORT else (30, 3)
    context, common = common_words(rng, size, *repeats)
    return Sample(CWE_TEMPLATE.format(context=context), CWE_ANSWER_PREFIX, common)


def make_fwe(max_length: int, rng: Random, size: int) -> Sample:
    """About `size` coded words, their frequencies a power law; the most frequent, `...`, does not count."""
    import numpy as np
    from scipy.special import zeta

    num_different = max_length // TOKENS_PER_FWE_WORD

    def word() -> str:
        return "".join(rng.choices(string.ascii_lowercase, k=WORD_LENGTH))

    coded = [word() for _ in range(num_different)]
    while len(set(coded)) < num_different:
        coded.append(word())
    coded = sorted(set(coded))
    Random(SEED).shuffle(coded)
    coded[0] = "..."
    counts = (size * np.arange(1, len(coded) + 1) ** -ALPHA / zeta(ALPHA)).astype(int)
    text = [w for w, count in zip(coded, counts, strict=True) for _ in range(count)]
    Random(SEED).shuffle(text)
    return Sample(FWE_TEMPLATE.format(context=" ".join(text)), FWE_ANSWER_PREFIX, coded[1:4])
