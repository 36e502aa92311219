"""worker-run-hybrids.patch: the lane's last row apart, states put back, and segments that run their own layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.uniprefill.plan import Segment, SegmentPlan
from vllm.v1.uniprefill.step_plan import LaneGrant
from vllm.v1.worker.gpu.uniprefill import stages
from vllm.v1.worker.gpu.uniprefill.lane import Chunk, Lane, LanePrompt
from vllm.v1.worker.gpu.uniprefill.recurrent import RecurrentStates

PLAN = SegmentPlan(4, (1,))
BUDGET = 256
KEPT = [600, 300, 100]


# --- states ----------------------------------------------------------------------------


class Recurrent(MambaBase):
    """Holds states alone."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        self.kv_cache = tuple(torch.randn(shape) for shape in shapes)

    get_state_shape = get_state_dtype = mamba_type = None


def test_a_requests_states_go_back_in_one_segment_only() -> None:
    """Blocks 3 and 5 are its own; block 4 is another request's, and the other segment's layers go on."""
    layers = {
        "model.layers.0.mixer": Recurrent((8, 2, 3), (8, 4)),
        "model.layers.1.self_attn.attn": SimpleNamespace(),
        "model.layers.2.mixer": Recurrent((8, 2, 3), (8, 4)),
    }
    tables = [torch.tensor([[0], [3]]), torch.tensor([[9], [9]]), torch.tensor([[0], [5]])]
    states = RecurrentStates(
        SimpleNamespace(
            compilation_config=SimpleNamespace(static_forward_context=layers),
            model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: PLAN.num_layers),
        ),
        SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=[name]) for name in layers]),
        SimpleNamespace(block_tables=[SimpleNamespace(gpu=table) for table in tables]),
    )
    early, late = (layers[f"model.layers.{i}.mixer"].kv_cache for i in (0, 2))
    before = [[state.clone() for state in of] for of in (early, late)]
    with states.kept(PLAN.segments[0], req_index=1):
        for state in (*early, *late):
            state += 1
    for state, was in zip(early, before[0], strict=True):
        assert torch.equal(state[3], was[3])
        assert torch.equal(state[[0, 1, 2, 4, 5, 6, 7]], was[[0, 1, 2, 4, 5, 6, 7]] + 1)
    assert all(torch.equal(state, was + 1) for state, was in zip(late, before[1], strict=True))


# --- the lane's last row ---------------------------------------------------------------


def lane_at(segment: int, done: int, last_row_apart: bool) -> Lane:
    """A prompt of 40 tokens, 30 of them alive in segment 1, and a step that grants 16 rows."""
    pool = SimpleNamespace(keys=torch.empty(0))
    lane = Lane(SimpleNamespace(), PLAN, pool, SimpleNamespace(), last_row_apart)
    counts = (40, 30)[: segment + 1]
    lane.prompt = LanePrompt("r", 7, None, torch.arange(counts[-1]), counts, segment, done)
    lane._grant = LaneGrant("r", 16)
    return lane


ROWS = SimpleNamespace(num_rows=5, positions=torch.arange(5))


@pytest.mark.parametrize(
    ("apart", "done", "end"), [(True, 10, 26), (True, 16, 29), (True, 29, 30), (False, 16, 30), (False, 29, 30)]
)
def test_the_last_row_runs_apart_if_it_must(apart: bool, done: int, end: int) -> None:
    lane = lane_at(1, done, apart)
    chunk = lane.chunk(PLAN.segments[1], ROWS)
    assert (chunk.start, chunk.end, chunk.rows) == (done, end, slice(5, 5 + end - done))
    assert lane.runs_last_row(PLAN.segments[1], chunk) == (7 if end == 30 else None)


def test_in_the_first_segment_it_runs_whenever_it_is_taken_back() -> None:
    first, last = PLAN.segments
    lane = lane_at(1, 0, True)
    assert lane.runs_last_row(first, None) == 7 and lane.runs_last_row(last, None) is None
    lane._grant = LaneGrant("r", 0)  # its first segment is not complete
    assert lane.runs_last_row(first, Chunk(0, 16, slice(0, 16))) is None
    lane.prompt = None
    assert lane.runs_last_row(first, None) is None


def test_the_scheduler_leaves_the_last_token_for_a_chunk_of_its_own(make_scheduler, make_request, finish_step) -> None:
    uniprefill = {"min_prompt_tokens": 100, "block_size": 16, "num_queries": 16, "sink_tokens": 16}
    uniprefill |= {"recent_tokens": 32, "pool_tokens": 1000}
    scheduler = make_scheduler(uniprefill, max_num_batched_tokens=BUDGET, max_num_seqs=8)
    scheduler.last_row_apart = True
    long = make_request(600)
    scheduler.add_request(long)
    seen = []
    for kept in (None, None, None, None, {long.request_id: KEPT}, None):
        step = scheduler.schedule()
        grant = step.uniprefill and step.uniprefill.lane
        seen.append((step.num_scheduled_tokens[long.request_id], long.num_computed_tokens, grant and grant.rows))
        finish_step(scheduler, step, kept)
    assert seen == [(256, 256, 0), (256, 512, 0), (87, 599, 0), (1, 599, BUDGET), (1, 599, BUDGET), (1, 600, None)]
    assert long.num_output_tokens == 1


# --- a segment's own layers ------------------------------------------------------------


class Decoder(nn.Module):
    """Runs its layers between the bounds, or all of them."""

    def __init__(self, all_layers: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(PLAN.num_layers))
        self.start_layer, self.end_layer, self.all_layers = 0, PLAN.num_layers, all_layers
        self.ran: list[int] = []

    def forward(self, states: Any) -> Any:
        bounds = (0, None) if self.all_layers else (self.start_layer, self.end_layer)
        for layer in self.layers[slice(*bounds)]:
            self.ran.append([*self.layers].index(layer))
            states = layer(states)
        return states


@pytest.fixture
def no_stages(monkeypatch) -> None:
    from contextlib import nullcontext

    group = SimpleNamespace(as_stage=lambda **flags: nullcontext())
    monkeypatch.setattr(stages, "get_pp_group", lambda: group)


def run_segments(model: Decoder) -> None:
    made = stages.Stages(model, PLAN)
    for segment in PLAN.segments:
        made.run(segment, model, {"states": 1})


def test_a_model_that_runs_all_layers_in_each_segment_is_refused_when_tried(no_stages) -> None:
    run_segments(model := Decoder(all_layers=False))
    assert model.ran == [0, 1, 2, 3] and not any(layer._forward_pre_hooks for layer in model.layers)
    with pytest.raises(ValueError, match="does not work with Decoder, whose layers cannot be run in parts"):
        run_segments(model := Decoder(all_layers=True))
    assert not any(layer._forward_pre_hooks for layer in model.layers)


def test_one_that_is_known_to_is_given_the_segments_layers(no_stages, monkeypatch) -> None:
    monkeypatch.setattr(stages, "_LOOP_OVER_ALL_LAYERS", ("Decoder",))
    model = Decoder(all_layers=True)
    layers = model.layers
    run_segments(model)
    assert model.ran == [0, 1, 0, 1] and model.layers is layers


def test_segments_are_tried_once(no_stages) -> None:
    model = Decoder(all_layers=False)
    made = stages.Stages(model, PLAN)
    last = Segment(1, 2, 4, is_last=True)
    made.run(last, model, {"states": 1})
    model.all_layers = True
    made.run(last, model, {"states": 1})
    assert model.ran == [2, 3, 0, 1, 2, 3]
