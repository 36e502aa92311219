"""Kept counts reach the scheduler once, whatever is in flight; a resumed request is scored as at first."""

from __future__ import annotations

import random

import pytest
import torch
from engines import engine, generate, recorded_selections, scheduler_of
from oracle.checkpoints import make_checkpoint
from oracle.oracle import Oracle
from test_oracle_agreement import MASS_TOLERANCE, MAX_RELATIVE_ERROR, logits_of, relative_error
from vllm import SamplingParams, TokensPrompt
from vllm.v1.worker.gpu.uniprefill.selector import Selector

VOCAB = 1024
LAYERS = [1, 2]
BLOCK = 16
FORCED = {"sink_tokens": 16, "recent_tokens": 32, "num_queries": 16}
CONFIG = {"selection_layers": LAYERS, "block_size": BLOCK, "min_prompt_tokens": 100, "top_p": 0.6, **FORCED}
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    return make_checkpoint(path, "llama", layers=4, hidden=128, heads=4, head_dim=32, seed=51)


@pytest.fixture(scope="module", params=[True, False], ids=["async scheduling", "sync scheduling"])
def llm(request, checkpoint):
    with engine(
        checkpoint,
        uniprefill=CONFIG,
        max_model_len=1024,
        enable_prefix_caching=True,
        async_scheduling=request.param,
        disable_log_stats=False,
        max_logprobs=-1,
        logprobs_mode="raw_logits",
    ) as llm:
        llm.is_async = request.param
        yield llm


@pytest.fixture
def specs(monkeypatch) -> list[list]:
    """What every selection was asked for meanwhile, one list a cut."""
    seen: list[list] = []
    choose = Selector.choose

    def record(self, mass, specs, num_rows):
        seen.append(specs)
        return choose(self, mass, specs, num_rows)

    monkeypatch.setattr(Selector, "choose", record)
    return seen


def random_prompt(num_tokens: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=num_tokens)


def add(llm, name: str, prompt: list[int]) -> None:
    params = SamplingParams(
        temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=-1, extra_args={"uniprefill_report": 1}
    )
    llm.llm_engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), params)


def tokens_out(output) -> list[int]:
    """From the report: prompt tokens alive after each cut."""
    return [segment["tokens_out"] for segment in output.uniprefill["segments"][:-1]]


def test_counts_come_with_the_step_that_made_them(llm, monkeypatch) -> None:
    """One schedule later under async scheduling, at once without; then never again."""
    scheduler = scheduler_of(llm)
    events: list[tuple[str, list[str]]] = []
    schedule, update = scheduler.schedule, scheduler.update_from_output

    def recording_schedule(*args, **kwargs):
        output = schedule(*args, **kwargs)
        if output.total_num_scheduled_tokens:
            events.append(("schedule", [new.req_id for new in output.scheduled_new_reqs]))
        return output

    def recording_update(scheduler_output, runner_output):
        events.append(("kept", list(runner_output.uniprefill_kept or ())))
        return update(scheduler_output, runner_output)

    monkeypatch.setattr(scheduler, "schedule", recording_schedule)
    monkeypatch.setattr(scheduler, "update_from_output", recording_update)
    with recorded_selections() as selections:
        [output] = generate(llm, [random_prompt(500, seed=1)], max_tokens=4)
        [kept] = selections.of([output])
    assert tokens_out(output) == [len(cut) for cut in kept] and len(kept[-1]) < 500
    delivered = [i for i, (what, names) in enumerate(events) if what == "kept" and names]
    assert len(delivered) == 1
    assert [what for what, _ in events[: delivered[0]]] == ["schedule"] * (2 if llm.is_async else 1)
    assert events[delivered[0]][1] == events[0][1]


