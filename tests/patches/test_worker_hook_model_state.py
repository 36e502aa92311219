"""worker-hook-model-state.patch: the runner asks the model state; by default nothing changes."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_utils import get_kv_cache_configs
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu.input_batch import InputBuffers
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

CPU = torch.device("cpu")
LAST_LAYER = "model.layers.7.self_attn.attn"


@pytest.fixture
def state(configure) -> DefaultModelState:
    return DefaultModelState(configure(None), nn.Module(), None, CPU)


def test_by_default_the_model_is_simply_called(state: DefaultModelState) -> None:
    """With the runner's keyword arguments, and whatever it returns is handed back."""
    returned = (object(), object())
    calls: list[dict] = []

    def model(**inputs: Any):
        calls.append(inputs)
        return returned

    inputs = {"input_ids": torch.zeros(3), "positions": torch.arange(3), "extra": None}
    assert state.run_model(model, inputs, None) is returned
    assert len(calls) == 1 and calls[0] == inputs


def test_by_default_there_is_nothing_of_its_own(state: DefaultModelState) -> None:
    assert state.needs_eager(SchedulerOutput.make_empty()) is False
    assert state.get_own_slot_mappings(5) == {}
    assert state.take_kept_tokens() is None
    assert state.get_warmup_steps() == []
    num_sampled, num_rejected = torch.tensor([1, 0]), torch.tensor([0, 2])
    state.take_back_tokens(None, num_sampled, num_rejected)
    assert (num_sampled.tolist(), num_rejected.tolist()) == ([1, 0], [0, 2])


def test_graph_capture_takes_the_states_own_slot_mappings(monkeypatch) -> None:
    """Before the metadata are built, and for the padded number of tokens."""
    asked: list[int] = []
    own = torch.arange(6)

    def get_own_slot_mappings(num_tokens: int) -> dict[str, torch.Tensor]:
        asked.append(num_tokens)
        return {"late": own}

    tables = SimpleNamespace(
        cp_size=1,
        get_dummy_block_tables=lambda num_reqs: (torch.zeros(num_reqs, 4),),
        get_dummy_slot_mappings=lambda num_tokens: torch.full((1, num_tokens), -1),
    )
    model_state = SimpleNamespace(
        get_own_slot_mappings=get_own_slot_mappings, prepare_attn=lambda *a, **k: {"built": 1}
    )
    group = SimpleNamespace(layer_names=["early", "late"])
    attention = cudagraph_utils.prepare_inputs_to_capture(
        2,
        6,
        model_state,
        InputBuffers(4, 16, CPU),
        tables,
        [],
        SimpleNamespace(kv_cache_groups=[group]),
        full_cudagraph=True,
    )
    metadata, slots = attention
    assert asked == [6] and metadata == {"built": 1}
    assert slots["late"] is own
    assert slots["early"].tolist() == [-1] * 6


# --- the real runner -------------------------------------------------------------------


