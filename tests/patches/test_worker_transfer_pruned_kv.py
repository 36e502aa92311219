"""worker-transfer-pruned-kv.patch: what is offered, which blocks travel, and what the decode server does with them.

Real transfers are in tests/installed/test_disaggregation.py.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from vllm.config import KVTransferConfig
from vllm.exceptions import VLLMValidationError
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import RequestStatus
from vllm.v1.uniprefill.transfer import (
    check_offer,
    make_offer,
    plan_fingerprint,
    read_offer,
    transferred_bytes,
    wrong_address,
)
from vllm.v1.uniprefill.transfer_blocks import FilledBlocks
from vllm.v1.worker.gpu import warmup

UNIPREFILL = {"top_p": 0.9, "selection_layers": [1, 4], "min_prompt_tokens": 64}
PROMPT = 200
ALIVE = (PROMPT, 90, 33)
ADDRESS = {
    "remote_engine_id": "prefill",
    "remote_request_id": "there",
    "remote_host": "localhost",
    "remote_port": 5600,
    "tp_size": 1,
}
# Whole lists, as the prefill server sends them: null where blocks were returned.
REMOTE_BLOCKS = [list(range(1, 14)), [0] * 6 + list(range(20, 27)), [0] * 10 + [30, 31, 32]]


def nixl(role: str = "kv_consumer", **settings: Any) -> KVTransferConfig:
    return KVTransferConfig(
        **({"kv_connector": "NixlConnector", "kv_role": role, "kv_buffer_device": "cpu"} | settings)
    )


@pytest.fixture(scope="session")
def decoder(configure):
    return configure(UNIPREFILL, kv_transfer_config=nixl())


def offered(config, **changed: Any) -> dict[str, Any]:
    params = {"do_remote_prefill": True, "do_remote_decode": False, "remote_block_ids": REMOTE_BLOCKS, **ADDRESS}
    return params | {"uniprefill": make_offer(ALIVE, config)} | changed


# --- the offer -------------------------------------------------------------------------


def test_what_is_offered_is_read(decoder) -> None:
    assert read_offer(offered(decoder), PROMPT, decoder) == ALIVE


@pytest.mark.parametrize("params", [None, {}, {"do_remote_prefill": False}, {"do_remote_decode": True}], ids=str)
def test_requests_without_an_offer_have_none(decoder, configure, params) -> None:
    for config in (decoder, configure(None), configure(UNIPREFILL)):
        assert read_offer(params, PROMPT, config) is None
    dense = offered(decoder)
    del dense["uniprefill"]
    assert read_offer(dense, PROMPT, decoder) is None


def test_only_a_server_with_the_flag_checks_the_releases_parameters(decoder, configure) -> None:
    params = {"kv_transfer_params": {"do_remote_prefill": True}}
    check_offer(params, PROMPT, configure(None, kv_transfer_config=nixl()))
    with pytest.raises(VLLMValidationError, match="^kv_transfer_params.remote_engine_id "):
        check_offer(params, PROMPT, decoder)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        *(
            ({"uniprefill": {"alive": alive}}, "kv_transfer_params.uniprefill.alive")
            for alive in (
                None,
                "200",
                [PROMPT, 90],
                [PROMPT, 90, 33, 33],
                [PROMPT + 1, 90, 33],
                [PROMPT - 1, 90, 33],
                [PROMPT, 33, 90],
                [PROMPT, 90, 0],
                [PROMPT, 90, -1],
                [PROMPT, 90.0, 33],
                [PROMPT, True, True],
            )
        ),
        ({"uniprefill": {"plan": "forged"}}, "kv_transfer_params.uniprefill.plan"),
        ({"uniprefill": {"more": 1}}, "kv_transfer_params.uniprefill"),
        ({"remote_block_ids": None}, "kv_transfer_params.remote_block_ids"),
        ({"remote_block_ids": [[1, -2]]}, "kv_transfer_params.remote_block_ids"),
        ({"remote_port": "5600"}, "kv_transfer_params.remote_port"),
        ({"remote_engine_id": None}, "kv_transfer_params.remote_engine_id"),
        ({"remote_engine_id": ["no", "key"]}, "kv_transfer_params.remote_engine_id"),
        ({"tp_size": "1"}, "kv_transfer_params.tp_size"),
        ({"tp_size": 2}, "kv_transfer_params.tp_size"),
        ({"dcp_size": 2}, "kv_transfer_params.dcp_size"),
        ({"do_remote_decode": True}, "kv_transfer_params.do_remote_decode"),
    ],
    ids=str,
)
def test_forged_parameters_are_refused_by_name(decoder, changed: dict, name: str) -> None:
    params = offered(decoder)
    if "uniprefill" in changed:
        changed = {"uniprefill": params["uniprefill"] | changed["uniprefill"]}
    with pytest.raises(
        VLLMValidationError, match=rf"^{name} .*, or drop kv_transfer_params to prefill here\."
    ) as error:
        read_offer(params | changed, PROMPT, decoder)
    assert error.value.parameter == name


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats(0, 300) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["alive", "plan", "x"]), inner),
    max_leaves=6,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_no_parameters_are_accepted_that_are_not_a_possible_prune(decoder, data: st.DataObject) -> None:
    """Any value in any place: HTTP 400, or counts that a pruning prefill of this prompt could have."""
    params = offered(decoder)
    place = data.draw(st.sampled_from(["uniprefill", "alive", "plan", "remote_block_ids", *ADDRESS]))
    counts = st.lists(st.integers(-1, 250), max_size=5).map(lambda counts: [PROMPT, *counts])
    value = data.draw(JSON | counts)
    if place in ("alive", "plan"):
        params["uniprefill"][place] = value
    else:
        params[place] = value
    try:
        alive = read_offer(params, PROMPT, decoder)
    except VLLMValidationError as error:
        assert error.parameter.startswith("kv_transfer_params.")
        return
    assert params["uniprefill"]["plan"] == plan_fingerprint(decoder)
    assert len(alive) == 3 and alive[0] == PROMPT
    assert all(type(n) is int and a >= n >= 1 for a, n in zip(alive, alive[1:], strict=False))
    assert all(type(params[name]) is type(value) for name, value in ADDRESS.items())


@pytest.mark.parametrize(
    ("settings", "missing"), [(None, "--uniprefill-config"), (UNIPREFILL, "--kv-transfer-config")], ids=str
)
def test_an_offer_needs_a_server_that_can_use_it(decoder, configure, settings, missing) -> None:
    with pytest.raises(VLLMValidationError, match=missing) as error:
        read_offer(offered(decoder), PROMPT, configure(settings))
    assert error.value.parameter == "kv_transfer_params.uniprefill"


def test_who_asks_for_an_exact_answer_gets_no_pruned_prompt(decoder) -> None:
    extra = {"kv_transfer_params": offered(decoder), "uniprefill": 0}
    with pytest.raises(VLLMValidationError, match="uniprefill is 0"):
        check_offer(extra, PROMPT, decoder)
    for fine in (extra | {"uniprefill": 1}, {"uniprefill": 0}, None):
        check_offer(fine, PROMPT, decoder)


def test_fingerprints_tell_plans_apart_but_not_scores(decoder, configure) -> None:
    same = {"keep_ratio": 0.1, "selection_layers": [{"layer": 1, "heads": [0]}, 4], "num_queries": 8}
    assert plan_fingerprint(configure(same)) == plan_fingerprint(decoder)
    others = [
        plan_fingerprint(config)
        for config in (
            configure(UNIPREFILL | {"selection_layers": [1, 5]}),
            configure(UNIPREFILL | {"free_kv": False}),
            configure(UNIPREFILL, block_size=64),
            configure(UNIPREFILL, tensor_parallel_size=2),
        )
    ]
    assert len({*others, plan_fingerprint(decoder)}) == 5
    assert plan_fingerprint(configure(None)) is None


def test_pruned_and_stock_servers_do_not_shake_hands(decoder, configure) -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import compute_nixl_compatibility_hash

    configs = [decoder, configure(UNIPREFILL | {"selection_layers": [2]}), configure(None)]
    hashes = [compute_nixl_compatibility_hash(config, "CPU_ATTN") for config in configs]
    assert len(set(hashes)) == 3
    assert hashes[0] == compute_nixl_compatibility_hash(configure(UNIPREFILL), "CPU_ATTN")


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"kv_transfer_config": nixl(kv_connector="NixlPushConnector")}, "connectors (NixlPushConnector)"),
        ({"kv_transfer_config": nixl(kv_connector="MultiConnector")}, "connectors (MultiConnector)"),
        ({"kv_transfer_config": nixl(kv_connector_module_path="a.b")}, "of other connectors"),
        (
            {"kv_transfer_config": nixl(kv_connector_extra_config={"bidirectional_kv_xfer": True})},
            "bidirectional_kv_xfer",
        ),
        ({"kv_transfer_config": nixl(kv_buffer_device="cuda")}, "kv_buffer_device other than the model's (cuda)"),
        ({"hf_overrides": {"layer_types": ["full_attention", "sliding_attention"] * 4}}, "layers than full attention"),
        ({"data_parallel_size": 2}, "--data-parallel-size > 1"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "--speculative-config"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_was_not_built_is_refused_at_start_up(configure, arguments, names) -> None:
    with pytest.raises(ValueError) as error:
        configure(UNIPREFILL | {"selection_layers": [2]}, **({"kv_transfer_config": nixl()} | arguments))
    message = str(error.value)
    assert message.startswith("--uniprefill-config does not work with --kv-transfer-config") and names in message
    assert message.endswith("or drop --uniprefill-config.") and "\n" not in message


# --- which blocks travel ----------------------------------------------------------------

SEGMENT_OF = (0, 0, 1, 1, 1, 2, 2, 2)  # of the toy's layers, cut after 1 and 4


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, Any]:
    """Layers in depth order in groups of one size, and a pruned prompt."""
    size = draw(st.sampled_from([8, 4, 3, 2]))
    length = draw(st.integers(1, 150))
    alive = sorted((draw(st.integers(1, length)) for _ in range(2)), reverse=True)
    return {
        "groups": [list(range(8))[i : i + size] for i in range(0, 8, size)],
        "alive": [length, *alive],
        "shed_here": draw(st.booleans()),
        "shed_there": draw(st.booleans()),
        "extra_blocks": draw(st.integers(0, 2)),
        "kernel_blocks": draw(st.sampled_from([1, 2])),
        "seed": draw(st.integers(0, 99)),
    }


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(layouts())
def test_every_token_arrives_at_its_place_and_nothing_else_moves(decoder, case: dict[str, Any]) -> None:
    """Against memory that is filled and looked up as `SegmentState` says, token by token."""
    block_size, num_blocks, n = 16, 256, case["kernel_blocks"]
    alive, groups = case["alive"], case["groups"]
    size = max(map(len, groups))
    rng = torch.Generator().manual_seed(case["seed"])
    spec = FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=1, dtype=torch.float32)
    names = [[f"model.layers.{i}.attn" for i in group] for group in groups]
    config = KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(group, spec) for group in names])

    def allocate(shed: bool, extra: int) -> list[list[int]]:
        free = (torch.randperm(num_blocks - 1, generator=rng) + 1).tolist()
        lists = []
        for group in groups:
            blocks = [free.pop() for _ in range(math.ceil(alive[0] / block_size) + extra)]
            returned = (alive[0] - alive[SEGMENT_OF[group[0]]]) // block_size
            lists.append([0] * returned + blocks[returned:] if shed else blocks)
        return lists

    def place(layer: int, token: int, lists: list[list[int]]) -> tuple[int, int]:
        """(region, row) of a layer's compact token."""
        group = next(i for i, layers in enumerate(groups) if layer in layers)
        returned = (alive[0] - alive[SEGMENT_OF[groups[group][0]]]) // block_size
        block = lists[group][returned + token // block_size]
        return groups[group].index(layer), block * block_size + token % block_size

    def kernel(lists: list[list[int]]) -> list[list[int]]:
        return [[block * n + i for block in blocks for i in range(n)] for blocks in lists]

    here, there = allocate(case["shed_here"], 0), allocate(case["shed_there"], case["extra_blocks"])
    source = torch.zeros(size, num_blocks * block_size)
    target = torch.full_like(source, -1)
    tokens = [(layer, token) for layer in range(8) for token in range(alive[SEGMENT_OF[layer]])]
    for value, (layer, token) in enumerate(tokens, 1):
        source[place(layer, token, there)] = value

    caches = {name: target[i] for group in names for i, name in enumerate(group)}
    addresses = [target[i].data_ptr() for i in range(size)]
    filled = FilledBlocks(decoder, config, caches, addresses, n)
    local = kernel([[block for block in blocks if block] for blocks in here])
    to_write, to_read = filled.pair(alive, local, kernel(there), num_blocks * n)

    rows = block_size // n
    for region, (written, read) in enumerate(zip(to_write, to_read, strict=True)):
        assert len(written) == len(read) == len(set(written))
        for ours, theirs in zip(written, read, strict=True):
            target[region, ours * rows : (ours + 1) * rows] = source[region, theirs * rows : (theirs + 1) * rows]
    for value, (layer, token) in enumerate(tokens, 1):
        assert target[place(layer, token, here)] == value
    moved = sum(map(len, to_write))
    assert moved == sum(math.ceil(alive[segment] * n / block_size) for segment in SEGMENT_OF)
    if n == 1:
        weight = transferred_bytes(alive, config, decoder)
        assert weight.moved == moved * spec.page_size_bytes
        assert sum(weight) == 8 * math.ceil(alive[0] / block_size) * spec.page_size_bytes


@pytest.mark.parametrize(
    "remote",
    [
        REMOTE_BLOCKS[:2],
        [REMOTE_BLOCKS[0][:-1], *REMOTE_BLOCKS[1:]],
        [*REMOTE_BLOCKS[:2], REMOTE_BLOCKS[2][1:]],
        [*REMOTE_BLOCKS[:2], [0] * 13],
        [[1000, *REMOTE_BLOCKS[0][1:]], *REMOTE_BLOCKS[1:]],
    ],
    ids=["groups", "short", "clipped", "returned", "beyond"],
)
def test_blocks_that_cannot_be_the_prompt_are_refused(decoder, remote) -> None:
    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=1, dtype=torch.float32)
    names = [f"model.layers.{i}.attn" for i in (0, 2, 5)]
    config = KVCacheConfig(100, [], [KVCacheGroupSpec([name], spec) for name in names])
    cache = torch.zeros(100)
    filled = FilledBlocks(decoder, config, dict.fromkeys(names, cache), [cache.data_ptr()], 1)
    local = [list(range(1, 14)), list(range(20, 27)), [30, 31, 32]]
    filled.pair(ALIVE, local, REMOTE_BLOCKS, 100)
    with pytest.raises(ValueError):
        filled.pair(ALIVE, local, remote, 100)


