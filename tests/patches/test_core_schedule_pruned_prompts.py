"""core-schedule-pruned-prompts.patch: whole prompts, the lane, and the account of every prefill."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from vllm.platforms import current_platform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.sched.uniprefill_scheduler import UniPrefillAsyncScheduler, UniPrefillScheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.uniprefill.ledger import PrefillLedger
from vllm.v1.uniprefill.step_plan import LaneGrant, StepPlan

BUDGET = 256
MAX_SEQS = 4
POOL = 900
LIMITS = {"max_num_batched_tokens": BUDGET, "max_num_seqs": MAX_SEQS}
UNIPREFILL = {"top_p": 0.9, "selection_layers": [1, 4], "min_prompt_tokens": 64, "pool_tokens": POOL}
DENSE = {"uniprefill": 0}
KV_BLOCK = 16
KEPT = [600, 300, 100]  # of a prompt of 600


class Engine:
    """A scheduler whose steps a worker finishes at once."""

    def __init__(self, scheduler: Scheduler, make_request: Callable, finish_step: Callable) -> None:
        self.scheduler, self.make_request, self.finish_step = scheduler, make_request, finish_step
        self.outputs: dict[str, Any] = {}

    def add(self, *args: Any, **kwargs: Any) -> Request:
        request = self.make_request(*args, **kwargs)
        self.scheduler.add_request(request)
        return request

    def step(self, kept: dict | None = None) -> SchedulerOutput:
        step = self.scheduler.schedule()
        self.outputs = self.finish_step(self.scheduler, step, kept)
        return step

    def took(self, *requests: Request, kept: dict | None = None) -> list[int]:
        """How many tokens of these requests a step takes."""
        step = self.step(kept)
        return [step.num_scheduled_tokens.get(request.request_id, 0) for request in requests]

    def preempt_all(self) -> None:
        self.scheduler.reset_prefix_cache(reset_running_requests=True)
        assert not self.scheduler.running


@pytest.fixture
def make_engine(make_scheduler, make_request, finish_step) -> Callable[..., Engine]:
    def make(uniprefill: dict | None = None, **arguments: Any) -> Engine:
        scheduler = make_scheduler(UNIPREFILL | (uniprefill or {}), **(LIMITS | arguments))
        return Engine(scheduler, make_request, finish_step)

    return make


@pytest.fixture
def engine(make_engine) -> Engine:
    return make_engine()


@pytest.mark.parametrize(("asynchronous", "cls"), [(False, UniPrefillScheduler), (True, UniPrefillAsyncScheduler)])
def test_the_flag_chooses_the_scheduler(configure, monkeypatch, asynchronous: bool, cls: type) -> None:
    monkeypatch.setattr(current_platform, "check_and_update_config", lambda _: None)  # a CPU's is synchronous
    config = configure({}, async_scheduling=asynchronous)
    assert config.scheduler_config.get_scheduler_cls() is cls
    stock = configure(None, async_scheduling=asynchronous).scheduler_config.get_scheduler_cls()
    assert stock is (AsyncScheduler if asynchronous else Scheduler)


# --- prompts that fit a step -----------------------------------------------------------


def test_prompts_that_fit_are_taken_whole_beside_decodes(engine) -> None:
    """And the worker is told which, with their decisions."""
    decodes = [engine.add(20) for _ in range(2)]
    assert engine.step().uniprefill is None
    first, second = engine.add(150), engine.add(104)
    step = engine.step()
    assert list(step.num_scheduled_tokens.values()) == [1, 1, 150, 104]
    assert step.uniprefill == StepPlan(whole=frozenset({first.request_id, second.request_id}))
    assert [new.prefill_decision for new in step.scheduled_new_reqs] == [
        first.prefill_decision,
        second.prefill_decision,
    ]
    assert first.compacts_kv and decodes[0].prefill_decision.dense_reason == "short_prompt"
    step = engine.step()
    assert step.num_scheduled_tokens == dict.fromkeys(step.num_scheduled_tokens, 1) and step.uniprefill is None


def test_without_a_pool_a_prompt_waits_for_room(make_engine) -> None:
    """Where a dense prompt takes what is left."""
    for extra, expected in ((None, [0, 150]), (DENSE, [112, 38])):
        engine = make_engine({"pool_tokens": 0})
        running = engine.add(400, extra=DENSE)
        assert engine.took(running) == [BUDGET]
        waiting = engine.add(150, extra=extra)
        assert [*engine.took(waiting), *engine.took(waiting)] == expected


def test_without_a_pool_a_prompt_waits_until_all_its_images_can_be_encoded(make_engine, monkeypatch) -> None:
    """Where a dense one starts with the tokens before the first image that cannot."""
    monkeypatch.setattr(Request, "has_encoder_inputs", True)
    for extra, expected in ((None, [0, 150]), (DENSE, [50, 100])):
        engine = make_engine({"pool_tokens": 0})
        request = engine.add(150, extra=extra)
        limits = iter([50, 150])

        def encode(request, computed, new, budget, **_):
            return [], min(new, next(limits)), budget, [], []  # noqa: B023

        monkeypatch.setattr(engine.scheduler, "_try_schedule_encoder_inputs", encode)
        assert [*engine.took(request), *engine.took(request)] == expected


def test_a_prompt_that_waits_for_the_lane_holds_no_encoder_outputs(make_engine, monkeypatch) -> None:
    """The one in the lane may need their room, and would wait for ever."""
    monkeypatch.setattr(Request, "has_encoder_inputs", True)
    engine = make_engine(long_prefill_token_threshold=100)
    held = set()

    def encode(request, computed, new, budget, **_):
        held.add(request.request_id)
        return [], new, budget, [], []

    monkeypatch.setattr(engine.scheduler, "_try_schedule_encoder_inputs", encode)
    monkeypatch.setattr(
        engine.scheduler.encoder_cache_manager, "free", lambda request: held.discard(request.request_id)
    )
    lane, waiting = engine.add(600), engine.add(600)
    for _ in range(3):
        assert engine.took(lane, waiting) == [100, 0]
        assert held == {lane.request_id}


def test_a_preempted_request_is_taken_whole_with_its_outputs(engine) -> None:
    """What outputs do not fit follow as a stock chunk."""
    request = engine.add(250)
    for _ in range(10):
        engine.step()
    engine.preempt_all()
    step = engine.step()
    assert step.num_scheduled_tokens[request.request_id] == BUDGET
    assert step.uniprefill == StepPlan(whole=frozenset({request.request_id}))
    (resumed,) = step.scheduled_new_reqs  # the V2 model runner gets it as a new one
    assert resumed.prefill_decision is request.prefill_decision and resumed.num_computed_tokens == 0
    assert engine.took(request) == [4] and request.num_output_tokens == 11
    assert engine.took(request) == [1]


@pytest.mark.parametrize("pool", [0, POOL])
def test_a_prompt_does_not_starve_under_dense_traffic(make_engine, pool: int) -> None:
    """New dense prompts come every step, each large enough to crowd it out."""
    engine = make_engine({"pool_tokens": pool})
    for _ in range(6):
        engine.add(200, max_tokens=3, extra=DENSE)
    long = engine.add(250, max_tokens=1)
    for _ in range(40):
        engine.add(200, max_tokens=3, extra=DENSE)
        ready = engine.scheduler.lane is long and long.num_computed_tokens == 249
        engine.step({long.request_id: [250, 100, 100]} if ready else None)
    assert long.is_finished()


# --- the lane --------------------------------------------------------------------------


def test_the_last_token_of_a_long_prompt_is_taken_back_until_it_is_ready(engine) -> None:
    long = engine.add(600)
    seen = []
    for kept in (None, None, None, None, {long.request_id: KEPT}, None, None):
        step = engine.scheduler.schedule()
        grant = step.uniprefill and step.uniprefill.lane
        seen.append((step.num_scheduled_tokens[long.request_id], long.num_computed_tokens, grant and grant.rows))
        engine.finish_step(engine.scheduler, step, kept)
    assert seen == [
        (256, 256, 0),
        (256, 512, 0),
        (88, 599, BUDGET),
        (1, 599, BUDGET),
        (1, 599, BUDGET),
        (1, 600, None),
        (1, 601, None),
    ]
    assert long.num_output_tokens == 2 and engine.scheduler.lane is None
    assert LaneGrant("r").takes_back is False and LaneGrant("r", 1).takes_back


def test_a_chunk_that_leaves_one_token_changes_nothing(engine) -> None:
    """The last token is then a chunk of its own, not yet one that stands for later segments."""
    long = engine.add(BUDGET + 1)
    grants = [engine.step().uniprefill.lane.rows for _ in range(3)]
    assert grants == [0, BUDGET, BUDGET] and long.num_computed_tokens == BUDGET
    engine.step({long.request_id: [257, 200, 100]})
    assert engine.took(long) == [1] and long.num_output_tokens == 1


def test_decodes_go_on_and_other_prefills_wait_for_the_lanes_rows(engine) -> None:
    decodes = [engine.add(20, max_tokens=50), engine.add(20, max_tokens=50)]
    engine.step()
    long = engine.add(600)
    dense = engine.add(100, extra=DENSE)
    takes = [engine.took(*decodes, long, dense) for _ in range(2)]
    assert takes == [[1, 1, 254, 0]] * 2
    assert engine.took(*decodes, long, dense) == [1, 1, 92, 100]
    assert engine.took(*decodes, long, dense) == [1, 1, 1, 1]
    late = engine.add(100, extra=DENSE)
    step = engine.step()
    assert late.request_id not in step.num_scheduled_tokens
    assert step.uniprefill.lane == LaneGrant(long.request_id, BUDGET - 3)
    engine.step({long.request_id: KEPT})
    assert engine.took(*decodes, long, dense) == [1, 1, 1, 1]


def test_a_dense_prefill_before_it_goes_on(make_engine) -> None:
    """The lane gets the rows that are left, up to the threshold."""
    engine = make_engine(long_prefill_token_threshold=100)
    dense, long = engine.add(480, extra=DENSE), engine.add(250)
    takes = [engine.took(dense, long) for _ in range(4)]
    assert takes == [[100, 100], [100, 100], [100, 50], [100, 1]]
    step = engine.step()
    assert step.num_scheduled_tokens[dense.request_id] == 80
    assert step.uniprefill.lane == LaneGrant(long.request_id, 100)


def test_a_busy_lane_holds_up_only_those_who_need_it(engine) -> None:
    """First come, first served among these."""
    first, second, third = engine.add(300), engine.add(400), engine.add(350)
    dense = engine.add(30)
    assert engine.took(first, second, third, dense) == [256, 0, 0, 0]
    assert engine.took(first, second, third, dense) == [44, 0, 0, 30]
    assert engine.took(first, second, third, dense, kept={first.request_id: [300, 100, 50]}) == [1, 0, 0, 1]
    assert engine.scheduler.lane is None
    assert engine.took(first, second, third, dense) == [1, 254, 0, 1]
    engine.scheduler.finish_requests(second.request_id, RequestStatus.FINISHED_ABORTED)
    assert engine.took(first, third, dense) == [1, 254, 1]


def test_a_prompt_beyond_the_pool_is_a_stock_prefill(engine) -> None:
    dense = engine.add(POOL + 1)
    steps = [engine.step() for _ in range(4)]
    assert [step.num_scheduled_tokens[dense.request_id] for step in steps] == [256, 256, 256, 133]
    assert {step.uniprefill for step in steps} == {None} and dense.num_output_tokens == 1


def test_the_long_prefill_threshold_bounds_the_lane_unless_it_is_alone(make_engine) -> None:
    engine = make_engine(long_prefill_token_threshold=100)
    long, decode = engine.add(250), engine.add(20, max_tokens=5)
    grants = []
    for expected in ([100, 20], [100, 1], [50, 1], [1, 1], [1, 1], [1, 0]):
        step = engine.step()
        assert [step.num_scheduled_tokens.get(r.request_id, 0) for r in (long, decode)] == expected
        grants.append(step.uniprefill.lane.rows)
    assert grants == [0, 0, 100, 100, 100, BUDGET]


def test_without_a_pool_the_threshold_does_not_starve_prompts(make_engine) -> None:
    engine = make_engine({"pool_tokens": 0}, long_prefill_token_threshold=200)
    requests = [engine.add(prompt, max_tokens=1) for prompt in (200, 250, 250)]
    for _ in range(5):
        engine.step()
    assert [request.is_finished() for request in requests] == [True] * 3


def test_a_preempted_prompt_starts_again_and_its_outputs_follow_the_lane(engine) -> None:
    long = engine.add(600)
    for _ in range(4):
        engine.step()
    engine.preempt_all()
    takes = [engine.took(long) for _ in range(4)]
    assert takes == [[256], [256], [88], [1]]
    engine.step({long.request_id: KEPT})
    for _ in range(5):
        engine.step()
    assert long.num_output_tokens == 5
    engine.preempt_all()
    takes = [engine.took(long) for _ in range(4)]
    assert takes == [[256], [256], [88], [1]] and long.num_computed_tokens == 599
    engine.step({long.request_id: KEPT})
    assert engine.took(long) == [6] and long.num_output_tokens == 6


def test_a_report_from_before_a_preemption_does_not_end_the_prefill_after_it(make_engine) -> None:
    engine = make_engine(cls=UniPrefillAsyncScheduler)
    scheduler = engine.scheduler
    long = engine.add(300)
    engine.step()
    before = scheduler.schedule()  # completes the prompt; not yet finished
    engine.preempt_all()
    after = scheduler.schedule()
    assert after.num_scheduled_tokens == {long.request_id: BUDGET} and scheduler.lane is long
    engine.finish_step(scheduler, before, {long.request_id: [300, 100, 100]})
    assert scheduler.lane is long
    engine.finish_step(scheduler, after)
    engine.step({long.request_id: [300, 100, 100]})
    assert scheduler.lane is None and engine.took(long) == [1]


# --- the prefix cache ------------------------------------------------------------------


@pytest.mark.parametrize("writer", ["dense", "pruned"])
@pytest.mark.parametrize("reader", ["dense", "pruned"])
@pytest.mark.parametrize("finished", [False, True], ids=["running", "finished"])
def test_only_dense_requests_share_a_prefix(engine, writer, reader, finished) -> None:
    """Also the outputs that a pruned request appended."""
    kind = {"dense": DENSE, "pruned": {"uniprefill": 1}}
    prompt = list(range(100))
    first = engine.add(prompt, max_tokens=40, extra=kind[writer])
    for _ in range(40 if finished else 30):
        engine.step()
    assert first.is_finished() == finished
    second = engine.add([*prompt, *first.output_token_ids], extra=kind[reader])
    found = {new.req_id: new.num_computed_tokens for new in engine.step().scheduled_new_reqs}[second.request_id]
    assert (found >= 112) if (writer, reader) == ("dense", "dense") else found == 0


# --- the ledger ------------------------------------------------------------------------


def test_the_ledger_closes_a_prefill_once(configure, make_request) -> None:
    ledger = PrefillLedger(configure(UNIPREFILL, **LIMITS))
    pruned, dense, gone = make_request(600), make_request(20), make_request(600)
    for request in (pruned, dense, gone):
        request.arrival_time = time.time() - 5
        ledger.open(request)
    assert ledger.count_unstarted(BUDGET) == 2 and ledger.count_unstarted(600) == 0
    ids = [request.request_id for request in (pruned, dense, gone)]
    ledger.record_step([*ids[:2], "unknown"])
    ledger.record_step(ids[:1])
    ledger.record_lane_wait(ids[0], 1.5)
    ledger.record_kept(ids[0], (600, 300, 100))
    ledger.record_kept("unknown", (600, 300, 100))
    assert ledger.count_unstarted(BUDGET) == 1
    decision, ended = ledger.close(ids[0])
    assert decision is pruned.prefill_decision and 5 <= ended.time_to_first_token < 65
    assert (ended.dense_reason, ended.alive, ended.steps, ended.lane_wait) == (None, KEPT, 2, 1.5)
    _, ended = ledger.close(ids[1])
    assert (ended.dense_reason, ended.alive, ended.steps, ended.lane_wait) == ("short_prompt", [20] * 3, 1, 0)
    ledger.forget(ids)
    assert [ledger.close(req_id) for req_id in ids] == [None] * 3


# --- the whole ------------------------------------------------------------------------


@dataclass
class Held:
    """A request in the simulated worker."""

    num_prompt: int
    num_tokens: int
    pruned: bool
    computed: int
    tables: tuple[list[int], ...]
    kept: list[int] | None = None

    @property
    def ready(self) -> bool:
        return self.kept is not None


@dataclass
class SimulatedLane:
    """Its prompt, tokens alive on entry to each segment, where it is, what is left there, and where it last ran."""

    req_id: str
    counts: list[int]
    segment: int = 0
    left: int = 0
    ran: int = 0


class SimulatedWorker:
    """Keeps counters and block tables as the model runner does, and runs the lane's rows as they are granted.

    `segments`: of each KV cache group.
    """

    def __init__(self, rng: random.Random, segments: tuple[int, ...]) -> None:
        self.rng, self.segments = rng, segments
        self.held: dict[str, Held] = {}
        self.lane: SimulatedLane | None = None

    def remove(self, req_id: str) -> None:
        self.held.pop(req_id, None)
        if self.lane and self.lane.req_id == req_id:
            self.lane = None

    def run(self, step: SchedulerOutput) -> ModelRunnerOutput:
        for req_id in step.finished_req_ids | (step.preempted_req_ids or set()):
            self.remove(req_id)
        for new in step.scheduled_new_reqs:
            self.remove(new.req_id)
            num_prompt, num_tokens = len(new.prompt_token_ids), len(new.prefill_token_ids)
            pruned = new.prefill_decision.pruned
            tables = tuple(list(blocks) for blocks in new.block_ids)
            self.held[new.req_id] = Held(num_prompt, num_tokens, pruned, new.num_computed_tokens, tables)
        cached = step.scheduled_cached_reqs
        for req_id, computed, blocks in zip(
            cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True
        ):
            assert computed == self.held[req_id].computed, "the counters agree"
            for table, more in zip(self.held[req_id].tables, blocks or (), strict=bool(blocks)):
                table.extend(more)
        plan = step.uniprefill or StepPlan()
        kept, waiting, sampled = {}, {}, []
        for req_id, num_tokens in step.num_scheduled_tokens.items():
            held = self.held[req_id]
            if req_id in plan.whole:
                assert held.computed == 0 and num_tokens >= held.num_prompt
                kept[req_id] = self.choose(held)
            held.computed += num_tokens
            sampled.append([7] if held.computed >= held.num_tokens else [])
            if plan.lane and plan.lane.req_id == req_id:
                if counts := self.advance(plan.lane, held, step.total_num_scheduled_tokens - num_tokens):
                    (kept if self.lane.segment == len(self.lane.counts) else waiting)[req_id] = counts
                if plan.lane.takes_back:
                    held.computed -= 1
                    sampled[-1] = []
                assert not sampled[-1] and held.computed < held.num_prompt
            assert held.ready or req_id in kept or not held.pruned or not sampled[-1], "nothing is sampled before ready"
            held.num_tokens += len(sampled[-1])
        live = [block for req_id in step.num_scheduled_tokens for block in self.live(self.held[req_id])]
        assert 0 not in live, "every token that is read or written has a block"
        assert len(set(live)) == len(live), "of its own"
        for req_id, counts in kept.items():
            self.held[req_id].kept = counts
        ids = list(step.num_scheduled_tokens)
        return ModelRunnerOutput(
            ids, {req_id: i for i, req_id in enumerate(ids)}, sampled_token_ids=sampled, uniprefill_kept=kept | waiting
        )

    def choose(self, held: Held) -> list[int]:
        second = self.rng.randint(1, held.num_prompt)
        return [held.num_prompt, second, self.rng.randint(1, second)]

    def live(self, held: Held) -> list[int]:
        """The blocks that hold its tokens, or are about to."""
        counts, ran = held.kept or [held.num_prompt] * 3, 2
        if self.lane and held is self.held.get(self.lane.req_id):
            counts, ran = self.lane.counts, self.lane.ran
        num_blocks = -(-max(held.computed, held.num_prompt * bool(held.kept)) // KV_BLOCK)
        found = []
        for table, segment in zip(held.tables, self.segments, strict=True):
            if segment <= ran:
                assert len(table) >= num_blocks
                found += table[(counts[0] - counts[segment]) // KV_BLOCK : num_blocks]
        return found

    def advance(self, grant: LaneGrant, held: Held, others: int) -> list[int]:
        """Run the rows granted: what is alive, if the prompt is done or comes to a segment without blocks."""
        assert 0 <= grant.rows <= BUDGET - others
        if self.lane is None or self.lane.req_id != grant.req_id:
            self.lane = SimulatedLane(grant.req_id, self.choose(held))
        lane = self.lane
        assert grant.takes_back == (held.computed == held.num_prompt)
        if not grant.takes_back:
            return []
        rows, before = grant.rows, lane.segment
        end = len(lane.counts) if grant.num_segments is None else grant.num_segments
        if lane.segment == 0:
            lane.segment = 1
            lane.left = lane.counts[1]
        while rows and lane.segment < end:
            num_rows = min(rows, lane.left)
            rows, lane.left, lane.ran = rows - num_rows, lane.left - num_rows, lane.segment
            if lane.left == 0:
                lane.segment += 1
                lane.left = lane.counts[lane.segment] if lane.segment < len(lane.counts) else 0
        return lane.counts[: lane.segment + 1] if before < lane.segment >= end else []


@pytest.mark.parametrize(
    ("cls", "depth"),
    [(UniPrefillScheduler, 1), (UniPrefillAsyncScheduler, 1), (UniPrefillAsyncScheduler, 2)],
    ids=["sync", "async", "async, batch queue of 2"],
)
@pytest.mark.parametrize("seed", range(25))
def test_random_traffic_is_served_with_equal_counters(make_scheduler, make_request, cls, depth: int, seed: int) -> None:
    """Dense, short and long pruned prompts; aborts, resets and, in a small KV cache, preemptions.

    With one KV cache group, and with several of which three return blocks.
    """
    rng = random.Random(seed)
    segments = ((0,), (0, 1, 1, 2))[seed % 2]
    num_blocks = 1 + rng.choice([70, 90, 400]) * len(segments)
    threshold = {"long_prefill_token_threshold": 100} if rng.random() < 0.25 else {}
    arguments = LIMITS | threshold | {"segments": segments, "async_scheduling": depth > 1}
    scheduler = make_scheduler(UNIPREFILL, num_blocks, cls=cls, **arguments)
    worker = SimulatedWorker(rng, segments)
    requests: list[Request] = []
    in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
    for number in range(3000):
        if number < 100 and rng.random() < 0.3:
            kind = rng.choice([(1, 60, None), (64, 900, DENSE), (64, BUDGET, None), (BUDGET, POOL, None)])
            requests.append(make_request(rng.randint(*kind[:2]), max_tokens=rng.randint(1, 40), extra=kind[2]))
            scheduler.add_request(requests[-1])
        if rng.random() < 0.03 and scheduler.requests:
            aborted = rng.choice(sorted(scheduler.requests))
            scheduler.finish_requests(aborted, RequestStatus.FINISHED_ABORTED)
        if rng.random() < 0.02:
            scheduler.reset_prefix_cache(reset_running_requests=True)
        decodes = [r for r in scheduler.running if not r.is_prefill_chunk and not ends(r)]
        if scheduler.has_requests():
            step = scheduler.schedule()
            in_flight.append((step, worker.run(step)))
            for request in decodes:
                scheduled = request.request_id in step.num_scheduled_tokens
                assert scheduled or request.status == RequestStatus.PREEMPTED, "every decode gets its token"
        elif number >= 100 and not in_flight:
            break
        if len(in_flight) == depth or not scheduler.has_requests():
            while in_flight:
                scheduler.update_from_output(*in_flight.popleft())
                if scheduler.has_requests():
                    break
    assert number < 2999 and len(requests) > 10
    assert all(request.is_finished() for request in requests)
    assert all(
        r.num_output_tokens == r.max_tokens for r in requests if r.status == RequestStatus.FINISHED_LENGTH_CAPPED
    )
    for req_id in scheduler.finished_req_ids:
        worker.remove(req_id)
    assert not worker.held and worker.lane is None
    scheduler.schedule()
    assert scheduler.lane is None and not scheduler.ledger.entries and not scheduler.requests
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == num_blocks - 1  # less the null block


def ends(request: Request) -> bool:
    """Whether the tokens in flight are its last."""
    return request.num_output_tokens + request.num_output_placeholders >= request.max_tokens


def test_without_the_flag_scheduling_is_the_releases(make_scheduler, make_request, finish_step) -> None:
    scheduler = make_scheduler(None, **LIMITS, long_prefill_token_threshold=96)
    engine = Engine(scheduler, make_request, finish_step)
    assert type(scheduler) is Scheduler
    first, second = engine.add(list(range(200))), engine.add(200)
    step = engine.step()
    assert list(step.num_scheduled_tokens.values()) == [96, 96]
    assert step.uniprefill is None and engine.outputs == {}
    assert [new.prefill_decision for new in step.scheduled_new_reqs] == [None, None]
    assert not first.compacts_kv and not first.skip_reading_prefix_cache
    while scheduler.has_unfinished_requests():
        engine.step()
    third = engine.add(list(range(200)))
    assert [new.num_computed_tokens for new in engine.step().scheduled_new_reqs] == [192]
    assert third.num_output_tokens == 1 and second.is_finished()
