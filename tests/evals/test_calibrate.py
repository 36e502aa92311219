"""Calibration: the prompts' places, the recorded masses, the reference's drops, the choice, resuming."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from evals.bench.shapes import ModelShape
from evals.calibrate import __main__ as calibrate
from evals.calibrate import answers, ceiling, choose, model, prompts, ranks
from evals.lm.records import open_records
from evals.needle import prompts as needle
from scripts.fork import ForkError
from tests.oracle.oracle import Oracle
from tests.oracle.selection import SelectionRule, select_blocks

ROOT = Path(__file__).resolve().parents[2]
NEEDLE = ROOT / "evals" / "needle" / "model"
SHAPE = ModelShape(layers=8, hidden=64, heads=2, kv_heads=2, head_dim=32, ffn=128)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def english(tmp_path_factory: pytest.TempPathFactory):
    """A tokenizer for any text: one token a word or sign."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def text_at(tokenizer, text: str, special: bool, span: tuple[int, int]) -> str:
    offsets = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)["offset_mapping"]
    return text[offsets[span[0]][0] : offsets[span[1] - 1][1]]


@pytest.mark.parametrize("template", [None, "<user>{{ messages[0]['content'] }}<end><assistant>"])
@pytest.mark.parametrize("part", prompts.PARTS)
def test_every_needed_span_holds_its_words(english, part: str, template: str | None, monkeypatch) -> None:
    english.chat_template = template
    seen = []
    monkeypatch.setattr(prompts, "in_template", lambda *a, real=prompts.in_template: seen.append(real(*a)) or seen[-1])
    tasks = prompts.CHOOSE_TASKS if part == "choose" else prompts.CHECK_TASKS
    for task in tasks:
        written = (prompts._own if part == "choose" else prompts._ruler)(task, english, 1024, 1)
        prompt = prompts._tokenized(part, task, english, 1024, 1, written)
        found = [text_at(english, *seen[-1], span) for span in prompt.needed]
        assert found == list(written.needed), task
        assert set(prompt.followed) <= set(prompt.needed)
        assert all(any(answer in words for words in found) for answer in prompt.answers) or task in (
            "cwe",
            "vt",
            "votes",
        )
        assert 1024 <= len(prompt.ids) < 1400 or part == "check"


def test_the_needle_models_spans_are_the_values_of_its_statements() -> None:
    tokenizer = AutoTokenizer.from_pretrained(NEEDLE)
    for part in prompts.PARTS:
        for prompt in prompts.make_prompts(part, tokenizer, True, 1024, 6):
            words = [needle.VOCAB[prompt.ids[start]] for start, _ in prompt.needed]
            assert set(prompt.answers[0].split(" and ")) <= set(words)
            assert len(prompt.ids) == 1024


