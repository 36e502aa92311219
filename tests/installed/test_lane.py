"""A prompt whose prefill is spread over steps keeps and answers what it does in one step, and stays out of the way.

All in float32: in bf16 a block at the threshold may go the other way with chunks of another shape.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
from engines import SMALL_CUTS, engine, generate, model_runner_of, recorded_selections, scheduler_of
from oracle.checkpoints import make_checkpoint
from test_random_traffic import assert_nothing_left
from vllm import SamplingParams, TokensPrompt
from vllm.sampling_params import StructuredOutputsParams

from evals.live_server import NEEDLE_MODEL
from evals.needle.prompts import is_correct, make_prompt

VOCAB = 1024
BUDGET = 256
CONFIG = SMALL_CUTS | {"top_p": 0.6}
NUM_CUTS = len(CONFIG["selection_layers"])
NUM_TOKENS = 24


def words(num_tokens: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=num_tokens)


PROMPTS = {
    "longest": words(6000, 0),
    "long": words(1800, 1),  # seven chunks and one of 8 tokens, which leaves room for "short"
    "second": words(1500, 2),
    "echo": words(25, 3) * 70,
    "short": words(150, 4),
    "decode": words(40, 5),
}


def open_engine(model, budget: int, **arguments):
    settings = {"max_model_len": 6144, "max_num_batched_tokens": budget, "max_num_seqs": 8, "dtype": "float32"}
    return engine(model, uniprefill=CONFIG, **(settings | arguments))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    return make_checkpoint(path, "llama", layers=4, hidden=128, heads=4, head_dim=32, seed=71)


@pytest.fixture(scope="module")
def truth(model) -> dict[str, tuple[list[list[int]], list[int]]]:
    """What each prompt keeps at each cut and generates, alone in one step."""
    found = {}
    with open_engine(model, 8192) as llm:
        for name, prompt in PROMPTS.items():
            with recorded_selections() as selections:
                [output] = generate(llm, [prompt], max_tokens=NUM_TOKENS)
            assert output.uniprefill["steps"] == 1
            kept = selections.of([output])[0] if output.uniprefill["outcome"] == "pruned" else []
            found[name] = kept, list(output.outputs[0].token_ids)
    assert all(len(found[name][0][-1]) < 0.7 * len(PROMPTS[name]) for name in ("longest", "long", "second"))
    return found


@pytest.mark.parametrize("budget", [512, 1024, 4096])
def test_chunks_keep_what_one_step_keeps(model, truth, budget: int) -> None:
    names = [name for name in PROMPTS if len(PROMPTS[name]) > budget]
    with open_engine(model, budget) as llm, recorded_selections() as selections:
        outputs = generate(llm, [PROMPTS[name] for name in names], max_tokens=NUM_TOKENS)
        kept = selections.of(outputs)
    for name, output, cuts in zip(names, outputs, kept, strict=True):
        right_cuts, right_tokens = truth[name]
        assert output.uniprefill["outcome"] == "pruned" and output.uniprefill["steps"] > len(PROMPTS[name]) / budget
        assert cuts == right_cuts, name
        assert [s["tokens_out"] for s in output.uniprefill["segments"][:-1]] == [len(cut) for cut in cuts]
        assert list(output.outputs[0].token_ids) == right_tokens, name


def test_ngram_speculation(model, truth) -> None:
    """Beside another request's drafts, and with drafts of its own behind the compacted prompt."""
    spec = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    names = ["echo", "decode", "long"]
    with open_engine(model, BUDGET, speculative_config=spec, disable_log_stats=False) as llm:
        outputs = generate(llm, [PROMPTS[name] for name in names], max_tokens=NUM_TOKENS)
        accepted = sum(m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_accepted_tokens")
    assert accepted > 0, "no draft was accepted, so nothing was verified"
    assert [list(output.outputs[0].token_ids) for output in outputs] == [truth[name][1] for name in names]


@pytest.fixture(scope="module", params=["sync, fcfs", "async, priority"])
def llm(request, model, truth) -> Iterator[Any]:
    scheduling, policy = request.param.split(", ")
    with open_engine(
        model,
        BUDGET,
        async_scheduling=scheduling == "async",
        scheduling_policy=policy,
        enable_prefix_caching=True,
        block_size=32,
        max_model_len=2048,
    ) as llm:
        assert scheduler_of(llm).vllm_config.scheduler_config.async_scheduling == (scheduling == "async")
        llm.by_priority = policy == "priority"
        yield llm


@pytest.fixture(autouse=True)
def same_counters(request, monkeypatch) -> None:
    """Before every step the worker has computed as many tokens of each request as the scheduler thinks."""
    if "llm" not in request.fixturenames:
        return
    runner = model_runner_of(request.getfixturevalue("llm"))
    execute_model = runner.execute_model

    def checked(scheduler_output, *args, **kwargs):
        cached = scheduler_output.scheduled_cached_reqs
        for req_id, num_computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            index = runner.req_states.req_id_to_index[req_id]
            assert int(runner.req_states.num_computed_tokens.gpu[index]) == num_computed
        return execute_model(scheduler_output, *args, **kwargs)

    monkeypatch.setattr(runner, "execute_model", checked)


def add(llm, name: str, prompt: str, priority: int = 0, max_tokens: int = NUM_TOKENS, **arguments: Any) -> str:
    params = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, extra_args={"uniprefill_report": 1} | arguments
    )
    return llm.llm_engine.add_request(name, TokensPrompt(prompt_token_ids=PROMPTS[prompt]), params, priority=priority)


