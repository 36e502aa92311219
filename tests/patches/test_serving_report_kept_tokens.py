"""serving-report-kept-tokens.patch: arguments are checked at the door, reports arrive."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionRequest,
    ChatCompletionResponseChoice,
    ChatCompletionResponseStreamChoice,
)
from vllm.entrypoints.openai.completion.protocol import (
    CompletionRequest,
    CompletionResponseChoice,
    CompletionResponseStreamChoice,
)
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

REPORT = {"outcome": "pruned", "reason": None, "prompt_tokens": 9, "segments": []}


# --- arguments -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processor(configure) -> Callable[..., InputProcessor]:
    """An input processor of a server with or without the flag."""
    return {
        flag: InputProcessor(configure({} if flag else None, skip_tokenizer_init=True)) for flag in (True, False)
    }.__getitem__


def enter(processor: InputProcessor, extra: dict[str, Any] | None) -> EngineCoreRequest:
    params = SamplingParams(extra_args=extra, detokenize=False)
    prompt = {"type": "token", "prompt_token_ids": [1, 2, 3]}
    return processor.process_inputs("request", prompt, params, supported_tasks=("generate",))


@pytest.mark.parametrize(
    ("extra", "named", "sentence"),
    [
        ({"uniprefill": 2}, "uniprefill", "uniprefill must be 0 or 1, not 2."),
        (
            {"uniprefill": 1, "uniprefill_top_p": 0},
            "uniprefill_top_p",
            "uniprefill_top_p must be a number greater than 0 and at most 1, not 0.",
        ),
        (
            {"uniprefill_keep_ratio": "half"},
            "uniprefill_keep_ratio",
            "uniprefill_keep_ratio must be a number greater than 0 and at most 1, not 'half'.",
        ),
        (
            {"uniprefill_hops": 2},
            "uniprefill_hops",
            "uniprefill_hops 2 needs a server whose --uniprefill-config has hops 2; drop it or start the server with "
            "that setting.",
        ),
        ({"uniprefill_hops": True}, "uniprefill_hops", "uniprefill_hops must be 1 or 2, not True."),
        ({"uniprefill_report": None}, "uniprefill_report", "uniprefill_report must be 0 or 1, not None."),
        (
            {"uniprefill_topp": 0.5},
            "uniprefill_topp",
            "uniprefill_topp is not an argument of UniPrefill; use one of uniprefill, uniprefill_top_p, "
            "uniprefill_keep_ratio, uniprefill_hops, uniprefill_report.",
        ),
        (
            {"uniprefill_top_p": 0.5, "uniprefill_keep_ratio": 0.5},
            "uniprefill_keep_ratio",
            "uniprefill_top_p and uniprefill_keep_ratio exclude each other; send one of them.",
        ),
        (
            {"uniprefill": 0, "uniprefill_top_p": 0.9},
            "uniprefill_top_p",
            "uniprefill_top_p says how to prune, and uniprefill is 0; drop one of them.",
        ),
        (
            {"uniprefill": 0, "uniprefill_keep_ratio": 0.9},
            "uniprefill_keep_ratio",
            "uniprefill_keep_ratio says how to prune, and uniprefill is 0; drop one of them.",
        ),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_by_name(processor, extra: dict, named: str, sentence: str) -> None:
    """Before the request reaches the engine, where an exception would end it."""
    with pytest.raises(VLLMValidationError) as error:
        enter(processor(True), extra)
    assert error.value.parameter == named
    assert str(error.value) == f"{sentence} (parameter={named})"


REQUESTS = {
    CompletionRequest: {"prompt": "x"},
    ChatCompletionRequest: {"messages": []},
    ResponsesRequest: {"input": "x"},
}


@pytest.mark.parametrize("model", REQUESTS, ids=lambda model: model.__name__)
@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("uniprefill_top_p", "a number greater than 0 and at most 1"),
        ("uniprefill_keep_ratio", "a number greater than 0 and at most 1"),
        ("uniprefill_hops", "1 or 2"),
    ],
)
def test_a_boolean_is_refused_before_it_becomes_a_number(model: type, name: str, taken: str) -> None:
    sentence = f"{name} must be {taken}, not True."
    with pytest.raises(VLLMValidationError) as error:
        model(**REQUESTS[model], vllm_xargs={name: True})
    assert error.value.parameter == name and str(error.value).startswith(sentence)
    taken = {"uniprefill": 1, name: 0.5, "other": 1}
    assert model(**REQUESTS[model], vllm_xargs=taken).vllm_xargs == taken
    assert model(**REQUESTS[model]).vllm_xargs is None


@pytest.mark.parametrize("name", ["uniprefill", "uniprefill_top_p", "uniprefill_keep_ratio", "uniprefill_report"])
@pytest.mark.parametrize("value", [0, 1])
def test_without_the_flag_any_argument_is_refused(processor, name: str, value: int) -> None:
    with pytest.raises(VLLMValidationError, match="--uniprefill-config") as error:
        enter(processor(False), {name: value})
    assert error.value.parameter == name


def test_good_arguments_pass_unchanged(processor) -> None:
    extra = {"uniprefill": 1, "uniprefill_top_p": 0.5, "uniprefill_report": 1, "other": "x"}
    assert enter(processor(True), extra).sampling_params.extra_args == extra
    assert enter(processor(False), {"other": "x"}).sampling_params.extra_args == {"other": "x"}
    assert enter(processor(False), None).sampling_params.extra_args is None


# --- the scheduler's report ------------------------------------------------------------

UNIPREFILL = {
    "selection_layers": [1, {"layer": 4, "heads": [1], "num_queries": 8}],
    "min_prompt_tokens": 64,
    "pool_tokens": 600,
    "hops": 2,
}
ASKS = {"uniprefill_report": 1}


def test_the_report_comes_with_the_first_output_of_who_asked(make_scheduler, make_request, finish_step) -> None:
    """Each its own counts, and it survives the way to the front end."""
    scheduler = make_scheduler(UNIPREFILL, max_num_batched_tokens=256)
    asks, silent, dense = make_request(100, extra=ASKS), make_request(100), make_request(20, extra=ASKS)
    for request in (asks, silent, dense):
        scheduler.add_request(request)
    kept = {asks.request_id: [100, 70, 50], silent.request_id: [100, 60, 40]}
    outputs = finish_step(scheduler, scheduler.schedule(), kept)
    assert outputs[silent.request_id].uniprefill is None
    report = outputs[asks.request_id].uniprefill
    all_heads = {"heads": "all", "num_queries": 128, "hops": 2}
    some_heads = {"heads": [1], "num_queries": 8, "hops": 2}
    assert report == {
        "outcome": "pruned",
        "reason": None,
        "prompt_tokens": 100,
        "steps": 1,
        "lane_wait_seconds": 0.0,
        "segments": [
            {"layers": [0, 1], "tokens_in": 100, "tokens_out": 70, "scored_by": all_heads},
            {"layers": [2, 4], "tokens_in": 70, "tokens_out": 50, "scored_by": some_heads},
            {"layers": [5, 7], "tokens_in": 50, "tokens_out": 50},
        ],
        "kv_blocks": [{"layers": 1, "held": 7, "returned": 0}],
    }
    encoded = MsgpackEncoder().encode(outputs[asks.request_id])
    assert MsgpackDecoder(EngineCoreOutput).decode(encoded).uniprefill == report
    of_dense = outputs[dense.request_id].uniprefill
    assert (of_dense["outcome"], of_dense["reason"]) == ("dense", "short_prompt")
    assert [(s["tokens_in"], s["tokens_out"]) for s in of_dense["segments"]] == [(20, 20)] * 3
    assert not any("scored_by" in segment for segment in of_dense["segments"])
    outputs = finish_step(scheduler, scheduler.schedule())
    assert {output.uniprefill for output in outputs.values()} == {None}


def test_a_prefill_over_several_steps_reports_with_its_first_token(
    make_scheduler, make_request, finish_step, monkeypatch
) -> None:
    """The lane's wait ends when it is taken; a prompt beyond the pool is dense."""
    now = 100.0
    monkeypatch.setattr(time, "time", lambda: now)
    scheduler = make_scheduler(UNIPREFILL, max_num_batched_tokens=256)
    first, second, beyond = (make_request(prompt, extra=ASKS) for prompt in (300, 300, 601))
    reports = {}
    for request in (first, second, beyond):
        request.arrival_time = now
        scheduler.add_request(request)
    for number in range(10):
        step = scheduler.schedule()
        now += 1
        lane = step.uniprefill and step.uniprefill.lane
        kept = {lane.req_id: [300, 100, 50]} if lane and lane.takes_back else {}
        for req_id, output in finish_step(scheduler, step, kept).items():
            if output.uniprefill:
                fields = ("reason", "steps", "lane_wait_seconds")
                reports[req_id] = (number, *(output.uniprefill[field] for field in fields))
    assert [reports[r.request_id] for r in (first, second, beyond)] == [
        (2, None, 3, 0.0),
        (5, None, 3, 2.0),
        (3, "prompt_exceeds_pool", 3, 0.0),
    ]


