"""core-add-uniprefill-config.patch: the flag, its checks, and how a model is cut into segments."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from vllm.config import UniPrefillConfig
from vllm.config.compilation import CompilationMode
from vllm.config.uniprefill import DEFAULT_POOL_TOKENS, SelectionLayer
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.models import registry
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.uniprefill.plan import (
    SegmentPlan,
    auto_selection_layers,
    check_selection_layers,
    decoder_layer,
    layer_kinds,
    segment_of_layer_name,
)
from vllm.v1.uniprefill.support import UNBOUNDED_ARCHITECTURES

FULL, SLIDING, LINEAR = "full", "sliding", "linear"


def hf_model(*kinds: str, layers: int | None = None, window: int | None = None) -> SimpleNamespace:
    """What the layer rules read of a ModelConfig: layer types, or only a number of layers."""
    text_config = SimpleNamespace(layer_types=list(kinds)) if kinds else SimpleNamespace()
    return SimpleNamespace(
        hf_text_config=text_config,
        get_total_num_hidden_layers=lambda: len(kinds) or layers,
        get_sliding_window=lambda: window,
        model_arch_config=SimpleNamespace(total_num_attention_heads=8),
    )


# --- the config alone ------------------------------------------------------------------


def test_defaults_are_the_published_ones() -> None:
    config = UniPrefillConfig()
    assert (config.selection_layers, config.top_p, config.keep_ratio) == ("auto", 0.99, None)
    assert (config.top_p_over, config.block_size, config.num_queries) == ("all", 64, 128)
    assert (config.sink_tokens, config.recent_tokens) == (128, 128)
    assert (config.min_prompt_tokens, config.enabled) == (None, True)
    assert (config.pool_tokens, config.pool_device) == (None, "device")
    assert (config.hops, config.hop_blocks, config.profile) == (1, 4, None)


def test_keep_ratio_takes_the_place_of_the_default_top_p() -> None:
    config = UniPrefillConfig(keep_ratio=0.5)
    assert (config.top_p, config.keep_ratio) == (None, 0.5)


def test_selection_layers_are_sorted_and_unique() -> None:
    layers = UniPrefillConfig(selection_layers=[5, {"layer": 1, "heads": [3, 0, 3]}, 5, 3]).selection_layers
    assert layers == [SelectionLayer(layer=1, heads=[0, 3]), SelectionLayer(layer=3), SelectionLayer(layer=5)]


def test_the_most_queries_may_be_a_layers_own() -> None:
    """Where each says how many, the general number does not count."""
    layers = [{"layer": 1, "num_queries": 8}, {"layer": 3, "num_queries": 32}]
    assert UniPrefillConfig(selection_layers=layers).max_num_queries == 32
    assert UniPrefillConfig(selection_layers=[*layers, 4]).max_num_queries == 128


@pytest.mark.parametrize("share", [1, 0.001])
def test_shares_up_to_one_are_taken(share: float) -> None:
    assert UniPrefillConfig(top_p=share).top_p == share
    assert UniPrefillConfig(keep_ratio=share).keep_ratio == share


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"top_p": 0}, "top_p must be greater than 0, not 0."),
        ({"top_p": 1.01}, "top_p must be less than or equal to 1, not 1.01."),
        ({"top_p": float("nan")}, "top_p must be a finite number, not nan."),
        ({"top_p": True}, "top_p must be a valid number, not True."),
        ({"keep_ratio": "0.9"}, "keep_ratio must be a valid number, not '0.9'."),
        ({"block_size": True}, "block_size must be a valid integer, not True."),
        ({"enabled": 1}, "enabled must be a valid boolean, not 1."),
        ({"recent_tokens": 0}, "recent_tokens must be greater than or equal to 1, not 0."),
        ({"top_p": 0.9, "keep_ratio": 0.9}, "top_p and keep_ratio exclude each other; set one."),
        (
            {"num_queries": 200},
            "num_queries (200) must not exceed recent_tokens (128), since a dropped token has no query; "
            "lower num_queries or raise recent_tokens.",
        ),
        ({"selection_layers": []}, 'selection_layers is empty; list at least one layer or use "auto".'),
        *(
            ({"selection_layers": bad}, f'selection_layers must be "auto" or a list of layers, not {bad!r}.')
            for bad in ("some", 3)
        ),
        *(
            ({"selection_layers": [bad]}, f"selection_layers: {sentence}.")
            for bad, sentence in (
                (-1, "layer must be greater than or equal to 0, not -1"),
                (True, "layer must be a valid integer, not True"),
                ([1], "layer must be a valid integer, not [1]"),
                ({"heads": [1]}, "{'heads': [1]} names no layer; add it"),
                (
                    {"layer": 1, "head": 2},
                    "'head' is no setting of a layer; use one of layer, heads, num_queries, top_p, keep_ratio",
                ),
                ({"layer": 1, "heads": 2}, "heads must be a valid list, not 2"),
                ({"layer": 1, "heads": [-1]}, "heads must be greater than or equal to 0, not [-1]"),
                ({"layer": 1, "top_p": 0.5, "keep_ratio": 0.5}, "top_p and keep_ratio exclude each other; set one"),
            )
        ),
        (
            {"selection_layers": [1, {"layer": 1, "num_queries": 8}]},
            "selection_layers has layer 1 twice; drop one.",
        ),
        ({"hops": 3}, "hops must be 1 or 2, not 3."),
        ({"hop_blocks": 0}, "hop_blocks must be greater than or equal to 1, not 0."),
        ({"pool_tokens": -1}, "pool_tokens must be greater than or equal to 0, not -1."),
        ({"pool_device": "cpu"}, "pool_device must be 'device' or 'host', not 'cpu'."),
        ({"top_p_over": "none"}, "top_p_over must be 'all' or 'middle', not 'none'."),
        (
            {"top_q": 0.9},
            # Later patches add some.
            f"'top_q' is no setting; use one of {', '.join(f.name for f in dataclasses.fields(UniPrefillConfig))}.",
        ),
    ],
    ids=str,
)
def test_bad_values_from_the_flag_are_one_sentence_that_names_them(values: dict, sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        UniPrefillConfig.from_cli(values)
    assert str(error.value) == f"--uniprefill-config: {sentence}"


@pytest.mark.parametrize("values", [0.99, [1, 2]], ids=str)
def test_the_flag_takes_an_object_only(values: object) -> None:
    with pytest.raises(ValueError) as error:
        UniPrefillConfig.from_cli(values)
    assert str(error.value) == f"--uniprefill-config takes a JSON object such as '{{\"top_p\": 0.99}}', not {values}."


# --- layers ----------------------------------------------------------------------------


def test_auto_reproduces_the_published_layers() -> None:
    """Llama-3.1-8B, Qwen3-Next and Gemma-3-12B."""
    assert auto_selection_layers([FULL] * 32) == [7, 11, 15, 19, 23, 27]
    assert auto_selection_layers([LINEAR, LINEAR, LINEAR, FULL] * 12) == list(range(7, 44, 4))
    assert auto_selection_layers([*[SLIDING] * 5, FULL] * 8) == [29, 35, 41]


@given(st.integers(3, 130))
def test_auto_cuts_where_layers_follow(num_layers: int) -> None:
    """Ascending, not after layer 0, two layers or more apart, and never after the last."""
    layers = auto_selection_layers([FULL] * num_layers)
    assert layers and layers[0] >= 1 and layers[-1] < num_layers - 1
    assert all(b - a >= 2 for a, b in zip(layers, layers[1:], strict=False))


def test_layer_kinds_come_from_the_layer_types_or_the_window() -> None:
    types = ("full_attention", "sliding_attention", "chunked_attention", "linear_attention")
    assert layer_kinds(hf_model(*types)) == [FULL, SLIDING, "chunked", LINEAR]
    assert layer_kinds(hf_model(layers=2)) == [FULL, FULL]
    assert layer_kinds(hf_model(layers=2, window=512)) == [SLIDING, SLIDING]
    blocks = hf_model(layers=5)
    blocks.hf_text_config.layers_block_type = ["mamba", "mlp", "attention", "moe", "hybrid"]
    assert layer_kinds(blocks) == [LINEAR, "mlp", FULL, "mlp", FULL]


def test_a_layers_name_says_where_it_is() -> None:
    assert decoder_layer("model.layers.3.self_attn.attn", 8) == decoder_layer("model.11.mixer", 8) == 3


@pytest.mark.parametrize(
    ("layers", "model", "named"),
    [
        ([2, 8], hf_model(layers=8), "layer 8 does not exist (the model has layers 0 to 7)"),
        ([7], hf_model(layers=8), "layer 7 is the last one"),
        ([2, 8], hf_model(layers=8), "full-attention layers 0-6 or"),
        (
            [1],
            hf_model("full_attention", "linear_attention", "full_attention", "full_attention"),
            "layer 1 is a linear-attention layer; choose from the full-attention layers 0, 2 or",
        ),
        ([1], hf_model("attention", "mlp", "attention"), "layer 1 has no attention; choose from"),
        (
            [0],
            hf_model("full_attention", "chunked_attention", "full_attention"),
            "chunked-attention layers; serve another model",
        ),
        ([], hf_model(layers=4, window=512), "no full-attention layer"),
        ([], hf_model(layers=2), "too few layers"),
        ([{"layer": 1, "heads": [0, 8]}], hf_model(layers=8), "layer 1 has no head 8; choose heads from 0 to 7."),
    ],
)
def test_impossible_selection_layers_are_refused(layers, model, named: str) -> None:
    with pytest.raises(ValueError) as error:
        check_selection_layers(layers and UniPrefillConfig(selection_layers=layers).selection_layers, model)
    assert named in str(error.value).replace(' or use "auto"', " or")


def test_segments_cover_the_layers_without_gap() -> None:
    plan = SegmentPlan(8, (0, 3, 6))
    segments = plan.segments
    assert [(s.index, s.start, s.end) for s in segments] == [
        (0, 0, 1),
        (1, 1, 4),
        (2, 4, 7),
        (3, 7, 8),
    ]
    assert [s.is_last for s in segments] == [False, False, False, True]
    assert [s.selection_layer for s in segments[:-1]] == [0, 3, 6]
    assert plan.num_segments == 4


@given(st.integers(2, 60), st.data())
def test_segment_of_a_layer_is_the_one_that_holds_it(num_layers: int, data) -> None:
    cuts = data.draw(st.sets(st.integers(0, num_layers - 2), min_size=1))
    plan = SegmentPlan(num_layers, tuple(sorted(cuts)))
    for segment in plan.segments:
        for layer in range(segment.start, segment.end):
            assert plan.segment_of(layer) == segment.index


# --- the engine's config ---------------------------------------------------------------


def parse(*arguments: str) -> EngineArgs:
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    # The default model would be looked up, or refused without a network.
    return EngineArgs.from_cli_args(parser.parse_args(["--model", str(Path(__file__).parent), *arguments]))


def test_the_flag_reaches_the_engine_args_as_an_object() -> None:
    values = {"top_p": 0.9, "selection_layers": [2, 4]}
    assert parse("--uniprefill-config", json.dumps(values)).uniprefill_config == values
    assert parse().uniprefill_config is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "{top_p: 0.9}",
            "and '{top_p: 0.9}' is no JSON: Expecting property name enclosed in double quotes: "
            "line 1 column 2 (char 1).",
        ),
        ("[0.9]", "not [0.9]."),
        ("null", "not null."),
    ],
)
def test_what_is_no_json_object_is_a_usage_error(text: str, reason: str, capsys) -> None:
    with pytest.raises(SystemExit):
        parse("--uniprefill-config", text)
    last = capsys.readouterr().err.splitlines()[-1]
    sentence = f"takes a JSON object such as '{{\"top_p\": 0.99}}', {reason}"
    assert last.endswith(f": error: argument --uniprefill-config: {sentence}")


def test_the_flag_reaches_the_config_and_leaves_compilation_alone(configure) -> None:
    config = configure({"top_p": 0.9})
    assert config.uniprefill_config.top_p == 0.9
    assert config.uniprefill_config.selection_layers == [SelectionLayer(layer=layer) for layer in (1, 3, 5)]
    assert config.compilation_config.mode == configure(None).compilation_config.mode
    assert config.use_v2_model_runner
    config.uniprefill_config.verify_with(config)  # as where a config arrives


def test_without_the_flag_the_config_is_the_releases(configure) -> None:
    config = configure(None)
    assert config.uniprefill_config is None
    assert SegmentPlan.from_vllm_config(config) is None
    assert segment_of_layer_name(config, "model.layers.7.self_attn.attn") == 0
    stock = {CompilationMode.VLLM_COMPILE, CompilationMode.DYNAMO_TRACE_ONCE}  # GPU, CPU
    assert config.compilation_config.mode in stock


def test_the_plan_follows_the_config(configure) -> None:
    config = configure({"selection_layers": [2, 5]})
    assert SegmentPlan.from_vllm_config(config) == SegmentPlan(8, (2, 5))
    names = [f"model.layers.{i}.self_attn.attn" for i in range(8)]
    assert [segment_of_layer_name(config, name) for name in names] == [0, 0, 0, 1, 1, 1, 2, 2]
    layers = config.compilation_config.static_forward_context
    recurrent = type("Recurrent", (MambaBase,), dict.fromkeys(MambaBase.__abstractmethods__))
    layers |= {names[4]: recurrent(), names[7]: SimpleNamespace(sliding_window=64)}
    assert [segment_of_layer_name(config, name) for name in names] == [0, 0, 0, 1, 0, 1, 2, 0]


def test_the_longest_pruned_prompt_fits_the_pool_or_one_step(configure) -> None:
    """The step next to a full batch of decodes; the pool is no longer than the context."""

    def longest(uniprefill: dict, **arguments) -> tuple[int, int]:
        config = configure(uniprefill, **arguments)
        return config.uniprefill_config.pool_tokens, config.uniprefill_config.max_prompt_tokens(config)

    assert longest({}) == longest({"pool_tokens": 5000}) == (2048, 2048)
    assert longest({"pool_tokens": 2046}) == (2046, 2046)
    assert longest({"pool_tokens": 0}) == (0, 2048 - 3)
    ngram = {"method": "ngram", "num_speculative_tokens": 2}
    assert longest({"pool_tokens": 0}, speculative_config=ngram) == (0, 2048 - 3 * 3)
    positions = {"max_position_embeddings": 2 * DEFAULT_POOL_TOKENS}
    long = {"hf_overrides": positions, "max_model_len": 2 * DEFAULT_POOL_TOKENS}
    assert longest({}, **long) == (DEFAULT_POOL_TOKENS, DEFAULT_POOL_TOKENS)


@pytest.mark.parametrize(("longest", "elsewhere"), [(8192, 4096), (4095, 1024)])
def test_the_shortest_pruned_prompt_is_longer_where_a_cut_costs_more(
    configure, monkeypatch, longest, elsewhere
) -> None:
    """Not beyond what can be pruned; a number that is given holds everywhere."""
    arguments = {"hf_overrides": {"max_position_embeddings": 8192}, "max_model_len": longest}

    def shortest(**uniprefill: int) -> int:
        return configure(uniprefill, **arguments).uniprefill_config.min_prompt_tokens

    assert shortest() == 1024
    monkeypatch.setattr("vllm.config.uniprefill.current_platform", SimpleNamespace(is_cpu=lambda: False))
    assert shortest() == elsewhere and shortest(min_prompt_tokens=2000) == 2000


def test_blocks_below_16_tokens_are_refused(configure) -> None:
    assert configure({"block_size": 16}).uniprefill_config.block_size == 16
    with pytest.raises(ValueError) as error:
        configure({"block_size": 15})
    assert str(error.value) == (
        "--uniprefill-config block_size (15) must be at least 16, since every block is scored on its own; raise it or "
        "drop --uniprefill-config."
    )


def test_a_pool_and_a_step_below_the_shortest_pruned_prompt_are_refused(configure) -> None:
    fits = {"max_num_batched_tokens": 1027, "max_model_len": 1024}
    configure({"pool_tokens": 0}, **fits)
    configure({"pool_tokens": 1024}, **(fits | {"max_num_batched_tokens": 512}))
    with pytest.raises(ValueError) as error:
        configure({"pool_tokens": 0}, **(fits | {"max_num_batched_tokens": 1026}))
    assert str(error.value) == (
        "--uniprefill-config pool_tokens: prompts of over 1023 tokens are not pruned, nor are those under "
        "min_prompt_tokens (1024); raise pool_tokens or lower min_prompt_tokens."
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"enable_chunked_prefill": False}, "--no-enable-chunked-prefill"),
        ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "--kv-transfer-config",
        ),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size > 1"),
        ({"enable_return_routed_experts": True}, "--enable-return-routed-experts"),
        ({"offload_group_size": 4}, "--offload-group-size > 0"),
        ({"kv_offloading_size": 8}, "--kv-offloading-size"),
        ({"scheduler_cls": "a.Scheduler"}, "--scheduler-cls"),
        ({"hf_overrides": {"layer_types": ["sliding_attention"] * 8}}, "no full-attention layer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_work_together_is_refused_by_name(configure, arguments, named) -> None:
    with pytest.raises(ValueError, match="--uniprefill-config") as error:
        configure({}, **arguments)
    assert named in str(error.value)


WINDOWS = {"layer_types": ["full_attention", "sliding_attention"] * 4, "sliding_window": 300}


@pytest.mark.parametrize(("cut", "recent"), [([4], 300), ([6], 300)])
def test_windows_behind_a_cut_have_all_their_tokens(configure, cut, recent: int) -> None:
    made = configure({"selection_layers": cut}, hf_overrides=WINDOWS)
    assert made.uniprefill_config.recent_tokens == recent
    assert configure({"selection_layers": cut, "recent_tokens": 900}).uniprefill_config.recent_tokens == 900


def test_windows_before_every_cut_change_nothing(configure) -> None:
    early = {"layer_types": ["sliding_attention"] * 4 + ["full_attention"] * 4, "sliding_window": 300}
    assert configure({"selection_layers": [5]}, hf_overrides=early).uniprefill_config.recent_tokens == 128


def test_the_kv_block_size_fits_later_windows(configure) -> None:
    """By itself, or else its flag is named."""
    config = configure({"selection_layers": [4]}, hf_overrides=WINDOWS)
    assert 64 % config.cache_config.block_size == 0
    with pytest.raises(ValueError) as error:
        configure({"selection_layers": [4]}, hf_overrides=WINDOWS, block_size=128)
    assert str(error.value) == (
        "--uniprefill-config block_size (64) must be a multiple of --block-size (128) for layers with a sliding "
        "window; set --block-size 64 or drop --uniprefill-config."
    )


@pytest.mark.parametrize("architecture", UNBOUNDED_ARCHITECTURES)
def test_models_without_layer_bounds_are_refused_by_their_class(configure, monkeypatch, architecture) -> None:
    config = configure({})
    monkeypatch.setattr(config.model_config, "_architecture", architecture)
    with pytest.raises(ValueError) as error:
        config.uniprefill_config.verify_with(config)
    assert str(error.value) == (
        f"--uniprefill-config does not work with models whose layers cannot be run in parts ({architecture}); "
        "serve another model or drop --uniprefill-config."
    )


def test_models_without_pipeline_parallelism_are_refused_by_their_class(configure, monkeypatch) -> None:
    config = configure({})
    model = config.model_config
    monkeypatch.setattr(model, "_model_info", dataclasses.replace(model._model_info, supports_pp=False))
    with pytest.raises(ValueError, match=r"layers cannot be run in parts \(LlamaForCausalLM\);"):
        config.uniprefill_config.verify_with(config)


def test_the_transformers_backend_is_refused_in_one_sentence(configure) -> None:
    """Without pydantic's frame, though the whole config is a pydantic class."""
    with pytest.raises(ValueError) as error:
        configure({}, model_impl="transformers")
    assert str(error.value) == (
        "--uniprefill-config does not work with models on the Transformers backend (TransformersForCausalLM); "
        "serve a model that vLLM implements itself or drop --uniprefill-config."
    )


