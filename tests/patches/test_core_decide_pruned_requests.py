"""core-decide-pruned-requests.patch: what is pruned, when it is scheduled, and what it reports."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch
from vllm.config import UniPrefillConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.uniprefill.policy import PrunePolicy, RequestArgs

KV_BLOCK = 16
BUDGET = 256
MAX_SEQS = 4
MIN_PROMPT = 64
LONGEST = BUDGET - (MAX_SEQS - 1)  # beside three decodes
UNIPREFILL = {"top_p": 0.9, "selection_layers": [1, 4], "min_prompt_tokens": MIN_PROMPT}

_ids = count()


@pytest.fixture(scope="module", autouse=True)
def _none_hash() -> None:
    init_none_hash(sha256)


def make_request(prompt: int | list[int], *, max_tokens: int = 16, extra: dict | None = None, **kwargs: Any) -> Request:
    """A request of so many tokens that no other request shares, or of these tokens."""
    number = next(_ids)
    if isinstance(prompt, int):
        prompt = [number % 1000] * prompt
    of_request = {"resumable": kwargs.pop("resumable", False)}
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=extra, **kwargs)
    return Request(
        request_id=str(number),
        prompt_token_ids=prompt,
        sampling_params=params,
        pooling_params=None,
        block_hasher=get_request_block_hasher(KV_BLOCK, sha256),
        **of_request,
    )


@pytest.fixture
def make_scheduler(configure) -> Callable[..., Scheduler]:
    def make(uniprefill: dict | None = UNIPREFILL, num_blocks: int = 1000, **arguments: Any) -> Scheduler:
        settings = {
            "max_num_batched_tokens": BUDGET,
            "max_num_seqs": MAX_SEQS,
            "block_size": KV_BLOCK,
            "enable_prefix_caching": True,
            "async_scheduling": False,
        }
        config = configure(uniprefill, **(settings | arguments))
        config.cache_config.num_gpu_blocks = num_blocks
        register_all_kvcache_specs(config)
        spec = FullAttentionSpec(block_size=KV_BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
        return Scheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=num_blocks,
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
            ),
            block_size=KV_BLOCK,
            log_stats=True,
            structured_output_manager=StructuredOutputManager(config),
        )

    return make


def add(scheduler: Scheduler, *args: Any, **kwargs: Any) -> Request:
    request = make_request(*args, **kwargs)
    scheduler.add_request(request)
    return request


def finish_step(
    scheduler: Scheduler, step: SchedulerOutput, kept: dict[str, list[int]] | None = None
) -> dict[str, EngineCoreOutput]:
    """Sample a token of every request whose tokens are all computed; outputs by request id."""
    req_ids = list(step.num_scheduled_tokens)
    requests = [scheduler.requests[req_id] for req_id in req_ids]
    sampled = [[7] if r.num_computed_tokens >= r.num_tokens else [] for r in requests]
    outputs: dict[int, EngineCoreOutputs] = scheduler.update_from_output(
        step,
        ModelRunnerOutput(
            req_ids=req_ids,
            req_id_to_index={req_id: i for i, req_id in enumerate(req_ids)},
            sampled_token_ids=sampled,
            uniprefill_kept=kept,
        ),
    )
    return {output.request_id: output for o in outputs.values() for output in o.outputs}


def step_of(scheduler: Scheduler) -> SchedulerOutput:
    step = scheduler.schedule()
    finish_step(scheduler, step)
    return step


def scheduled(step: SchedulerOutput, *requests: Request) -> list[int]:
    return [step.num_scheduled_tokens.get(request.request_id, 0) for request in requests]


# --- arguments -------------------------------------------------------------------------


def test_arguments_are_read() -> None:
    config = UniPrefillConfig()
    given = {"uniprefill_top_p": 1, "uniprefill_report": True, "other": object()}
    assert RequestArgs.parse(given, config) == RequestArgs(None, 1, None, True)
    assert RequestArgs.parse({"uniprefill": 0}, config) == RequestArgs(False, None, None, False)
    given = {"uniprefill": 1, "uniprefill_keep_ratio": 0.2}
    assert RequestArgs.parse(given, config) == RequestArgs(True, None, 0.2, False)


@pytest.mark.parametrize("config", [None, UniPrefillConfig()], ids=["without", "with"])
@pytest.mark.parametrize("given", [None, {}, {"prefill": 3}], ids=str)
def test_requests_without_our_arguments_ask_for_nothing(given, config) -> None:
    assert RequestArgs.parse(given, config) == RequestArgs(None, None, None, False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("uniprefill", value) for value in (2, -1, "1", 1.0, None, [])),
        *(("uniprefill_report", value) for value in (2, "yes", 0.0)),
        *(
            (name, value)
            for name in ("uniprefill_top_p", "uniprefill_keep_ratio")
            for value in (0, -0.5, 1.1, math.nan, math.inf, True, "0.5", None)
        ),
        ("uniprefill_topp", 0.5),
        ("uniprefill_selection_layers", [1]),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(VLLMValidationError, match=f"^{name} ") as error:
        RequestArgs.parse({"uniprefill": 1, name: value}, UniPrefillConfig())
    assert error.value.parameter == name


def test_two_budgets_exclude_each_other() -> None:
    both = {"uniprefill_top_p": 0.5, "uniprefill_keep_ratio": 0.5}
    with pytest.raises(VLLMValidationError, match="uniprefill_top_p and uniprefill_keep_ratio"):
        RequestArgs.parse(both, UniPrefillConfig())


def test_any_argument_needs_the_flag() -> None:
    with pytest.raises(VLLMValidationError, match="--uniprefill-config") as error:
        RequestArgs.parse({"uniprefill_report": 0}, None)
    assert error.value.parameter == "uniprefill_report"


# --- the decision ----------------------------------------------------------------------


@pytest.fixture
def policy(configure) -> Callable[..., PrunePolicy]:
    def make(**values: Any) -> PrunePolicy:
        limits = {"max_num_batched_tokens": BUDGET, "max_num_seqs": MAX_SEQS}
        return PrunePolicy.from_vllm_config(configure(UNIPREFILL | values, **limits))

    return make


def admitted(policy: PrunePolicy, *args: Any, **kwargs: Any) -> Request:
    request = make_request(*args, **kwargs)
    assert request.uniprefill is None and not request.is_pruned
    policy.admit(request)
    return request


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, None),
        ({"extra": {"uniprefill": 0}}, "disabled"),
        ({"prompt": MIN_PROMPT}, None),
        ({"prompt": MIN_PROMPT - 1}, "short_prompt"),
        ({"prompt": LONGEST}, None),
        ({"prompt": LONGEST + 1}, "prompt_exceeds_step"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"resumable": True}, "streaming_input"),
    ],
    ids=str,
)
def test_decision_and_its_reason(policy, arguments: dict, reason: str | None) -> None:
    """Only pruned requests are kept from reading the prefix cache."""
    request = admitted(policy(), **({"prompt": 100} | arguments))
    assert request.uniprefill.dense_reason == reason
    assert request.is_pruned == (reason is None)
    assert request.uniprefill.num_prompt_tokens == request.num_prompt_tokens
    if "prompt_logprobs" not in arguments:  # those never read it, stock
        assert request.skip_reading_prefix_cache == (reason is None)


def test_requests_choose_against_the_default(policy) -> None:
    off = policy(enabled=False)
    assert admitted(off, 100).uniprefill.dense_reason == "disabled"
    assert admitted(off, 100, extra={"uniprefill": 1}).is_pruned
    assert admitted(off, 10, extra={"uniprefill": 1}).uniprefill.dense_reason == "short_prompt"


@pytest.mark.parametrize(
    ("config", "extra", "expected"),
    [
        ({"top_p": 0.9}, {}, (0.9, None)),
        ({"top_p": 0.9}, {"uniprefill_top_p": 0.5}, (0.5, None)),
        ({"top_p": 0.9}, {"uniprefill_keep_ratio": 0.2}, (None, 0.2)),
        ({"top_p": None, "keep_ratio": 0.3}, {}, (None, 0.3)),
        ({"top_p": None, "keep_ratio": 0.3}, {"uniprefill_keep_ratio": 0.2}, (None, 0.2)),
        ({"top_p": None, "keep_ratio": 0.3}, {"uniprefill_top_p": 0.5}, (0.5, None)),
    ],
    ids=str,
)
def test_the_requests_budget_replaces_the_configs(policy, config, extra, expected) -> None:
    decision = admitted(policy(**config), 100, extra=extra).uniprefill
    assert (decision.top_p, decision.keep_ratio) == expected


def test_the_report_says_what_each_segment_took_and_kept(policy) -> None:
    """Once, and only to the request that asked; other requests' counts are not its own."""
    policy = policy()
    request = admitted(policy, 200, extra={"uniprefill_report": 1})
    kept = {"another": [1, 1, 1], request.request_id: [200, 120, 80]}
    assert policy.take_report(request, kept) == {
        "outcome": "pruned",
        "reason": None,
        "prompt_tokens": 200,
        "segments": [
            {"layers": [0, 1], "tokens_in": 200, "tokens_kept": 120},
            {"layers": [2, 4], "tokens_in": 120, "tokens_kept": 80},
            {"layers": [5, 7], "tokens_in": 80, "tokens_kept": 80},
        ],
    }
    assert policy.take_report(request, None) is None
    silent = admitted(policy, 200)
    assert policy.take_report(silent, {silent.request_id: [200, 120, 80]}) is None
    assert silent.uniprefill.alive == [200, 120, 80]


