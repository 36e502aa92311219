"""worker-run-segments.patch: what each segment sees of a batch, how a pruning step runs, and the lane.

Without a GPU the Triton kernel runs in Triton's interpreter, beside its torch reference.
"""

from __future__ import annotations

import itertools
import random
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.compilation import CompilationMode, CUDAGraphMode
from vllm.distributed.parallel_state import get_pp_group
from vllm.forward_context import get_forward_context, set_forward_context
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.attention import Attention
from vllm.sequence import IntermediateTensors
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.uniprefill.plan import segment_of_layer_name
from vllm.v1.uniprefill.policy import Decision
from vllm.v1.uniprefill.step_plan import LaneGrant, StepPlan
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.uniprefill.eager import EagerKernels
from vllm.v1.worker.gpu.uniprefill.events import Selected, observed_by
from vllm.v1.worker.gpu.uniprefill.model_state import SegmentedModelState, with_segments
from vllm.v1.worker.gpu.uniprefill.rows import Guest, PromptRows, SegmentRows
from vllm.v1.worker.gpu.uniprefill.runner import SegmentRunner
from vllm.v1.worker.gpu.uniprefill.stages import find_bounded_model
from vllm.v1.worker.gpu.uniprefill.state import GroupSegments, SegmentState
from vllm.v1.worker.utils import AttentionGroup

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MAX_REQS, MAX_TOKENS, KV_BLOCK = 6, 3000, 16
BLOCKS = 20  # a request
TABLE = torch.arange(MAX_REQS * BLOCKS, dtype=torch.int32).view(MAX_REQS, BLOCKS).to(DEVICE)


def each_group(method: str) -> Any:
    """`SegmentState.update` by the kernel, or by plain torch."""

    def update(state: SegmentState, segments: range, *batch: Any) -> None:
        for group in state.groups:
            start, end = group.rows(segments)
            if start < end:
                getattr(state, method)(group, start, end, *batch)

    return update


IMPLEMENTATIONS = [SegmentState.update, each_group("update_triton"), each_group("update_reference")]


# --- the state -------------------------------------------------------------------------


def make_state(num_segments: int = 3, groups: Sequence[GroupSegments] | None = None) -> SegmentState:
    """By default of one KV cache group, which returns nothing."""
    one = GroupSegments(0, KV_BLOCK, tuple(range(num_segments)), TABLE, 0)
    return SegmentState(num_segments, MAX_REQS, MAX_TOKENS, groups or [one], DEVICE)


def check_mirror(state: SegmentState) -> None:
    np.testing.assert_array_equal(state.dropped_np, state.dropped.cpu().numpy())


def test_drops_hold_for_the_later_segments_until_these_drop_more() -> None:
    state = make_state(4)
    state.drop(1, [4, 2], [10, 20])
    state.drop(3, [2, 4], [25, 17])
    check_mirror(state)
    assert state.dropped_np[:, 4].tolist() == [0, 10, 10, 17]
    assert state.dropped_np[:, 2].tolist() == [0, 20, 20, 25]
    assert not state.dropped_np[:, [0, 1, 3, 5]].any()


def test_reset_forgets_one_request_only() -> None:
    state = make_state()
    state.drop(1, [0, 1, 5], [3, 4, 5])
    state.reset(1)
    state.reset(2)  # which dropped nothing
    check_mirror(state)
    assert state.dropped_np[1].tolist() == [3, 0, 0, 0, 0, 5]
    assert state.any_dropped(np.array([1, 5])) and not state.any_dropped(np.array([1, 2]))


def test_a_drop_in_the_last_segment_counts() -> None:
    state = make_state()
    state.drop(2, [3], [1])
    assert state.any_dropped(np.array([3]))


