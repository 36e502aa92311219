"""worker-run-segments.patch: what each segment sees of a batch, and how a pruning step runs.

Without a GPU the Triton kernel runs in Triton's interpreter, beside its torch reference.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed.parallel_state import get_pp_group
from vllm.forward_context import get_forward_context, set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.sequence import IntermediateTensors
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.uniprefill.policy import Decision
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.uniprefill.model_state import UniPrefillModelState
from vllm.v1.worker.gpu.uniprefill.runner import PruningRequest, SegmentRunner, _compact
from vllm.v1.worker.gpu.uniprefill.state import SegmentState

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MAX_REQS, MAX_TOKENS, KV_BLOCK = 6, 3000, 16
IMPLEMENTATIONS = [
    SegmentState.update,
    SegmentState.update_triton,
    SegmentState.update_reference,
]


# --- the state -------------------------------------------------------------------------


def make_state(num_segments: int = 3) -> SegmentState:
    return SegmentState(num_segments, MAX_REQS, MAX_TOKENS, KV_BLOCK, DEVICE)


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
    segment: int,
    req_indices: list[int],
    starts: list[int],
    seq_lens: list[int],
    block_table: np.ndarray,
    slot_mapping: list[int],
) -> tuple[list[int], list[int]]:
    """The segment's sequence lengths and slots, token by token."""
    lengths = [0] * len(seq_lens)
    slots = [PAD_SLOT_ID] * len(slot_mapping)
    for i, req in enumerate(req_indices):
        dropped = int(state.dropped_np[segment, req])
        lengths[i] = seq_lens[i] - dropped
        num_rows = starts[i + 1] - starts[i]
        for row in range(num_rows):
            if slot_mapping[starts[i] + row] == PAD_SLOT_ID:
                continue
            position = seq_lens[i] - num_rows + row
            place = position - dropped
            slots[starts[i] + row] = block_table[i, place // KV_BLOCK] * KV_BLOCK + place % KV_BLOCK
    return lengths, slots


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("seed", range(8))
def test_inputs_of_random_batches_match_a_loop(implementation, seed: int) -> None:
    """Decodes, chunked prefills, rows of drafts, rows without a slot, and padding."""
    rng = np.random.default_rng(seed)
    state = make_state(4)
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
    block_table = rng.integers(1, 1 << 28, size=(num_padded_reqs, 128), dtype=np.int32)
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
        torch.from_numpy(block_table).to(DEVICE),
        torch.from_numpy(dense_slots).to(DEVICE),
    )

    for segment in range(1, 4):
        table = block_table.astype(np.int64)
        batch = (req_indices, starts, dense_lens, table, dense_slots.tolist())
        lengths, slots = naive_inputs(state, segment, *batch)
        lengths[num_reqs:] = [0] * (num_padded_reqs - num_reqs)
        assert state.seq_lens[segment, :num_padded_reqs].tolist() == lengths
        assert state.slot_mappings[segment, :num_padded].tolist() == slots
    assert (state.seq_lens[:, num_padded_reqs:] == -7).all()
    assert (state.slot_mappings[:, num_padded:] == -7).all()
    assert (state.slot_mappings[0] == -7).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_update_fills_only_its_segments(implementation) -> None:
    state = make_state(4)
    state.drop(1, [0], [5])
    state.seq_lens.fill_(-7)
    args = [[0, 1], [9], [[3]], [77]]
    starts, lens, table, slots = (torch.tensor(a, dtype=torch.int32, device=DEVICE) for a in args)
    index = torch.tensor([0], device=DEVICE)
    implementation(state, range(2, 3), index, starts, lens, table, slots.long())
    assert state.seq_lens[:, 0].tolist() == [-7, -7, 4, -7]
    untouched = PAD_SLOT_ID
    expected = [untouched, untouched, 3 * KV_BLOCK + 3, untouched]
    assert state.slot_mappings[:, 0].tolist() == expected


# --- compaction ------------------------------------------------------------------------


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


def make_pruning(batch: InputBatch, batch_index: int, num_prompt: int, **budget: float) -> PruningRequest:
    budgets = {"top_p": None, "keep_ratio": None} | budget
    return PruningRequest(
        req_id=batch.req_ids[batch_index],
        batch_index=batch_index,
        decision=Decision(num_prompt, None, wants_report=False, **budgets),
        num_prompt=num_prompt,
        num_output=int(batch.num_scheduled_tokens[batch_index]) - num_prompt,
        alive=[num_prompt],
    )