def test_a_dense_request_reports_its_reason(policy) -> None:
    policy = policy()
    request = admitted(policy, 20, extra={"uniprefill_report": 1})
    report = policy.take_report(request, None)
    assert (report["outcome"], report["reason"]) == ("dense", "short_prompt")
    assert [(s["tokens_in"], s["tokens_kept"]) for s in report["segments"]] == [(20, 20)] * 3


# --- the scheduler ---------------------------------------------------------------------


def test_the_decision_travels_with_the_request(make_scheduler) -> None:
    scheduler = make_scheduler()
    pruned, dense = add(scheduler, 100), add(scheduler, 20)
    new = {r.req_id: r for r in scheduler.schedule().scheduled_new_reqs}
    assert new[pruned.request_id].uniprefill is pruned.uniprefill
    assert pruned.uniprefill.pruned
    assert new[dense.request_id].uniprefill.dense_reason == "short_prompt"


def test_a_prompt_waits_until_a_chunked_dense_prefill_leaves_room(make_scheduler) -> None:
    """Where a dense prompt takes what is left."""
    for extra, expected in (({}, [0, 150]), ({"uniprefill": 0}, [112, 38])):
        scheduler = make_scheduler()
        running = add(scheduler, 400)
        assert scheduled(step_of(scheduler), running) == [BUDGET]
        waiting = add(scheduler, 150, extra=extra)
        for whole in expected:
            assert scheduled(step_of(scheduler), waiting) == [whole]