def naive_inputs(
    state: SegmentState,
    group: GroupSegments,
    segment: int,
    req_indices: list[int],
    starts: list[int],
    seq_lens: list[int],
    slot_mapping: list[int],
) -> tuple[list[int], list[int]]:
    """The segment's sequence lengths and slots, token by token."""
    lengths = [0] * len(seq_lens)
    slots = [PAD_SLOT_ID] * len(slot_mapping)
    for i, req in enumerate(req_indices):
        dropped = int(state.dropped_np[segment, req])
        returned = int(state.dropped_np[group.base, req]) // group.block_size * group.block_size
        lengths[i] = seq_lens[i] - dropped
        num_rows = starts[i + 1] - starts[i]
        for row in range(num_rows):
            if slot_mapping[starts[i] + row] == PAD_SLOT_ID:
                continue
            place = seq_lens[i] - num_rows + row - dropped + returned
            block = int(group.block_table[req, place // group.block_size])
            slots[starts[i] + row] = block * group.block_size + place % group.block_size
    return lengths, slots


def random_groups(rng: np.random.Generator) -> list[GroupSegments]:
    """Segments 0 .. 3 in one to three groups, some of which share a segment."""
    found, first_row = [], 0
    for segments in ([(0, 1, 2, 3)], [(0, 1), (1, 2, 3)], [(0,), (1, 2), (3,)])[rng.integers(3)]:
        table = torch.from_numpy(rng.integers(1, 1 << 26, size=(MAX_REQS, 128), dtype=np.int32)).to(DEVICE)
        found.append(GroupSegments(len(found), int(rng.choice([16, 32])), segments, table, first_row))
        first_row += len(segments)
    return found


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("seed", range(12))
def test_inputs_of_random_batches_match_a_loop(implementation, seed: int) -> None:
    """Decodes, chunked prefills, rows of drafts, rows without a slot, and padding."""
    rng = np.random.default_rng(seed)
    state = make_state(4, random_groups(rng))
    num_reqs = int(rng.integers(1, MAX_REQS))
    req_indices = rng.permutation(MAX_REQS)[:num_reqs].tolist()
    # A token, four with drafts, a chunk, and one chunk beyond the kernel's tile.
    rows = [int(rng.choice([1, 4, rng.integers(2, 300)])) for _ in range(num_reqs)]
    if seed % 4 == 0:
        rows[-1] = 1500
    seq_lens = []
    for req, num_rows in zip(req_indices, rows, strict=False):
        context = int(rng.integers(0, 400))
        seq_lens.append(context + num_rows)
        for segment in sorted(rng.integers(1, 4, size=2)):
            more = int(rng.integers(state.dropped_np[segment, req], context + 1))
            state.drop(int(segment), [req], [more])
    starts = [0, *np.cumsum(rows).tolist()]
    num_padded_reqs = int(rng.integers(num_reqs, MAX_REQS + 1))
    num_padded = starts[-1] + int(rng.integers(0, 40))
    dense_slots = rng.integers(0, 1 << 40, size=num_padded)
    dense_slots[rng.random(num_padded) < 0.1] = PAD_SLOT_ID
    dense_lens = [*seq_lens, *rng.integers(1, 9, size=num_padded_reqs - num_reqs).tolist()]
    state.seq_lens.fill_(-7)  # what an earlier batch left
    state.slot_mappings.fill_(-7)

    implementation(
        state,
        range(1, 4),
        torch.tensor(req_indices, device=DEVICE),
        torch.tensor(starts, dtype=torch.int32, device=DEVICE),
        torch.tensor(dense_lens, dtype=torch.int32, device=DEVICE),
        torch.from_numpy(dense_slots).to(DEVICE),
    )

    for group in state.groups:
        for segment in group.segments:
            if segment == 0:
                assert (state.slots(group, segment) == -7).all()
                continue
            lengths, slots = naive_inputs(state, group, segment, req_indices, starts, dense_lens, dense_slots.tolist())
            lengths[num_reqs:] = [0] * (num_padded_reqs - num_reqs)
            assert state.seq_lens[segment, :num_padded_reqs].tolist() == lengths
            assert state.slots(group, segment)[:num_padded].tolist() == slots
    assert (state.seq_lens[:, num_padded_reqs:] == -7).all()
    assert (state.slot_mappings[:, num_padded:] == -7).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_update_fills_only_its_segments(implementation) -> None:
    table = torch.tensor([[3]], dtype=torch.int32, device=DEVICE)
    state = make_state(4, [GroupSegments(0, KV_BLOCK, (0, 1, 2, 3), table, 0)])
    state.drop(1, [0], [5])
    state.seq_lens.fill_(-7)
    args = [[0, 1], [9], [77]]
    starts, lens, slots = (torch.tensor(a, dtype=torch.int32, device=DEVICE) for a in args)
    index = torch.tensor([0], device=DEVICE)
    implementation(state, range(2, 3), index, starts, lens, slots.long())
    assert state.seq_lens[:, 0].tolist() == [-7, -7, 4, -7]
    untouched = PAD_SLOT_ID
    expected = [untouched, untouched, 3 * KV_BLOCK + 3, untouched]
    assert state.slot_mappings[:, 0].tolist() == expected


@pytest.mark.parametrize("shift", [SegmentState.shift, SegmentState.shift_triton, SegmentState.shift_reference])
@pytest.mark.parametrize("block_size", [16, 64])
def test_a_shifted_block_table_begins_behind_the_returned_blocks(shift, block_size: int) -> None:
    """Also of more blocks than the kernel's tile; rows of padded requests stay."""
    blocks = 1500
    table = torch.randint(1, 1 << 30, (MAX_REQS, blocks), dtype=torch.int32, device=DEVICE)
    group = GroupSegments(0, block_size, (1, 2), table, 0)
    state = make_state(3, [group])
    dropped = [0, 15, 16, 1000 * block_size - 1]
    state.drop(1, [5, 2, 0, 4], dropped)
    state.drop(2, [5, 2, 0, 4], [count + 640 for count in dropped])  # later segments share the first one's blocks
    out = torch.full((6, blocks), -7, dtype=torch.int32, device=DEVICE)
    shift(state, group, torch.tensor([5, 2, 0, 4], device=DEVICE), out)
    for row, (slot, count) in enumerate(zip([5, 2, 0, 4], dropped, strict=True)):
        first = count // block_size
        assert torch.equal(out[row, : blocks - first], table[slot, first:])
    assert (out[4:] == -7).all()


# --- rows ------------------------------------------------------------------------------


def make_batch(rows: list[int], slots: list[int], computed: list[int] | None = None) -> InputBatch:
    """A batch of so many rows of the requests in `slots`, with a real batch's fields."""
    num_tokens, num_reqs = sum(rows), len(rows)
    computed = computed or [0] * num_reqs
    buffers = InputBuffers(MAX_REQS, MAX_TOKENS, DEVICE)
    batch = InputBatch.make_dummy(num_reqs, num_tokens, buffers, is_padding=False)
    starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int32)
    lengths = np.array(rows, dtype=np.int32) + np.array(computed, dtype=np.int32)
    batch.req_ids = [f"r{slot}" for slot in slots]
    batch.idx_mapping = torch.tensor(slots, device=DEVICE)
    batch.idx_mapping_np = np.array(slots, dtype=np.intp)
    batch.num_scheduled_tokens = np.array(rows, dtype=np.int32)
    batch.num_computed_tokens_np = np.array(computed, dtype=np.int32)
    batch.query_start_loc_np = starts
    batch.query_start_loc = torch.from_numpy(starts).to(DEVICE)
    batch.seq_lens = torch.from_numpy(lengths).to(DEVICE)
    batch.seq_lens_cpu_upper_bound = torch.from_numpy(lengths.copy())
    positions = [c + i for c, n in zip(computed, rows, strict=False) for i in range(n)]
    batch.positions = torch.tensor(positions, device=DEVICE)
    return batch


def make_prompt(batch: InputBatch, batch_index: int, num_prompt: int, **budget: float) -> PromptRows:
    budgets = {"top_p": None, "keep_ratio": None} | budget
    return PromptRows(
        req_id=batch.req_ids[batch_index],
        batch_index=batch_index,
        decision=Decision(num_prompt, None, wants_report=False, **budgets),
        num_prompt=num_prompt,
        num_output=int(batch.num_scheduled_tokens[batch_index]) - num_prompt,
    )


def make_rows(batch: InputBatch, *prompts: PromptRows) -> SegmentRows:
    slots = 1000 + torch.arange(batch.num_tokens, device=DEVICE)
    return SegmentRows(batch, slots, batch.positions, prompts)


def test_dropped_rows_leave_and_lengths_stay_dense() -> None:
    """The request of 12 rows has 2 outputs."""
    batch = make_batch([1, 12, 4], [5, 0, 3], computed=[30, 0, 8])
    starts = batch.query_start_loc_np
    kept = torch.tensor([0, 1, 2, 9, 10, 11, 12, 13, 14, 15, 16], device=DEVICE)
    rows = make_rows(batch, make_prompt(batch, 1, 10, top_p=0.9)).leave(kept, [4])
    compact = rows.batch
    assert compact.num_scheduled_tokens.tolist() == [1, 6, 4]
    assert rows.num_rows == compact.num_tokens_after_padding == 11
    assert compact.query_start_loc.tolist() == [0, 1, 7, 11]
    assert compact.query_start_loc_np.tolist() == [0, 1, 7, 11]
    assert rows.positions.tolist() == compact.positions.tolist() == [30, 0, 1, 8, 9, 10, 11, 8, 9, 10, 11]
    assert compact.is_padding.shape == (11,)
    assert (rows.prompts[0].num_prompt, rows.prompts[0].num_output) == (4, 2)
    assert rows.slot_mapping.tolist() == [1000 + row for row in kept.tolist()]
    assert torch.equal(compact.seq_lens, batch.seq_lens)
    again = rows.leave(torch.tensor([0, 2, 10], device=DEVICE), [1])
    assert again.step_rows.tolist() == [0, 2, 16]
    assert again.scatter(torch.ones(3, 1), 17).squeeze(1).nonzero().squeeze(1).tolist() == [0, 2, 16]
    assert batch.num_scheduled_tokens.tolist() == [1, 12, 4]  # the step's batch is untouched
    assert batch.query_start_loc_np is starts and batch.num_tokens == 17


def describe(rows: SegmentRows) -> list[tuple]:
    """Each request: its name, slot, computed, length, whether it prefills, positions."""
    batch = rows.batch
    assert batch.num_reqs == batch.num_reqs_after_padding == len(batch.req_ids)
    assert batch.num_tokens == batch.num_tokens_after_padding == rows.num_rows == len(batch.is_padding)
    assert batch.query_start_loc.tolist() == batch.query_start_loc_np[: batch.num_reqs + 1].tolist()
    assert batch.idx_mapping.tolist() == batch.idx_mapping_np.tolist()
    assert batch.seq_lens.tolist() == batch.seq_lens_cpu_upper_bound.tolist()
    starts = batch.query_start_loc_np.tolist()
    return [
        (
            batch.req_ids[i],
            int(batch.idx_mapping[i]),
            int(batch.num_computed_tokens_np[i]),
            int(batch.seq_lens[i]),
            bool(batch.is_prefilling_np[i]),
            batch.positions[starts[i] : starts[i + 1]].tolist(),
        )
        for i in range(batch.num_reqs)
    ]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_request_goes_out_and_comes_back_as_a_guest(place: int) -> None:
    batch = make_batch([1, 3, 6], [5, 0, 3], computed=[30, 8, 0])
    batch.is_prefilling_np = np.array([False, True, True])
    rows = make_rows(batch, make_prompt(batch, 2, 6, top_p=0.9))
    before = describe(rows)
    others, which = rows.without(place)
    assert describe(others) == [request for i, request in enumerate(before) if i != place]
    assert others.slot_mapping.tolist() == [1000 + row for row in which.tolist()]
    assert others.step_rows is which and others.positions.tolist() == rows.positions[which].tolist()
    assert [p.batch_index for p in others.prompts] == [2 - (place < 2)]
    guest = rows.guest(place)
    tokens = torch.tensor([2, 5, 7, 9], device=DEVICE)
    joined = others.joined_by(guest, tokens, tokens * 2, seq_len=20)
    name, slot, *_ = before[place]
    assert guest == Guest(name, slot)
    assert describe(joined) == [*describe(others), (name, slot, 16, 20, True, [2, 5, 7, 9])]
    assert joined.positions.tolist() == [*others.positions.tolist(), 4, 10, 14, 18]
    assert (joined.slot_mapping[-4:] != PAD_SLOT_ID).all() and describe(rows) == before


# --- running segments ------------------------------------------------------------------

HIDDEN, LAYERS, CUTS = 8, 8, [1, 4]
UNIPREFILL = {
    "selection_layers": CUTS,
    "num_queries": 2,
    "sink_tokens": 4,
    "recent_tokens": 4,
    "min_prompt_tokens": 8,
    "pool_tokens": 256,
}
MODULUS = 2.0**20  # states are integers below it, in float64: exact, whatever the order of sums


class ToyLayer(nn.Module):
    """Exact arithmetic; mixes rows only by a KV cache, and shows an observer queries and keys."""

    def __init__(self, index: int, attn: Attention) -> None:
        super().__init__()
        self.index, self.attn, self.window = index, attn, attn.sliding_window
        self.kv: torch.Tensor | None = None  # [slots, HIDDEN]

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.attn.on_query_key is not None:
            query = (hidden_states % 7 - 3).float().repeat(1, 8).view(-1, 2, 32) / 8
            self.attn.on_query_key(query, query[:, :1])
        position = positions if positions.dim() == 1 else (positions * positions.new_tensor([[1], [2], [4]])).sum(0)
        attended = self.attend(hidden_states) if self.kv is not None else 0
        return (hidden_states * 3 + self.index + 1000 * position[:, None] + attended) % MODULUS

    def attend(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The sum of all states before and of its own, each times its place in the sequence, or in the window."""
        context = get_forward_context()
        batch, _, table = context.attn_metadata[self.attn.layer_name]
        self.kv[context.slot_mapping[self.attn.layer_name]] = hidden_states
        attended = []
        for i in range(batch.num_reqs):
            num_rows, length = int(batch.num_scheduled_tokens[i]), int(batch.seq_lens[i])
            states = self.kv[slots_of(table[i], length)]
            if self.window:
                # From its place in the window: what lies before the first row's may be gone.
                first_seen = max(0, length - num_rows - self.window + 1)
                states = torch.cat([states.new_zeros(self.window, HIDDEN), states[first_seen:]])
                places = torch.arange(1.0, self.window + 1, dtype=states.dtype, device=DEVICE)
                attended.append((states.unfold(0, self.window, 1) * places).sum(-1)[-num_rows:])
                continue
            places = torch.arange(1, length + 1, device=DEVICE)[:, None]
            attended.append((states * places).cumsum(0)[length - num_rows :])
        return torch.cat(attended)


def slots_of(table: torch.Tensor, length: int) -> torch.Tensor:
    places = torch.arange(length, device=DEVICE)
    return table[places // KV_BLOCK].long() * KV_BLOCK + places % KV_BLOCK


class ToyInner(nn.Module):
    """Follows vLLM's pipeline-parallel contract, and records how it is called."""

    def __init__(self, attention: list[Attention]) -> None:
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(torch.randint(1, 2**20, (100, HIDDEN)).double())
        self.layers = nn.ModuleList(ToyLayer(i, attn) for i, attn in enumerate(attention))
        self.start_layer, self.end_layer = 0, LAYERS
        self.calls: list[SimpleNamespace] = []
        self.fail_in: int | None = None

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
        group = get_pp_group()
        context = get_forward_context()
        self.calls.append(
            SimpleNamespace(
                layers=(self.start_layer, self.end_layer),
                flags=(group.is_first_rank, group.is_last_rank),
                armed=[i for i, x in enumerate(self.layers) if x.attn.on_query_key is not None],
                positions=positions.tolist(),
                num_rows=positions.shape[-1],
                metadata=dict(context.attn_metadata),
                slots={name: slots.tolist() for name, slots in context.slot_mapping.items()},
                num_padding_rows=len(context.is_padding),
                moe_layer_index=context.moe_layer_index,
            )
        )
        if group.is_first_rank:
            assert intermediate_tensors is None
            hidden_states = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        else:
            assert input_ids is None and inputs_embeds is None
            hidden_states = intermediate_tensors["hidden_states"]
        for layer in self.layers[self.start_layer : self.end_layer]:
            hidden_states = layer(positions, hidden_states)
            if layer.index == self.fail_in:
                raise RuntimeError("in the model")
        if not group.is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states})
        return hidden_states


