"""core-decide-pruned-requests.patch: what is pruned, and that it stays out of the prefix cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from vllm.config import ModelConfig, UniPrefillConfig
from vllm.exceptions import VLLMValidationError
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.uniprefill.policy import Decision, PrunePolicy, RequestArgs

BUDGET = 256
MAX_SEQS = 4
MIN_PROMPT = 64
POOL = 300
UNIPREFILL = {"top_p": 0.9, "selection_layers": [1, 4], "min_prompt_tokens": MIN_PROMPT, "pool_tokens": POOL}


# --- arguments -------------------------------------------------------------------------


def test_arguments_are_read() -> None:
    config = UniPrefillConfig()
    given = {"uniprefill_top_p": 1, "uniprefill_report": True, "other": object()}
    assert RequestArgs.parse(given, config) == RequestArgs(top_p=1, report=True)
    assert RequestArgs.parse({"uniprefill": 0}, config) == RequestArgs(enabled=False)
    given = {"uniprefill": 1, "uniprefill_keep_ratio": 0.2}
    assert RequestArgs.parse(given, config) == RequestArgs(enabled=True, keep_ratio=0.2)


@pytest.mark.parametrize("config", [None, UniPrefillConfig()], ids=["without", "with"])
@pytest.mark.parametrize("given", [None, {}, {"prefill": 3}], ids=str)
def test_requests_without_our_arguments_ask_for_nothing(given, config) -> None:
    assert RequestArgs.parse(given, config) == RequestArgs()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("uniprefill", value) for value in (2, -1, "1", 1.0, None, [])),
        *(("uniprefill_report", value) for value in (2, "yes", 0.0)),
        *(("uniprefill_hops", value) for value in (0, 3, 1.0, True, "2", None, 2)),
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
def decide(configure, make_request) -> Callable[..., Decision]:
    """The decision for a request, of an engine with these settings."""

    def make(config: dict[str, Any], *args: Any, **kwargs: Any) -> Decision:
        limits = {"max_num_batched_tokens": BUDGET, "max_num_seqs": MAX_SEQS}
        policy = PrunePolicy(configure(UNIPREFILL | config, **limits))
        return policy.decide(make_request(*args, **kwargs))

    return make


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, None),
        ({"extra": {"uniprefill": 0}}, "disabled"),
        ({"prompt": MIN_PROMPT}, None),
        ({"prompt": MIN_PROMPT - 1}, "short_prompt"),
        ({"prompt": POOL}, None),
        ({"prompt": POOL + 1}, "prompt_exceeds_pool"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"prompt_logprob_token_ids": [3]}, "prompt_logprobs"),
        ({"resumable": True}, "streaming_input"),
    ],
    ids=str,
)
def test_decision_and_its_reason(decide, arguments: dict, reason: str | None) -> None:
    arguments = {"prompt": 100} | arguments
    decision = decide({}, **arguments)
    assert (decision.dense_reason, decision.pruned) == (reason, reason is None)
    assert decision.num_prompt_tokens == arguments["prompt"]
    assert decision.wants_report is False


def test_without_a_pool_the_longest_prompt_fits_one_step(decide) -> None:
    longest = BUDGET - (MAX_SEQS - 1)
    assert decide({"pool_tokens": 0}, longest).pruned
    assert decide({"pool_tokens": 0}, longest + 1).dense_reason == "prompt_exceeds_pool"


def test_requests_choose_against_the_default(decide) -> None:
    off, on = {"enabled": False}, {"uniprefill": 1}
    assert decide(off, 100).dense_reason == "disabled"
    assert decide(off, 100, extra=on).pruned
    assert decide(off, 10, extra=on).dense_reason == "short_prompt"
    assert decide(off, 10, extra={"uniprefill_report": 1}).wants_report


@pytest.mark.parametrize(
    ("config", "extra", "expected"),
    [
        ({"top_p": 0.9}, {}, (None, None)),
        ({"top_p": 0.9}, {"uniprefill_top_p": 0.5}, (0.5, None)),
        ({"top_p": 0.9}, {"uniprefill_keep_ratio": 0.2}, (None, 0.2)),
        ({"top_p": None, "keep_ratio": 0.3}, {"uniprefill_keep_ratio": 0.2}, (None, 0.2)),
        ({"top_p": None, "keep_ratio": 0.3}, {"uniprefill_top_p": 0.5}, (0.5, None)),
    ],
    ids=str,
)
def test_a_decision_has_the_requests_own_budget_only(decide, config, extra, expected) -> None:
    decision = decide(config, 100, extra=extra)
    assert (decision.top_p, decision.keep_ratio) == expected


# --- the request -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [("Gemma3ForConditionalGeneration", "multimodal_input"), ("Qwen2VLForConditionalGeneration", None)],
)
def test_prompts_with_images_are_dense_where_their_tokens_see_one_another(
    configure, make_request, monkeypatch, architecture: str, reason: str | None
) -> None:
    monkeypatch.setattr(ModelConfig, "architecture", architecture)
    policy = PrunePolicy(configure(UNIPREFILL))
    request = make_request(100)
    assert policy.decide(request).dense_reason is None
    request.mm_features = [object()]
    assert policy.decide(request).dense_reason == reason


@pytest.mark.parametrize("reason", [None, "short_prompt"])
def test_the_decision_travels_and_a_pruned_request_leaves_no_hashed_block(
    make_scheduler, make_request, finish_step, reason: str | None
) -> None:
    """With the release's scheduler: neither its prompt nor what it appends."""
    scheduler = make_scheduler(None)
    request = make_request(100, max_tokens=40)
    assert request.prefill_decision is None and not request.compacts_kv
    request.prefill_decision = Decision(100, reason, 0.9, None, wants_report=False)
    assert request.compacts_kv == (reason is None)
    assert NewRequestData.from_request(request, ([],)).prefill_decision is request.prefill_decision
    scheduler.add_request(request)
    created = []
    while scheduler.has_unfinished_requests():
        output = finish_step(scheduler, scheduler.schedule())[request.request_id]
        created += [output.prefill_stats.num_cache_creation_tokens] if output.prefill_stats else []
    scheduler.kv_cache_manager.cache_blocks(request, 100)  # as after a remote prefill
    hashed = len(scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block)
    assert (created, hashed) == (([0], 0) if reason is None else ([96], 8))