# --- the scheduler -----------------------------------------------------------------------

Make = Callable[..., Any]


@pytest.fixture
def make_server(make_scheduler) -> Make:
    def make(role: str, policy: str = "recompute", num_blocks: int = 200, **settings: Any) -> Any:
        transfer = nixl(role, kv_load_failure_policy=policy)
        return make_scheduler(UNIPREFILL | settings, num_blocks, segments=(0, 1, 2), kv_transfer_config=transfer)

    return make


def received(scheduler, step, *, failed: bool = False) -> Any:
    """Ends a step of no tokens in which the one transfer under way ends."""
    ids = set(scheduler.requests)
    output = ModelRunnerOutput([], {})
    output.kv_connector_output = KVConnectorOutput(finished_recving=ids, failed_recving=ids if failed else set())
    return scheduler.update_from_output(step, output)


def free_blocks(scheduler) -> int:
    return scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def start_receiving(scheduler, make_request, **changed: Any) -> tuple[Any, Any]:
    """(request, step) after admission."""
    params = offered(scheduler.vllm_config, **changed)
    request = make_request(PROMPT, max_tokens=3, extra={"kv_transfer_params": params, "uniprefill_report": 1})
    scheduler.add_request(request)
    return request, scheduler.schedule()


def blocks_held(scheduler, request) -> list[int]:
    return [sum(b > 0 for b in ids) for ids in scheduler.kv_cache_manager.get_block_ids(request.request_id)]