def test_the_longest_prompt_fits_beside_a_full_batch_of_decodes(make_scheduler) -> None:
    scheduler = make_scheduler()
    decodes = [add(scheduler, 20) for _ in range(MAX_SEQS - 1)]
    step_of(scheduler)
    longest = add(scheduler, LONGEST)
    assert scheduled(step_of(scheduler), *decodes, longest) == [1, 1, 1, LONGEST]


def test_two_prompts_share_a_step_only_if_both_are_whole(make_scheduler) -> None:
    scheduler = make_scheduler()
    first, second, third = add(scheduler, 150), add(scheduler, 106), add(scheduler, 100)
    assert scheduled(step_of(scheduler), first, second, third) == [150, 106, 0]
    assert scheduled(step_of(scheduler), first, second, third) == [1, 1, 100]


def test_the_long_prefill_threshold_does_not_cut_a_prompt(make_scheduler) -> None:
    """Where it cuts a dense one."""
    scheduler = make_scheduler(long_prefill_token_threshold=32)
    dense = add(scheduler, 100, extra={"uniprefill": 0})
    pruned = add(scheduler, 200)
    assert scheduled(step_of(scheduler), dense, pruned) == [32, 200]


def test_a_prompt_waits_until_all_its_images_can_be_encoded(make_scheduler, monkeypatch) -> None:
    """Where a dense one starts with the tokens before the first image that cannot."""
    monkeypatch.setattr(Request, "has_encoder_inputs", True)
    for extra, expected in (({}, [0, 150]), ({"uniprefill": 0}, [50, 100])):
        scheduler = make_scheduler()
        request = add(scheduler, 150, extra=extra)
        first_step = True

        def encode(request, computed, new, budget, **_):
            return [], 50 if first_step else new, budget, [], []  # noqa: B023

        monkeypatch.setattr(scheduler, "_try_schedule_encoder_inputs", encode)
        found = []
        for first_step in (True, False):  # noqa: B007
            found += scheduled(step_of(scheduler), request)
        assert found == expected


