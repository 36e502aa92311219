"""Bad settings and unsupported combinations end the start-up with a sentence that names them."""

from __future__ import annotations

import json
import math
import re
import shutil

import pytest
from engines import engine
from oracle.checkpoints import make_checkpoint
from vllm.config import ECTransferConfig, KVTransferConfig, MultiModalConfig
from vllm.engine.arg_utils import EngineArgs

FLAG = "--uniprefill-config"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama", layers=4, hidden=64, heads=4, kv_heads=1)


def configure(model, uniprefill, **arguments):
    settings = {"max_model_len": 4096, "max_num_batched_tokens": 8192, "max_num_seqs": 16}
    return EngineArgs(model=str(model), uniprefill_config=uniprefill, **(settings | arguments)).create_engine_config()


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        ({"topp": 0.9}, "topp"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"top_p": "much"}, "top_p"),
        ({"top_p": True}, "top_p"),
        ({"keep_ratio": 0}, "keep_ratio"),
        ({"keep_ratio": 1.1}, "keep_ratio"),
        ({"top_p": 0.9, "keep_ratio": 0.3}, "keep_ratio"),
        ({"top_p_over": "some"}, "top_p_over"),
        ({"block_size": 0}, "block_size"),
        ({"block_size": -64}, "block_size"),
        ({"num_queries": 0}, "num_queries"),
        ({"num_queries": 129}, "recent_tokens"),
        ({"sink_tokens": -1}, "sink_tokens"),
        ({"recent_tokens": 0}, "recent_tokens"),
        ({"min_prompt_tokens": -5}, "min_prompt_tokens"),
        ({"enabled": "maybe"}, "enabled"),
        ({"selection_layers": []}, "selection_layers"),
        ({"selection_layers": [-1]}, "selection_layers"),
        ({"selection_layers": [1, 99]}, "99"),
        ({"selection_layers": [3]}, "last one"),
        ({"selection_layers": "some"}, "selection_layers"),
        ({"selection_layers": [{"layer": 1, "heads": [99]}]}, "layer 1 has no head 99"),
        ({"profile": "nowhere.json"}, "profile: 'nowhere.json' cannot be read"),
        ({"min_prompt_tokens": 9000}, "pool_tokens"),
        ({"pool_tokens": -1}, "pool_tokens"),
        ({"pool_device": "disk"}, "pool_device"),
    ],
    ids=str,
)
def test_bad_setting(model, setting, names) -> None:
    with pytest.raises(ValueError) as error:
        configure(model, setting)
    message = str(error.value)
    assert message.startswith(FLAG) and message.endswith(".") and names in message, message
    assert "\n" not in message and "Value error" not in message, message


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ({"decode_context_parallel_size": 2, "tensor_parallel_size": 2}, "--decode-context-parallel-size"),
        ({"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size"),
        ({"ubatch_size": 2}, "--enable-dbo and microbatching"),
        ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
        (
            {"ec_transfer_config": {"ec_connector": "ECExampleConnector", "ec_role": "ec_both"}},
            "--ec-transfer-config",
        ),
        ({"enable_chunked_prefill": False}, "--no-enable-chunked-prefill"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "--scheduler-cls"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "--kv-transfer-config",
        ),
    ],
    ids=str,
)
def test_unsupported_combination(model, arguments, names) -> None:
    made = {"kv_transfer_config": KVTransferConfig, "ec_transfer_config": ECTransferConfig}
    arguments = {name: made[name](**value) if name in made else value for name, value in arguments.items()}
    assert_refused(names, model, **arguments)


def assert_refused(names: str, model, **arguments) -> None:
    """One sentence says what the flag does not work with, and the way out."""
    with pytest.raises(ValueError) as error:
        configure(model, {}, **arguments)
    sentence = re.fullmatch(rf"{FLAG} does not work with (.*?); (.*?) or drop {FLAG}\.", str(error.value))
    assert sentence and names in sentence[1] and sentence[2], str(error.value)


def test_dual_batch_overlap(model) -> None:
    """The CPU platform drops --enable-dbo before UniPrefill sees it, so it is set on a configuration that is made."""
    config = configure(model, {})
    config.parallel_config.enable_dbo = True
    with pytest.raises(ValueError, match=f"{FLAG} does not work with --enable-dbo and microbatching; drop it"):
        config.uniprefill_config.verify_with(config)


def test_draft_model_speculation(model) -> None:
    spec = {"method": "draft_model", "model": str(model), "num_speculative_tokens": 2}
    with pytest.raises(ValueError, match=f"{FLAG} does not work with speculative method"):
        configure(model, {}, speculative_config=spec)