HELD = [13, 7, 3]  # of 13 blocks each: dropped tokens return 110 // 16 and 167 // 16


def test_a_received_prompt_holds_only_what_was_kept_and_decodes_at_once(make_server, make_request, finish_step) -> None:
    scheduler = make_server("kv_consumer")
    free = free_blocks(scheduler)
    # What is cached of the same prompt here must not be taken for a part of it.
    request, step = start_receiving(scheduler, make_request)
    assert request.status == RequestStatus.WAITING_FOR_REMOTE_KVS and not step.num_scheduled_tokens
    assert blocks_held(scheduler, request) == HELD
    (meta,) = step.kv_connector_metadata.reqs_to_recv.values()
    assert meta.alive == ALIVE and [len(blocks) for blocks in meta.local_block_ids] == HELD
    received(scheduler, step)
    step = scheduler.schedule()
    assert step.num_scheduled_tokens == {request.request_id: 1} and step.uniprefill is None
    (new,) = step.scheduled_new_reqs
    assert new.num_computed_tokens == PROMPT - 1 and new.prefill_decision.alive == ALIVE
    finish_step(scheduler, step)
    while scheduler.has_unfinished_requests():
        finish_step(scheduler, scheduler.schedule())
    assert free_blocks(scheduler) == free


def test_the_prefix_cache_is_not_read_for_a_received_prompt(make_server, make_request, finish_step) -> None:
    scheduler = make_server("kv_consumer")
    tokens = list(range(PROMPT))
    dense = make_request(tokens, max_tokens=1, extra={"uniprefill": 0})
    scheduler.add_request(dense)
    finish_step(scheduler, scheduler.schedule())
    params = offered(scheduler.vllm_config)
    request = make_request(tokens, extra={"kv_transfer_params": params})
    again = make_request(tokens, extra={"uniprefill": 0})
    scheduler.add_request(request)
    scheduler.add_request(again)
    step = scheduler.schedule()
    assert blocks_held(scheduler, request) == HELD
    assert step.scheduled_new_reqs[0].num_computed_tokens > 0, "the cache has the prompt"
    (meta,) = step.kv_connector_metadata.reqs_to_recv.values()
    assert [len(blocks) for blocks in meta.local_block_ids] == HELD


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("loss", ["failed", "preempted"])
def test_what_is_lost_is_decided_on_again(make_server, make_request, finish_step, loss, enabled) -> None:
    """Pruned or dense, as the decode server's own settings say."""
    scheduler = make_server("kv_consumer", enabled=enabled)
    free = free_blocks(scheduler)
    request, step = start_receiving(scheduler, make_request)
    received(scheduler, step, failed=loss == "failed")
    if loss == "preempted":
        finish_step(scheduler, scheduler.schedule())
        scheduler.running.remove(request)
        scheduler._preempt_request(request, 0.0)
    step = scheduler.schedule()
    decision = request.prefill_decision
    assert decision.pruned == enabled and not decision.alive
    num_output = 1 if loss == "preempted" else 0
    assert step.num_scheduled_tokens == {request.request_id: PROMPT + num_output}
    assert (step.uniprefill is not None) == enabled
    assert blocks_held(scheduler, request) == [13, 13, 13]
    kept = {request.request_id: [PROMPT, 50, 20]} if enabled else None
    finish_step(scheduler, step, kept)
    assert blocks_held(scheduler, request) == ([13, 4, 2] if enabled else [13, 13, 13])
    while scheduler.has_unfinished_requests():
        finish_step(scheduler, scheduler.schedule())
    assert free_blocks(scheduler) == free