def preempt_all(scheduler: Scheduler) -> None:
    scheduler.reset_prefix_cache(reset_running_requests=True)
    assert not scheduler.running


def test_a_preempted_request_resumes_with_its_outputs(make_scheduler) -> None:
    scheduler = make_scheduler()
    request = add(scheduler, 100)
    for _ in range(5):
        step_of(scheduler)
    assert request.num_output_tokens == 5
    preempt_all(scheduler)
    step = scheduler.schedule()
    assert scheduled(step, request) == [105]
    (resumed,) = step.scheduled_new_reqs  # the V2 model runner gets it as a new one
    assert resumed.uniprefill is request.uniprefill and request.is_pruned
    assert resumed.num_computed_tokens == 0
    finish_step(scheduler, step)
    assert scheduled(step_of(scheduler), request) == [1]


def test_a_resumed_request_may_chunk_its_outputs_but_not_its_prompt(make_scheduler) -> None:
    scheduler = make_scheduler()
    request = add(scheduler, LONGEST)
    for _ in range(10):
        step_of(scheduler)
    preempt_all(scheduler)
    assert scheduled(step_of(scheduler), request) == [BUDGET]  # the prompt and 3 outputs
    assert scheduled(step_of(scheduler), request) == [7]
    assert request.num_output_tokens == 11


def test_a_resumed_prompt_waits_for_room_too(make_scheduler) -> None:
    scheduler = make_scheduler()
    request = add(scheduler, 200)
    for _ in range(5):
        step_of(scheduler)
    preempt_all(scheduler)
    dense = make_request(400)
    scheduler.add_request(dense)
    scheduler.waiting.remove_request(dense)
    scheduler.waiting.prepend_request(dense)
    taken = [scheduled(step_of(scheduler), dense, request) for _ in range(3)]
    assert taken == [[BUDGET, 0], [144, 0], [1, 205]]


def test_preemption_for_memory_loses_nothing(make_scheduler) -> None:
    """Two requests outgrow the blocks: every prefill is whole, and all finish."""
    scheduler = make_scheduler(num_blocks=18)
    requests = [add(scheduler, 100, max_tokens=60), add(scheduler, 90, max_tokens=60)]
    starts = []
    for _ in range(200):
        if not scheduler.has_unfinished_requests():
            break
        step = scheduler.schedule()
        starts += [
            (new.uniprefill.num_prompt_tokens, step.num_scheduled_tokens[new.req_id]) for new in step.scheduled_new_reqs
        ]
        finish_step(scheduler, step)
    assert [r.status for r in requests] == [RequestStatus.FINISHED_LENGTH_CAPPED] * 2
    assert len(starts) > 2 and all(tokens >= prompt for prompt, tokens in starts)
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 17  # less the null block


# --- the prefix cache ------------------------------------------------------------------


def cached_tokens(scheduler: Scheduler, request: Request) -> int:
    """How much of the request's prompt the step that starts it found in the prefix cache."""
    new = {r.req_id: r for r in step_of(scheduler).scheduled_new_reqs}
    return new[request.request_id].num_computed_tokens


def run_to_the_end(scheduler: Scheduler) -> None:
    while scheduler.has_unfinished_requests():
        step_of(scheduler)