def finish(llm) -> dict[str, Any]:
    """The outputs of all requests, in the order in which they end."""
    ended = {}
    while llm.llm_engine.has_unfinished_requests():
        ended |= {output.request_id: output for output in llm.llm_engine.step() if output.finished}
    return ended


def tokens_of(output) -> list[int]:
    return list(output.outputs[0].token_ids)


def test_decodes_get_a_token_in_every_step(llm, truth) -> None:
    core = llm.llm_engine
    for i in range(2):
        add(llm, f"decode{i}", "decode", max_tokens=60)
    counts = {f"decode{i}": 0 for i in range(2)}
    while min(counts.values()) < 2:
        counts |= {output.request_id: len(tokens_of(output)) for output in core.step()}
    add(llm, "long", "long")
    num_steps, long = 0, None
    while long is None:
        num_steps += 1
        outputs = {output.request_id: output for output in core.step()}
        for name in counts:
            assert len(tokens_of(outputs[name])) == counts[name] + 1, f"step {num_steps}"
            counts[name] += 1
        long = outputs.get("long")
    # What was in flight when the prompt came is one of the steps counted here.
    assert 8 < long.uniprefill["steps"] <= num_steps
    ended = finish(llm)
    assert tokens_of(ended["long"]) == truth["long"][1]
    for name in counts:
        assert tokens_of(ended[name])[:NUM_TOKENS] == truth["decode"][1]
    assert_nothing_left(llm)


def test_a_busy_lane_blocks_long_prompts_only(llm, truth) -> None:
    for name in ("long", "second", "short"):
        add(llm, name, name, max_tokens=1)
    ended = finish(llm)
    assert list(ended) == ["short", "long", "second"]
    assert ended["long"].uniprefill["lane_wait_seconds"] == 0 < ended["second"].uniprefill["lane_wait_seconds"]
    assert ended["short"].uniprefill["steps"] == 1
    for name, output in ended.items():
        assert output.uniprefill["outcome"] == "pruned" and tokens_of(output) == truth[name][1][:1]
    assert_nothing_left(llm)


def test_waiting_prompts_by_priority(llm, truth) -> None:
    for name, prompt, priority in (("first", "second", 5), ("later", "second", 3), ("urgent", "long", 0)):
        add(llm, name, prompt, priority if llm.by_priority else 0, max_tokens=2)
        llm.llm_engine.step()
    ended = finish(llm)
    assert list(ended) == (["first", "urgent", "later"] if llm.by_priority else ["first", "later", "urgent"])
    assert tokens_of(ended["urgent"]) == truth["long"][1][:2]
    assert tokens_of(ended["first"]) == tokens_of(ended["later"]) == truth["second"][1][:2]


# Eight steps for the first segment, then some for the later ones, then the decodes.
MOMENTS = [1, 7, 8, 9, 10, 11, 14]


@pytest.mark.parametrize("num_steps", MOMENTS)
def test_abort(llm, truth, num_steps: int) -> None:
    name = add(llm, "aborted", "long")
    add(llm, "next", "second", max_tokens=4)
    for _ in range(num_steps):
        llm.llm_engine.step()
    llm.llm_engine.abort_request([name], internal=True)
    assert tokens_of(finish(llm)["next"]) == truth["second"][1][:4]
    assert_nothing_left(llm)


@pytest.mark.parametrize("num_steps", MOMENTS)
def test_preemption(llm, truth, num_steps: int) -> None:
    """It starts again, and ends as if it had not been interrupted."""
    add(llm, "decode", "decode")
    with recorded_selections() as selections:
        add(llm, "preempted", "long")
        for _ in range(num_steps):
            llm.llm_engine.step()
        scheduler_of(llm).reset_prefix_cache(reset_running_requests=True)
        ended = finish(llm)
        [kept] = selections.cuts.values()
    right_cuts, right_tokens = truth["long"]
    assert kept[-NUM_CUTS:] == right_cuts
    assert tokens_of(ended["preempted"]) == right_tokens
    assert tokens_of(ended["decode"]) == truth["decode"][1]
    assert_nothing_left(llm)