def test_compaction_leaves_the_kept_rows_and_the_dense_lengths() -> None:
    """The request of 12 rows has 2 outputs; padded requests start where the rows end."""
    batch = make_batch([1, 12, 4], [5, 0, 3], computed=[30, 0, 8])
    padded = np.array([*batch.query_start_loc_np, 17, 17], dtype=np.int32)
    batch.query_start_loc_np = padded
    pruning = [make_pruning(batch, 1, 10, top_p=0.9)]
    rows = torch.tensor([0, 1, 2, 9, 10, 11, 12, 13, 14, 15, 16], device=DEVICE)
    compact = _compact(batch, rows, pruning, kept=[4])
    assert compact.num_scheduled_tokens.tolist() == [1, 6, 4]
    assert compact.num_tokens == compact.num_tokens_after_padding == 11
    assert compact.query_start_loc.tolist() == [0, 1, 7, 11]
    assert compact.query_start_loc_np.tolist() == [0, 1, 7, 11, 11, 11]
    assert compact.positions.tolist() == [30, 0, 1, 8, 9, 10, 11, 8, 9, 10, 11]
    assert compact.is_padding.shape == (11,)
    assert (pruning[0].num_prompt, pruning[0].num_output) == (4, 2)
    assert torch.equal(compact.seq_lens, batch.seq_lens)
    assert batch.num_scheduled_tokens.tolist() == [1, 12, 4]  # the step's batch is untouched
    assert batch.query_start_loc_np is padded and batch.num_tokens == 17


# --- running segments ------------------------------------------------------------------

HIDDEN, LAYERS, CUTS = 8, 8, [1, 4]
UNIPREFILL = {
    "selection_layers": CUTS,
    "block_size": 4,
    "num_queries": 2,
    "sink_tokens": 4,
    "recent_tokens": 4,
    "min_prompt_tokens": 8,
}


class ToyLayer(nn.Module):
    """Mixes no rows: adds its index and the position, and shows the hook queries and keys."""

    def __init__(self, index: int, attn: Attention) -> None:
        super().__init__()
        self.index, self.attn = index, attn

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.attn.on_query_key is not None:
            query = hidden_states.repeat(1, 8).view(-1, 2, 32)
            self.attn.on_query_key(query, query[:, :1])
        position = positions if positions.dim() == 1 else (positions * positions.new_tensor([[1], [2], [4]])).sum(0)
        return hidden_states * 1.01 + self.index + 0.001 * position[:, None]


class ToyInner(nn.Module):
    """Follows vLLM's pipeline-parallel contract, and records how it is called."""

    def __init__(self, attention: list[Attention]) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, HIDDEN)
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
                metadata=dict(context.attn_metadata),
                slots={name: slots.tolist() for name, slots in context.slot_mapping.items()},
                num_padding_rows=len(context.is_padding),
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

    def forward(self, **inputs: Any):
        return self.model(**inputs)


@pytest.fixture
def config(configure, one_rank: None) -> VllmConfig:
    return configure(UNIPREFILL, max_num_seqs=MAX_REQS)


@pytest.fixture
def toy(config: VllmConfig) -> ToyModel:
    with set_current_vllm_config(config):
        attention = [
            Attention(2, 32, 1.0, num_kv_heads=1, prefix=f"model.layers.{i}.self_attn.attn") for i in range(LAYERS)
        ]
    torch.manual_seed(0)
    return ToyModel(attention).to(DEVICE).requires_grad_(False)


class Step:
    """One step of the toy through the SegmentRunner, with metadata that says what was asked."""

    def __init__(self, config: VllmConfig, toy: ToyModel, batch: InputBatch, pruning: list[PruningRequest]) -> None:
        self.config, self.toy, self.batch, self.pruning = config, toy, batch, pruning
        self.runner = SegmentRunner(config, toy, self.build_metadata)
        self.state = make_state()
        self.built: list[tuple[int, InputBatch, list[int]]] = []
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, 100, (batch.num_tokens,), generator=generator).to(DEVICE)
        self.inputs = {
            "input_ids": ids,
            "positions": batch.positions,
            "intermediate_tensors": None,
            "inputs_embeds": None,
        }
        self.slot_mapping = 1000 + torch.arange(batch.num_tokens, device=DEVICE)

    def build_metadata(self, batch: InputBatch, segment: int, slot_mapping: torch.Tensor):
        self.built.append((segment, batch, slot_mapping.tolist()))
        return {f"layers of {segment}": segment}, {f"layers of {segment}": slot_mapping}

    def in_context(self, run):
        metadata, slots = {"layers of 0": 0}, {"layers of 0": self.slot_mapping}
        padding = self.batch.is_padding
        with set_forward_context(metadata, self.config, slot_mapping=slots, is_padding=padding):
            return run()

    def run(self) -> torch.Tensor:
        return self.in_context(
            lambda: self.runner.run(
                self.toy, dict(self.inputs), self.batch, self.slot_mapping, self.pruning, self.state
            )
        )

    def dense(self) -> torch.Tensor:
        return self.in_context(lambda: self.toy(**self.inputs))


