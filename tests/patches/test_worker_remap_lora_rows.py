"""worker-remap-lora-rows.patch: the rows that a cut leaves are mapped to their adapters."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from vllm.v1.worker.gpu.lora_utils import LoraState
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.uniprefill.model_state import with_segments


def test_lora_is_no_longer_refused(configure) -> None:
    assert configure({"top_p": 0.9}, enable_lora=True).lora_config is not None


def test_without_lora_nothing_is_activated() -> None:
    assert ModelState.activate_loras is None


class Adapter:
    def __init__(self, lora_int_id: int) -> None:
        self.lora_int_id = lora_int_id


def make_batch(num_tokens: list[int], slots: list[int]) -> SimpleNamespace:
    return SimpleNamespace(
        req_ids=[f"r{slot}" for slot in slots],
        idx_mapping_np=np.array(slots),
        num_scheduled_tokens=np.array(num_tokens),
        num_tokens=sum(num_tokens),
    )


def test_each_row_has_the_adapter_of_its_request() -> None:
    """Per row and per request, for the rows that the batch has."""
    lora_state = LoraState(max_num_reqs=4)
    adapters = [Adapter(7), None, Adapter(9), None]
    for slot, adapter in enumerate(adapters):
        lora_state.add_request(f"r{slot}", slot, adapter)
    calls: list[tuple] = []
    runner = SimpleNamespace(lora_state=lora_state, _set_active_loras=lambda *inputs: calls.append(inputs))

    GPUModelRunner._activate_loras(runner, make_batch([3, 1, 2], [2, 1, 0]))
    GPUModelRunner._activate_loras(runner, make_batch([1, 1, 2], [2, 1, 0]))  # a cut left one of three

    (before_requests, before_rows, before), (after_requests, after_rows, after) = calls
    assert before_requests == after_requests == (9, 0, 7)
    assert before_rows == (9, 9, 9, 0, 7, 7)
    assert after_rows == (9, 0, 7, 7)
    assert before == after == {adapters[0], adapters[2]}


def test_a_segment_activates_before_its_metadata_are_built() -> None:
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
    state.activate_loras = order.append
    state._enter_segment(1, rows)
    assert order == ["metadata", rows.batch, "metadata"]