def test_the_parts_share_no_task_and_no_sentence(english) -> None:
    english.chat_template = None
    own = prompts._own("multikey", english, 1024, 0)
    ruler = prompts._ruler("niah_multikey_1", english, 1024, 0)
    assert not set(prompts.CHOOSE_TASKS) & set(prompts.CHECK_TASKS)
    assert not set(own.body.split(". ")) & set(ruler.body.split(". "))
    assert (
        own.body == prompts._own("multikey", english, 1024, 0).body != prompts._own("multikey", english, 1024, 2).body
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, grouped-query attention, peaked scores."""
    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=1024, initializer_range=0.5,
        )
    )  # fmt: skip
    made.save_pretrained(path)
    AutoTokenizer.from_pretrained(NEEDLE).save_pretrained(path)
    return path


def test_masses_are_the_softmax_of_the_last_queries(tiny: Path) -> None:
    ids = torch.randint(0, 64, (300,)).tolist()
    watched = model.WatchedModel(tiny)
    watch = model.Watch(layers=watched.layers, with_hops=True)
    watched.answer(ids, 2, watch)
    plain = LlamaForCausalLM.from_pretrained(tiny, attn_implementation="eager")
    attention = plain(torch.tensor([ids]), output_attentions=True).attentions
    assert sorted(watch.mass) == [0, 1]  # not the last layer
    blocks = torch.arange(300) // model.BLOCK
    for layer in watched.layers:
        weights = attention[layer][0]
        into = torch.zeros(4, 300, 5).index_add_(2, blocks, weights.detach())
        for i, window in enumerate(model.WINDOWS):
            torch.testing.assert_close(watch.mass[layer][:, i], into[:, -window:].sum(1), atol=1e-4, rtol=1e-3)
        square = model.without_own(torch.zeros(4, 5, 5).index_add_(1, blocks, into))
        torch.testing.assert_close(watch.hops[layer], square, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("amount", [{"top_p": 0.9}, {"keep_ratio": 0.4}])
def test_drops_are_those_of_the_oracle(amount: dict[str, float]) -> None:
    ids = needle.encode(needle.make_prompt("multikey", 1100, 5).text)
    expected = Oracle(NEEDLE).run(ids, 3, selection_layers=[2, 4], top_p_over="middle", **amount)
    watched = model.WatchedModel(NEEDLE)
    watch = model.Watch(cuts={layer: {"num_queries": 128, **amount} for layer in (2, 4)})
    text = watched.answer(ids, 4, watch)
    assert watch.kept == [len(kept) for kept in expected.kept]
    assert watch.alive is not None and watch.alive[: len(ids)].nonzero()[:, 0].tolist() == expected.kept[-1]
    stop = expected.tokens.index(needle.DOT_ID) if needle.DOT_ID in expected.tokens else len(expected.tokens)
    assert text.split()[:stop] == [needle.VOCAB[token] for token in expected.tokens[:stop]]


@pytest.mark.parametrize(("by", "amount"), [("top_p", 0.5), ("top_p", 0.99), ("keep_ratio", 0.3), ("keep_ratio", 0.05)])
@pytest.mark.parametrize("num_tokens", [256, 300, 1024, 2000])
def test_blocks_kept_are_those_of_the_oracle(by: str, amount: float, num_tokens: int) -> None:
    mass = np.random.default_rng(num_tokens).pareto(1, -(-num_tokens // 64))
    rule = SelectionRule(**{by: amount}, top_p_over="middle")
    expected = select_blocks(torch.tensor(mass), num_tokens, rule).kept.numpy()
    assert (choose.keep(mass, num_tokens, by, amount) == expected).all()


def made_sample(index: int, part: str, good: tuple[int, int]) -> ranks.Sample:
    """20 blocks, one needed; `good` (layer, head) ranks it first from 32 queries, all others rank at random."""
    rng = np.random.default_rng([index, len(part)])
    needed = int(rng.integers(3, 16))
    mass = rng.random((7, 2, len(model.WINDOWS), 20), dtype=np.float32)
    mass[good[0], good[1], 2, needed] = 50
    span = (needed * 64 + 5, needed * 64 + 9)
    prompt = prompts.Prompt(part, "made", 1280, index, (index,) * 1280, (span,), (), ("x",), 1)
    return ranks.Sample(prompt, "x", 1.0, mass, None)


@pytest.mark.parametrize(
    ("text", "used"),
    [("12 and 34", (0, 1)), ("just 34", (1,)), ("nothing", ())],
)
def test_of_several_answers_those_given_tell(text: str, used: tuple[int, ...]) -> None:
    spans = ((300, 304), (600, 604))
    prompt = prompts.Prompt("check", "made", 1280, 0, (1,) * 1280, spans, (), ("12", "34"), 1)
    sample = ranks.Sample(prompt, text, prompt.score(text), np.zeros((1, 1, 1, 20)), None)
    assert sample.used == tuple(spans[i] for i in used)
    assert sample.needed.nonzero()[0].tolist() == [spans[i][0] // 64 for i in used]
    assert sample.tells == bool(used)
    chained = replace(sample, prompt=replace(prompt, followed=spans[1:]))
    assert chained.tells == (len(used) == 2), "the second is found through the first"


def made_trial(part: str, good: tuple[int, int] = (2, 1), count: int = 12) -> choose.Trial:
    return choose.Trial([made_sample(i, part, good) for i in range(count)], range(7), SHAPE)


def test_the_head_that_finds_is_chosen_and_what_it_saves() -> None:
    trial = made_trial("choose")
    first = choose.candidates(trial, made_trial("check"))[0]
    cut = first.cuts[0]
    assert (cut.layer, cut.num_queries) == (2, 32)
    assert 1 in cut.heads  # another may join where it changes no rank
    assert made_trial("check").computed(first) < 0.7 and made_trial("check").recall(first) == 1
    assert first.settings()["selection_layers"][0]["heads"] == list(cut.heads)


def test_heads_that_find_everything_only_together_are_chosen_over_the_best_one() -> None:
    samples = []
    for index in range(12):
        sample = made_sample(index, "choose", (2, 1))
        mass = np.random.default_rng(index).random((7, 3, len(model.WINDOWS), 20), dtype=np.float32)
        mass[2, 0, 2, sample.needed] = 0.9  # the first head ranks it well, the others first in every second prompt
        mass[2, 1 + index % 2, 2, sample.needed] = 50
        samples.append(replace(sample, mass=mass))
    scorer = choose.Trial(samples, range(7), SHAPE).scorers(1)[2]
    assert (scorer.heads, scorer.num_queries) == ((1, 2), 32)


@pytest.mark.parametrize("found_elsewhere", [False, True])
def test_candidates_hold_on_both_parts_the_cheapest_first(found_elsewhere: bool) -> None:
    parts = made_trial("choose"), made_trial("check", (4, 0) if found_elsewhere else (2, 1))
    plans = choose.candidates(*parts)
    assert all(part.recall(plan) >= 1 - choose.MAY_BE_LOST for plan in plans for part in parts)
    computed = [sum(part.computed(plan) for part in parts) / 2 for plan in plans]
    assert computed == sorted(computed) and computed[-1] < 1
    for layer in {plan.cuts[0].layer for plan in plans}:
        own = [c for plan, c in zip(plans, computed, strict=True) if plan.cuts[0].layer == layer]
        assert all(b >= choose.NEXT_CANDIDATE * a for a, b in pairwise(own)), "of one layer none like another"
    assert len(plans) > 3 if not found_elsewhere else computed[0] > 0.8


def test_second_hop_keeps_what_the_first_found_block_looks_at() -> None:
    mass, hops = np.zeros(20), np.zeros((20, 20))
    mass[5] = 1
    hops[5, 9] = 1
    hops[7, 12] = 9  # 7 is not among the heaviest
    assert choose.second_hop(mass, hops, 1280).nonzero()[0].tolist() == [9]


@pytest.fixture
def calibrated(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Calibrates made samples; pruned answers are right if `keeps(settings)`."""
    config = LlamaConfig(num_hidden_layers=8, num_attention_heads=2, num_key_value_heads=2, hidden_size=128)
    watched = SimpleNamespace(config=config, tokenizer=None, speaks_needle=True, layers=range(7))
    monkeypatch.setattr(model, "WatchedModel", lambda path: watched)
    monkeypatch.setattr(prompts, "make_prompts", lambda part, *a: [part])
    made = lambda part: [made_sample(i, part, (2, 1)) for i in range(12)]  # noqa: E731
    monkeypatch.setattr(ranks, "record", lambda model, parts, *a: made(parts[0]))

    def run(keeps, *arguments: str) -> dict:
        def ask_with(model, settings):
            dense = {"score": 1.0, "report": {}}
            cuts = [cut["layer"] for cut in settings["selection_layers"]]
            segments = [{"layers": [0, cuts[0]], "tokens_in": 1280}, {"layers": [cuts[0] + 1, 7], "tokens_in": 400}]
            pruned = {"outcome": "pruned", "prompt_tokens": 1280, "segments": segments}
            return lambda sample, xargs: (
                dense if xargs == answers.DENSE else {"score": float(keeps(settings)), "report": pruned}
            )

        monkeypatch.setattr(answers, "with_transformers", ask_with)
        records = tmp_path / f"records{len(list(tmp_path.iterdir()))}"
        folders = ["--results", str(tmp_path), "--records", str(records)]
        calibrate.main(["--model", str(tiny), "--backend", "transformers", *folders, *arguments])
        return json.loads((tmp_path / f"{tiny.name}.json").read_text())

    return run


def test_the_cheapest_candidate_whose_answers_hold_stands(calibrated) -> None:
    """Blocks say what may hold; a model may need what they do not show."""
    first = calibrated(lambda settings: True)
    assert first["settings"]["selection_layers"][0]["layer"] == 2
    mild = calibrated(lambda settings: settings["selection_layers"][0].get("top_p", 0) >= 0.8)
    assert mild["settings"]["selection_layers"][0]["top_p"] >= 0.8
    assert mild["evidence"]["end_to_end"]["all"]["difference"] == 0
    assert mild["evidence"]["check"]["computed"] > first["evidence"]["check"]["computed"]
    assert 1 < mild["evidence"]["candidates"]["asked"] < mild["evidence"]["candidates"]["made"]


def test_without_a_setting_that_holds_there_is_no_profile(calibrated, tmp_path: Path) -> None:
    with pytest.raises(ForkError, match="raise --loss"):
        calibrated(lambda settings: False)
    assert not list(tmp_path.glob("*.json"))
    lost = calibrated(lambda settings: False, "--loss", "100")
    assert lost["evidence"]["end_to_end"]["all"]["difference"] == -1


def test_chance_gains_where_the_model_cannot_answer_make_up_for_no_loss() -> None:
    samples = [
        replace(sample, prompt=replace(sample.prompt, task=task))
        for task in ("can", "just", "cannot")
        for sample in (made_sample(0, "check", (2, 1)), made_sample(1, "check", (2, 1)))
    ]
    counts = [True] * 4 + [False] * 2
    assert answers.counted(samples, [1, 0.6, 0.8, 0, 0.6, 0]) == counts
    with pytest.raises(ForkError, match="answers no task"):
        answers.counted(samples[4:], [0.6, 0])


@pytest.mark.parametrize(("wrong", "asked"), [((), 12), ((0, 1), 2), ((10, 11), 12), ((0, 6), 7)])
def test_asking_ends_when_too_much_is_lost(tmp_path: Path, wrong: tuple[int, ...], asked: int) -> None:
    """12 prompts, of which one may be lost, and two of a task that the model cannot answer."""
    samples = [made_sample(i, "check", (2, 1)) for i in range(14)]
    samples[12:] = [replace(sample, prompt=replace(sample.prompt, task="cannot")) for sample in samples[12:]]
    report = {"outcome": "pruned", "prompt_tokens": 1280, "segments": [{"layers": [0, 7], "tokens_in": 1280}]}
    pruned = []

    def ask(sample: ranks.Sample, xargs: dict) -> dict:
        if xargs == answers.DENSE:
            return {"score": float(sample.prompt.task != "cannot"), "report": {}}
        pruned.append(sample.prompt.index)
        return {"score": float(sample.prompt.index not in wrong), "report": report}

    with open_records(tmp_path, {}, fresh=False) as records:
        rows = answers.compare(samples, ask, None, timed=0, records=records, settings={}, loss=0.1)
    assert len(pruned) == asked
    assert (rows is None) == (len(wrong) > 1)


def test_ceiling_counts_answers_with_the_needed_blocks_first_and_without(tmp_path: Path, monkeypatch) -> None:
    """The engine is made up, its selection is not: an answer is right if the needed block is kept."""
    from vllm.v1.uniprefill.selection import SelectionSpec
    from vllm.v1.worker.gpu.uniprefill import selector

    asked = []

    def start_engine(path, config, *rest):
        def ask(sample, xargs):
            asked.append(config["selection_layers"])
            mass = torch.ones(20)
            mass[sample.needed.argmax()] = 0  # the last by the score
            spec = SelectionSpec(0, 1280, 0, 128, keep_ratio=xargs["uniprefill_keep_ratio"])
            sizes = {"block_size": 64, "sink_tokens": 128, "recent_tokens": 128, "top_p_over": "middle"}
            kept = selector.select_blocks(mass, [spec], **sizes)
            assert kept.sum() == np.ceil(20 * spec.keep_ratio)
            return {"score": float(kept[sample.needed.argmax()])}

        return ask, SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(ceiling, "start_engine", start_engine)
    samples = [made_sample(i, "check", (2, 1)) for i in range(3)]

    def measured() -> list[dict]:
        with open_records(tmp_path, {}, fresh=False) as records:
            return list(ceiling.measure(tmp_path, samples, (2, 5), records, True, {}))

    rows = measured()
    assert [(row["layer"], row["keep_ratio"]) for row in rows] == [(n, s) for n in (2, 5) for s in ceiling.SHARES]
    # Of 20 blocks the first and last two stay anyway; with .2 of them nothing else does.
    assert [row["right"]["needed"] for row in rows] == [0, 3, 3] * 2
    assert not any(row["right"]["published"] for row in rows)
    text = ceiling.markdown("a model", [("package", "x")], rows)
    assert "| 5 | 0.4 | 3 of 3 | 0 of 3 |" in text
    before = len(asked)
    assert measured() == rows and len(asked) == before, "answers are kept"


def test_too_few_answers_are_refused() -> None:
    with pytest.raises(ForkError, match="raise --prompts"):
        choose.candidates(made_trial("choose", count=3), made_trial("check"))


def test_recording_goes_on_where_it_stopped(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = model.WatchedModel(tiny)
    made = [
        prompts.Prompt("choose", "made", 300, i, tuple(range(3, 63)) * 5, ((150, 151),), (), ("x",), 1) for i in (0, 1)
    ]
    made[1] = prompts.Prompt("choose", "made", 300, 1, tuple(range(2, 62)) * 5, ((150, 151),), ((150, 151),), ("x",), 1)
    first = next(iter(ranks.record(watched, made, tmp_path, "model")))  # ended after one
    asked = []
    monkeypatch.setattr(watched, "answer", lambda *args, real=watched.answer: asked.append(args[0]) or real(*args))
    samples = list(ranks.record(watched, made, tmp_path, "model"))
    assert asked == [made[1].ids]
    assert (samples[0].mass == first.mass).all() and samples[0].hops is None
    assert samples[1].hops is not None


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "MLA"),
        ({"model_type": "mamba"}, "no full-attention layer"),
        ({"model_type": "mistral", "sliding_window": 512}, "no full-attention layer"),
    ],
)
def test_models_without_heads_to_score_are_refused(tmp_path: Path, config: dict, reason: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ForkError, match=reason):
        model.text_config(tmp_path)


def test_only_full_layers_of_a_hybrid_score() -> None:
    config = LlamaConfig(num_hidden_layers=6)
    config.layer_types = ["sliding_attention", "full_attention"] * 3
    assert model.full_layers(config) == [1, 3]


def test_rank_is_the_share_of_heavier_blocks() -> None:
    middle = np.array([False, True, True, True, True, False])
    needed = np.array([False, False, True, False, False, False])
    mass = np.array([9, 3, 2, 1, 4, 9.0])
    assert math.isclose(float(ranks.rank_shares(mass, needed, middle)), 2 / 3)