def test_a_failed_load_fails_the_request_where_asked(make_server, make_request) -> None:
    scheduler = make_server("kv_consumer", policy="fail")
    free = free_blocks(scheduler)
    request, step = start_receiving(scheduler, make_request)
    (outputs,) = received(scheduler, step, failed=True).values()
    assert [str(output.finish_reason) for output in outputs.outputs] == ["error"]
    scheduler.schedule()
    assert free_blocks(scheduler) == free and not scheduler.requests and not scheduler.ledger.entries


def test_an_aborted_transfer_frees_its_blocks_when_it_ends(make_server, make_request) -> None:
    scheduler = make_server("kv_consumer")
    free = free_blocks(scheduler)
    request, step = start_receiving(scheduler, make_request)
    scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
    assert free_blocks(scheduler) < free, "the transfer still writes"
    received(scheduler, step)
    assert free_blocks(scheduler) == free and not scheduler.requests and not scheduler.ledger.entries


def test_a_dense_prompt_is_received_as_in_stock(make_server, make_request) -> None:
    scheduler = make_server("kv_consumer")
    params = offered(scheduler.vllm_config)
    del params["uniprefill"]
    request = make_request(PROMPT, extra={"kv_transfer_params": params})
    scheduler.add_request(request)
    step = scheduler.schedule()
    assert request.prefill_decision.dense_reason == "remote_prefill"
    (meta,) = step.kv_connector_metadata.reqs_to_recv.values()
    assert meta.alive == () and [len(blocks) for blocks in meta.local_block_ids] == [13, 13, 13]


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["uniprefill", "alive", "plan", "remote_block_ids", *ADDRESS]), JSON, st.booleans())
def test_no_parameters_end_the_engine(make_server, make_request, place, value, rejected) -> None:
    """Neither those that no front end has checked, nor those with which it asks to clean up after a refusal."""
    scheduler = make_server("kv_consumer")
    params = offered(scheduler.vllm_config)
    if place in ("alive", "plan"):
        params["uniprefill"][place] = value
    else:
        params[place] = value
    request = make_request(PROMPT, extra={"kv_transfer_params": params})
    if rejected:
        # The front end does so only where it can name the prefill server.
        assume(wrong_address(params) is None)
        request.abort_immediately = True
    scheduler.add_request(request)
    if rejected:
        scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
    step = scheduler.schedule()
    assert bool(step.num_scheduled_tokens) == (request.kv_transfer_params is None and not rejected)
    received = step.kv_connector_metadata.reqs_to_recv
    assert all(meta.alive == request.prefill_decision.alive for meta in received.values())
    assert bool(received) == (rejected or request.kv_transfer_params is not None)