class ToyModel(nn.Module):
    def __init__(self, attention: list[Attention]) -> None:
        super().__init__()
        self.model = ToyInner(attention)

    def make_empty_intermediate_tensors(self, num_rows: int, dtype: torch.dtype, device: torch.device):
        return IntermediateTensors({"hidden_states": torch.empty(num_rows, HIDDEN, dtype=torch.float64, device=device)})

    def forward(self, **inputs: Any):
        return self.model(**inputs)


@pytest.fixture
def config(configure, one_rank: None) -> VllmConfig:
    config = configure(UNIPREFILL, max_num_seqs=MAX_REQS)
    config.uniprefill_config.block_size = 4  # a server takes no such blocks; toy prompts have few tokens
    return config


@pytest.fixture
def toy(config: VllmConfig) -> ToyModel:
    with set_current_vllm_config(config):
        attention = [
            Attention(2, 32, 1.0, num_kv_heads=1, prefix=f"model.layers.{i}.self_attn.attn") for i in range(LAYERS)
        ]
    torch.manual_seed(0)
    return ToyModel(attention).to(DEVICE).requires_grad_(False)


class Observer:
    """Sees what was selected; the spans are not its business."""

    def span(self, name: str) -> nullcontext:
        return nullcontext()


class Step(Observer):
    """One step of the toy through the SegmentRunner, with metadata that says what was asked."""

    def __init__(self, config: VllmConfig, toy: ToyModel, batch: InputBatch, prompts: list[PromptRows]) -> None:
        self.config, self.toy, self.batch, self.prompts = config, toy, batch, prompts
        self.runner = SegmentRunner(config, toy, self.enter_segment, DEVICE)
        self.state = make_state()
        self.entered: list[tuple[int, SegmentRows]] = []
        self.events: list[Selected] = []
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, 100, (batch.num_tokens,), generator=generator).to(DEVICE)
        self.inputs = {
            "input_ids": ids,
            "positions": batch.positions,
            "intermediate_tensors": None,
            "inputs_embeds": None,
        }

    def enter_segment(self, segment: int, rows: SegmentRows):
        self.entered.append((segment, rows))
        return {f"layers of {segment}": segment}, {f"layers of {segment}": rows.slot_mapping}

    def selected(self, event: Selected) -> None:
        self.events.append(event)

    def in_context(self, run):
        metadata, slots = {"layers of 0": 0}, {"layers of 0": make_rows(self.batch).slot_mapping}
        padding = self.batch.is_padding
        with set_forward_context(metadata, self.config, slot_mapping=slots, is_padding=padding):
            return run()

    def run(self) -> torch.Tensor:
        """Hidden states; `alive` holds the counts by request."""
        rows = replace(make_rows(self.batch, *self.prompts), positions=self.inputs["positions"])
        with observed_by(self):
            hidden_states, alive = self.in_context(
                lambda: self.runner.run(self.toy, dict(self.inputs), rows, self.state)
            )
        self.alive = [list(alive[prompt.req_id]) for prompt in self.prompts]
        return hidden_states

    def dense(self) -> torch.Tensor:
        return self.in_context(lambda: self.toy(**self.inputs))


