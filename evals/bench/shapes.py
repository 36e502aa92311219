"""What can be benchmarked: a model's sizes, its prompts, and what is asked of it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from evals.needle.prompts import TOKEN_ID, encode, make_prompt
from scripts.fork import ForkError
from scripts.serve import NEEDLE_MODEL

HYBRID_MODEL = NEEDLE_MODEL.with_name("needle-hybrid")
TASK = "multikey"  # its answer is one token, so the first token tells

Segments = Sequence[tuple[int, int]]
"""(layers in the segment, prompt tokens alive in it), in order."""


@dataclass(frozen=True)
class ModelShape:
    """A decoder with grouped-query attention and gated MLPs.

    Attributes:
        ffn: intermediate width that one token uses: of experts, those routed to it and the shared one.
        full: share of the layers with full attention. The others attend to a window, or keep a state, and count as if
            the attention itself were free, in every segment alike.

    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    full: float = 1.0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """From a Hugging Face config.json.

        Raises:
            ForkError: if it has other names for its sizes than Llama's.

        """
        if lacking := {"hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size"} - set(config):
            raise ForkError(
                f"The model's config.json lacks {min(lacking)}; choose a model with Llama's names for sizes."
            )
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        ffn = config["intermediate_size"]
        if experts := config.get("num_experts") or config.get("num_local_experts"):
            width = config.get("moe_intermediate_size", ffn)
            ffn = min(experts, config["num_experts_per_tok"]) * width + config.get("shared_expert_intermediate_size", 0)
        kv_heads, head_dim = config.get("num_key_value_heads") or heads, config.get("head_dim") or hidden // heads
        layers = config["num_hidden_layers"]
        kinds = config.get("layer_types") or ["full_attention"]
        full = kinds.count("full_attention") / len(kinds) / config.get("full_attention_interval", 1)
        return cls(layers, hidden, heads, kv_heads, head_dim, ffn, full)

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers, 16 bit each."""
        return self.layers * 2 * self.kv_heads * self.head_dim * 2

    def prefill_flops(self, segments: Segments) -> float:
        """Matrix products, and causal attention: q·k and p·v of the pairs that see each other."""
        attention = self.heads * self.head_dim
        qkv = self.hidden * (attention + 2 * self.kv_heads * self.head_dim)
        a_token = 2 * (qkv + attention * self.hidden + 3 * self.hidden * self.ffn)
        pairs = 2 * self.full * attention
        return sum(layers * tokens * (a_token + tokens * pairs) for layers, tokens in segments)

    def flop_gain(self, segments: Segments) -> float:
        """Dense FLOPs over pruned FLOPs; selection is free here, and so is everything else."""
        return self.prefill_flops([(self.layers, segments[0][1])]) / self.prefill_flops(segments)


def model_name(model: Path) -> str:
    """What a model folder is called in the names of results."""
    return "needle" if model.resolve() == NEEDLE_MODEL else model.resolve().name


def read_config(model: Path) -> dict[str, Any]:
    """Of a model folder."""
    if not (model / "config.json").is_file():
        raise ForkError(f"--model {model} holds no config.json; download the model and name its folder.")
    return json.loads((model / "config.json").read_text())


LLAMA_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "silu",
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip
QWEN3_MOE_CONFIG: dict[str, Any] = LLAMA_CONFIG | {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048,
    "intermediate_size": 6144, "num_hidden_layers": 48, "num_key_value_heads": 4, "rope_theta": 1e6,
    "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip
GEMMA3_CONFIG: dict[str, Any] = LLAMA_CONFIG | {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": 262208, "hidden_size": 3840,
    "intermediate_size": 15360, "num_hidden_layers": 48, "num_attention_heads": 16, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "rope_theta": 1e6,
    "rope_local_base_freq": 10000.0, "sliding_window": 1024, "sliding_window_pattern": 6,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 8, "tie_word_embeddings": True,
    "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
# 16 of the 48 layers, which fit 80 GB.
QWEN3_NEXT_CONFIG: dict[str, Any] = QWEN3_MOE_CONFIG | {
    "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "intermediate_size": 5120,
    "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
    "num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 512, "rope_theta": 1e7,
    "shared_expert_intermediate_size": 512, "partial_rotary_factor": 0.25, "full_attention_interval": 4,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
}  # fmt: skip
# Small enough for a test, with grouped-query attention and enough layers to cut twice.
TINY: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 8192,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TINY_CONFIG = LLAMA_CONFIG | TINY | {"num_hidden_layers": 6}
TINY_MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
TINY_CONFIGS = {
    "tiny-qwen3-30b-a3b": QWEN3_MOE_CONFIG | TINY | TINY_MOE,
    "tiny-gemma-3-12b": GEMMA3_CONFIG
    | TINY
    | {"layer_types": ["sliding_attention", "full_attention"] * 4, "sliding_window": 128},
    "tiny-qwen3-next-16l": QWEN3_NEXT_CONFIG
    | TINY
    | TINY_MOE
    | {"full_attention_interval": 2, "shared_expert_intermediate_size": 64, "linear_num_key_heads": 2}
    | {"linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64},
}


@dataclass(frozen=True)
class Shape:
    """Defaults of one `--shape`.

    Attributes:
        selection_layers: None: those that the engine chooses.
        model: its folder, or its Hugging Face config, for dummy weights.
        lengths: prompt tokens of the part ttft.
        efficiency_lengths: of the parts efficiency and breakdown; interleave uses the last.
        budgets: tokens a step in the part interleave; None: vLLM's default.
        prune_by: what the part ttft prunes by.
        traffic_length: prompt tokens of the parts concurrency and cache, and of the long prompts of poisson.
        kernel_lengths: prompt tokens of the part kernels.

    """

    name: str
    selection_layers: tuple[int, ...] | None
    model: Path | dict[str, Any]
    lengths: tuple[int, ...] = (8192, 32768, 131072)
    efficiency_lengths: tuple[int, ...] = (131072,)
    keep_ratio: float = 0.3
    prune_by: Literal["top_p", "keep_ratio"] = "keep_ratio"
    traffic_length: int = 16384
    kernel_lengths: tuple[int, ...] = (32768, 65536, 131072)
    budgets: tuple[int | None, ...] = (None,)


# In the lane, at a server's budget, and in one step beside decodes.
ALL_STEPS = (None, 131072 + 1024)
NEEDLE_LENGTHS = (2048, 4096, 8192, 16384, 32768)
SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "needle",
            (1, 3, 5),
            NEEDLE_MODEL,
            NEEDLE_LENGTHS,
            (8192, 16384),
            0.3,
            "top_p",
            4096,
            (4096, 16384),
            (2048, 4096, 20480),
        ),
        Shape("llama-3.1-8b", None, LLAMA_CONFIG, budgets=ALL_STEPS),
        Shape("qwen3-30b-a3b", None, QWEN3_MOE_CONFIG, budgets=ALL_STEPS),
        Shape("gemma-3-12b", None, GEMMA3_CONFIG, budgets=ALL_STEPS),
        Shape("qwen3-next-16l", None, QWEN3_NEXT_CONFIG, budgets=ALL_STEPS),
        *(
            Shape(name, None, config, (1024, 2048), (2048,), 0.3, "keep_ratio", 1024, (1024,), (512, 4096))
            for name, config in TINY_CONFIGS.items()
        ),
        Shape("tiny", (1, 3), TINY_CONFIG, (1024, 2048), (2048,), 0.3, "keep_ratio", 1024, (1024,), (512, 4096)),
    )
}

# Of the part classes: the needle model's sizes, with layers of another class.
SMALL: dict[str, Any] = TINY | {
    "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "max_position_embeddings": 32768,
}  # fmt: skip
SMALL_CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3-next": TINY_CONFIGS["tiny-qwen3-next-16l"] | SMALL | {"full_attention_interval": 4},
    "nemotron-h": LLAMA_CONFIG | SMALL | {
        "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "num_hidden_layers": 12,
        "hybrid_override_pattern": "M-M*-M*M-M*-", "mamba_num_heads": 8, "mamba_head_dim": 64, "ssm_state_size": 64,
        "n_groups": 2, "conv_kernel": 4, "chunk_size": 128, "mlp_hidden_act": "relu2",
    },
    "qwen3-moe": TINY_CONFIGS["tiny-qwen3-30b-a3b"] | SMALL,
    # This size of latent and RoPE part alone has a CPU kernel.
    "deepseek-v2": LLAMA_CONFIG | SMALL | {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "num_key_value_heads": 4,
        "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64,
        "topk_method": "greedy", "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 128,
    },
}  # fmt: skip
WHOLE = 16384 + 8  # the CPU's backend for MLA takes prompts in one step
CLASSES = (
    Shape("needle-hybrid", (2, 4, 6), HYBRID_MODEL, prune_by="top_p"),
    *(
        Shape(name, None, config, budgets=(WHOLE if name == "deepseek-v2" else None,))
        for name, config in SMALL_CONFIGS.items()
    ),
)


@contextmanager
def model_folder(shape: Shape, given: Path | None) -> Iterator[tuple[Path, str]]:
    """The model to load, and vLLM's `load_format` for it: dummy weights where there is a config alone."""
    model = given or shape.model
    if isinstance(model, Path):
        yield model, "auto" if any(model.glob("*.safetensors")) or any(model.glob("*.bin")) else "dummy"
        return
    with TemporaryDirectory(prefix="bench-model-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(model))
        yield Path(folder), "dummy"


def speaks_needle(model: Path) -> bool:
    """Whether the model's vocabulary is the needle prompts' own."""
    file = model / "tokenizer.json"
    return file.is_file() and json.loads(file.read_text())["model"].get("vocab") == TOKEN_ID


@dataclass(frozen=True)
class Prompts:
    """Prompts of a model: needle questions where it knows the words, else random tokens."""

    needle: bool
    vocabulary: int

    @classmethod
    def of(cls, model: Path) -> Prompts:
        return cls(speaks_needle(model), read_config(model)["vocab_size"])

    def ids(self, tokens: int, seed: int) -> list[int]:
        if self.needle:
            return encode(make_prompt(TASK, tokens, seed).text)
        return random.Random(f"{tokens}/{seed}").choices(range(self.vocabulary), k=tokens)

    def answered(self, tokens: int, seed: int, first_token: int) -> bool | None:
        """Whether the first token answers the prompt; None if it asks nothing."""
        if not self.needle:
            return None
        return first_token == TOKEN_ID[make_prompt(TASK, tokens, seed).answer]