@pytest.mark.parametrize("has_uniprefill", [True, False])
def test_only_a_prefill_server_that_is_named_is_notified(decoder, has_uniprefill: bool) -> None:
    """A refused request ends there; the engine hears of it for the sake of the blocks that wait for it.

    Without the flag of all, as in the release: other connectors have other parameters.
    """
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing

    notified = []

    async def notify(request_id: str, params: dict, **_: Any) -> None:
        notified.append(params)

    async def refuse() -> None:
        raise ValueError

    serving = SimpleNamespace(
        has_kv_connector=True,
        has_uniprefill=has_uniprefill,
        engine_client=SimpleNamespace(notify_kv_transfer_request_rejected=notify),
        _get_data_parallel_rank=lambda _: None,
    )
    good = offered(decoder, uniprefill="forged")
    asked = [good, offered(decoder, remote_engine_id=[]), {"do_remote_prefill": True}]
    for params in asked:
        request = SimpleNamespace(kv_transfer_params=params, request_id="0")
        with pytest.raises(ValueError):
            asyncio.run(GenerateBaseServing._with_kv_transfer_rejection_cleanup(serving, refuse(), request, None))
    assert notified == ([good] if has_uniprefill else asked)


def test_a_parameter_that_was_used_up_leaves_the_prefill_here(make_server, make_request) -> None:
    """Of two requests that share their parameters only the first is received."""
    scheduler = make_server("kv_consumer")
    params = offered(scheduler.vllm_config)
    first, second = (make_request(PROMPT, extra={"kv_transfer_params": params}) for _ in range(2))
    for request in (first, second):
        scheduler.add_request(request)
    step = scheduler.schedule()
    assert first.status == RequestStatus.WAITING_FOR_REMOTE_KVS
    assert step.uniprefill.whole == {second.request_id} and not second.prefill_decision.alive