def mixed_step(config: VllmConfig, toy: ToyModel, **budget: float) -> Step:
    """A decode, a resumed prompt (40 and 3 outputs), a dense chunk and another prompt of 30."""
    batch = make_batch([1, 43, 5, 30], [2, 4, 0, 5], computed=[60, 0, 16, 0])
    prompts = [make_prompt(batch, 1, 40, **budget), make_prompt(batch, 3, 30, **budget)]
    return Step(config, toy, batch, prompts)


class Decoder(nn.Module):
    """Layers with pipeline-parallel bounds, as vLLM's models have them."""

    def __init__(self, num_layers: int, start: int, end: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(num_layers))
        self.start_layer, self.end_layer = start, end


def test_the_bounded_model_is_found_inside_the_model() -> None:
    inner = Decoder(4, 0, 4)
    outer = nn.ModuleDict({"vision": Decoder(2, 0, 2), "model": inner})
    assert find_bounded_model(outer, 4) is inner


@pytest.mark.parametrize("model", [nn.Linear(1, 1), Decoder(4, 0, 3), Decoder(3, 0, 4), Decoder(4, 1, 4)])
def test_models_without_layer_bounds_are_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=f"does not work with {type(model).__name__}, whose"):
        find_bounded_model(model, 4)


def test_each_segment_is_a_stage_with_its_layers(config, toy) -> None:
    """Only the selection layer of a segment is armed, and all is as before afterwards."""
    step = mixed_step(config, toy, keep_ratio=0.5)
    step.run()
    calls = toy.model.calls
    assert [call.layers for call in calls] == [(0, 2), (2, 5), (5, 8)]
    assert [call.flags for call in calls] == [(True, False), (False, False), (False, True)]
    assert [call.armed for call in calls] == [[1], [4], []]
    assert (toy.model.start_layer, toy.model.end_layer) == (0, LAYERS)
    assert (get_pp_group().is_first_rank, get_pp_group().is_last_rank) == (True, True)


@pytest.mark.parametrize("failing", [0, 1, 3, 4, 7])
def test_an_exception_restores_the_model(config, toy, failing: int) -> None:
    step = mixed_step(config, toy, keep_ratio=0.5)
    toy.model.fail_in = failing
    with pytest.raises(RuntimeError, match="in the model"):
        step.run()
    assert (toy.model.start_layer, toy.model.end_layer) == (0, LAYERS)
    assert (get_pp_group().is_first_rank, get_pp_group().is_last_rank) == (True, True)
    assert all(layer.attn.on_query_key is None for layer in toy.model.layers)


def test_keeping_all_is_the_models_own_output(config, toy) -> None:
    step = mixed_step(config, toy, top_p=1.0)
    hidden_states = step.run()
    assert torch.equal(hidden_states, step.dense())
    assert step.alive == [[40, 40, 40], [30, 30, 30]]
    assert not step.state.dropped_np.any()
    assert [segment for segment, _ in step.entered] == [1, 2]


@pytest.mark.parametrize("keep_ratio", [1.0, 0.5])
def test_the_states_at_a_cut_are_freed_as_the_segment_replaces_them(config, toy, keep_ratio: float) -> None:
    """They are as large as the prompt, where nearly all of it is kept."""
    step = mixed_step(config, toy, keep_ratio=keep_ratio)
    run, entering, alive_at = step.runner.stages.run, [], []

    def watched(segment, model, inputs):
        entering.clear()
        if segment.index > 0:
            entering.append(weakref.ref(inputs["intermediate_tensors"].tensors["hidden_states"]))
        return run(segment, model, inputs)

    step.runner.stages.run = watched
    for layer in (CUTS[0] + 2, CUTS[1] + 2):  # the second of their segments
        toy.model.layers[layer].register_forward_pre_hook(
            lambda *_: alive_at.append([states() is not None for states in entering])
        )
    step.run()
    assert alive_at == [[False], [False]]


def test_surviving_rows_return_to_their_places_and_dropped_ones_are_zero(config, toy) -> None:
    """Rows do not mix in the toy, so a survivor's state is that of the dense run."""
    step = mixed_step(config, toy, keep_ratio=0.5)
    hidden_states = step.run()
    dense = step.dense()
    alive = hidden_states.any(1)
    assert torch.equal(hidden_states[alive], dense[alive])
    assert (hidden_states[~alive] == 0).all()
    # Of 10 blocks half, of those 5 again 3; of 8 (the last of 2 tokens) 4, then 2.
    assert step.alive == [[40, 20, 12], [30, 14, 10]]
    for counts, start, end in zip(step.alive, (1, 49), (41, 79), strict=True):
        assert counts[2] == int(alive[start:end].sum())
        assert alive[start : start + 4].all() and alive[end - 4 : end].all()  # sink, recent
    assert alive[0] and alive[41:44].all() and alive[44:49].all()  # decode, outputs, chunk


def test_a_segments_metadata_is_built_from_its_rows(config, toy) -> None:
    """Slots and positions follow the same rows, and the context holds every segment's."""
    step = mixed_step(config, toy, keep_ratio=0.5)
    step.run()
    positions = step.batch.positions.tolist()
    for (segment, entering), call in zip(step.entered, toy.model.calls[1:], strict=True):
        batch, slots = entering.batch, entering.slot_mapping.tolist()
        rows = [slot - 1000 for slot in slots]
        assert rows == sorted(set(rows)) == entering.step_rows.tolist()
        assert [positions[row] for row in rows] == call.positions == batch.positions.tolist()
        first, second = (counts[segment] for counts in step.alive)
        assert batch.num_scheduled_tokens.tolist() == [1, first + 3, 5, second]
        assert call.metadata == {f"layers of {i}": i for i in range(segment + 1)}
        assert call.slots[f"layers of {segment}"] == slots
        assert call.num_padding_rows == batch.num_tokens
    assert len(toy.model.calls[0].slots["layers of 0"]) == step.batch.num_tokens


def test_a_request_keeps_the_same_tokens_alone_and_in_a_batch(config, toy) -> None:
    """Events tell them by their positions in the prompt."""
    together = mixed_step(config, toy, top_p=0.6)
    kept = together.run()[49:79].any(1).nonzero().squeeze(1)
    batch = make_batch([30], [5])
    alone = Step(config, toy, batch, [make_prompt(batch, 0, 30, top_p=0.6)])
    alone.inputs["input_ids"] = together.inputs["input_ids"][49:79]
    assert torch.equal(alone.run().any(1).nonzero().squeeze(1), kept)
    assert alone.alive[0] == together.alive[1] and 0 < len(kept) < 30
    of_second = [event for event in together.events if event.req_id == "r5"]
    assert [event.segment for event in of_second] == [0, 1]
    for event, same in zip(of_second, alone.events, strict=True):
        for name in ("alive", "mass", "kept"):
            assert torch.equal(getattr(event, name), getattr(same, name))
    assert torch.equal(of_second[0].alive, torch.arange(30, device=DEVICE))
    assert torch.equal(of_second[0].kept, of_second[1].alive) and torch.equal(of_second[1].kept, kept)