def test_ngram_speculation_is_allowed(model) -> None:
    spec = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    assert configure(model, {}, speculative_config=spec).uniprefill_config is not None


def test_old_model_runner(model, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER"):
        configure(model, {})


def test_sliding_window_model(tmp_path) -> None:
    path = make_checkpoint(tmp_path / "m", "mistral", layers=4, hidden=64, heads=2)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"sliding_window": 128}))
    with pytest.raises(ValueError, match="no full-attention layer"):
        configure(path, {})


MIXTURE_OF_EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
}
HYBRID = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "M*M*",
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "ssm_state_size": 16,
    "n_groups": 1,
}
LATENT = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
OTHER_MODELS = {
    "sparse attention": {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "index_topk": 64,
        "index_n_heads": 2,
        "index_head_dim": 32,
        "q_lora_rank": 32,
    }
    | LATENT,
    "hybrid models with MLA": {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": "kimi_linear",
        "linear_attn_config": {
            "kda_layers": [1, 2, 3],
            "full_attn_layers": [4],
            "num_heads": 2,
            "head_dim": 32,
            "short_conv_kernel_size": 4,
        },
    }
    | LATENT,
    "encoder-decoder": {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 4,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "max_target_positions": 4096,
        "pad_token_id": 0,
        "is_encoder_decoder": True,
    },
    "diffusion": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "canvas_length": 32},
    "in parts (GPT2LMHeadModel)": {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
    "Transformers backend": {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3"},
}


def other_model(model, folder, settings):
    """A configuration is enough: these are refused before any weight is read."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    base = json.loads((model / "config.json").read_text())
    shape = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim", "dtype")
    shape += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    (folder / "config.json").write_text(json.dumps({key: base[key] for key in shape if key in base} | settings))
    return folder


@pytest.mark.parametrize("names", OTHER_MODELS)
def test_unsupported_model(names, model, tmp_path) -> None:
    assert_refused(names, other_model(model, tmp_path / "m", OTHER_MODELS[names]))


def test_multimodal_model(model) -> None:
    """vLLM inspects such a model with torchvision, which a CPU has not: a configuration that is made gets images."""
    config = configure(model, {})
    config.model_config.multimodal_config = MultiModalConfig()
    with pytest.raises(ValueError, match=f"{FLAG} does not work with multimodal models other than .*; serve one of"):
        config.uniprefill_config.verify_with(config)


def test_hybrid_model(model, tmp_path) -> None:
    """Prefix caching, which is their default too, and drafts would need states of earlier tokens."""
    hybrid = other_model(model, tmp_path / "m", HYBRID)
    assert_refused("prefix caching for hybrid models", hybrid)
    assert_refused("prefix caching for hybrid models", hybrid, mamba_cache_mode="align")
    uncached = {"enable_prefix_caching": False}
    drafts = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}}
    assert_refused("speculation for hybrid models", hybrid, **uncached, **drafts)
    config = configure(hybrid, {}, **uncached).uniprefill_config
    assert [entry.layer for entry in config.selection_layers] == [1]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"data_parallel_size": 2}, "--data-parallel-size > 1 for mixture-of-experts"),
        ({"enable_expert_parallel": True, "tensor_parallel_size": 2}, "--enable-expert-parallel"),
        ({"enable_return_routed_experts": True}, "--enable-return-routed-experts"),
    ],
    ids=str,
)
def test_experts_over_ranks(arguments, names, model, tmp_path) -> None:
    experts = other_model(model, tmp_path / "m", MIXTURE_OF_EXPERTS)
    assert_refused(names, experts, **arguments)
    assert configure(experts, {}).uniprefill_config is not None


def test_data_parallel_dense_model_is_allowed(model) -> None:
    assert configure(model, {}, data_parallel_size=2).uniprefill_config is not None


def test_pooling_model(model) -> None:
    with pytest.raises(ValueError, match=f"{FLAG} does not work with pooling"):
        configure(model, {}, runner="pooling")


def test_defaults_resolve(model) -> None:
    config = configure(model, {}).uniprefill_config
    assert config.top_p == 0.99 and config.keep_ratio is None and config.enabled
    assert [entry.layer for entry in config.selection_layers] == [1]


def test_absent_flag_leaves_no_config(model) -> None:
    assert configure(model, None).uniprefill_config is None


def test_not_an_object(model) -> None:
    with pytest.raises(ValueError, match=FLAG):
        configure(model, [1])


def test_engine_refuses_at_start(model) -> None:
    """The refusal reaches the one who starts an engine."""
    with pytest.raises(ValueError, match="num_queries"), engine(model, uniprefill={"num_queries": 999}):
        pass