@pytest.mark.parametrize("max_tokens", [1, 3])
def test_the_prefill_server_offers_what_it_kept(make_server, make_request, finish_step, max_tokens) -> None:
    scheduler = make_server("kv_producer")
    free = free_blocks(scheduler)
    params = {"kv_transfer_params": {"do_remote_decode": True}}
    request = make_request(PROMPT, max_tokens=max_tokens, extra=params)
    scheduler.add_request(request)
    output = finish_step(scheduler, scheduler.schedule(), {request.request_id: list(ALIVE)})
    for _ in range(max_tokens - 1):
        output = finish_step(scheduler, scheduler.schedule())
    offer = output[request.request_id].kv_transfer_params
    assert offer["uniprefill"] == make_offer(ALIVE, scheduler.vllm_config)
    assert [[b > 0 for b in ids] for ids in offer["remote_block_ids"]] == [
        [False] * (13 - held) + [True] * held for held in HELD
    ]
    assert read_offer(offer, PROMPT, scheduler.vllm_config) == ALIVE
    # Leased until it is read.
    assert free_blocks(scheduler) == free - sum(HELD)
    step = scheduler.schedule()
    result = ModelRunnerOutput([], {})
    result.kv_connector_output = KVConnectorOutput(finished_sending={request.request_id})
    scheduler.update_from_output(step, result)
    assert free_blocks(scheduler) == free and not scheduler.requests and not scheduler.to_offer


