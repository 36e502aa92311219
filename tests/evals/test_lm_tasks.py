"""The task files of evals/tasks/: RULER in the harness's form and metric, any tokenizer and length, always the same."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from functools import cache
from pathlib import Path
from random import Random
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import vllm  # noqa: E402, F401, I001  before torch: on a CPU it chooses Triton's interpreter
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.tasks._yaml_loader import load_yaml  # noqa: E402
from lm_eval.tasks.ruler import common_utils, cwe_utils, fwe_utils, qa_utils, vt_utils  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from evals.tasks.generators import datasets, niah, passages, prose, variables, words  # noqa: E402

FOLDER = ROOT / "evals" / "tasks"
HARNESS = Path(common_utils.__file__).parent
NEEDLE_MODEL = ROOT / "evals" / "needle" / "model"
RULER = [task for task in datasets.MAKERS if not task.startswith("needle_")]
NEEDLE = [task for task in datasets.MAKERS if task.startswith("needle_")]
HARNESS_YAML = {"qa_1": "qa_squad", "qa_2": "qa_hotpot"}
PINNED = "1b04b129b6d7d833a44e65d030a1afabf43e43fd4707f6c5a6c59757be9c57fb"


@cache
def harness_niah() -> ModuleType:
    """Its module for needles, which fetches a sentence splitter when it is imported; here it must not."""
    import nltk

    nltk.download, download = lambda *_, **__: False, nltk.download
    try:
        from lm_eval.tasks.ruler import prepare_niah
    finally:
        nltk.download = download
    return prepare_niah


def split_words(text: str) -> SimpleNamespace:
    """A tokenizer in a line: words and white space."""
    return SimpleNamespace(input_ids=re.findall(r"\S+|\s", text))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> Path:
    """A byte-level tokenizer with a beginning-of-text token, as Llama's, trained here."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" ".join(prose.essay_words()[:5000])], trainer)
    return saved(tokenizer, tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def characters(tmp_path_factory) -> Path:
    """One token a byte: four to five times as many tokens."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE({"<s>": 0, "</s>": 1} | {c: i for i, c in enumerate(alphabet, 2)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return saved(tokenizer, tmp_path_factory.mktemp("characters"))


def saved(tokenizer: Tokenizer, folder: Path) -> Path:
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder


def load(name: str, tokenizer: Path, length: int, num_samples: int = 2) -> Any:
    metadata = {"tokenizer": str(tokenizer), "max_seq_lengths": [length], "num_samples": num_samples}
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False, metadata=metadata)
    [task] = manager.load(name)["tasks"].values()
    return task


# --- the same words, the same draws, the same text as the harness ---


def test_the_words_are_the_harnesss() -> None:
    theirs, ours = harness_niah().WORDS, niah.word_pairs()
    assert len(ours) == len(theirs)
    picked = [0, len(theirs) - 1, *Random(0).sample(range(len(theirs)), 2000)]
    for end in ours.ends[:-1]:  # where one adjective's pairs end and the next one's begin
        picked += [end - 1, end]
    assert [ours[i] for i in picked] == [theirs[i] for i in picked]
    assert words.vocabulary() == cwe_utils.WORDS
    assert harness_niah().DEPTHS == niah.DEPTHS


@pytest.mark.parametrize("task", niah.TASKS)
@pytest.mark.parametrize("seed", [1, 2])
def test_needles_have_the_harnesss_text(task: str, seed: int, monkeypatch) -> None:
    """Also with the essay, which is ours in both, as is the splitting into sentences (theirs is a download)."""
    harness, settings = harness_niah(), niah.TASKS[task]
    monkeypatch.setattr(harness, "cached_sent_tokenize", prose.split_sentences)
    haystack = {"essay": list(prose.essay_words()), "repeat": harness.get_haystack("repeat"), "needle": harness.NEEDLE}
    random.seed(seed)
    text, answers, query = harness.generate_input_output(
        700,
        haystack[settings.haystack],
        type_haystack=settings.haystack,
        num_needle_k=settings.num_keys,
        type_needle_k=settings.keys,
        num_needle_v=settings.values_per_key,
        type_needle_v=settings.values,
        template=load_template(),
        num_needle_q=settings.num_queries,
    )
    ours = niah.make(settings, Random(seed), 700)
    assert (ours.text, ours.answers) == (text, answers)
    assert f" for {query} mentioned" in ours.answer_prefix


def load_template() -> str:
    harness_niah()  # the import below must not download
    from lm_eval.tasks.ruler import niah_utils

    return niah_utils.TEMPLATE


@pytest.mark.parametrize("task", niah.TASKS)
def test_needle_documents_have_the_harnesss_form(task: str, monkeypatch) -> None:
    """Every field but the values drawn: names, the start of the answer, the number of answers."""
    harness, settings = harness_niah(), niah.TASKS[task]
    monkeypatch.setattr(harness, "cached_sent_tokenize", prose.split_sentences)
    haystack = {"essay": list(prose.essay_words()), "repeat": harness.get_haystack("repeat"), "needle": harness.NEEDLE}
    [theirs] = harness.generate_samples(
        haystack[settings.haystack],
        split_words,
        max_seq_length=4096,
        template=load_template(),
        type_haystack=settings.haystack,
        type_needle_k=settings.keys,
        type_needle_v=settings.values,
        num_needle_k=settings.num_keys,
        num_needle_v=settings.values_per_key,
        num_needle_q=settings.num_queries,
        num_samples=1,
    )
    [ours] = datasets.MAKERS[task](task, split_words, 4096, 1, 0)

    def form(doc: dict[str, Any]) -> tuple[Any, ...]:
        query = re.search(r" for (.*) mentioned in", doc["gen_prefix"])[1]
        last = doc["input"].rpartition("\n")[2]
        keys = re.sub(r"[^,]+(?=,)|(?<=and ).*|^[^,]*$", "KEY", query)
        return (
            sorted(doc),
            doc["gen_prefix"].replace(query, "QUERY"),
            last.replace(query, "QUERY"),
            keys,
            len(doc["outputs"]),
            doc["max_length"],
        )

    assert form(ours) == form(theirs)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_variable_tracking_has_the_harnesss_text(seed: int, monkeypatch) -> None:
    # it draws the value from numpy: here from the same stream as the rest
    monkeypatch.setattr(vt_utils.np.random, "randint", random.randrange)
    for size in (2, 40):
        for is_example, name_length in ((False, 5), (True, 3)):
            random.seed(seed)
            theirs = vt_utils.generate_input_output(size, 1, variables.NUM_HOPS, is_icl=is_example)
            assert variables.make_text(Random(seed), size, name_length) == theirs
    text, names = theirs
    example = f"{text} {' '.join(names)}\n\n"
    random.seed(seed)
    assert variables.rename_answers(Random(seed), example) == vt_utils.randomize_icl(example)


def test_variable_tracking_documents_have_the_harnesss_form() -> None:
    [example] = vt_utils.sys_vartrack_w_noise_random(split_words, 1, 500, incremental=5)
    [theirs] = vt_utils.sys_vartrack_w_noise_random(split_words, 1, 4096, icl_example=example)
    [ours] = datasets.MAKERS["vt"]("vt", split_words, 4096, 1, 0)

    def form(doc: dict[str, Any]) -> tuple[Any, ...]:
        """Names, values and assignments out, noise once."""
        text = re.sub(r"VAR [A-Z]+ = (VAR [A-Z]+ |\d+)", "", doc["input"])
        noise = re.sub(r"\s+", " ", variables.NOISE)
        text = re.sub(rf"({re.escape(noise)}?)+", noise, re.sub(r"\s+", " ", text))
        text = re.sub(r"\d{5}", "VALUE", re.sub(r"\b[A-Z]{3,5}\b", "NAME", text))
        prefix = re.sub(r"\d{5}", "VALUE", doc["gen_prefix"])
        return sorted(doc), text, prefix, len(doc["outputs"]), doc["max_length"]

    assert form(ours) == form(theirs)
    assert form(ours)[1].count("Memorize and track") == 2, "the example, then the question"


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("repeats", [(6, 1), (30, 3)])
def test_common_words_have_the_harnesss_text(seed: int, repeats: tuple[int, int], monkeypatch) -> None:
    monkeypatch.setattr(cwe_utils, "RNG", random)  # one stream for both of its generators
    random.seed(seed)
    assert words.common_words(Random(seed), 300, *repeats) == cwe_utils.get_example(300, *repeats, 10)


@pytest.mark.parametrize("length", [2048, 4096])
def test_common_words_documents_have_the_harnesss_form(length: int) -> None:
    [theirs] = cwe_utils.sys_word_pair_random(1, length, split_words)
    [ours] = datasets.MAKERS["cwe"]("cwe", split_words, length, 1, 0)
    del theirs["input_example"]  # made and counted, but not asked with

    def form(doc: dict[str, Any]) -> tuple[Any, ...]:
        listed = re.findall(r"\d+\. ([^\d\n]+?)(?= \d+\.|\n)", doc["input"])
        counts = (
            {listed.count(word) for word in doc["outputs"]},
            {listed.count(w) for w in {*listed} - {*doc["outputs"]}},
        )
        text = re.sub(r"\n1\. .*\n", "\nLIST\n", doc["input"])
        return sorted(doc), text, doc["gen_prefix"], counts, doc["max_length"]

    assert form(ours) == form(theirs)


@pytest.mark.parametrize("seed", [1, 2])
def test_frequent_words_have_the_harnesss_text(seed: int) -> None:
    length = 4096
    random.seed(seed)
    text, answer, _ = fwe_utils.generate_input_output(10**9, split_words, num_words=900, vocab_size=length // 50)
    ours = words.make_fwe(length, Random(seed), 900)
    assert (f"{ours.text} {ours.answer_prefix}", ours.answers) == (text, answer)


def test_frequent_words_documents_have_the_harnesss_form() -> None:
    [theirs] = fwe_utils.sys_kwext(split_words, 4096, num_samples=1)
    [ours] = datasets.MAKERS["fwe"]("fwe", split_words, 4096, 1, 0)

    def form(doc: dict[str, Any]) -> tuple[Any, ...]:
        text = re.sub(r"(?<=coded words\. ).*(?=\nQuestion)", "WORDS", doc["input"])
        return sorted(doc), text, doc["gen_prefix"], len(doc["outputs"]), doc["max_length"]

    assert form(ours) == form(theirs)


def test_passages_have_the_harnesss_form() -> None:
    """Its form around our documents gives our prompt, but for their order."""
    ours = passages.make(2, Random(1), 12)
    query = ours.text.rpartition("Question: ")[2]
    documents = re.findall(r"Document \d+:\n(.*?)(?=\n\n)", ours.text, re.DOTALL)
    assert len(documents) == 12
    qas = [{"query": query, "outputs": ours.answers, "context": [0]}]
    text, answers = qa_utils.generate_input_output(0, 12, qas, list(documents))

    def lines(text: str) -> list[str]:
        return sorted(text.split("\n"))

    assert (lines(text), answers) == (lines(ours.text), ours.answers)
    assert re.sub(r"(?s)Document 1:.*\n\nAnswer", "", text) == re.sub(r"(?s)Document 1:.*\n\nAnswer", "", ours.text)
    assert ours.answer_prefix == qa_utils.CONFIG["answer_prefix"]


@pytest.mark.parametrize("task", RULER)
def test_the_task_file_says_what_the_harnesss_does(task: str) -> None:
    harness_niah()  # what the file names imports it
    theirs = load_yaml(HARNESS / f"{HARNESS_YAML.get(task, task)}.yaml", resolve_func=True)
    ours = load_yaml(FOLDER / "ruler" / f"{task}.yaml", resolve_func=True)
    same = (
        "doc_to_text",
        "doc_to_target",
        "gen_prefix",
        "target_delimiter",
        "generation_kwargs",
        "output_type",
        "repeats",
    )
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
    assert ours["process_results"].__code__ == theirs["process_results"].__code__
    assert {m["aggregation"].__code__ for m in ours["metric_list"]} == {common_utils.aggregate_metrics.__code__}
    budgets = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
    assert ours["generation_kwargs"]["max_gen_toks"] == budgets.get(task, 128)


@pytest.mark.parametrize(
    ("task", "completion", "score"),
    [
        ("niah_multiquery", "They are 1234567, 7654321.", 0.5),
        ("niah_multiquery", "1234567 7654321 1111111 2222222", 1),
        ("niah_multiquery", "none", 0),
        ("vt", "abcde, fghij", 0),
        ("qa_1", "in 1234567 or so", 0.25),
    ],
)
def test_the_metric_gives_the_harnesss_scores(task: str, completion: str, score: float, bpe: Path) -> None:
    doc = {"outputs": ["1234567", "7654321", "1111111", "2222222"], "max_length": 8192}
    theirs = common_utils.process_results_part if task == "qa_1" else common_utils.process_results
    ours = load(f"local_{task}", bpe, 4096, 1)
    assert ours.process_results(doc, [completion])["8192"] == score == theirs(doc, [completion])["8192"]


# --- any tokenizer, any length ---


def contexts(task: Any) -> list[str]:
    task.build_all_requests(limit=None)
    return [instance.args[0] for instance in task.instances]


@pytest.mark.parametrize("task", RULER)
@pytest.mark.parametrize("tokenizer", ["bpe", "characters"])
def test_prompt_and_answer_fill_the_length(task: str, tokenizer: str, request) -> None:
    folder = request.getfixturevalue(tokenizer)
    length = 8192
    loaded = load(f"local_{task}", folder, length)
    encode = PreTrainedTokenizerFast.from_pretrained(folder)
    answer = loaded.config.generation_kwargs["max_gen_toks"]
    for doc, prompt in zip(loaded.dataset["test"], contexts(loaded), strict=True):
        tokens = len(encode(prompt).input_ids) + answer
        assert tokens == doc["length"], "what was counted is not what is asked"
        assert 0.9 * length < tokens <= length
        assert prompt.endswith(doc["gen_prefix"])
        if task != "fwe":
            assert all(output in doc["input"] for output in doc["outputs"])


def test_prompts_of_128k(bpe: Path) -> None:
    [doc] = datasets.documents("vt", str(bpe), (131072,), 1)
    assert 0.98 * 131072 < doc["length"] <= 131072
    assert len(prose.essay_words()) > 131072, "the essay must not end before the prompt"


def test_what_is_reserved_stays_free(bpe: Path) -> None:
    [doc] = datasets.documents("vt", str(bpe), (2048,), 1, 100)
    tokens = common_utils.get_tokenizer(str(bpe))(f"{doc['input']} {doc['gen_prefix']}").input_ids
    assert len(tokens) <= 2048 - 100 - variables.ANSWER_TOKENS


def test_a_length_that_is_too_short_is_refused() -> None:
    tokenizer = split_words
    with pytest.raises(ValueError, match="vt does not fit into 200 tokens.*choose a greater length"):
        list(datasets.MAKERS["vt"]("vt", tokenizer, 200, 1, 0))


def test_a_task_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="need a tokenizer; name it with --metadata"):
        datasets.dataset("vt", max_seq_lengths=[4096])


# --- always the same ---


def digest() -> str:
    """Of two short documents of every task, with a tokenizer that no package brings."""
    hashed = hashlib.sha256()
    for task in RULER:
        for doc in datasets.MAKERS[task](task, split_words, 4096, 2, 0):
            hashed.update(json.dumps(doc, sort_keys=True).encode())
    return hashed.hexdigest()


def test_prompts_stay_what_they_were() -> None:
    """Results name samples by task, length and number: the generators must not drift, nor depend on the process."""
    assert digest() == PINNED


@pytest.mark.parametrize("task", RULER)
def test_a_sample_does_not_depend_on_how_many_there_are(task: str) -> None:
    few, many = (list(datasets.MAKERS[task](task, split_words, 4096, count, 0)) for count in (2, 4))
    assert many[:2] == few
    assert len({doc["input"] for doc in many}) == 4


def test_the_essay_holds_nothing_like_a_needle() -> None:
    essay = " ".join(prose.essay_words())
    assert not re.search(r"\d|magic|special|[{}]", essay)
    sentences = prose.split_sentences(essay)
    assert len(set(sentences)) > 0.5 * len(sentences), "it repeats itself too much"


# --- questions that can be answered, from one place only ---


@pytest.mark.parametrize("seed", range(10))
def test_two_hops_lead_to_the_answer(seed: int) -> None:
    sample = passages.make(2, Random(seed), 40)
    documents = {d.split("\n")[0]: d for d in re.findall(r"Document \d+:\n(.*?)(?=\n\n)", sample.text, re.DOTALL)}
    assert len(documents) == 40, "two things have one name"
    query = sample.text.rpartition("Question: ")[2]
    [person] = [name for name in documents if name in query]
    town = re.search(r"was born in (\w+)\.", documents[person])[1]
    assert town not in query
    assert sample.answers[0] in documents[town]
    assert sample.answers[0] not in documents[person]


@pytest.mark.parametrize("seed", range(10))
def test_one_hop_is_answered_by_the_document_named(seed: int) -> None:
    sample = passages.make(1, Random(seed), 40)
    documents = re.findall(r"Document \d+:\n(.*?)(?=\n\n)", sample.text, re.DOTALL)
    query = sample.text.rpartition("Question: ")[2]
    [named] = [document for document in documents if document.split("\n")[0] in query]
    assert sample.answers[0] in named


# --- the needle model's own ---


@pytest.mark.parametrize("task", NEEDLE)
def test_needle_prompts_have_their_exact_length_and_their_own_judge(task: str) -> None:
    loaded = load(task, NEEDLE_MODEL, 2048)
    encode = common_utils.get_tokenizer(str(NEEDLE_MODEL))
    answer = loaded.config.generation_kwargs["max_gen_toks"]
    for doc, prompt in zip(loaded.dataset["test"], contexts(loaded), strict=True):
        ids = encode(prompt).input_ids
        assert len(ids) + answer == 2048
        assert encode.unk_token_id not in ids
        assert len(encode(doc["outputs"][0], add_special_tokens=False).input_ids) <= answer
        assert loaded.process_results(doc, [f"{doc['outputs'][0]} ."]) == {"2048": 1.0}
        assert loaded.process_results(doc, [f". {doc['outputs'][0]}"]) == {"2048": 0.0}


def test_needle_prompts_want_the_needle_models_words(bpe: Path) -> None:
    with pytest.raises(ValueError, match="choose the tasks local_ruler"):
        datasets.documents("needle_single", str(bpe), (2048,), 1)
