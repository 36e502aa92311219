"""Tiny random checkpoints of architectures whose layers differ: recurrent ones, windows, sinks, experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from .checkpoints import write_tokenizer

VOCAB = 1024
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_n_groups": 1, "mamba_d_state": 64, "mamba_d_conv": 4}
_MAMBA2 |= {"mamba_chunk_size": 128}
_DELTA_NET = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4}
_DELTA_NET |= {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "mlp_only_layers": []}
_EXPERTS |= {"shared_expert_intermediate_size": 128, "decoder_sparse_step": 1}
# Only this size of latent and RoPE part has a CPU kernel.
_LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64}
_LATENT |= {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
_LATENT |= {"moe_intermediate_size": 128, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}

# Model type -> what its config has beside the common shape.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_next": {"layer_types": [*["linear_attention"] * 3, "full_attention"] * 2} | _DELTA_NET | _EXPERTS,
    "qwen3_5_text": {"layer_types": [*["linear_attention"] * 3, "full_attention"] * 2} | _DELTA_NET,
    "nemotron_h": {
        "hybrid_override_pattern": "M-M*-M*M-M*-",
        "num_hidden_layers": 12,
        "mamba_num_heads": 8,
        "mamba_head_dim": 64,
        "ssm_state_size": 64,
        "n_groups": 2,
        "conv_kernel": 4,
        "chunk_size": 128,
    },
    "falcon_h1": {"mamba_d_ssm": 512} | _MAMBA2,
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * 4,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 256,
        "position_embedding_type": "rope",
    }
    | _MAMBA2,
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "mamba_dt_rank": 16,
    },
    "gemma2": {"sliding_window": 256, "query_pre_attn_scalar": 64, "tie_word_embeddings": True},
    "gemma3_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 4,
        "sliding_window": 256,
        "query_pre_attn_scalar": 64,
        "tie_word_embeddings": True,
    },
    "lfm2": {
        "layer_types": [*["conv"] * 2, "full_attention"] * 2 + ["conv", "full_attention"],
        "conv_L_cache": 3,
        "conv_dim": 256,
        "block_dim": 256,
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
        "tie_word_embeddings": True,
        "block_auto_adjust_ff_dim": False,
        "block_ff_dim": 256,
    },
    "deepseek_v2": {"q_lora_rank": None, "topk_method": "greedy"} | _LATENT,
    # Without experts: the release's CPU router is off by 2e-3 with V3's scores, pruned or not.
    "deepseek_v3": _LATENT | {"q_lora_rank": 128, "first_k_dense_replace": 8},
    "gpt_oss": {"sliding_window": 128, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def make_family_checkpoint(path: Path, family: str) -> Path:
    """Write config.json, model.safetensors (bf16) and a word-level tokenizer; attention is peaked."""
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    config = AutoConfig.for_model(family, **(shape | FAMILIES[family]))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "q_b_proj.weight", "k_proj.weight")):
                weight.data *= 12
            elif name.endswith("o_proj.weight") and family in ("qwen3_next", "qwen3_5_text"):
                weight.data *= 12  # half of what its attention hands on is gated away
            elif "embed" in name:
                weight.data.normal_()
    model.to(torch.bfloat16).save_pretrained(path)
    write_tokenizer(path, VOCAB)
    return path