def test_counts_of_many_in_flight_are_their_own(llm) -> None:
    """Prompts of eleven lengths, some dense, arriving while others decode."""
    lengths = [90, 500, 300, 101, 700, 99, 256, 450, 620, 380, 150]
    engine_core, outputs = llm.llm_engine, {}
    waiting = list(enumerate(lengths))
    with recorded_selections() as selections:
        while waiting or engine_core.has_unfinished_requests():
            if waiting:
                number, length = waiting.pop(0)
                add(llm, f"{number}", random_prompt(length, seed=number))
            for output in engine_core.step():
                if output.finished:
                    outputs[int(output.request_id)] = output
    for number, length in enumerate(lengths):
        report = outputs[number].uniprefill
        assert report["prompt_tokens"] == length
        if length < 100:
            assert report["reason"] == "short_prompt" and tokens_out(outputs[number]) == [length, length]
        else:
            [kept] = selections.of([outputs[number]])
            assert tokens_out(outputs[number]) == [len(cut) for cut in kept]


@pytest.mark.parametrize("num_steps", [1, 2, 7], ids=lambda n: f"after {n} steps")
def test_resumed_request_is_scored_as_at_first(llm, checkpoint, specs, num_steps: int) -> None:
    """By its prompt's last queries; all its output tokens stay; the numbers are an oracle's.

    After one step under async scheduling the first prefill is still in flight.
    """
    prompt = random_prompt(500, seed=7)
    [alone] = generate(llm, [prompt], max_tokens=NUM_TOKENS)
    first_specs = [cut for [cut] in specs]
    specs.clear()
    scheduler, name = scheduler_of(llm), f"resumed-after-{num_steps}"
    with recorded_selections() as selections:
        add(llm, name, prompt)
        outputs = []
        for _ in range(num_steps):
            outputs += llm.llm_engine.step()
        [request] = scheduler.requests.values()
        scheduler.reset_prefix_cache(reset_running_requests=True)
        assert request.num_preemptions == 1
        num_output = request.num_output_tokens
        while llm.llm_engine.has_unfinished_requests():
            outputs += llm.llm_engine.step()
        [cuts] = [cuts for req_id, cuts in selections.cuts.items() if req_id.startswith(name)]
    assert len(cuts) == 2 * len(LAYERS), "the request was pruned twice"
    kept = cuts[len(LAYERS) :]
    assert kept == cuts[: len(LAYERS)], "the second time as at first"

    again = [cut for [cut] in specs[len(LAYERS) :]]
    for spec, first in zip(again, first_specs, strict=True):
        assert spec.num_output == num_output and first.num_output == 0
        assert (spec.num_prompt, spec.num_queries) == (first.num_prompt, first.num_queries)

    output = outputs[-1]
    assert tokens_out(output) == [len(cut) for cut in kept]
    tokens = list(output.outputs[0].token_ids)
    assert len(tokens) == NUM_TOKENS
    assert tokens[:num_output] == list(alone.outputs[0].token_ids)[:num_output]
    truth = Oracle(checkpoint).run(
        prompt,
        NUM_TOKENS - 1,
        selection_layers=LAYERS,
        block_size=BLOCK,
        top_p=CONFIG["top_p"],
        forced_tokens=tokens,
        kept_sets=kept,
        num_resumed=num_output,
        **FORCED,
    )
    for cut, ours in zip(truth.cuts, kept, strict=True):
        differs = cut.blocks_kept(ours) != cut.selection.kept
        assert not (differs & ~cut.selection.undecided(MASS_TOLERANCE)).any()
    right = torch.cat([truth.prefill_logits[None], truth.decode_logits])
    errors = [relative_error(a, b) for a, b in zip(logits_of(output), right, strict=True)]
    assert max(errors) <= MAX_RELATIVE_ERROR


def test_a_resumed_request_is_counted_once(llm, monkeypatch) -> None:
    """In the metrics' source and in the report."""
    scheduler = scheduler_of(llm)
    taken: list = []
    take = scheduler._take_stats

    def keep(ended):
        taken.extend(ended)
        return take(ended)

    monkeypatch.setattr(scheduler, "_take_stats", keep)
    add(llm, "counted-once", random_prompt(400, seed=9))
    for _ in range(5):
        llm.llm_engine.step()
    scheduler.reset_prefix_cache(reset_running_requests=True)
    while llm.llm_engine.has_unfinished_requests():
        outputs = llm.llm_engine.step()
    [prefill] = taken
    assert prefill.dense_reason is None and prefill.alive[0] == 400
    assert tokens_out(outputs[-1]) == prefill.alive[1:]
