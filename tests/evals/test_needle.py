"""The needle model: its prompts, its files, and that it answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from evals.needle import prompts as P
from scripts.fork import ForkError

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "evals" / "needle" / "model"
HYBRID = ROOT / "evals" / "needle" / "needle-hybrid"
MAX_WEIGHT_BYTES = 10_000_000
PINNED = ("v235", "what is k70 ? answer :", (146,))


def test_vocabulary_has_distinct_words_of_one_token_each() -> None:
    assert len(P.VOCAB) == len(set(P.VOCAB)) == P.VOCAB_SIZE
    assert not any(set(word) & set(" \n\t") for word in P.VOCAB)


@pytest.mark.parametrize("template", [*P.INSTRUCTIONS, P.OPENING, P.CLOSING])
def test_every_word_of_the_tail_is_in_the_vocabulary(template: str) -> None:
    for keys in (["k1"], ["k1", "k2"]):
        assert set(P.fill_template(template, keys)) <= set(P.VOCAB)


def test_prompts_need_only_the_standard_library() -> None:
    code = "import sys; import evals.needle.prompts; print(bool({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


@pytest.mark.parametrize("task", P.TASKS)
def test_a_prompt_is_determined_by_task_length_and_seed(task: str) -> None:
    assert P.make_prompt(task, 700, 5) == P.make_prompt(task, 700, 5)
    assert P.make_prompt(task, 700, 5).text != P.make_prompt(task, 700, 6).text


def test_a_prompt_stays_what_it_was() -> None:
    """Results name prompts by task, length and seed: the generator must not drift."""
    prompt = P.make_prompt("multikey", 1024, 0)
    assert (prompt.answer, prompt.question, prompt.needle_tokens) == PINNED


@pytest.mark.parametrize("task", P.TASKS)
@pytest.mark.parametrize("num_tokens", [256, 257, 1000, 4096, 32768])
def test_a_prompt_has_exactly_the_tokens_asked_for(task: str, num_tokens: int) -> None:
    ids = P.encode(P.make_prompt(task, num_tokens, 1).text)
    assert len(ids) == num_tokens
    assert P.TOKEN_ID["<unk>"] not in ids


@pytest.mark.parametrize("seed", range(20))
def test_the_answer_stands_exactly_where_the_prompt_says(seed: int) -> None:
    for task in ("single", "multikey", "multiquery"):
        prompt = P.make_prompt(task, 600, seed)
        words = ["<bos>", *prompt.text.split()]
        statements = [words[at : at + P.STATEMENT_LENGTH] for at in prompt.needle_tokens]
        asked = [word for word in prompt.question.split() if word in P.KEYS]
        assert statements == [P.key_statement(k, v) for k, v in zip(asked, prompt.answer.split(" and "), strict=False)]
        assert all(words.count(value) == 1 for value in prompt.answer.split(" and "))
        assert prompt.text.endswith(prompt.question)
        assert prompt.depth == prompt.needle_tokens[0] / 600


@pytest.mark.parametrize("seed", range(20))
def test_a_variable_is_reached_in_two_hops(seed: int) -> None:
    prompt = P.make_prompt("variable", 600, seed)
    words = ["<bos>", *prompt.text.split()]
    base, alias = (words[at : at + P.STATEMENT_LENGTH] for at in prompt.needle_tokens)
    assert base == P.key_statement(base[2], prompt.answer)
    assert alias == P.alias_statement(alias[2], base[2])
    assert f"what is {alias[2]} ?" in prompt.question
    assert prompt.needle_tokens[0] < prompt.needle_tokens[1]


@pytest.mark.parametrize("task", P.TASKS)
def test_the_tail_is_instruction_and_question_and_fits_the_scored_queries(task: str) -> None:
    for seed in range(50):
        words = P.make_prompt(task, 512, seed).text.split()
        tail = words[words.index("question") :]
        assert P.TAIL_TOKENS <= len(tail) < 128
        assert not set(tail) & set(P.FILLER)


def test_depth_places_the_needle() -> None:
    first, last = (P.make_prompt("single", 1000, 0, depth=d).needle_tokens[0] for d in (0, 1))
    assert first == 1
    assert last > 850


@pytest.mark.parametrize(
    ("task", "num_tokens", "depth"),
    [
        ("other", 512, None),
        ("single", 255, None),
        ("single", 32769, None),
        ("single", 512, 1.5),
        ("multikey", 512, 0.5),
    ],  # fmt: skip
)
def test_bad_requests_are_refused(task: str, num_tokens: int, depth: float | None) -> None:
    with pytest.raises(ValueError):
        P.make_prompt(task, num_tokens, 0, depth=depth)


def test_is_correct_compares_words() -> None:
    prompt = P.make_prompt("multiquery", 512, 0)
    first, _, second = prompt.answer.split()
    assert P.is_correct(prompt, f" {prompt.answer} .")
    assert not P.is_correct(prompt, first)
    assert not P.is_correct(prompt, f"{second} and {first}")


@pytest.mark.parametrize("folder", [MODEL, HYBRID])
def test_weights_are_small(folder: Path) -> None:
    assert (folder / "model.safetensors").stat().st_size <= MAX_WEIGHT_BYTES


@pytest.mark.parametrize(("folder", "kind"), [(MODEL, "llama"), (HYBRID, "ministral")])
def test_configuration_is_of_stock_layers(folder: Path, kind: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    types = ["full_attention", "sliding_attention"] * 4 if folder == HYBRID else None
    assert config.get("layer_types") == types
    expected = {
        "architectures": ["LlamaForCausalLM"], "model_type": kind, "vocab_size": 1024, "hidden_size": 256,
        "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "max_position_embeddings": 32768, "tie_word_embeddings": True, "dtype": "bfloat16",
    }  # fmt: skip
    assert {name: config[name] for name in expected} == expected


@pytest.mark.parametrize("folder", [MODEL, HYBRID])
def test_tokenizer_is_the_prompt_generators(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for task in P.TASKS:
        prompt = P.make_prompt(task, 1024, 2)
        ids = tokenizer(prompt.text).input_ids
        assert ids == P.encode(prompt.text)
        assert tokenizer.decode(ids, skip_special_tokens=True) == prompt.text


def load(folder: Path):  # noqa: ANN201
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module", params=[MODEL, HYBRID], ids=["full", "hybrid"])
def model(request):  # noqa: ANN001, ANN201
    return load(request.param)


@pytest.mark.parametrize("task", P.TASKS)
def test_the_model_answers_through_generate(model, task: str) -> None:  # noqa: ANN001
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for seed in range(2):
        prompt = P.make_prompt(task, 1024, seed)
        ids = torch.tensor([tokenizer(prompt.text).input_ids])
        new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4)[0, ids.shape[1] :]
        completion = tokenizer.decode(new)
        assert P.is_correct(prompt, completion), (prompt.answer, completion)


def test_the_model_answers_pruned_and_keeps_little() -> None:
    from transformers import AutoTokenizer

    from evals.needle.evaluate import DEFAULTS, Pruning, run

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    prompt = P.make_prompt("multikey", 4096, 0)
    result = run(load(MODEL), tokenizer, prompt, Pruning((2, 4, 6), DEFAULTS))
    assert P.is_correct(prompt, result.text)
    assert max(result.kept) < 0.5


def test_windows_are_not_measured_as_if_there_were_none() -> None:
    from evals.needle.evaluate import main

    with pytest.raises(ForkError, match="sliding windows"):
        main([str(HYBRID), "--count", "1"])