def mixed_step(config: VllmConfig, toy: ToyModel, **budget: float) -> Step:
    """A decode, a resumed prompt (40 and 3 outputs), a dense chunk and another prompt of 30."""
    batch = make_batch([1, 43, 5, 30], [2, 4, 0, 5], computed=[60, 0, 16, 0])
    pruning = [make_pruning(batch, 1, 40, **budget), make_pruning(batch, 3, 30, **budget)]
    return Step(config, toy, batch, pruning)


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
    assert [request.alive for request in step.pruning] == [[40, 40, 40], [30, 30, 30]]
    assert not step.state.dropped_np.any()
    assert [segment for segment, *_ in step.built] == [1, 2]


def test_surviving_rows_return_to_their_places_and_dropped_ones_are_zero(config, toy) -> None:
    """Rows do not mix in the toy, so a survivor's state is that of the dense run."""
    step = mixed_step(config, toy, keep_ratio=0.5)
    hidden_states = step.run()
    dense = step.dense()
    alive = hidden_states.any(1)
    assert torch.equal(hidden_states[alive], dense[alive])
    assert (hidden_states[~alive] == 0).all()
    # Of 10 blocks half, of those 5 again 3; of 8 (the last of 2 tokens) 4, then 2.
    assert [request.alive[0] for request in step.pruning] == [40, 30]
    for request, start, end in zip(step.pruning, (1, 49), (41, 79), strict=False):
        assert request.alive[2] == int(alive[start:end].sum()) == request.num_prompt
        assert request.alive[0] > request.alive[1] > request.alive[2]
        assert alive[start : start + 4].all() and alive[end - 4 : end].all()  # sink, recent
    assert alive[0] and alive[41:44].all() and alive[44:49].all()  # decode, outputs, chunk
    assert step.pruning[0].alive == [40, 20, 12]


