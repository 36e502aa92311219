"""worker-remap-lora-rows.patch: the rows that a cut leaves are mapped to their adapters."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from vllm.lora.layers import LoRAMapping
from vllm.lora.ops.triton_ops import LoRAKernelMeta
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU
from vllm.v1.worker.gpu.lora_utils import LoraState
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.uniprefill.lora import LoraRows, map_rows
from vllm.v1.worker.gpu.uniprefill.model_state import SegmentedModelState, with_segments

MAX_LORAS, MAX_ROWS, MAX_REQS = 3, 400, 8
LORA_CONFIG = SimpleNamespace(max_loras=MAX_LORAS, specialize_active_lora=True)
SLOTS = [9, None, 7]  # which adapter is where


def test_lora_is_no_longer_refused(configure) -> None:
    assert configure({"top_p": 0.9}, enable_lora=True).lora_config is not None


def test_without_lora_nothing_is_mapped() -> None:
    assert SegmentedModelState.lora_rows is None


def make_wrapper(cls: type) -> Any:
    wrapper = cls(MAX_ROWS, MAX_REQS, "cpu", lora_config=LORA_CONFIG)
    for buffer in vars(wrapper).values():
        if isinstance(buffer, torch.Tensor):
            buffer.zero_()
    return wrapper


def state_of(wrapper: Any, num_rows: int) -> dict[str, Any]:
    """What the layers' kernels read."""
    found = {"rows": wrapper.token_lora_indices.tolist(), "requests": wrapper.sampler_indices.tolist()}
    if isinstance(wrapper, PunicaWrapperCPU):
        if not wrapper.no_lora:
            starts, lengths, loras, _, longest, total = wrapper.prefill_metadata
            found |= {"runs": [starts.tolist(), lengths.tolist(), loras.tolist()], "sizes": [longest, total]}
        return found | {"no_lora": wrapper.no_lora}
    for name, meta in (("of rows", wrapper.token_mapping_meta), ("of requests", wrapper.prompt_mapping_meta)):
        mapping, order, *rest = meta.meta_args(num_rows if name == "of rows" else MAX_REQS, True)
        found[name] = [value.tolist() for value in rest]
        if name == "of rows" and not meta.no_lora_flag_cpu:
            found[name] += [mapping.tolist(), order.tolist()]
    return found


@pytest.mark.parametrize("cls", [PunicaWrapperGPU, PunicaWrapperCPU])
@pytest.mark.parametrize("seed", range(8))
def test_fewer_rows_are_mapped_as_vllm_maps_them(cls, seed: int) -> None:
    """From the step that the mapping was made for, whose requests stay; also with none or all of a request."""
    rng = np.random.default_rng(seed)
    num_reqs = int(rng.integers(1, MAX_REQS))
    ids = rng.choice([0, 7, 9], num_reqs) if seed else np.zeros(num_reqs, dtype=int)
    indices = np.array([SLOTS.index(lora) if lora else -1 for lora in ids], dtype=np.int64)
    before = rng.integers(1, 50, num_reqs, dtype=np.int32)
    after = rng.integers(0, before + 1, dtype=np.int32)
    after[-1] = max(1, after[-1])

    def by_vllm(num_rows: np.ndarray) -> Any:
        wrapper = make_wrapper(cls)
        mapping = LoRAMapping(tuple(ids.repeat(num_rows)), tuple(ids), is_prefill=True)
        wrapper.update_metadata(mapping, SLOTS, MAX_LORAS + 1, 100)
        return wrapper

    ours = by_vllm(before)
    map_rows(ours, indices, after)
    total = int(after.sum())
    if cls is PunicaWrapperGPU or (after > 0).all():
        assert state_of(ours, total) == state_of(by_vllm(after), total)
    else:
        assert ours.token_lora_indices.tolist() == by_vllm(after).token_lora_indices.tolist()


def test_nothing_waits_for_the_device() -> None:
    """Fake tensors have no values to wait for; vLLM's own mapping asks for them."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        wrapper = make_wrapper(PunicaWrapperGPU)
        for meta in (wrapper.token_mapping_meta,):  # these live on the host
            meta.no_lora_flag_cpu, meta.num_active_loras_cpu = HostValue(), HostValue()
        map_rows(wrapper, np.array([0, -1, 2]), np.array([5, 1, 40]))
        assert wrapper.token_lora_indices.shape == (46,)
        assert (wrapper.token_mapping_meta.no_lora_flag_cpu.value, wrapper.indices_len[0]) == (False, 46)
        assert wrapper.token_mapping_meta.num_active_loras_cpu.value >= 3
        with pytest.raises(DataDependentOutputException):
            LoRAKernelMeta.prepare_tensors(wrapper.token_mapping_meta, wrapper.token_lora_indices)


class HostValue:
    """A tensor of one value on the host."""

    value: Any = None

    def __setitem__(self, _: int, value: Any) -> None:
        self.value = value

    def fill_(self, value: Any) -> None:
        self.value = value


def make_batch(num_tokens: list[int], slots: list[int]) -> SimpleNamespace:
    return SimpleNamespace(idx_mapping_np=np.array(slots), num_scheduled_tokens=np.array(num_tokens))


def test_each_row_has_the_adapter_of_its_request() -> None:
    """A cut left one row of three; the next step's mapping is made anew, whatever it is."""
    lora_state = LoraState(max_num_reqs=4)
    for slot, lora in enumerate([7, None, 9, None]):
        lora_state.add_request(f"r{slot}", slot, None if lora is None else SimpleNamespace(lora_int_id=lora))
    wrapper = make_wrapper(PunicaWrapperGPU)
    manager = SimpleNamespace(
        supports_mm=False,
        punica_wrapper_mapping={"language_model": wrapper},
        lora_index_to_id=SLOTS,
        _last_mapping="of the step",
    )
    rows = LoraRows(lora_state, manager)
    rows.map(make_batch([1, 1, 2], [2, 1, 0]))
    assert wrapper.token_lora_indices.tolist() == [0, -1, 2, 2]
    assert manager._last_mapping is None


def test_a_segment_maps_its_rows_before_its_metadata_are_built() -> None:
    """With the batch that enters it, guests too; not at all without LoRA."""
    order: list[object] = []
    rows = SimpleNamespace(batch=make_batch([1, 2], [0, 1]), slot_mapping=None, num_rows=3)
    cls = with_segments(DefaultModelState)
    state = cls.__new__(cls)
    state.step, state.segment_state = None, None
    state.layer_names = state.transient_names = [[], []]
    state.metadata = SimpleNamespace(build=lambda *_, persistent: order.append("metadata") or {})
    state._enter_segment(1, rows)
    assert order == ["metadata"]
    state.lora_rows = SimpleNamespace(map=order.append)
    state._enter_segment(1, rows)
    assert order == ["metadata", rows.batch, "metadata"]