def test_a_dense_prompt_is_offered_as_in_stock(make_server, make_request, finish_step) -> None:
    scheduler = make_server("kv_producer")
    extra = {"kv_transfer_params": {"do_remote_decode": True}, "uniprefill": 0}
    request = make_request(PROMPT, max_tokens=1, extra=extra)
    scheduler.add_request(request)
    offer = finish_step(scheduler, scheduler.schedule())[request.request_id].kv_transfer_params
    assert offer["do_remote_prefill"] and "uniprefill" not in offer


def test_an_aborted_prefill_offers_nothing(make_server, make_request) -> None:
    scheduler = make_server("kv_producer")
    free = free_blocks(scheduler)
    request = make_request(PROMPT, extra={"kv_transfer_params": {"do_remote_decode": True}})
    scheduler.add_request(request)
    scheduler.schedule()
    scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
    assert free_blocks(scheduler) == free and not scheduler.requests and not scheduler.to_offer


def test_warm_up_steps_run_without_the_connector(monkeypatch) -> None:
    """They have no metadata for it."""
    monkeypatch.setattr(warmup, "_warmup_kernels", lambda *_: None)
    runner = MagicMock(rejection_sampler=None)
    runner.model_state.get_warmup_steps.return_value = [MagicMock(total_num_scheduled_tokens=n) for n in (64, 0)]
    warmup.warmup_kernels(runner, runner.execute, runner.sample)
    calls = [call[0] for call in runner.mock_calls if call[0] in ("execute", "sample")]
    assert calls == ["execute", "sample", "execute"]
    switched = [call for call in runner.mock_calls if call[0] in ("kv_connector.set_disabled", "execute")]
    assert [call[1][0] for call in (switched[0], switched[-1])] == [True, False] and len(switched) == 4
