"""Whatever the flag or a request says: a right value is taken, a wrong one told in one sentence, nothing else."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.config import UniPrefillConfig
from vllm.config.uniprefill import FLAG
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.request import Request
from vllm.v1.uniprefill.policy import DenseReason, PrunePolicy, RequestArgs

from evals.live_server import NEEDLE_MODEL

# FUZZ_TIMES=10 tries ten times as many examples, and not the same ones each time.
FUZZ_TIMES = int(os.environ.get("FUZZ_TIMES", "1"))
fuzz = settings(
    max_examples=400 * FUZZ_TIMES,
    deadline=None,
    derandomize=FUZZ_TIMES == 1,
    suppress_health_check=[HealthCheck.too_slow],
)

SETTINGS = [
    "selection_layers",
    "top_p",
    "keep_ratio",
    "top_p_over",
    "block_size",
    "num_queries",
    "sink_tokens",
    "recent_tokens",
    "hops",
    "hop_blocks",
    "min_prompt_tokens",
    "pool_tokens",
    "pool_device",
    "profile",
    "calibrated_for",
    "enabled",
]
ARGUMENTS = ["uniprefill", "uniprefill_top_p", "uniprefill_keep_ratio", "uniprefill_hops", "uniprefill_report"]

# At the edges of what is taken, and of what Python, C and JSON call a number.
NUMBERS = st.sampled_from(
    [0, 1, -1, 2, 64, 128, 0.5, 0.99, 1.0, 1.0000000000000002, 5e-324, -0.0, math.nan, math.inf, -math.inf]
    + [2**31, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**400, -(10**400), 1e308]
)
SCALARS = NUMBERS | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
WORDS = st.sampled_from(["auto", "all", "middle", "0.5", "1", "true", "nan", ""])
VALUES = st.recursive(
    SCALARS | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def objects(names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    """JSON objects whose keys are mostly known ones."""
    odd = st.text(max_size=6) | st.sampled_from(["self", "cls", "__dataclass_self__", "args", "top-p", "TOP_P"])
    known = st.dictionaries(st.sampled_from(names), VALUES, max_size=4)
    return known | st.builds(lambda a, b: a | b, known, st.dictionaries(odd, VALUES, max_size=2))


def is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


# --- the flag


def check_config(config: UniPrefillConfig) -> None:
    """Every promise of the config's own documentation."""
    assert (config.top_p is None) != (config.keep_ratio is None)
    assert is_share(config.keep_ratio if config.top_p is None else config.top_p)
    assert config.top_p_over in ("all", "middle")
    assert min(config.block_size, config.num_queries, config.recent_tokens, config.min_prompt_tokens or 1) >= 1
    assert config.sink_tokens >= 0 and config.num_queries <= config.recent_tokens
    assert config.pool_tokens is None or config.pool_tokens >= 0
    assert config.pool_device in ("device", "host") and isinstance(config.enabled, bool)
    assert config.hops in (1, 2) and config.hop_blocks >= 1
    if config.selection_layers != "auto":
        layers = [entry.layer for entry in config.selection_layers]
        assert layers == sorted(set(layers)) and min(layers) >= 0


def check_sentence(message: str) -> None:
    """One sentence that names the flag."""
    assert message.startswith(FLAG) and message.endswith(".")
    assert len(message.splitlines()) == 1
    assert "Traceback" not in message and "pydantic" not in message


@fuzz
@given(value=objects(SETTINGS) | VALUES)
@example(value={"top_p": 10**400})
@example(value={"selection_layers": [[1]]})
@example(value={"selection_layers": [{"layer": 1, "heads": []}]})
@example(value={"selection_layers": [{}]})
@example(value={"profile": 1})
@example(value={"profile": "\0"})
@example(value={"__dataclass_self__": 1})
@example(value={"recent_tokens": math.inf})
def test_any_config_is_taken_or_refused(value: Any) -> None:
    try:
        config = UniPrefillConfig.from_cli(value)
    except ValueError as error:
        check_sentence(str(error))
    else:
        check_config(config)


@pytest.fixture(scope="module")
def parser() -> FlexibleArgumentParser:
    return EngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm serve"))


TEXTS = st.text(max_size=30) | (objects(SETTINGS) | VALUES).map(json.dumps)


