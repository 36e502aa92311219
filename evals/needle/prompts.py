"""Needle prompts: the vocabulary and a deterministic prompt generator (standard library only).

A prompt is a long run of filler words with a few statements hidden in it, then a tail of about 100 tokens that
holds instructions and restates the question:

    zufe the key k17 is v203 . mo ... question : what is k17 ? read the text above ... what is k17 ? answer :

Every whitespace-separated word is exactly one token; the tokenizer adds <bos> in front, and `num_tokens` counts it.

    python -m evals.needle.prompts --task multikey --num-tokens 1024 --seed 3
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import asdict, dataclass

VOCAB_SIZE = 1024
NUM_KEYS = 240
NUM_VALUES = 240
SPECIAL_WORDS = ("<pad>", "<unk>", "<bos>", "<eos>")
FUNCTION_WORDS = tuple(
    "the key is . what ? answer : equals are and , question again so read text above find line of value only "
    "one gives for all other words filler do not matter guess copy from reply with nothing else may be in look "
    "if names another follow it to belongs which task your".split()
)

MIN_TOKENS = 256
MAX_TOKENS = 32768
STATEMENT_LENGTH = 6
MULTIKEY_STATEMENTS = 8
TAIL_TOKENS = 100  # instructions are added until the tail is at least this long

INSTRUCTIONS = (
    "read the text above and find the line of {key} .",
    "one line of the text gives the value for {key} .",
    "all other words are filler and do not matter .",
    "do not guess : copy the value of {key} from the text .",
    "reply with the value of {key} and nothing else .",
    "nothing else belongs in the answer .",
    "other words may be in the text : look only for {key} .",
    "if the line of {key} names another key , follow it to the value .",
    "your task is to find which value belongs to {key} .",
    "so the question is : what {verb} {key} ?",
    "again , what {verb} {key} ?",
)
OPENING = "question : what {verb} {key} ?"
CLOSING = "what {verb} {key} ? answer :"


def _filler_words(count: int) -> tuple[str, ...]:
    """`count` made-up words of two or three syllables, none of them a function word."""
    rng = random.Random(0)
    syllables = [c + v for c in "bcdfghjklmnprstvwz" for v in "aeiou"]
    words: dict[str, None] = {}
    while len(words) < count:
        word = "".join(rng.choices(syllables, k=rng.choice((2, 3))))
        if word not in FUNCTION_WORDS:
            words[word] = None
    return tuple(words)


KEYS = tuple(f"k{i}" for i in range(NUM_KEYS))
VALUES = tuple(f"v{i}" for i in range(NUM_VALUES))
FILLER = _filler_words(VOCAB_SIZE - len(SPECIAL_WORDS) - len(FUNCTION_WORDS) - NUM_KEYS - NUM_VALUES)
VOCAB = SPECIAL_WORDS + FUNCTION_WORDS + KEYS + VALUES + FILLER
TOKEN_ID = {word: i for i, word in enumerate(VOCAB)}
BOS_ID, EOS_ID, PAD_ID, DOT_ID = TOKEN_ID["<bos>"], TOKEN_ID["<eos>"], TOKEN_ID["<pad>"], TOKEN_ID["."]


@dataclass(frozen=True)
class NeedlePrompt:
    """A prompt, its answer, and where things are.

    `answer` is what the model must write first: one value, or "v1 and v2" for multiquery. `needle_tokens` are the
    token positions (<bos> is 0) of the statements that answer the question: each is the first of six tokens.
    `depth` is the position of the first of them as a share of the prompt.
    """

    task: str
    text: str
    answer: str
    question: str
    num_tokens: int
    seed: int
    depth: float
    needle_tokens: tuple[int, ...]


def key_statement(key: str, value: str) -> list[str]:
    return ["the", "key", key, "is", value, "."]


def alias_statement(key: str, other_key: str) -> list[str]:
    return ["the", "key", key, "equals", other_key, "."]


def fill_template(template: str, keys: list[str]) -> list[str]:
    """The words of an instruction or question about one key or several."""
    verb = "is" if len(keys) == 1 else "are"
    return template.format(key=" and ".join(keys), verb=verb).split()


def make_tail(rng: random.Random, keys: list[str], min_tokens: int) -> list[str]:
    """Question, shuffled instructions until `min_tokens` are reached, question again."""
    closing = fill_template(CLOSING, keys)
    if min_tokens <= len(closing):
        return closing
    tail = fill_template(OPENING, keys)
    for template in rng.sample(INSTRUCTIONS, len(INSTRUCTIONS)):
        if len(tail) + len(closing) >= min_tokens:
            break
        tail += fill_template(template, keys)
    return tail + closing


def make_filler(rng: random.Random, count: int) -> list[str]:
    """`count` filler words, one in twenty-five of them a full stop."""
    return [("." if rng.random() < 0.04 else rng.choice(FILLER)) for _ in range(count)]


@dataclass(frozen=True)
class _Task:
    statements: list[list[str]]  # in order of appearance
    needles: list[int]  # indices of the statements that answer
    asked: list[str]
    answer: str


def _task_single(rng: random.Random) -> _Task:
    key, value = rng.choice(KEYS), rng.choice(VALUES)
    return _Task([key_statement(key, value)], [0], [key], value)


def _many(rng: random.Random) -> tuple[list[str], list[str], list[list[str]]]:
    keys, values = rng.sample(KEYS, MULTIKEY_STATEMENTS), rng.sample(VALUES, MULTIKEY_STATEMENTS)
    return keys, values, [key_statement(k, v) for k, v in zip(keys, values, strict=False)]


def _task_multikey(rng: random.Random) -> _Task:
    keys, values, statements = _many(rng)
    i = rng.randrange(len(keys))
    return _Task(statements, [i], [keys[i]], values[i])


def _task_multiquery(rng: random.Random) -> _Task:
    keys, values, statements = _many(rng)
    i, j = rng.sample(range(len(keys)), 2)
    return _Task(statements, [i, j], [keys[i], keys[j]], f"{values[i]} and {values[j]}")


def _task_variable(rng: random.Random) -> _Task:
    """Two-hop variable tracking: `the key a is v .` and, later, `the key b equals a .`; b is asked for."""
    keys, values, statements = _many(rng)
    alias = rng.choice([k for k in KEYS if k not in keys])
    base = rng.randrange(len(keys))
    at = rng.randint(base + 1, len(statements))
    statements.insert(at, alias_statement(alias, keys[base]))
    return _Task(statements, [base, at], [alias], values[base])


_TASKS = {
    "single": _task_single,
    "multikey": _task_multikey,
    "multiquery": _task_multiquery,
    "variable": _task_variable,
}
TASKS = tuple(_TASKS)


def make_prompt(task: str, num_tokens: int, seed: int, *, depth: float | None = None) -> NeedlePrompt:
    """The prompt of exactly `num_tokens` tokens (<bos> included) that `task`, `num_tokens` and `seed` determine.

    `depth` (0 to 1, single only) puts the needle there instead of at a random place.
    """
    if task not in _TASKS:
        raise ValueError(f"unknown task {task!r}: one of {', '.join(TASKS)}")
    if not MIN_TOKENS <= num_tokens <= MAX_TOKENS:
        raise ValueError(f"num_tokens must be {MIN_TOKENS} to {MAX_TOKENS}, not {num_tokens}")
    if depth is not None and (task != "single" or not 0 <= depth <= 1):
        raise ValueError("depth is for the single task, 0 to 1")
    rng = random.Random(f"{task}/{num_tokens}/{seed}")
    made = _TASKS[task](rng)
    tail = make_tail(rng, made.asked, TAIL_TOKENS)
    num_filler = num_tokens - 1 - len(tail) - STATEMENT_LENGTH * len(made.statements)
    filler = make_filler(rng, num_filler)
    cuts = sorted(rng.randint(0, num_filler) for _ in made.statements)
    if depth is not None:
        cuts = [round(depth * num_filler)]
    words: list[str] = []
    starts: list[int] = []
    previous = 0
    for cut, statement in zip(cuts, made.statements, strict=False):
        words += filler[previous:cut]
        starts.append(1 + len(words))
        words += statement
        previous = cut
    words += filler[previous:] + tail
    needles = tuple(starts[i] for i in made.needles)
    return NeedlePrompt(
        task=task,
        text=" ".join(words),
        answer=made.answer,
        question=" ".join(fill_template(CLOSING, made.asked)),
        num_tokens=num_tokens,
        seed=seed,
        depth=needles[0] / num_tokens,
        needle_tokens=needles,
    )


def encode(text: str) -> list[int]:
    """Token ids as the tokenizer gives them, <bos> first."""
    unknown = TOKEN_ID["<unk>"]
    return [BOS_ID] + [TOKEN_ID.get(word, unknown) for word in text.split()]


def is_correct(prompt: NeedlePrompt, completion: str) -> bool:
    """Whether a completion starts with the prompt's answer, word by word."""
    return starts_with_answer(completion, prompt.answer)


def starts_with_answer(completion: str, answer: str) -> bool:
    expected = answer.split()
    return completion.split()[: len(expected)] == expected


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Print one needle prompt as JSON, or its text alone.")
    parser.add_argument("--task", choices=TASKS, default="multikey")
    parser.add_argument("--num-tokens", type=int, default=1024, help="length in tokens, <bos> included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--depth", type=float, help="where the needle is, 0 to 1 (single only)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--text", action="store_true", help="print only the prompt's text")
    form.add_argument("--request", metavar="MODEL", help="print a completion request that asks what was kept")
    args = parser.parse_args(argv)
    prompt = make_prompt(args.task, args.num_tokens, args.seed, depth=args.depth)
    if args.request:
        body = {"model": args.request, "prompt": prompt.text, "max_tokens": 4, "temperature": 0}
        print(json.dumps(body | {"vllm_xargs": {"uniprefill_report": 1}}))
    else:
        print(prompt.text if args.text else json.dumps(asdict(prompt), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