# --- profiles --------------------------------------------------------------------------

LLAMA = {
    "name": "toy",
    "architecture": "LlamaForCausalLM",
    "num_layers": 8,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 32,
    "hidden_size": 64,
    "vocab_size": 1024,
}
CALIBRATED = {"selection_layers": [{"layer": 2, "heads": [1], "num_queries": 8}], "keep_ratio": 0.3, "hops": 2}


def write_profile(path: Path, **changes: object) -> str:
    path.write_text(json.dumps({"model": LLAMA | changes, "settings": CALIBRATED}))
    return str(path)


def test_a_profile_gives_the_settings_and_others_take_precedence(configure, tmp_path) -> None:
    path = write_profile(tmp_path / "profile.json")
    config = configure({"profile": path, "block_size": 32}).uniprefill_config
    assert config.selection_layers == [SelectionLayer(layer=2, heads=[1], num_queries=8)]
    assert (config.keep_ratio, config.top_p, config.hops, config.block_size) == (0.3, None, 2, 32)
    assert (config.profile, config.calibrated_for) == (path, LLAMA)
    config = configure({"profile": path, "top_p": 0.9, "hops": 1}).uniprefill_config
    assert (config.keep_ratio, config.top_p, config.hops) == (None, 0.9, 1)


def test_an_amount_beside_a_profile_takes_precedence_over_those_of_its_layers(configure, tmp_path) -> None:
    entries = [{"layer": 2, "heads": [1], "num_queries": 8, "top_p": 0.8}, {"layer": 4, "keep_ratio": 0.3}]
    profile = {"model": LLAMA, "settings": {"selection_layers": entries}}
    (path := tmp_path / "profile.json").write_text(json.dumps(profile))
    own = configure({"profile": str(path)}).uniprefill_config.selection_layers
    assert [(entry.top_p, entry.keep_ratio) for entry in own] == [(0.8, None), (None, 0.3)]
    config = configure({"profile": str(path), "top_p": 0.99}).uniprefill_config
    assert config.top_p == 0.99
    assert config.selection_layers == [SelectionLayer(layer=2, heads=[1], num_queries=8), SelectionLayer(layer=4)]