def test_prefix_cache_of_dense_requests(llm, truth) -> None:
    """A prompt in the lane reads nothing from it and leaves nothing in it."""
    assert scheduler_of(llm).reset_prefix_cache()
    cached = scheduler_of(llm).kv_cache_manager.block_pool.cached_block_hash_to_block
    [pruned] = generate(llm, [PROMPTS["long"]], max_tokens=40)
    assert pruned.num_cached_tokens == 0 and len(cached) == 0
    [dense] = generate(llm, [PROMPTS["long"]], max_tokens=NUM_TOKENS, uniprefill=0)
    assert dense.num_cached_tokens == 0 and len(cached) > 0
    add(llm, "pruned", "long")
    add(llm, "dense", "long", uniprefill=0)
    ended = finish(llm)
    assert ended["dense"].num_cached_tokens == len(PROMPTS["long"]) // 32 * 32
    assert tokens_of(ended["dense"]) == tokens_of(dense)
    assert ended["pruned"].num_cached_tokens == 0
    assert tokens_of(ended["pruned"]) == truth["long"][1]


def test_samples_and_logprobs(llm) -> None:
    """Three samples, of which two wait for the lane, follow their seeds; nothing is sampled early."""
    params = SamplingParams(n=3, temperature=1, seed=3, max_tokens=6, logprobs=2, extra_args={"uniprefill_report": 1})
    prompt = TokensPrompt(prompt_token_ids=PROMPTS["second"])
    [first], [second] = (llm.generate([prompt], params, use_tqdm=False) for _ in range(2))
    assert first.uniprefill["outcome"] == "pruned" and first.uniprefill["steps"] > 1
    assert [o.token_ids for o in first.outputs] == [o.token_ids for o in second.outputs]
    assert len({tuple(o.token_ids) for o in first.outputs}) > 1
    assert all(len(o.token_ids) == len(o.logprobs) == 6 for o in first.outputs)


def test_long_prefill_token_threshold(llm, truth, monkeypatch) -> None:
    """Next to others it bounds the lane's rows in every segment."""
    scheduler = scheduler_of(llm)
    monkeypatch.setattr(scheduler.scheduler_config, "long_prefill_token_threshold", 100)
    grants, schedule = [], scheduler.schedule

    def recorded(*args, **kwargs):
        output = schedule(*args, **kwargs)
        if output.uniprefill is not None and output.uniprefill.lane is not None:
            lane = output.uniprefill.lane
            grants.append((output.num_scheduled_tokens[lane.req_id], lane.rows))
        return output

    monkeypatch.setattr(scheduler, "schedule", recorded)
    add(llm, "decode", "decode", max_tokens=100)
    add(llm, "long", "long")
    ended = finish(llm)
    chunks, rows = zip(*grants, strict=True)
    assert max(chunks) == max(rows) == 100
    assert tokens_of(ended["long"]) == truth["long"][1]


@pytest.fixture(scope="module")
def needle() -> Iterator[Any]:
    """The model that can answer, with the settings that a server has by default."""
    settings = {"max_model_len": 16_384, "max_num_batched_tokens": 2048, "max_num_seqs": 8, "async_scheduling": True}
    with engine(NEEDLE_MODEL, uniprefill={"top_p": 0.99}, dtype="float32", **settings) as llm:
        yield llm


def test_answers_of_the_needle_model(needle) -> None:
    prompts = [make_prompt("multikey", length, seed) for length, seed in [(4096, 0), (4096, 1), (8192, 0), (16_000, 0)]]
    params = SamplingParams(temperature=0, max_tokens=4, extra_args={"uniprefill_report": 1})
    outputs = needle.generate([prompt.text for prompt in prompts], params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.uniprefill["outcome"] == "pruned"
        assert output.uniprefill["segments"][-1]["tokens_out"] < prompt.num_tokens / 2
        assert is_correct(prompt, output.outputs[0].text), (prompt.num_tokens, prompt.seed)


def test_grammar(needle) -> None:
    """It is followed from the first token on, and only there."""
    prompt = make_prompt("multikey", 4096, 3)
    pattern = "v[0-9]{1,3}andv[0-9]{1,3}"
    params = SamplingParams(temperature=0, max_tokens=8, structured_outputs=StructuredOutputsParams(regex=pattern))
    free = SamplingParams(temperature=0, max_tokens=4)
    bound, beside = needle.generate([prompt.text, prompt.text], [params, free], use_tqdm=False)
    text = bound.outputs[0].text.replace(" ", "")
    assert bound.outputs[0].finish_reason == "stop" and re.fullmatch(pattern, text), text
    assert text.startswith(f"{prompt.answer}and")
    assert is_correct(prompt, beside.outputs[0].text)