def test_three_positions_a_token_follow_their_rows(config, toy) -> None:
    """M-RoPE: [3, tokens]. The attention metadata goes on counting tokens."""
    step = mixed_step(config, toy, keep_ratio=0.5)
    one = step.batch.positions
    step.inputs["positions"] = torch.stack([one, one // 2, 100 - one])
    hidden_states = step.run()
    alive = hidden_states.any(1)
    assert torch.equal(hidden_states[alive], step.dense()[alive])
    for call, (_, batch, _) in zip(toy.model.calls[1:3], step.built, strict=True):
        time, height, width = call.positions
        assert time == batch.positions.tolist()
        assert height == [p // 2 for p in time] and width == [100 - p for p in time]


def test_dropped_counts_are_those_of_each_segment(config, toy) -> None:
    step = mixed_step(config, toy, keep_ratio=0.5)
    step.run()
    check_mirror(step.state)
    for request, slot in zip(step.pruning, (4, 5), strict=False):
        dropped = [request.alive[0] - alive for alive in request.alive]
        assert step.state.dropped_np[:, slot].tolist() == dropped
    assert not step.state.dropped_np[:, :4].any()


def test_a_segments_metadata_is_built_from_its_rows(config, toy) -> None:
    """Slots and positions follow the same rows, and the context holds every segment's."""
    step = mixed_step(config, toy, keep_ratio=0.5)
    step.run()
    positions = step.batch.positions.tolist()
    for (segment, batch, slots), call in zip(step.built, toy.model.calls[1:], strict=False):
        rows = [slot - 1000 for slot in slots]
        assert rows == sorted(set(rows)) and len(rows) == batch.num_tokens
        assert [positions[row] for row in rows] == call.positions == batch.positions.tolist()
        first, second = (request.alive[segment] for request in step.pruning)
        assert batch.num_scheduled_tokens.tolist() == [1, first + 3, 5, second]
        assert call.metadata == {f"layers of {i}": i for i in range(segment + 1)}
        assert call.slots[f"layers of {segment}"] == slots
        assert call.num_padding_rows == batch.num_tokens
    assert len(toy.model.calls[0].slots["layers of 0"]) == step.batch.num_tokens


def test_a_request_keeps_the_same_tokens_alone_and_in_a_batch(config, toy) -> None:
    together = mixed_step(config, toy, top_p=0.6)
    rows = together.run()[49:79].any(1)
    batch = make_batch([30], [1])
    alone = Step(config, toy, batch, [make_pruning(batch, 0, 30, top_p=0.6)])
    alone.inputs["input_ids"] = together.inputs["input_ids"][49:79]
    assert torch.equal(alone.run().any(1), rows)
    assert alone.pruning[0].alive == together.pruning[1].alive
    assert alone.pruning[0].num_prompt < 30


def test_embeddings_are_the_first_stages_input_only(config, toy) -> None:
    expected = mixed_step(config, toy, keep_ratio=0.5).run()
    step = mixed_step(config, toy, keep_ratio=0.5)
    ids = step.inputs["input_ids"]
    step.inputs |= {"input_ids": None, "inputs_embeds": toy.model.embed(ids)}
    assert torch.equal(step.run(), expected)


# --- the model state -------------------------------------------------------------------


def test_it_stands_in_for_the_default_state_only() -> None:
    assert UniPrefillModelState.in_place_of(DefaultModelState) is UniPrefillModelState

    class OtherModelState(DefaultModelState):
        pass

    with pytest.raises(ValueError, match="models that keep a OtherModelState"):
        UniPrefillModelState.in_place_of(OtherModelState)


@pytest.fixture
def model_state(config, toy) -> UniPrefillModelState:
    state = UniPrefillModelState(config, toy, None, DEVICE)
    cache = SimpleNamespace(kv_cache_groups=[object()])
    state.initialize_kv_cache(cache, SimpleNamespace(block_sizes=[KV_BLOCK]))
    return state


def new_request(req_id: str, decision: Decision | None) -> Any:
    return SimpleNamespace(req_id=req_id, uniprefill=decision, mm_features=[])


def decide(num_prompt: int, reason: str | None = None) -> Decision:
    return Decision(num_prompt, reason, 0.5, None, wants_report=False)


def test_several_kv_cache_groups_are_refused(model_state) -> None:
    cache = SimpleNamespace(kv_cache_groups=[object(), object()])
    with pytest.raises(ValueError, match="several KV cache groups"):
        model_state.initialize_kv_cache(cache, SimpleNamespace(block_sizes=[KV_BLOCK] * 2))


def test_only_a_step_that_starts_a_pruned_request_is_eager(model_state) -> None:
    model_state.add_request(3, new_request("pruned", decide(40)))
    model_state.add_request(1, new_request("dense", decide(4, "short_prompt")))
    model_state.add_request(2, new_request("stock", None))
    steps = [["dense", "stock"], ["dense", "pruned"]]
    asked = [SimpleNamespace(num_scheduled_tokens=dict.fromkeys(step, 4)) for step in steps]
    assert [model_state.needs_eager(step) for step in asked] == [False, True]
    model_state.remove_request("pruned")
    assert not model_state.needs_eager(asked[1])


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


def prepare(model_state: UniPrefillModelState, monkeypatch, batch: InputBatch, **kwargs: Any):
    """prepare_attn with a stock side that returns the batch it is given, by layer name."""

    def stock(self, batch, mode, tables, slots, groups, *args, **kwargs):
        (group,) = groups[0]
        return dict.fromkeys(group.layer_names, (batch, slots[0].tolist()))

    monkeypatch.setattr(DefaultModelState, "prepare_attn", stock)
    names = model_state.layer_names
    groups = [[SimpleNamespace(segment=i, layer_names=names[i]) for i in range(3)]]
    table = torch.arange(MAX_REQS * 8, dtype=torch.int32, device=DEVICE).view(MAX_REQS, 8)
    slots = 5000 + torch.arange(batch.num_tokens, device=DEVICE)[None]
    mode = kwargs.pop("mode", CUDAGraphMode.NONE)
    return model_state.prepare_attn(batch, mode, (table,), slots, groups, None, **kwargs)


@pytest.mark.parametrize("for_capture", [False, True])
def test_a_decode_sees_each_segments_compact_sequence(model_state, monkeypatch, for_capture) -> None:
    """Host and device agree on its length; other requests are as in the dense segment."""
    model_state.segment_state.drop(1, [4], [10])
    model_state.segment_state.drop(2, [4], [25])
    batch = make_batch([1, 1], [4, 0], computed=[60, 20])
    metadata = prepare(model_state, monkeypatch, batch, for_capture=for_capture)
    assert len(metadata) == LAYERS
    expected = {0: [61, 21], 1: [51, 21], 2: [36, 21]}
    places = {1: [50, 8 * 16 + 20], 2: [35, 8 * 16 + 20]}  # blocks 0.. and 8..
    for segment, lengths in expected.items():
        for name in model_state.layer_names[segment]:
            seen, slots = metadata[name]
            assert seen.seq_lens.tolist() == lengths
            assert seen.seq_lens_cpu_upper_bound.tolist() == lengths
            if segment:
                assert slots == places[segment]
                assert model_state.get_own_slot_mappings(2)[name].tolist() == slots
    assert batch.seq_lens_cpu_upper_bound.tolist() == [61, 21]


def test_without_pruned_requests_all_layers_share_the_dense_metadata(model_state, monkeypatch) -> None:
    model_state.segment_state.drop(1, [4], [10])  # not in this batch
    metadata = prepare(model_state, monkeypatch, make_batch([3, 1], [1, 0], computed=[0, 20]))
    assert len({id(value) for value in metadata.values()}) == 1 and len(metadata) == LAYERS
    for slots in model_state.get_own_slot_mappings(4).values():
        assert slots.tolist() == [5000, 5001, 5002, 5003]


def test_graph_steps_fill_the_persistent_buffers_even_so(model_state, monkeypatch) -> None:
    """A captured graph reads them, not the shared metadata."""
    batch = make_batch([1], [0], computed=[20])
    metadata = prepare(model_state, monkeypatch, batch, mode=CUDAGraphMode.FULL)
    seen, slots = metadata["model.layers.7.self_attn.attn"]
    buffer = model_state.segment_state.seq_lens[2]
    assert seen.seq_lens.data_ptr() == buffer.data_ptr() and buffer[0] == 21
    assert slots == [20]


def test_a_pruning_step_runs_segments_and_hands_out_what_was_kept(model_state, monkeypatch, config, toy) -> None:
    """Its dense metadata first; the kept counts once; the next step is stock."""
    batch = make_batch([1, 40], [2, 4], computed=[60, 0])
    model_state.add_request(4, new_request("r4", decide(40)))
    scheduled = SimpleNamespace(num_scheduled_tokens={"r2": 1, "r4": 40})
    assert model_state.needs_eager(scheduled)
    metadata = prepare(model_state, monkeypatch, batch)
    assert sorted(metadata) == sorted(model_state.layer_names[0])
    inputs = {
        "input_ids": torch.arange(41, device=DEVICE),
        "positions": batch.positions,
        "intermediate_tensors": None,
        "inputs_embeds": None,
    }
    slots = model_state.get_own_slot_mappings(41)
    with set_forward_context(metadata, config, slot_mapping=slots, is_padding=batch.is_padding):
        hidden_states = model_state.run_model(toy, dict(inputs), batch)
    assert hidden_states.shape == (41, HIDDEN)
    kept = model_state.take_kept_tokens()
    assert list(kept) == ["r4"] and kept["r4"][0] == 40 > kept["r4"][2]
    assert model_state.take_kept_tokens() is None
    # Kept tokens sit in the first slots of the request's own blocks, 8 to 15.
    last = toy.model.calls[-1]
    slots = last.slots["model.layers.7.self_attn.attn"]
    assert slots == [60, *(8 * KV_BLOCK + i for i in range(kept["r4"][2]))]
    seen, _ = last.metadata["model.layers.7.self_attn.attn"]
    assert seen.seq_lens.tolist() == [61, kept["r4"][2]]

    assert not model_state.needs_eager(scheduled)
    toy.model.calls.clear()
    with set_forward_context({}, config, slot_mapping={}, is_padding=batch.is_padding):
        model_state.run_model(toy, dict(inputs), batch)
    assert [call.layers for call in toy.model.calls] == [(0, LAYERS)]
