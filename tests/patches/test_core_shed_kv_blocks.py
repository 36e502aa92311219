"""core-shed-kv-blocks.patch: how layers are divided into KV cache groups, and what these return.

That traffic with such groups leaks no block and reads none that it returned is tested with the scheduler
(test_core_schedule_pruned_prompts.py) and the worker (test_worker_run_segments.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups, get_kv_cache_groups
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import UNIPREFILL_ROLE, FullAttentionSpec, KVCacheGroupRole
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import RequestStatus
from vllm.v1.uniprefill.kv_groups import MAX_GROUPS, MAX_PADDING, plan_groups
from vllm.v1.uniprefill.ledger import EndedPrefill, KVBlocks
from vllm.v1.uniprefill.step_plan import StepPlan

UNIPREFILL = {"top_p": 0.9, "selection_layers": [1, 4], "min_prompt_tokens": 64, "pool_tokens": 900}
SEGMENTS = (0, 1, 1, 2)


# --- the plan --------------------------------------------------------------------------


def odd(num_layers: int) -> list[int]:
    return list(range(1, num_layers, 2))


def every(step: int, num_layers: int) -> list[int]:
    return list(range(step - 1, num_layers, step))


def rest(full: list[int], num_layers: int) -> list[list[int]]:
    return [[i for i in range(num_layers) if i not in full]]


@pytest.mark.parametrize(
    ("full", "others", "first_cut", "groups", "size"),
    [
        pytest.param(list(range(32)), [], 7, (1, 3, 0), 8, id="Llama-3.1-8B"),
        pytest.param(list(range(80)), [], 19, (1, 3, 0), 20, id="Llama-3.1-70B"),
        pytest.param(list(range(36)), [], 8, (1, 3, 0), 9, id="Qwen3-8B"),
        pytest.param(list(range(61)), [], 14, (1, 3, 0), 16, id="DeepSeek-V3"),
        pytest.param(list(range(8)), [], 1, (1, 3, 0), 2, id="needle"),
        pytest.param(odd(24), rest(odd(24), 24), 15, (2, 1, 3), 4, id="gpt-oss-20b"),
        pytest.param(every(4, 48), rest(every(4, 48), 48), 7, (1, 1, 6), 6, id="Qwen3-Next"),
    ],
)
def test_plans_of_known_models(full, others, first_cut, groups, size) -> None:
    plan = plan_groups(full, others, first_cut)
    assert (len(plan.dense), len(plan.shedding), sum(map(len, plan.others))) == groups
    assert plan.size == size


@pytest.mark.parametrize(
    ("full", "num_layers", "first_cut"),
    [(every(6, 48), 48, 29), ([5, 15, 25, 35], 40, 5), ([3], 8, 3)],
    ids=["Gemma-3-12B", "Granite-4-H-small", "one layer"],
)
def test_no_plan_where_groups_would_be_too_many_or_padded(full, num_layers, first_cut) -> None:
    assert plan_groups(full, rest(full, num_layers), first_cut) is None


@given(st.integers(2, 100), st.data())
def test_a_plan_partitions_the_layers(num_layers: int, data: st.DataObject) -> None:
    full = sorted(data.draw(st.sets(st.integers(0, num_layers - 1), min_size=2)))
    first_cut = data.draw(st.sampled_from(full[:-1]))
    others = [layers for layers in rest(full, num_layers) if layers]
    plan = plan_groups(full, others, first_cut)
    if plan is None:
        return
    assert [i for group in (*plan.dense, *plan.shedding) for i in group] == full
    assert all(layer > first_cut for group in plan.shedding for layer in group) and plan.shedding
    assert [sorted(i for group in kind for i in group) for kind in plan.others] == others
    groups = [*plan.dense, *plan.shedding, *(group for kind in plan.others for group in kind)]
    assert len(groups) == plan.num_groups <= MAX_GROUPS and max(map(len, groups)) <= plan.size
    assert plan.padding(len(full)) <= MAX_PADDING


# --- the groups of a model --------------------------------------------------------------


def specs() -> dict[str, FullAttentionSpec]:
    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=32, dtype=torch.bfloat16)
    return {f"model.layers.{i}.self_attn.attn": spec for i in range(8)}


def test_layers_are_divided_in_depth_order(configure) -> None:
    config = configure(UNIPREFILL)
    config.cache_config.kv_cache_layout = "LBHNC"
    groups = get_kv_cache_groups(config, specs())
    assert [(len(group.layer_names), group.role, group.segment) for group in groups] == [
        (2, KVCacheGroupRole.DEFAULT, 0),
        (2, UNIPREFILL_ROLE, 1),
        (2, UNIPREFILL_ROLE, 1),
        (2, UNIPREFILL_ROLE, 2),
    ]
    assert [name for group in groups for name in group.layer_names] == list(specs())
    stock = get_kv_cache_groups(configure(None), specs())
    memory = 16 << 20
    blocks, stock_blocks = (
        get_kv_cache_config_from_groups(config, found, memory).num_blocks for found in (groups, stock)
    )
    assert blocks == 4 * stock_blocks, "a dense token takes the same memory"


@pytest.mark.parametrize("off", ["no flag", "free_kv", "disable_hybrid_kv_cache_manager"])
def test_groups_are_the_releases_where_nothing_is_to_be_returned(configure, off: str) -> None:
    settings = {"no flag": None, "free_kv": UNIPREFILL | {"free_kv": False}}.get(off, UNIPREFILL)
    more = {off: True} if off.startswith("disable") else {}
    (group,) = get_kv_cache_groups(configure(settings, **more), specs())
    assert (group.role, group.segment, group.layer_names) == (KVCacheGroupRole.DEFAULT, 0, list(specs()))


# --- what is returned -------------------------------------------------------------------


def free_blocks(scheduler: Scheduler) -> int:
    return scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


@pytest.fixture
def make(make_scheduler) -> Callable[..., Scheduler]:
    return lambda **more: make_scheduler(UNIPREFILL, segments=SEGMENTS, max_num_batched_tokens=1024, **more)


def ended_prefills(scheduler: Scheduler, monkeypatch) -> list[EndedPrefill]:
    """Those that end from now on."""
    ended, close = [], scheduler.ledger.close

    def noted(req_id: str) -> Any:
        if closed := close(req_id):
            ended.append(closed[1])
        return closed

    monkeypatch.setattr(scheduler.ledger, "close", noted)
    return ended


def test_blocks_come_back_when_the_scheduler_hears_of_them(make, make_request, finish_step, monkeypatch) -> None:
    """Those of whole blocks in later groups, by what their first layer dropped; all others when the request ends."""
    scheduler = make()
    before = free_blocks(scheduler)
    ended = ended_prefills(scheduler, monkeypatch)
    request = make_request(320, max_tokens=20)
    scheduler.add_request(request)
    step = scheduler.schedule()
    assert before - free_blocks(scheduler) == 4 * 20
    finish_step(scheduler, step, {request.request_id: [320, 130, 40]})
    # 190 dropped are 11 blocks, 280 are 17
    assert before - free_blocks(scheduler) == 20 + 2 * (20 - 11) + (20 - 17)
    assert [prefill.kv_blocks for prefill in ended] == [[KVBlocks(1, 20 - n, n) for n in (0, 11, 11, 17)]]
    step = scheduler.schedule()  # a new block in every group
    assert before - free_blocks(scheduler) == 20 + 2 * 9 + 3 + 4
    finish_step(scheduler, step)
    scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
    assert free_blocks(scheduler) == before


class Lane:
    """A scheduler whose steps take 128 tokens, and a worker that says what it keeps."""

    def __init__(self, make_scheduler, finish_step, num_blocks: int = 1000, **more) -> None:
        self.finish_step = finish_step
        self.scheduler = make_scheduler(UNIPREFILL, num_blocks, segments=SEGMENTS, max_num_batched_tokens=128, **more)
        self.free = free_blocks(self.scheduler)

    def step(self, kept: dict | None = None) -> StepPlan | None:
        step = self.scheduler.schedule()
        self.finish_step(self.scheduler, step, kept)
        return step.uniprefill

    @property
    def held(self) -> int:
        return self.free - free_blocks(self.scheduler)

    def prune(self, request) -> list[int]:
        """The blocks held after each report."""
        while self.step().lane.rows == 0:
            pass
        held = []
        for alive in ([320, 130], [320, 130, 40], [320, 130, 40]):
            self.step({request.request_id: alive})
            held.append(self.held)
        return held


def test_in_the_lane_a_group_takes_blocks_when_the_prompt_gets_to_it(
    make_scheduler, make_request, finish_step, monkeypatch
) -> None:
    """And only those of what it keeps: 190 dropped are 11 blocks of 20, 280 are 17. The peak is what it holds then."""
    lane = Lane(make_scheduler, finish_step)
    ended = ended_prefills(lane.scheduler, monkeypatch)
    request = make_request(320, max_tokens=20)
    lane.scheduler.add_request(request)
    for held in (8, 16, 20):
        assert lane.step().lane.num_segments == 1 and lane.held == held
    assert lane.step({request.request_id: [320, 130]}).lane.num_segments == 1 and lane.held == 20
    assert lane.step().lane.num_segments == 2 and lane.held == 20 + 2 * 9
    lane.step({request.request_id: [320, 130, 40]})
    assert lane.step().lane.num_segments is None and lane.held == 20 + 2 * 9 + 3
    lane.step({request.request_id: [320, 130, 40]})
    assert lane.held == 20 + 2 * 9 + 3 and lane.scheduler.lane is None
    lane.step()
    assert [prefill.kv_blocks for prefill in ended] == [[KVBlocks(1, 20 - n, n) for n in (0, 11, 11, 17)]]
    lane.scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
    assert lane.held == 0
    managers = lane.scheduler.kv_cache_manager.coordinator.single_type_managers
    assert not any("allocate_new_blocks" in vars(manager) for manager in managers), "others pay for no lane"


def test_the_blocks_that_a_worker_hears_of_begin_with_null(make_scheduler, make_request, finish_step) -> None:
    """So that its table has a block's place for every token's position."""
    lane = Lane(make_scheduler, finish_step)
    request = make_request(320)
    lane.scheduler.add_request(request)
    tables = [[] for _ in SEGMENTS]
    for kept in (None, None, None, {request.request_id: [320, 130]}, {request.request_id: [320, 130, 40]}, None):
        step = lane.scheduler.schedule()
        new = step.scheduled_new_reqs
        blocks = new[0].block_ids if new else step.scheduled_cached_reqs.new_block_ids[0]
        for table, more in zip(tables, blocks or [()] * 4, strict=True):
            table.extend(more)
        finish_step(lane.scheduler, step, kept)
    assert [len(table) for table in tables] == [20] * 4
    assert [sum(block == 0 for block in table) for table in tables] == [0, 11, 11, 17]
    assert [table[:n] for table, n in zip(tables, (0, 11, 11, 17), strict=True)] == [[0] * n for n in (0, 11, 11, 17)]


@pytest.mark.parametrize(
    ("num_preemptions", "admitted"), [(0, True), (1, False)], ids=["at first", "after a preemption"]
)
def test_a_prompt_is_admitted_if_what_the_last_one_kept_would_fit(
    make_scheduler, make_request, finish_step, num_preemptions: int, admitted: bool
) -> None:
    """The first one, and one that was preempted, only if all of it would: 80 blocks."""
    lane = Lane(make_scheduler, finish_step, num_blocks=1 + 79)
    lane.scheduler.add_request(make_request(320))
    assert lane.step() is None
    lane = Lane(make_scheduler, finish_step, num_blocks=1 + 90)
    first, second = make_request(320), make_request(320)
    lane.scheduler.add_request(first)
    assert lane.prune(first) == [20, 38, 41]
    second.num_preemptions = num_preemptions
    lane.scheduler.add_request(second)
    step = lane.step()
    assert lane.free - lane.held <= 49 and (step is not None) == admitted


@pytest.mark.parametrize("steps", range(7))
def test_an_abort_in_the_lane_leaks_nothing(make_scheduler, make_request, finish_step, steps: int) -> None:
    lane = Lane(make_scheduler, finish_step)
    request, other = make_request(320), make_request(320)
    lane.scheduler.add_request(request)
    reports = [None, None, None, [320, 130], None, [320, 130, 40], None]
    for alive in reports[:steps]:
        lane.step(alive and {request.request_id: alive})
    lane.scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
    assert lane.held == 0
    lane.scheduler.add_request(other)
    assert lane.step().lane.num_segments == 1 and lane.held == 8


def test_a_report_from_before_a_preemption_returns_nothing(make, make_request, finish_step) -> None:
    scheduler = make(async_scheduling=True)
    request = make_request(320)
    scheduler.add_request(request)
    before = free_blocks(scheduler)
    step = scheduler.schedule()
    scheduler.reset_prefix_cache(reset_running_requests=True)
    again = scheduler.schedule()
    held = before - free_blocks(scheduler)
    finish_step(scheduler, step, {request.request_id: [320, 130, 40]})
    assert before - free_blocks(scheduler) == held
    finish_step(scheduler, again, {request.request_id: [320, 320, 320]})
    assert before - free_blocks(scheduler) == held


def test_an_output_from_before_a_preemption_has_its_own_report(make, make_request, monkeypatch) -> None:
    """Preempted for want of blocks, a request still gets the token that was on its way."""
    scheduler = make(async_scheduling=True)
    request = make_request(320)
    scheduler.add_request(request)
    step = scheduler.schedule()
    scheduler.running.remove(request)
    scheduler._preempt_request(request, 0.0)
    before, ended = free_blocks(scheduler), ended_prefills(scheduler, monkeypatch)
    output = ModelRunnerOutput([request.request_id], {request.request_id: 0}, sampled_token_ids=[[7]])
    output.uniprefill_kept = {request.request_id: [320, 130, 40]}
    scheduler.update_from_output(step, output)
    assert request.num_output_tokens == 1 and [prefill.alive for prefill in ended] == [[320, 130, 40]]
    assert free_blocks(scheduler) == before


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75, 0.9])
def test_eviction_takes_as_much_of_a_prefix_as_with_one_group(
    make_scheduler, make_request, finish_step, share: float
) -> None:
    """Freed group after group, the first evictions would end every hit: it needs all groups."""
    hits = []
    for segments in ((0,), SEGMENTS):
        scheduler = make_scheduler(UNIPREFILL, 1 + 100 * len(segments), segments=segments, max_num_batched_tokens=2048)
        tokens = list(range(16 * 90))
        for prompt in (tokens, int(16 * (10 + 90 * share))):
            request = make_request(prompt, max_tokens=1, extra={"uniprefill": 0})
            scheduler.add_request(request)
            finish_step(scheduler, scheduler.schedule())
            assert request.is_finished()
        hits.append(scheduler.kv_cache_manager.get_computed_blocks(make_request(tokens, extra={"uniprefill": 0}))[1])
    assert hits[0] == hits[1] and abs(hits[0] - 16 * 90 * (1 - share)) <= 32


def test_without_such_groups_requests_are_freed_as_in_the_release(make_scheduler) -> None:
    assert make_scheduler(UNIPREFILL).kv_cache_manager.coordinator.sheds_blocks is False
    assert make_scheduler(UNIPREFILL, segments=SEGMENTS).kv_cache_manager.coordinator.sheds_blocks is True