def test_embeddings_are_the_first_stages_input_only(config, toy) -> None:
    expected = mixed_step(config, toy, keep_ratio=0.5).run()
    step = mixed_step(config, toy, keep_ratio=0.5)
    ids = step.inputs["input_ids"]
    step.inputs |= {"input_ids": None, "inputs_embeds": toy.model.embed(ids)}
    assert torch.equal(step.run(), expected)


# --- the model state -------------------------------------------------------------------


def test_it_stands_in_for_the_default_state_only() -> None:
    cls = with_segments(DefaultModelState)
    assert cls.__mro__[:3] == (cls, SegmentedModelState, DefaultModelState)

    class OtherModelState(DefaultModelState):
        pass

    with pytest.raises(ValueError, match="models that keep a OtherModelState"):
        with_segments(OtherModelState)


@pytest.fixture
def stock(monkeypatch) -> None:
    """A stock side whose metadata are the batch, slots and block table that it is given."""

    def prepare_attn(self, batch, mode, tables, slots, groups, *args, **kwargs):
        metadata = {}
        for i, of_cache in enumerate(groups):
            for group in of_cache:
                metadata |= dict.fromkeys(group.layer_names, (batch, slots[i].tolist(), tables[i]))
        return metadata

    monkeypatch.setattr(DefaultModelState, "prepare_attn", prepare_attn)