# --- from the engine's outputs to the request's ----------------------------------------


def engine_request(request_id: str, params: SamplingParams) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=request_id,
        external_req_id="r",
        prompt_token_ids=list(range(9)),
        mm_features=None,
        arrival_time=0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        sampling_params=params,
        pooling_params=None,
    )


def make_output_processor(
    kind: RequestOutputKind, *, num_children: int = 0, stream_interval: int = 1
) -> OutputProcessor:
    """Of one request `r`, or of the samples of one."""
    outputs = OutputProcessor(None, log_stats=False, stream_interval=stream_interval)

    params = SamplingParams(detokenize=False, output_kind=kind, n=num_children or 1)
    if not num_children:
        outputs.add_request(engine_request("r", params), None)
        return outputs
    parent = ParentRequest(engine_request("r", params))
    for index in range(num_children):
        child_id, child_params = parent.get_child_info(index)
        outputs.add_request(engine_request(child_id, child_params), None, parent, index)
    return outputs


def feed(
    outputs: OutputProcessor,
    token: int,
    *,
    request_id: str = "r",
    report: dict | None = None,
    end: bool = False,
) -> list[RequestOutput]:
    output = EngineCoreOutput(
        request_id=request_id,
        new_token_ids=[token],
        uniprefill=report,
        finish_reason=FinishReason.LENGTH if end else None,
    )
    return outputs.process_outputs([output]).request_outputs