@pytest.mark.parametrize("writer", ["dense", "pruned"])
@pytest.mark.parametrize("reader", ["dense", "pruned"])
@pytest.mark.parametrize("finished", [False, True], ids=["running", "finished"])
def test_only_dense_requests_share_a_prefix(make_scheduler, writer, reader, finished) -> None:
    """Also the outputs that a pruned request appended."""
    kind = {"dense": {"uniprefill": 0}, "pruned": {"uniprefill": 1}}
    scheduler = make_scheduler()
    prompt = list(range(100))
    first = add(scheduler, prompt, max_tokens=40, extra=kind[writer])
    for _ in range(40 if finished else 30):
        step_of(scheduler)
    assert first.is_finished() == finished
    second = add(scheduler, [*prompt, *first.output_token_ids], extra=kind[reader])
    hit = cached_tokens(scheduler, second)
    assert (hit >= 112) if (writer, reader) == ("dense", "dense") else hit == 0


def test_a_pruned_request_leaves_no_hashed_block(make_scheduler) -> None:
    scheduler = make_scheduler()
    cache = scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block
    request = add(scheduler, 100, max_tokens=40, extra={"uniprefill_report": 1})
    outputs = finish_step(scheduler, scheduler.schedule())
    assert outputs[request.request_id].prefill_stats.num_cache_creation_tokens == 0
    scheduler.kv_cache_manager.cache_blocks(request, 100)  # as after a remote prefill
    run_to_the_end(scheduler)
    assert len(cache) == 0
    add(scheduler, 100, extra={"uniprefill": 0})
    step_of(scheduler)
    assert len(cache) == 100 // KV_BLOCK


# --- fairness and the report -----------------------------------------------------------


def test_a_prompt_does_not_starve_under_dense_traffic(make_scheduler) -> None:
    """New dense prompts come every step, each large enough to crowd it out."""
    scheduler = make_scheduler()
    for _ in range(6):
        add(scheduler, 200, max_tokens=3, extra={"uniprefill": 0})
    longest = add(scheduler, LONGEST)
    for _ in range(40):
        add(scheduler, 200, max_tokens=3, extra={"uniprefill": 0})
        (tokens,) = scheduled(step_of(scheduler), longest)
        if tokens:
            break
    assert tokens == LONGEST


def test_kept_counts_flow_into_the_report(make_scheduler) -> None:
    """With the first output only; the report survives the way to the front end."""
    scheduler = make_scheduler()
    asks = add(scheduler, 100, extra={"uniprefill_report": 1})
    silent = add(scheduler, 100)
    step = scheduler.schedule()
    kept = {asks.request_id: [100, 70, 50], silent.request_id: [100, 60, 40]}
    outputs = finish_step(scheduler, step, kept)
    assert outputs[silent.request_id].uniprefill is None
    report = outputs[asks.request_id].uniprefill
    assert [s["tokens_in"] for s in report["segments"]] == [100, 70, 50]
    encoded = MsgpackEncoder().encode(outputs[asks.request_id])
    assert MsgpackDecoder(EngineCoreOutput).decode(encoded).uniprefill == report
    outputs = finish_step(scheduler, scheduler.schedule())
    assert outputs[asks.request_id].uniprefill is None


def test_a_chunked_dense_prompt_reports_with_its_first_token(make_scheduler) -> None:
    scheduler = make_scheduler()
    request = add(scheduler, 300, extra={"uniprefill_report": 1})
    assert finish_step(scheduler, scheduler.schedule()) == {}
    outputs = finish_step(scheduler, scheduler.schedule())
    assert outputs[request.request_id].uniprefill["reason"] == "prompt_exceeds_step"


def test_without_the_flag_scheduling_is_the_releases(make_scheduler) -> None:
    scheduler = make_scheduler(None, long_prefill_token_threshold=96)
    assert scheduler.uniprefill is None
    first, second = add(scheduler, list(range(200))), add(scheduler, 200)
    step = scheduler.schedule()
    assert scheduled(step, first, second) == [96, 96]
    assert [new.uniprefill for new in step.scheduled_new_reqs] == [None, None]
    assert finish_step(scheduler, step) == {}
    while first.num_output_tokens == 0:
        outputs = finish_step(scheduler, scheduler.schedule())
    assert outputs[first.request_id].uniprefill is None
    assert first.uniprefill is None and not first.is_pruned
    assert not first.skip_reading_prefix_cache
    run_to_the_end(scheduler)
    assert cached_tokens(scheduler, add(scheduler, list(range(200)))) == 192