def attention_name(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.attn"


def initialize(
    state: SegmentedModelState, division: Sequence[Sequence[int]], tables: Sequence[torch.Tensor], num_blocks: int = 1
) -> None:
    spec = SimpleNamespace(block_size=KV_BLOCK)
    groups = [SimpleNamespace(layer_names=[*map(attention_name, layers)], kv_cache_spec=spec) for layers in division]
    block_tables = SimpleNamespace(
        block_sizes=[KV_BLOCK] * len(groups), block_tables=[SimpleNamespace(gpu=table) for table in tables]
    )
    state.initialize_kv_cache(SimpleNamespace(kv_cache_groups=groups, num_blocks=num_blocks), block_tables)


WIDTH = 8  # blocks of a request in `prepare`


def make_model_state(config: VllmConfig, toy: ToyModel) -> SegmentedModelState:
    state = with_segments(DefaultModelState)(config, toy, None, DEVICE)
    table = torch.arange(MAX_REQS * WIDTH, dtype=torch.int32, device=DEVICE).view(MAX_REQS, WIDTH)
    initialize(state, [range(LAYERS)], [table])
    return state


def names_of(state: SegmentedModelState, segment: int) -> list[str]:
    return [name for _, names in state.layer_names[segment] for name in names]


def attention_groups(state: SegmentedModelState) -> list[list[Any]]:
    """For each KV cache group one of each of its segments, as the model runner makes them; windows together."""
    found: list[list[Any]] = []
    for i, group in enumerate(state.kv_cache_config.kv_cache_groups):
        names: dict[int, list[str]] = {}
        for name in group.layer_names:
            names.setdefault(segment_of_layer_name(state.vllm_config, name), []).append(name)
        assert all(of.index != i or set(of.segments) <= set(names) for of in state.segment_state.groups)
        found.append([attention_group(names[s], s, i) for s in sorted(names)])
    return found


def attention_group(layer_names: list[str], segment: int, index: int, backend: str = "one") -> SimpleNamespace:
    """Of a builder that shares nothing between KV cache groups, and nothing under FULL CUDA graphs."""
    builder = SimpleNamespace(supports_update_block_table=False)
    return SimpleNamespace(
        segment=segment,
        layer_names=layer_names,
        backend=backend,
        kv_cache_spec=None,
        kv_cache_group_id=index,
        kernel_block_size=None,
        supports_draft_decode_metadata_update=False,
        get_metadata_builder=lambda: builder,
    )


@pytest.fixture
def model_state(config, toy, stock) -> SegmentedModelState:
    return make_model_state(config, toy)


def new_request(req_id: str, decision: Decision | None) -> Any:
    return SimpleNamespace(req_id=req_id, prefill_decision=decision, mm_features=[])


def decide(num_prompt: int, reason: str | None = None) -> Decision:
    return Decision(num_prompt, reason, 0.5, None, wants_report=False)


def plan_of(whole: tuple[str, ...] = (), lane: LaneGrant | None = None) -> SchedulerOutput:
    output = SchedulerOutput.make_empty()
    output.uniprefill = StepPlan(frozenset(whole), lane) if whole or lane else None
    return output


def test_only_a_step_with_a_plan_is_eager(model_state) -> None:
    assert not model_state.needs_eager(plan_of())
    assert model_state.needs_eager(plan_of(("r4",)))
    assert model_state.needs_eager(plan_of((), LaneGrant("r4")))
    assert not model_state.needs_eager(plan_of())


def test_only_the_lanes_last_token_is_taken_back(model_state) -> None:
    batch = make_batch([1, 1, 1], [2, 4, 0], computed=[60, 39, 8])
    for plan, expected in (
        (plan_of(("r2",)), [1, 1, 1]),
        (plan_of((), LaneGrant("r4", 0)), [1, 1, 1]),
        (plan_of((), LaneGrant("r4", 7)), [1, 0, 1]),
    ):
        model_state.needs_eager(plan)
        num_sampled, num_rejected = torch.ones(3, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
        model_state.take_back_tokens(batch, num_sampled, num_rejected)
        assert num_sampled.tolist() == expected and (num_sampled + num_rejected).tolist() == [1, 1, 1]


def test_removing_a_request_frees_its_slot_for_the_next(model_state) -> None:
    """Whether it was pruned, preempted before, or never pruned at all."""
    model_state.add_request(3, new_request("a", decide(40)))
    model_state.add_request(4, new_request("b", decide(40)))
    model_state.segment_state.drop(1, [3, 4], [7, 8])
    model_state.remove_request("a")
    model_state.remove_request("unknown")
    check_mirror(model_state.segment_state)
    assert model_state.segment_state.dropped_np[1].tolist() == [0, 0, 0, 0, 8, 0]


def test_layers_of_later_segments_have_slot_mappings_of_their_own(model_state) -> None:
    mappings = model_state.get_own_slot_mappings(7)
    assert sorted(mappings) == [f"model.layers.{i}.self_attn.attn" for i in range(2, 8)]
    for name, slots in mappings.items():
        segment = 1 if int(name.split(".")[2]) <= CUTS[1] else 2
        assert slots.shape == (7,)
        assert slots.data_ptr() == model_state.segment_state.slot_mappings[segment].data_ptr()


def prepare(model_state: SegmentedModelState, batch: InputBatch, **kwargs: Any):
    """prepare_attn, with blocks 0 .. 7 for the request in slot 0, and so on."""
    groups = attention_groups(model_state)
    table = model_state.segment_state.groups[0].block_table[batch.idx_mapping]
    slots = 5000 + torch.arange(batch.num_tokens, device=DEVICE)[None]
    mode = kwargs.pop("mode", CUDAGraphMode.NONE)
    return model_state.prepare_attn(batch, mode, (table,), slots, groups, None, **kwargs)


@pytest.mark.parametrize("for_capture", [False, True])
def test_a_decode_sees_each_segments_compact_sequence(model_state, for_capture) -> None:
    """Host and device agree on its length; other requests are as in the dense segment."""
    model_state.segment_state.drop(1, [4], [10])
    model_state.segment_state.drop(2, [4], [25])
    batch = make_batch([1, 1], [4, 0], computed=[60, 20])
    metadata = prepare(model_state, batch, for_capture=for_capture)
    assert len(metadata) == LAYERS
    expected = {0: [61, 21], 1: [51, 21], 2: [36, 21]}
    start = 4 * WIDTH * KV_BLOCK  # of slot 4's blocks
    places = {1: [start + 50, 20], 2: [start + 35, 20]}
    for segment, lengths in expected.items():
        for name in names_of(model_state, segment):
            seen, slots, _ = metadata[name]
            assert seen.seq_lens.tolist() == lengths
            assert seen.seq_lens_cpu_upper_bound.tolist() == lengths
            if segment:
                assert slots == places[segment]
                assert model_state.get_own_slot_mappings(2)[name].tolist() == slots
    assert batch.seq_lens_cpu_upper_bound.tolist() == [61, 21]


def test_without_pruned_requests_all_layers_share_the_dense_metadata(model_state) -> None:
    model_state.segment_state.drop(1, [4], [10])  # not in this batch
    metadata = prepare(model_state, make_batch([3, 1], [1, 0], computed=[0, 20]))
    assert len({id(value) for value in metadata.values()}) == 1 and len(metadata) == LAYERS
    for slots in model_state.get_own_slot_mappings(4).values():
        assert slots.tolist() == [5000, 5001, 5002, 5003]


def test_layers_of_different_backends_do_not_share_metadata(model_state, monkeypatch) -> None:
    """Also in one segment: the release makes attention groups of them."""
    split = [
        attention_group([name], group.segment, 0, backend=f"number {int(name.split('.')[2]) % 2}")
        for group in attention_groups(model_state)[0]
        for name in group.layer_names
    ]
    monkeypatch.setitem(globals(), "attention_groups", lambda _: [split])
    batch = make_batch([3, 1], [1, 0], computed=[0, 20])
    metadata = prepare(model_state, batch)
    kinds = [id(metadata[attention_name(i)]) for i in range(LAYERS)]
    assert kinds == [*kinds[:2]] * (LAYERS // 2) and kinds[0] != kinds[1]
    assert all(seen.seq_lens.tolist() == [3, 21] for seen, *_ in metadata.values())


def test_a_step_that_is_over_leaves_no_plan_behind(model_state) -> None:
    """Graphs are captured behind the warm-up's pruning step, and need all layers' metadata."""
    step = SchedulerOutput.make_empty()
    step.uniprefill = StepPlan(whole=frozenset({"long"}))
    assert model_state.needs_eager(step)
    batch = make_batch([3, 1], [1, 0], computed=[0, 20])
    assert len(prepare(model_state, batch)) < LAYERS
    model_state.take_kept_tokens()
    assert len(prepare(model_state, batch)) == LAYERS


def flash_attention_groups(
    config: VllmConfig, state: SegmentedModelState, monkeypatch
) -> tuple[list[list[AttentionGroup]], list[str]]:
    """The release's groups and FlashAttention 3's builders, and the first layer of each build from now on."""
    monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda *_, **__: 3)

    def schedule(*, batch_size: int, cache_seqlens: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.cat([cache_seqlens.new_tensor([batch_size]), cache_seqlens.repeat_interleave(4)])

    monkeypatch.setattr(flash_attn, "get_scheduler_metadata", schedule, raising=False)
    spec = FullAttentionSpec(block_size=KV_BLOCK, num_kv_heads=1, head_size=32, dtype=torch.bfloat16)
    found = [
        [
            AttentionGroup(flash_attn.FlashAttentionBackend, group.layer_names, spec, i, segment=group.segment)
            for group in groups
        ]
        for i, groups in enumerate(attention_groups(state))
    ]
    builds: list[str] = []

    class Builder(flash_attn.FlashAttentionMetadataBuilder):
        def build(self, *args: Any, **kwargs: Any) -> Any:
            builds.append(self.layer_names[0])
            return super().build(*args, **kwargs)

    monkeypatch.setattr(flash_attn.FlashAttentionBackend, "get_builder_cls", lambda: Builder)
    with set_current_vllm_config(config):
        for group in itertools.chain(*found):
            group.create_metadata_builders(config, DEVICE)
    return found, builds


@pytest.mark.parametrize("division", [[range(LAYERS)], [range(3), range(3, LAYERS)]], ids=["one group", "two groups"])
@pytest.mark.parametrize("mode", [CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE])
def test_a_dense_decode_builds_metadata_as_often_as_stock(config, toy, monkeypatch, mode, division) -> None:
    """Once, by FlashAttention 3's builder; captured graphs find what a build for each segment leaves there."""
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE  # which a CPU has not
    config.compilation_config.max_cudagraph_capture_size = MAX_REQS
    with set_current_vllm_config(config):
        state = with_segments(DefaultModelState)(config, toy, None, DEVICE)
    tables = [TABLE + i for i in range(len(division))]
    initialize(state, division, tables)
    groups, builds = flash_attention_groups(config, state, monkeypatch)
    requests, lengths = [2, 5, 1], [31, 9, 201]
    batch = make_batch([1, 1, 1], requests, computed=[length - 1 for length in lengths])
    # A graph of four decodes.
    batch.num_reqs_after_padding = batch.num_tokens_after_padding = 4
    batch.seq_lens = torch.cat([batch.seq_lens, batch.seq_lens.new_zeros(1)])
    batch.seq_lens_cpu_upper_bound = batch.seq_lens.cpu()
    batch.query_start_loc_np = np.append(batch.query_start_loc_np, 3).astype(np.int32)
    batch.query_start_loc = torch.from_numpy(batch.query_start_loc_np).to(DEVICE)
    slots = torch.stack(
        [
            torch.tensor(
                [slots_of(table[r], length)[-1] for r, length in zip(requests, lengths, strict=True)] + [PAD_SLOT_ID]
            )
            for table in tables
        ]
    ).to(DEVICE)
    padded = [table[[*requests, 0]].clone() for table in tables]
    captured = [
        state.segment_state.seq_lens[1:, :4],
        state.segment_state.slot_mappings[1:, :4],
        *(group.get_metadata_builder().scheduler_metadata for group in itertools.chain(*groups)),
    ]

    def step() -> tuple[dict[str, dict[str, Any]], list[list]]:
        for buffer in captured:
            buffer.fill_(-7)
        builds.clear()
        metadata = state.prepare_attn(batch, mode, padded, slots, groups, state.kv_cache_config)
        seen = {
            name: {
                field: value.tolist() if isinstance(value, torch.Tensor) else value for field, value in vars(of).items()
            }
            for name, of in metadata.items()
        }
        return seen, [buffer.tolist() for buffer in captured]

    with monkeypatch.context() as as_with_drops:
        as_with_drops.setattr(SegmentState, "any_dropped", lambda *_: True)
        apart, left_by_each = step()
        assert len(builds) == sum(map(len, groups))
    together, left = step()
    assert builds == [attention_name(0)]
    assert together == apart and together.keys() == {attention_name(i) for i in range(LAYERS)}
    assert mode != CUDAGraphMode.FULL or left == left_by_each


@pytest.mark.parametrize(("num_blocks", "num_tokens"), [(1000, 1024), (5, 4 * KV_BLOCK), (1, 0)])
def test_kernels_are_warmed_up_with_a_pruned_prompt_that_fits_the_cache(model_state, num_blocks, num_tokens) -> None:
    """Beside the null block; afterwards the request is gone."""
    initialize(model_state, [range(4), range(4, LAYERS)], [TABLE, TABLE], 2 * (num_blocks - 1) + 1)
    steps = model_state.get_warmup_steps()
    assert len(steps) == (2 if num_tokens else 0)
    if not num_tokens:
        return
    prune, finish = steps
    (request,) = prune.scheduled_new_reqs
    assert prune.uniprefill == StepPlan(whole=frozenset({request.req_id})) and request.prefill_decision.pruned
    assert prune.num_scheduled_tokens == {request.req_id: num_tokens} and len(request.prefill_token_ids) == num_tokens
    first, second = request.block_ids
    assert first + second == list(range(1, 1 + 2 * num_tokens // KV_BLOCK)) and len(first) == len(second)
    assert finish.finished_req_ids == {request.req_id} and finish.total_num_scheduled_tokens == 0


@CustomOp.register("toy_of_uniprefill")
class ToyOp(CustomOp):
    def forward_native(self) -> str:
        return "native"

    def forward_cpu(self) -> str:
        return "kernel"

    forward_cuda = forward_cpu


@pytest.mark.parametrize("custom_ops", [["none"], ["none", "-toy_of_uniprefill"]], ids=str)
def test_a_pruning_step_runs_kernels_beside_a_compiled_model(configure, custom_ops: list[str]) -> None:
    """Those of ops that the user did not refuse; the compiled model's come back, also by an exception."""
    settings = {"mode": CompilationMode.VLLM_COMPILE, "custom_ops": custom_ops}
    config = configure(UNIPREFILL, compilation_config=settings)
    with set_current_vllm_config(config):
        op = ToyOp()
        kernels = EagerKernels(config, nn.ModuleList([op]))
    assert op() == "native"
    with pytest.raises(RuntimeError), kernels.chosen():
        assert op() == ("native" if len(custom_ops) > 1 else "kernel")
        raise RuntimeError
    assert op() == "native"


# --- the lane --------------------------------------------------------------------------

# Layers by KV cache group: one that returns nothing; some that begin in segments 0, 1, 1 and 2.
DIVISIONS = ([range(LAYERS)], [range(3), range(3, 6), range(6, LAYERS)], [(0, 1), (2, 3), (4, 5), (6, 7)])


class Worker(Observer):
    """A model runner of toys: real model state, exact attention over a KV cache of its slots.

    Blocks that are returned lose what they hold at once.
    """

    def __init__(
        self, config: VllmConfig, toy: ToyModel, *, mrope: bool = False, division: Sequence[Any] = DIVISIONS[0]
    ) -> None:
        self.config, self.toy, self.mrope, self.division = config, toy, mrope, division
        self.state = with_segments(DefaultModelState)(config, toy, None, DEVICE)
        self.tables = [TABLE + i * TABLE.numel() for i in range(len(division))]
        initialize(self.state, division, self.tables)
        num_slots = len(division) * TABLE.numel() * KV_BLOCK
        for layer in toy.model.layers:
            layer.kv = torch.full((num_slots, HIDDEN), torch.nan, dtype=torch.float64, device=DEVICE)
        self.computed = dict.fromkeys(range(MAX_REQS), 0)
        self.outputs: dict[tuple[int, int], list[float]] = {}  # by slot and position
        self.kept: dict[str, list[int]] = {}
        self.events: dict[str, list[list[int]]] = {}

    def selected(self, event: Selected) -> None:
        self.events.setdefault(event.req_id, []).append(event.kept.tolist())

    def step(self, rows: dict[int, int], whole: tuple[str, ...] = (), lane: LaneGrant | None = None) -> None:
        """So many tokens of the requests in these slots."""
        slots = list(rows)
        batch = make_batch(list(rows.values()), slots, [self.computed[slot] for slot in slots])
        positions = batch.positions
        owner = torch.tensor(slots, device=DEVICE).repeat_interleave(torch.tensor(list(rows.values()), device=DEVICE))
        dense_slots = torch.stack(
            [t[owner, positions // KV_BLOCK].long() * KV_BLOCK + positions % KV_BLOCK for t in self.tables]
        )
        inputs = {
            "input_ids": (owner * 31 + positions * 7 + positions // 9) % 100,
            "positions": torch.stack([positions // i for i in (1, 2, 3)]) if self.mrope else positions,
            "intermediate_tensors": None,
            "inputs_embeds": None,
        }
        eager = self.state.needs_eager(plan_of(whole, lane))
        metadata = self.state.prepare_attn(
            batch,
            CUDAGraphMode.NONE,
            tuple(table[slots] for table in self.tables),
            dense_slots,
            attention_groups(self.state),
            None,
        )
        by_layer = {
            attention_name(i): group_slots
            for layers, group_slots in zip(self.division, dense_slots, strict=True)
            for i in layers
        }
        by_layer |= self.state.get_own_slot_mappings(batch.num_tokens)
        self.toy.model.calls.clear()
        context = set_forward_context(metadata, self.config, slot_mapping=by_layer, is_padding=batch.is_padding)
        with context, observed_by(self):
            get_forward_context().all_moe_layers = [f"model.layers.{i}.mlp.experts" for i in range(LAYERS)]
            hidden_states = self.state.run_model(self.toy, inputs, batch)
        assert hidden_states.shape == (batch.num_tokens, HIDDEN) and eager == (bool(whole) or lane is not None)
        num_rejected = torch.zeros(len(slots), dtype=torch.int32)
        self.state.take_back_tokens(batch, torch.ones(len(slots), dtype=torch.int32), num_rejected)
        for i, slot in enumerate(slots):
            self.computed[slot] += rows[slot] - int(num_rejected[i])
            if lane is None or lane.req_id != f"r{slot}":
                last = int(batch.query_start_loc_np[i + 1]) - 1
                self.outputs[slot, int(positions[last])] = hidden_states[last].tolist()
        kept = self.state.take_kept_tokens() or {}
        self.waiting = kept.pop(lane.req_id, None) if lane is not None and lane.num_segments is not None else None
        self.kept |= kept
        for req_id in kept:
            self.return_blocks(req_id)
        assert self.state.take_kept_tokens() is None
        check_mirror(self.state.segment_state)
        calls = self.toy.model.calls
        assert eager or [call.layers for call in calls] == [(0, LAYERS)]
        assert all(call.moe_layer_index == call.layers[0] for call in calls), "also where a segment was skipped"
        if lane is not None:
            self.check_bounds(lane, rows)

    def check_bounds(self, lane: LaneGrant, rows: dict[int, int]) -> None:
        """Of the rows a grant allows in a segment, and of the work it allows in all."""
        sizes = [(call.num_rows, call.layers) for call in self.toy.model.calls if call.layers[0] > 0]
        passing = sum(rows.values()) - rows[int(lane.req_id[1:])]
        assert all(num_rows <= passing + lane.rows for num_rows, _ in sizes)
        guests = [(num_rows - passing) * (end - start) for num_rows, (start, end) in sizes if num_rows > passing]
        assert len(guests) < 2 or sum(guests) <= lane.rows * (CUTS[0] + 1)

    def prefill_in_lane(self, slot: int, num_prompt: int, budget: int, beside: dict[int, int], stop: int = -1) -> None:
        """As the scheduler drives it; `stop`: how many steps to take before the request goes."""
        req_id, start = f"r{slot}", self.computed[slot]
        assert start == 0
        without_blocks = sorted({base for base in self.bases if base})
        while req_id not in self.kept and stop != 0:
            num_rows = min(budget, num_prompt - self.computed[slot])
            complete = self.computed[slot] + num_rows == num_prompt
            held = without_blocks[0] if without_blocks else None
            self.step(beside | {slot: num_rows}, lane=LaneGrant(req_id, budget if complete else 0, held))
            stop -= 1
            if self.waiting is not None:
                assert len(self.waiting) == held + 1
                if stop % 2:  # scheduled before the report arrived
                    self.step(beside | {slot: 1}, lane=LaneGrant(req_id, budget, held))
                    assert self.waiting is None and req_id not in self.kept
                self.take_blocks(slot, without_blocks.pop(0))

    @property
    def bases(self) -> list[int]:
        """The first segment of each group."""
        bases = {group.index: group.base for group in self.state.segment_state.groups}
        return [bases.get(i, 0) for i in range(len(self.division))]

    def take_blocks(self, slot: int, segment: int) -> None:
        """What was written to a group's blocks before it had them is lost."""
        for layers, table, base in zip(self.division, self.tables, self.bases, strict=True):
            if base == segment:
                for i in layers:
                    self.toy.model.layers[i].kv[slots_of(table[slot], table.shape[1] * KV_BLOCK)] = torch.nan

    def returned(self, req_id: str) -> list[int]:
        """Blocks of each group."""
        counts = self.kept[req_id]
        return [(counts[0] - counts[base]) // KV_BLOCK for base in self.bases]

    def return_blocks(self, req_id: str) -> None:
        for layers, table, count in zip(self.division, self.tables, self.returned(req_id), strict=True):
            slots = slots_of(table[int(req_id[1:])], count * KV_BLOCK)
            for i in layers:
                self.toy.model.layers[i].kv[slots] = torch.nan

    def cache_of(self, slot: int) -> list[list[list[float]]]:
        """What each layer's cache holds of the request's prompt."""
        counts, cache = self.kept[f"r{slot}"], []
        for layers, table, count in zip(self.division, self.tables, self.returned(f"r{slot}"), strict=True):
            for i in layers:
                if self.toy.model.layers[i].window:
                    continue
                length = counts[sum(cut < i for cut in CUTS)]
                cache.append(self.toy.model.layers[i].kv[slots_of(table[slot, count:], length)].tolist())
        return cache


def finish(worker: Worker) -> tuple:
    """Three more tokens of the prompt in slot 4 and of the decode in slot 2; what there is to compare."""
    for _ in range(3):
        worker.step({2: 1, 4: 1})
    outputs = {position: row for (slot, position), row in worker.outputs.items() if slot == 4}
    return worker.kept["r4"], worker.events["r4"], outputs, worker.cache_of(4)


@pytest.mark.parametrize("seed", range(12))
def test_a_prompt_in_the_lane_ends_as_one_that_is_taken_whole(config, toy, stock, seed: int) -> None:
    """Kept tokens, every layer's cache, its outputs and those of a decode, bit by bit, in chunks of any size.

    Also if it was aborted before in any phase, after an idle step, with a whole prompt beside it, and whatever KV
    cache groups return blocks.
    """
    rng = random.Random(seed)
    num_prompt = rng.randint(60, 250)
    budget = {"keep_ratio": rng.choice([0.3, 0.5, 0.8])} if seed % 2 else {"top_p": rng.choice([0.5, 0.8, 1.0])}
    decision = Decision(num_prompt, None, wants_report=False, **({"top_p": None, "keep_ratio": None} | budget))
    mrope = seed % 3 == 0

    def make_worker() -> Worker:
        worker = Worker(config, toy, mrope=mrope, division=rng.choice(DIVISIONS))
        worker.state.add_request(2, new_request("r2", decide(4, "short_prompt")))
        worker.state.add_request(4, new_request("r4", decision))
        worker.step({2: 9})
        return worker

    worker = make_worker()
    worker.step({2: 1, 4: num_prompt}, whole=("r4",))
    whole, decodes = finish(worker), dict(worker.outputs)
    for chunk in (1 + num_prompt // 9, rng.randint(10, num_prompt), num_prompt - 1, num_prompt, num_prompt + 5):
        worker = make_worker()
        worker.prefill_in_lane(4, num_prompt, chunk, {2: 1}, stop=rng.randint(0, 9))
        worker.state.remove_request("r4")
        worker.kept.clear(), worker.events.clear()
        worker.computed[4] = 0
        worker.state.add_request(4, new_request("r4", decision))
        worker.prefill_in_lane(4, num_prompt, chunk, {2: 1})
        assert worker.computed[4] == num_prompt - 1
        for _ in range(seed % 2):  # scheduled before the report arrived
            worker.step({2: 1, 4: 1}, lane=LaneGrant("r4", chunk))
        worker.step({2: 1, 4: 1})
        assert finish(worker) == whole
        assert all(worker.outputs[key] == row for key, row in decodes.items() if key[0] == 2 and key in worker.outputs)


WINDOW = 40
HYBRID = UNIPREFILL | {"block_size": KV_BLOCK, "sink_tokens": KV_BLOCK, "selection_layers": [1, 4]}
KINDS = ["full" if i in (1, 4) else "sliding" for i in range(LAYERS)]


@pytest.fixture
def with_windows(configure, one_rank: None) -> tuple[VllmConfig, ToyModel]:
    """Full attention in the selection layers only."""
    overrides = {"layer_types": [f"{kind}_attention" for kind in KINDS], "sliding_window": WINDOW}
    config = configure(HYBRID, max_num_seqs=MAX_REQS, hf_overrides=overrides, block_size=KV_BLOCK)
    with set_current_vllm_config(config):
        attention = [
            Attention(
                2,
                32,
                1.0,
                num_kv_heads=1,
                prefix=attention_name(i),
                per_layer_sliding_window=WINDOW if kind == "sliding" else None,
            )
            for i, kind in enumerate(KINDS)
        ]
    torch.manual_seed(0)
    return config, ToyModel(attention).to(DEVICE).requires_grad_(False)


@pytest.mark.parametrize("seed", range(6))
def test_windows_hold_kept_tokens_while_the_prompt_is_pruned_and_slide_on_as_ever(with_windows, stock, seed) -> None:
    """In the lane as whole; afterwards what is outside the stock window is gone."""
    rng = random.Random(seed)
    num_prompt = rng.randint(120, 250)
    decision = Decision(num_prompt, None, keep_ratio=rng.choice([0.3, 0.6]))
    # Two groups of windows, and the full layers together or apart.
    division = [(1, 4), (0, 2, 3), (5, 6, 7)] if seed % 2 else [(1,), (4,), (0, 3, 6), (2, 5, 7)]

    def prune(chunk: int | None) -> tuple:
        worker = Worker(*with_windows, division=division)
        worker.state.add_request(2, new_request("r2", decide(4, "short_prompt")))
        worker.state.add_request(4, new_request("r4", decision))
        worker.step({2: 9})
        if chunk is None:
            worker.step({2: 1, 4: num_prompt}, whole=("r4",))
        else:
            worker.prefill_in_lane(4, num_prompt, chunk, {2: 1})
            worker.step({2: 1, 4: 1})
        for layers, table in zip(division, worker.tables, strict=True):
            if KINDS[layers[0]] == "sliding":
                slots = slots_of(table[4], (num_prompt - WINDOW) // KV_BLOCK * KV_BLOCK)
                for i in layers:
                    worker.toy.model.layers[i].kv[slots] = torch.nan
        return finish(worker)[:3]

    whole = prune(None)
    counts, _, outputs = whole
    assert counts[2] <= counts[1] < num_prompt and not any(np.isnan(row).any() for row in outputs.values())
    for chunk in (rng.randint(10, 60), rng.randint(60, num_prompt), num_prompt + 5):
        assert prune(chunk) == whole


def test_a_whole_prompt_beside_the_lane_is_as_one_alone(config, toy, stock) -> None:
    """In the step in which the lane goes through several segments."""
    decision = decide(50)
    found = []
    for beside in ({}, {4: 100}):
        worker = Worker(config, toy, division=DIVISIONS[2] if beside else DIVISIONS[0])
        worker.state.add_request(5, new_request("r5", decision))
        worker.state.add_request(4, new_request("r4", decide(100)))
        worker.step(beside | {5: 50}, whole=("r5",), lane=LaneGrant("r4", 400) if beside else None)
        worker.step({5: 1})
        found.append((worker.kept["r5"], worker.events["r5"], worker.cache_of(5), worker.outputs[5, 50]))
    assert found[0] == found[1] and 0 < found[0][0][2] < found[0][0][1] < 50
    assert "r4" in worker.kept