class RecordingState(DefaultModelState):
    """Records who asks, gives one layer its own slots and hands out other hidden states."""

    def record(self) -> RecordingState:
        self.log: list[Any] = []
        self.own_slots = torch.full((64,), 5, dtype=torch.int64)
        self.eager = self.takes_back = False
        return self

    def needs_eager(self, scheduler_output: SchedulerOutput) -> bool:
        self.log.append(("needs_eager", dict(scheduler_output.num_scheduled_tokens)))
        return self.eager

    def get_own_slot_mappings(self, num_tokens: int) -> dict[str, torch.Tensor]:
        self.log.append("get_own_slot_mappings")
        return {LAST_LAYER: self.own_slots[:num_tokens]}

    def prepare_attn(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.log.append("prepare_attn")
        return super().prepare_attn(*args, **kwargs)

    def run_model(self, model, model_inputs, input_batch) -> torch.Tensor:
        context = get_forward_context()
        self.log.append(("run_model", list(input_batch.req_ids)))
        self.context = (context.skip_compiled, dict(context.slot_mapping))
        return torch.zeros_like(super().run_model(model, model_inputs, input_batch))

    def take_back_tokens(self, input_batch, num_sampled: torch.Tensor, num_rejected: torch.Tensor) -> None:
        self.log.append(("take_back_tokens", num_sampled.tolist(), num_rejected.tolist()))
        if self.takes_back:
            num_sampled[0], num_rejected[0] = 0, 1

    def take_kept_tokens(self) -> dict[str, list[int]]:
        self.log.append("take_kept_tokens")
        return {"a": [4, 3]}


@pytest.fixture(scope="module")
def runner(configure, one_rank: None) -> Iterator[Any]:
    """The CPU's model runner with a tiny model of dummy weights."""
    if not current_platform.is_cpu():
        pytest.skip("the toy runner is the CPU's")
    import vllm.v1.worker.cpu.shm  # noqa: F401  as its worker does, for torch.cuda's names
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.worker.cpu.model_runner import CPUModelRunner

    config: VllmConfig = configure(
        None,
        load_format="dummy",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=8,
        kv_cache_memory_bytes=1 << 22,
    )
    current_platform.import_kernels()
    with set_current_vllm_config(config):
        runner = CPUModelRunner(config, CPU)
        runner.load_model()
        layers = runner.get_kv_cache_spec()
        (layout, *_) = CPUAttentionBackend.supported_kv_cache_layouts()
        config.cache_config.kv_cache_layout = layout.name
        (cache,) = get_kv_cache_configs(config, [layers], [1 << 22])
        config.cache_config.num_gpu_blocks = cache.num_blocks
        runner.initialize_kv_cache(cache)
        yield runner


def new_step(req_id: str, num_tokens: int) -> SchedulerOutput:
    step = SchedulerOutput.make_empty()
    step.scheduled_new_reqs = [
        NewRequestData(
            req_id=req_id,
            prompt_token_ids=list(range(num_tokens)),
            prefill_token_ids=list(range(num_tokens)),
            mm_features=[],
            sampling_params=SamplingParams(temperature=0, max_tokens=4),
            pooling_params=None,
            block_ids=([1],),
            num_computed_tokens=0,
            lora_request=None,
        )
    ]
    step.num_scheduled_tokens = {req_id: num_tokens}
    step.total_num_scheduled_tokens = num_tokens
    step.scheduled_cached_reqs = CachedRequestData.make_empty()
    step.num_common_prefix_blocks = [0]
    return step


def run_step(runner: Any, step: SchedulerOutput) -> ModelRunnerOutput:
    assert runner.execute_model(step) is None
    output = runner.sample_tokens(None)
    return output.get_output() if hasattr(output, "get_output") else output


@pytest.mark.parametrize("eager", [False, True])
def test_the_runner_asks_its_model_state(runner, monkeypatch, eager: bool) -> None:
    """In the order that the state relies on, and it uses each answer."""
    state = RecordingState(runner.vllm_config, runner.model, None, CPU).record()
    state.eager = eager
    monkeypatch.setattr(runner, "model_state", state)
    req_id = f"asked-{eager}"
    output = run_step(runner, new_step(req_id, 4))
    assert state.log == [
        ("needs_eager", {req_id: 4}),
        "get_own_slot_mappings",
        "prepare_attn",
        ("run_model", [req_id]),
        ("take_back_tokens", [1], [0]),
        "take_kept_tokens",
    ]
    skip_compiled, slots = state.context
    assert skip_compiled is eager
    assert slots[LAST_LAYER].tolist() == [5] * 4
    first_layer = slots[LAST_LAYER.replace("7", "0")].tolist()
    assert first_layer == [first_layer[0] + i for i in range(4)] != [5] * 4
    assert output.uniprefill_kept == {"a": [4, 3]}
    assert output.sampled_token_ids == [[0]]  # the first among equal logits


def next_step(req_id: str, num_computed: int, num_tokens: int = 1) -> SchedulerOutput:
    step = SchedulerOutput.make_empty()
    step.scheduled_cached_reqs = CachedRequestData(
        req_ids=[req_id],
        resumed_req_ids=set(),
        new_token_ids=[],
        all_token_ids={},
        new_block_ids=[None],
        num_computed_tokens=[num_computed],
        num_output_tokens=[0],
    )
    step.num_scheduled_tokens = {req_id: num_tokens}
    step.total_num_scheduled_tokens = num_tokens
    step.num_common_prefix_blocks = [0]
    return step


def test_a_token_that_is_taken_back_is_computed_again(runner, monkeypatch) -> None:
    """No step that takes back samples, the counter rests, and the step that does not samples as ever."""
    (undisturbed,) = run_step(runner, new_step("plain", 4)).sampled_token_ids
    state = RecordingState(runner.vllm_config, runner.model, None, CPU).record()
    state.run_model = lambda model, model_inputs, _: positions.append(model_inputs["positions"].tolist()) or model(
        **model_inputs
    )
    positions: list[list[int]] = []
    monkeypatch.setattr(runner, "model_state", state)
    state.takes_back = True
    steps = [new_step("held", 4), next_step("held", 3), next_step("held", 3)]
    assert [run_step(runner, step).sampled_token_ids for step in steps] == [[[]]] * 3
    state.takes_back = False
    assert run_step(runner, next_step("held", 3)).sampled_token_ids == [undisturbed]
    run_step(runner, next_step("held", 4))
    assert positions == [[0, 1, 2, 3], [3], [3], [3], [4]]


def test_a_stock_step_reports_nothing_kept(runner) -> None:
    assert type(runner.model_state) is DefaultModelState
    output = run_step(runner, new_step("stock", 4))
    assert output.req_ids == ["stock"] and output.sampled_token_ids != [[0]]
    assert output.uniprefill_kept is None
