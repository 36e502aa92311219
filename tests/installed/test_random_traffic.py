"""Random arrivals, lengths, aborts and preemptions leave right answers and nothing else."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import pytest
from engines import SMALL_CUTS, engine, generate, model_runner_of, scheduler_of
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from oracle.checkpoints import make_checkpoint
from vllm import SamplingParams, TokensPrompt

VOCAB = 1024
MAX_LEN = 640
LANE_BUDGET = 320  # the longer prompts take several steps
NUM_TOKENS = 32  # at most, of an answer
MANY_TOKENS = 90  # so many that three long requests outgrow the cache
NUM_BLOCKS = 48  # of 32 tokens: two or three long requests fill them
CONFIG = SMALL_CUTS | {"top_p": 0.7, "hops": 2}
# Preempted requests compute their output tokens again, in one batch instead of one by one, which
# rounds otherwise. A token may differ only where the best two were this close (log probability).
NEAR_TIE = 0.1
NAMES = itertools.count()


@dataclass(frozen=True)
class Arrival:
    """A request: when it comes, what it asks for, and when its client goes away."""

    step: int
    length: int
    max_tokens: int
    extra: tuple[tuple[str, float], ...]
    abort_after: int | None


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        step=st.integers(0, 25),
        length=st.sampled_from([3, 99, 100, 257, 400, 560]),
        max_tokens=st.integers(1, NUM_TOKENS),
        extra=st.sampled_from(
            [
                (),
                (("uniprefill", 0),),
                (("uniprefill_top_p", 0.4),),
                (("uniprefill_keep_ratio", 0.3),),
                (("uniprefill_hops", 1),),
                (("uniprefill_top_p", 1.0),),
            ]
        ),
        abort_after=st.none() | st.integers(0, 40),
    ),
    min_size=1,
    max_size=10,
)


@pytest.fixture(
    scope="module",
    params=[(True, LANE_BUDGET), (False, MAX_LEN + 6)],
    ids=["async scheduling, 320 tokens a step", "sync scheduling, 646 tokens a step"],
)
def llm(request, tmp_path_factory):
    async_scheduling, budget = request.param
    path = make_checkpoint(
        tmp_path_factory.mktemp("llama"), "llama", layers=4, hidden=128, heads=4, head_dim=32, seed=4
    )
    with engine(
        path,
        uniprefill=CONFIG,
        max_model_len=MAX_LEN,
        max_num_seqs=6,
        max_num_batched_tokens=budget,
        # Which chunks a prompt is cut into follows from what is beside it, and so does bf16's rounding.
        dtype="float32",
        num_gpu_blocks_override=NUM_BLOCKS,
        block_size=32,
        enable_prefix_caching=True,
        async_scheduling=async_scheduling,
    ) as llm:
        llm.expected = {}
        yield llm


def prompt_of(arrival: Arrival) -> list[int]:
    return random.Random(arrival.length).choices(range(VOCAB), k=arrival.length)


def expected(llm, arrival: Arrival):
    """What the request generates with nothing beside it, and the gap of the best two."""
    num_tokens = max(NUM_TOKENS, arrival.max_tokens)
    key = (arrival.length, arrival.extra, num_tokens)
    if key not in llm.expected:
        [output] = generate(llm, [prompt_of(arrival)], max_tokens=num_tokens, logprobs=2, **dict(arrival.extra))
        steps = output.outputs[0].logprobs
        ranked = [sorted((e.logprob for e in step.values()), reverse=True) for step in steps]
        llm.expected[key] = (list(output.outputs[0].token_ids), [r[0] - r[1] for r in ranked])
    return llm.expected[key]


def run(llm, arrivals: list[Arrival]) -> dict[int, list[int]]:
    """Drive the engine step by step; tokens of every request that was not aborted."""
    core = llm.llm_engine
    waiting = sorted(range(len(arrivals)), key=lambda i: arrivals[i].step)
    base = next(NAMES)
    internal: dict[int, str] = {}
    added_at: dict[int, int] = {}
    tokens: dict[int, list[int]] = {}
    for step in itertools.count():
        assert step < 3000, "the engine makes no progress"
        while waiting and arrivals[waiting[0]].step <= step:
            i = waiting.pop(0)
            params = SamplingParams(
                temperature=0,
                max_tokens=arrivals[i].max_tokens,
                ignore_eos=True,
                extra_args=dict(arrivals[i].extra),
            )
            prompt = TokensPrompt(prompt_token_ids=prompt_of(arrivals[i]))
            internal[i] = core.add_request(f"{base}-{i}", prompt, params)
            added_at[i] = step
        for i in list(internal):
            abort = arrivals[i].abort_after
            if abort is not None and step == added_at[i] + abort:
                core.abort_request([internal.pop(i)], internal=True)
        for output in core.step():
            if output.finished:
                i = int(output.request_id.split("-")[1])
                if internal.pop(i, None):
                    tokens[i] = list(output.outputs[0].token_ids)
        if not waiting and not internal and not core.has_unfinished_requests():
            return tokens


@settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(arrivals=ARRIVALS)
def test_right_tokens_and_nothing_left(llm, arrivals: list[Arrival]) -> None:
    truth = [expected(llm, arrival) for arrival in arrivals]
    scheduler = scheduler_of(llm)
    preemptions = count_preemptions(scheduler)
    tokens = run(llm, arrivals)
    event(f"preempted: {preemptions() > 0}")
    assert tokens.keys() >= {i for i, a in enumerate(arrivals) if a.abort_after is None}
    for i, found in tokens.items():
        right, gaps = truth[i]
        assert len(found) == arrivals[i].max_tokens
        for position, (ours, alone) in enumerate(zip(found, right, strict=False)):
            if ours != alone:
                assert gaps[position] < NEAR_TIE, f"request {i}, token {position}"
                break
    assert_nothing_left(llm)


def count_preemptions(scheduler):
    """A function that says how often the scheduler preempted since this call."""
    if not hasattr(scheduler, "preempt_count"):
        scheduler.preempt_count = 0
        preempt = scheduler._preempt_request

        def counted(*args, **kwargs):
            scheduler.preempt_count += 1
            return preempt(*args, **kwargs)

        scheduler._preempt_request = counted
    before = scheduler.preempt_count
    return lambda: scheduler.preempt_count - before


def assert_nothing_left(llm) -> None:
    scheduler, runner = scheduler_of(llm), model_runner_of(llm)
    # The worker hears of finished requests with the next step's batch.
    generate(llm, [[1, 2, 3]], uniprefill=0)
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # one is the null block
    assert not scheduler.requests and not scheduler.running and not scheduler.waiting
    assert scheduler.lane is None and not scheduler.ledger.entries
    state = runner.model_state
    assert not state.pruned and not state.kept and state.segment_runner.lane.prompt is None
    assert not state.segment_state.dropped_np.any() and not state.segment_state.dropped.any()


def test_preemption_happens_and_resumes_pruned(llm) -> None:
    """Three long pruned requests do not fit with their outputs; all end right."""
    arrivals = [Arrival(i, 440, MANY_TOKENS, (("uniprefill_top_p", 0.4),), None) for i in range(3)]
    truth, gaps = expected(llm, arrivals[0])
    preemptions = count_preemptions(scheduler_of(llm))
    tokens = run(llm, arrivals)
    assert preemptions() > 0, "the KV cache is too large for this test"
    for found in tokens.values():
        differing = [i for i, (a, b) in enumerate(zip(found, truth, strict=False)) if a != b]
        assert len(found) == MANY_TOKENS and (not differing or gaps[differing[0]] < NEAR_TIE)
    assert_nothing_left(llm)


def test_reasons_of_dense_requests(llm) -> None:
    def reason(length: int, **arguments) -> str | None:
        prompt = random.Random(1).choices(range(VOCAB), k=length)
        return generate(llm, [prompt], **arguments)[0].uniprefill["reason"]

    assert reason(99) == "short_prompt"
    assert reason(100) is None
    assert reason(200, uniprefill=0) == "disabled"
    assert reason(200, prompt_logprobs=1) == "prompt_logprobs"


def test_prompt_that_fits_no_step_is_dense_without_a_lane(tmp_path) -> None:
    path = make_checkpoint(tmp_path / "m", "llama", layers=4, hidden=128, heads=4, head_dim=32)
    prompt = random.Random(1).choices(range(VOCAB), k=500)
    config = CONFIG | {"pool_tokens": 0}
    with engine(path, uniprefill=config, max_model_len=1024, max_num_seqs=4, max_num_batched_tokens=256) as llm:
        fits, too_long = generate(llm, [prompt[:253], prompt[:254]])
        assert fits.uniprefill["reason"] is None
        assert too_long.uniprefill["reason"] == "prompt_exceeds_pool"
        assert too_long.uniprefill["segments"][-1]["tokens_out"] == 254
