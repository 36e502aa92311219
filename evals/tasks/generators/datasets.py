"""The harness's `custom_dataset` functions: documents for every length of `max_seq_lengths`, from the metadata."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

from evals.needle import prompts as needle
from evals.tasks.generators import niah, passages, variables, words
from evals.tasks.generators.documents import DEFAULT_NUM_SAMPLES, Budget, make_documents

DEFAULT_LENGTHS = (4096,)
NEEDLE_ANSWER_TOKENS = 4

Documents = Iterator[dict[str, Any]]
Maker = Callable[[str, Callable[[str], Any], int, int, int], Documents]
"""(task, tokenizer, length, number of samples, reserved tokens) -> documents."""


def _niah(task: str, tokenizer: Any, length: int, num_samples: int, reserved: int) -> Documents:
    settings = niah.TASKS[task]
    budget = Budget(tokenizer, length, niah.ANSWER_TOKENS, reserved=reserved)
    return make_documents(task, partial(niah.make, settings), budget, num_samples, settings.num_needles)


def _vt(task: str, tokenizer: Any, length: int, num_samples: int, reserved: int) -> Documents:
    budget = Budget(tokenizer, length, variables.ANSWER_TOKENS, reserved=reserved)
    make = partial(variables.make, variables.make_example(budget))
    return make_documents(task, make, budget, num_samples, smallest=2)


def _cwe(task: str, tokenizer: Any, length: int, num_samples: int, reserved: int) -> Documents:
    budget = Budget(tokenizer, length, words.CWE_ANSWER_TOKENS, "\n\n", reserved)
    make = partial(words.make_cwe, length)
    return make_documents(task, make, budget, num_samples, 2 * words.NUM_COMMON, len(words.vocabulary()))


def _fwe(task: str, tokenizer: Any, length: int, num_samples: int, reserved: int) -> Documents:
    budget = Budget(tokenizer, length, words.FWE_ANSWER_TOKENS, reserved=reserved)
    return make_documents(task, partial(words.make_fwe, length), budget, num_samples, words.FWE_SMALLEST)


def _qa(hops: int, task: str, tokenizer: Any, length: int, num_samples: int, reserved: int) -> Documents:
    budget = Budget(tokenizer, length, passages.ANSWER_TOKENS, reserved=reserved)
    return make_documents(task, partial(passages.make, hops), budget, num_samples, smallest=2)


def _needle(task: str, tokenizer: Any, length: int, num_samples: int, reserved: int) -> Documents:
    """Prompts of exactly `length` tokens, the answer included."""
    num_tokens = length - NEEDLE_ANSWER_TOKENS - reserved
    for index in range(num_samples):
        prompt = needle.make_prompt(task.removeprefix("needle_"), num_tokens, seed=index)
        if len(tokenizer(prompt.text).input_ids) != num_tokens:
            raise ValueError(
                f"{task} is written in the words of the needle model, and this tokenizer has others; choose the tasks "
                "local_ruler."
            )
        yield {
            "index": index,
            "input": prompt.text,
            "outputs": [prompt.answer],
            "length": length,
            "max_length": length,
            "gen_prefix": "",
        }


MAKERS: dict[str, Maker] = {
    **dict.fromkeys(niah.TASKS, _niah),
    "vt": _vt,
    "cwe": _cwe,
    "fwe": _fwe,
    "qa_1": partial(_qa, 1),
    "qa_2": partial(_qa, 2),
    **{f"needle_{task}": _needle for task in needle.TASKS},
}


@cache
def documents(
    task: str, tokenizer: str, lengths: tuple[int, ...], num_samples: int, reserved: int = 0
) -> list[dict[str, Any]]:
    """All documents of a task, length after length; made once in a process."""
    from lm_eval.tasks.ruler.common_utils import get_tokenizer

    loaded = get_tokenizer(tokenizer)
    return [doc for length in lengths for doc in MAKERS[task](task, loaded, length, num_samples, reserved)]


def dataset(task: str, **metadata: Any) -> dict[str, Any]:
    """The `test` split that the harness asks for.

    metadata: `max_seq_lengths` (list of tokens), `num_samples` (per length), `reserved_tokens` (left free for a chat
    template), and the tokenizer, as `tokenizer`, `pretrained` or `model`: what the harness gets with `--metadata` and
    `--model_args`.

    Raises:
        ValueError: without a tokenizer, or if a length is too short for the task.

    """
    import datasets
    from lm_eval.tasks.ruler.common_utils import resolve_tokenizer_name

    tokenizer = resolve_tokenizer_name(metadata)
    if tokenizer is None:
        raise ValueError('The tasks need a tokenizer; name it with --metadata \'{"tokenizer": "path-or-name"}\'.')
    made = documents(
        task,
        tokenizer,
        tuple(metadata.get("max_seq_lengths", DEFAULT_LENGTHS)),
        int(metadata.get("num_samples", DEFAULT_NUM_SAMPLES)),
        int(metadata.get("reserved_tokens", 0)),
    )
    return {"test": datasets.Dataset.from_list(made, split=datasets.Split.TEST)}