@fuzz
@given(text=TEXTS | st.builds(lambda text, at: text[: at % (len(text) + 1)], TEXTS, st.integers(0, 200)))
@example(text="{'top_p': 0.9}")
def test_any_text_behind_the_flag_is_taken_or_refused(parser: FlexibleArgumentParser, text: str) -> None:
    """The command line: exit status 2 with a usage error, or a value that from_cli judges."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            value = parser.parse_args([f"{FLAG}={text}"]).uniprefill_config
    except SystemExit as end:
        assert end.code == 2 and FLAG in told.getvalue()
        return
    if value is None:
        return
    try:
        check_config(UniPrefillConfig.from_cli(value))
    except ValueError as error:
        check_sentence(str(error))


@fuzz
@given(value=objects(SETTINGS))
@example(value={"selection_layers": [7]})
@example(value={"min_prompt_tokens": 2**70})
def test_any_config_starts_or_is_refused(value: dict[str, Any]) -> None:
    """With the model: what is taken alone may still not fit it."""
    try:
        config = engine_config(value)
    except ValueError as error:
        check_sentence(str(error))
        return
    check_config(config.uniprefill_config)
    assert {entry.layer for entry in config.uniprefill_config.selection_layers} <= set(range(7))


def engine_config(uniprefill: dict[str, Any]) -> Any:
    return EngineArgs(
        str(NEEDLE_MODEL),
        uniprefill_config=uniprefill,
        enforce_eager=True,
        max_model_len=8192,
        max_num_batched_tokens=8448,
        max_num_seqs=16,
        distributed_executor_backend="uni",
    ).create_engine_config()


# --- requests


@pytest.fixture(scope="module")
def policy() -> PrunePolicy:
    return PrunePolicy(engine_config({}))


@fuzz
@given(extra=objects(ARGUMENTS), length=st.sampled_from([1, 1023, 1024, 8000, 8434]))
@example(extra={"uniprefill_top_p": 10**400}, length=2000)
@example(extra={"uniprefill": 1, "uniprefill_keep_ratio": True}, length=2000)
@example(extra={"uniprefill_top_p": math.nan}, length=2000)
def test_any_request_is_decided_or_refused(policy: PrunePolicy, extra: dict[str, Any], length: int) -> None:
    """The way of a request: its parameters' own checks, then the scheduler's decision."""
    try:
        params = SamplingParams(extra_args=extra)
        request = Request("0", [1] * length, params, None)
        decision = policy.decide(request)
    except VLLMValidationError as error:
        assert str(error)
        return
    assert decision.top_p is None or decision.keep_ratio is None
    assert all(is_share(value) for value in (decision.top_p, decision.keep_ratio) if value is not None)
    assert decision.hops == 1
    assert decision.dense_reason in (None, *get_args(DenseReason))
    assert decision.pruned == (1024 <= length <= 8433 and extra.get("uniprefill", 1) == 1)
    assert decision.wants_report == bool(extra.get("uniprefill_report", 0))
    asked = extra.get("uniprefill_keep_ratio", extra.get("uniprefill_top_p"))
    assert asked is None or extra.get("uniprefill", 1) == 1
    assert asked is None or asked in (decision.top_p, decision.keep_ratio)


def fits_64_bits(value: Any) -> bool:
    return not isinstance(value, int) or -(2**63) <= value < 2**64


@fuzz
@given(extra=st.none() | objects(ARGUMENTS))
def test_arguments_parse_or_are_refused_by_name(extra: dict[str, Any] | None) -> None:
    """The reader alone, of what SamplingParams lets through: it refuses longer integers itself."""
    assume(all(fits_64_bits(value) for value in (extra or {}).values()))
    given_names = [name for name in extra or {} if name.startswith("uniprefill")]
    try:
        args = RequestArgs.parse(extra, UniPrefillConfig())
    except VLLMValidationError as error:
        assert any(name in str(error) for name in given_names)
        assert error.parameter in (*given_names, "uniprefill_keep_ratio")
        return
    assert set(given_names) <= set(ARGUMENTS)
    assert args.top_p is None or args.keep_ratio is None
    assert all(is_share(value) for value in (args.top_p, args.keep_ratio) if value is not None)
    for value in (extra or {}).get("uniprefill"), (extra or {}).get("uniprefill_report"):
        assert value in (None, 0, 1) and not isinstance(value, float)