def test_the_report_of_the_first_output_is_with_the_final_one() -> None:
    outputs = make_output_processor(RequestOutputKind.FINAL_ONLY)
    assert feed(outputs, 1, report=REPORT) == []
    assert feed(outputs, 2) == []
    (final,) = feed(outputs, 3, end=True)
    assert final.finished and final.uniprefill == REPORT


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE])
def test_each_streamed_output_carries_the_report(kind: RequestOutputKind) -> None:
    """So the last one has it too, where the server sends it."""
    outputs = make_output_processor(kind)
    streamed = [
        *feed(outputs, 1, report=REPORT),
        *feed(outputs, 2),
        *feed(outputs, 3, end=True),
    ]
    assert [output.uniprefill for output in streamed] == [REPORT] * 3


def test_a_report_survives_outputs_that_are_held_back() -> None:
    outputs = make_output_processor(RequestOutputKind.DELTA, stream_interval=10)
    streamed = [feed(outputs, 1, report=REPORT), feed(outputs, 2), feed(outputs, 3, end=True)]
    assert [[output.uniprefill for output in step] for step in streamed] == [[REPORT], [], [REPORT]]


def test_merged_outputs_keep_the_report() -> None:
    outputs = make_output_processor(RequestOutputKind.DELTA)
    (first,), (last,) = feed(outputs, 1, report=REPORT), feed(outputs, 2, end=True)
    first.add(last, aggregate=True)
    assert first.finished and first.uniprefill == REPORT
    assert list(first.outputs[0].token_ids) == [1, 2]


def test_parallel_samples_give_one_report() -> None:
    outputs = make_output_processor(RequestOutputKind.FINAL_ONLY, num_children=2)
    children = list(outputs.request_states)
    assert len(children) == 2
    for child in children:
        assert feed(outputs, 1, request_id=child, report=REPORT) == []
    assert feed(outputs, 2, request_id=children[1], end=True) == []
    (final,) = feed(outputs, 2, request_id=children[0], end=True)
    assert len(final.outputs) == 2 and final.uniprefill == REPORT


def test_reports_do_not_cross_requests() -> None:
    outputs = make_output_processor(RequestOutputKind.FINAL_ONLY, num_children=2)
    with_report, without = outputs.request_states.values()
    feed(outputs, 1, request_id=with_report.request_id, report=REPORT)
    assert with_report.uniprefill == REPORT and without.uniprefill is None


def test_without_a_report_the_output_has_none() -> None:
    outputs = make_output_processor(RequestOutputKind.FINAL_ONLY)
    (final,) = feed(outputs, 1, end=True)
    assert final.uniprefill is None
    positional = RequestOutput("r", None, [1], None, [], True)
    assert positional.uniprefill is None


# --- responses -------------------------------------------------------------------------

CHOICES = {
    CompletionResponseChoice: {"text": "x"},
    CompletionResponseStreamChoice: {"text": "x"},
    ChatCompletionResponseChoice: {"message": {"role": "assistant", "content": "x"}},
    ChatCompletionResponseStreamChoice: {"delta": {"content": "x"}},
}


def bodies(response: Any) -> list[dict]:
    """All ways in which the server writes a choice."""
    return [
        response.model_dump(),
        json.loads(response.model_dump_json()),
        json.loads(response.model_dump_json(exclude_unset=True)),
        json.loads(response.model_dump_json(exclude_none=True)),
    ]


@pytest.mark.parametrize("model", CHOICES, ids=lambda model: model.__name__)
def test_choices_name_the_report_only_if_there_is_one(model: type) -> None:
    arguments = {"index": 0} | CHOICES[model]
    for silent in (model(**arguments), model(**arguments, uniprefill=None)):
        for body in bodies(silent):
            assert "uniprefill" not in body and body["index"] == 0
        assert "stop_reason" in silent.model_dump()  # other fields stay the release's
    given = model(**arguments, uniprefill=REPORT)
    assert all(body["uniprefill"] == REPORT for body in bodies(given))