def test_another_models_profile_is_refused_by_name(configure, tmp_path) -> None:
    path = write_profile(tmp_path / "profile.json", num_heads=4)
    with pytest.raises(ValueError, match=r"was made for 'toy' with num_heads 4, and '.*' has 2; make one"):
        configure({"profile": path})


@pytest.mark.parametrize(
    ("text", "reason"),
    [(None, "cannot be read"), ("{", "cannot be read"), ("[]", "has no settings and model"), ("{}", "has no settings")],
)
def test_what_is_no_profile_is_refused_by_its_path(text: str | None, reason: str, tmp_path) -> None:
    path = tmp_path / "profile.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=f"--uniprefill-config profile: '{path}' {reason}"):
        UniPrefillConfig.from_cli({"profile": str(path)})


def test_a_profile_with_an_unknown_setting_is_refused_by_the_settings_name(tmp_path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"model": LLAMA, "settings": {"heads": [1]}}))
    with pytest.raises(ValueError, match="'heads' is no setting; use one of"):
        UniPrefillConfig.from_cli({"profile": str(path)})


def test_other_failures_keep_pydantics_frame(configure) -> None:
    with pytest.raises(ValidationError):
        configure({}, max_num_seqs=-1)


def test_every_class_that_names_its_layers_otherwise_is_listed() -> None:
    """By vLLM's sources: who makes layers with bounds under another name than `layers`."""
    models = Path(registry.__file__).parent
    modules = {
        path.stem
        for path in models.glob("*.py")
        if re.search(r"self\.end_layer, self\.(?!layers)\w+ = make", path.read_text())
    }
    assert modules
    listed = {arch for arch, (module, _) in registry._TEXT_GENERATION_MODELS.items() if module in modules}
    assert listed == set(UNBOUNDED_ARCHITECTURES)


def test_the_old_model_runner_is_refused(configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(ValueError, match="requires Model Runner V2"):
        configure({})
