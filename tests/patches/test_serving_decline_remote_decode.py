"""serving-decline-remote-decode.patch: what a prefill server leaves to the decode server, and how it ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from vllm.config import KVTransferConfig
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.uniprefill.decline import MIB, DeclineRule

UNIPREFILL = {"top_p": 0.9, "selection_layers": [1, 4], "min_prompt_tokens": 64}
REMOTE_DECODE = {"kv_transfer_params": {"do_remote_decode": True}}
PROMPT = 200


@pytest.fixture
def make_prefill_server(make_scheduler) -> Callable[..., Any]:
    def make(**settings: Any) -> Any:
        transfer = KVTransferConfig(kv_connector="NixlConnector", kv_role="kv_producer", kv_buffer_device="cpu")
        return make_scheduler(UNIPREFILL | settings, segments=(0, 1, 2), kv_transfer_config=transfer)

    return make


def step(scheduler, **finished: Any) -> list[Any]:
    """The outputs of a step that schedules nothing."""
    scheduled = scheduler.schedule()
    assert not scheduled.num_scheduled_tokens
    output = ModelRunnerOutput([], {})
    output.kv_connector_output = KVConnectorOutput(**finished)
    return [o for of_client in scheduler.update_from_output(scheduled, output).values() for o in of_client.outputs]


def prefill(scheduler, request, finish_step) -> Any:
    scheduler.add_request(request)
    kept = {request.request_id: [request.num_prompt_tokens, 90, 33]} if request.compacts_kv else None
    return finish_step(scheduler, scheduler.schedule(), kept)[request.request_id]


def test_a_short_prompt_ends_at_once_with_nothing(make_prefill_server, make_request) -> None:
    scheduler = make_prefill_server(decline_below_tokens=PROMPT)
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    request = make_request(PROMPT - 1, extra=REMOTE_DECODE)
    scheduler.add_request(request)
    assert scheduler.has_requests(), "or the engine would not take the step that answers"
    (output,) = step(scheduler)
    assert output.request_id == request.request_id and output.new_token_ids == []
    assert (str(output.finish_reason), output.stop_reason) == ("stop", "declined: few_tokens")
    assert output.kv_transfer_params is None
    assert not scheduler.has_requests() and not scheduler.requests and not scheduler.ledger.entries
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == free
    assert step(scheduler) == []


def test_longer_prompts_and_those_of_other_kinds_are_not_declined(
    make_prefill_server, make_request, finish_step
) -> None:
    scheduler = make_prefill_server(decline_below_tokens=PROMPT)
    long = prefill(scheduler, make_request(PROMPT, max_tokens=1, extra=REMOTE_DECODE), finish_step)
    assert long.kv_transfer_params["do_remote_prefill"] and long.new_token_ids
    for extra in (None, {"kv_transfer_params": {"do_remote_prefill": False}}):
        assert prefill(scheduler, make_request(20, max_tokens=1, extra=extra), finish_step).new_token_ids


def test_cached_tokens_do_not_count(make_prefill_server, make_request, finish_step) -> None:
    scheduler = make_prefill_server(decline_below_tokens=50)
    dense = REMOTE_DECODE | {"uniprefill": 0}
    tokens = list(range(PROMPT))
    assert prefill(scheduler, make_request(tokens, max_tokens=1, extra=dense), finish_step).kv_transfer_params
    scheduler.add_request(make_request([*tokens, *range(40)], extra=dense))
    assert [output.stop_reason for output in step(scheduler)] == ["declined: few_tokens"]
    # A pruned prompt does not read the cache.
    again = prefill(scheduler, make_request(tokens, max_tokens=1, extra=REMOTE_DECODE), finish_step)
    assert again.kv_transfer_params["uniprefill"]["alive"] == [PROMPT, 90, 33]


def test_a_backlog_declines_until_it_is_read(make_prefill_server, make_request, finish_step) -> None:
    scheduler = make_prefill_server(decline_over_mib=0)
    first = make_request(PROMPT, max_tokens=1, extra=REMOTE_DECODE)
    assert prefill(scheduler, first, finish_step).kv_transfer_params
    # Of groups of one layer each, whose pages take 16 tokens x 2 x 4 bytes.
    assert scheduler.decline_rule.backlog == {first.request_id: (13 + 13 + 6) * 128}
    scheduler.add_request(make_request(PROMPT, extra=REMOTE_DECODE))
    assert [output.stop_reason for output in step(scheduler)] == ["declined: backlog"]
    step(scheduler, finished_sending={first.request_id})
    assert not scheduler.decline_rule.backlog
    assert prefill(scheduler, make_request(PROMPT, max_tokens=1, extra=REMOTE_DECODE), finish_step).kv_transfer_params


@pytest.mark.parametrize(("waiting", "reason"), [(3 * MIB, None), (3 * MIB + 1, "backlog")])
def test_the_bound_is_in_mib_and_inclusive(configure, waiting, reason) -> None:
    transfer = KVTransferConfig(kv_connector="NixlConnector", kv_role="kv_producer", kv_buffer_device="cpu")
    config = configure(UNIPREFILL | {"decline_over_mib": 3}, kv_transfer_config=transfer).uniprefill_config
    rule = DeclineRule(config)
    rule.backlog = {"a": waiting - MIB, "b": MIB}
    assert rule.reason(1) == reason


@pytest.mark.parametrize("settings", [{"decline_below_tokens": 1}, {"decline_over_mib": 0}], ids=str)
def test_only_servers_that_transfer_decline(configure, settings) -> None:
    with pytest.raises(ValueError, match=r"^--uniprefill-config decline_below_tokens .* --kv-transfer-config; .*\.$"):
        configure(UNIPREFILL | settings)
