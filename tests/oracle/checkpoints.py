"""Tiny random bf16 checkpoints whose attention is peaked, for vLLM and transformers.

Plain random weights attend almost evenly, and then every block weighs the same.
Here each head prefers some tokens to others for most queries:

- The first hidden channels are constants: every embedding holds the same
  values, no layer writes to them, and the final norm's weight hides them from
  the logits. They are several so that their rounding errors average out.
- W_k is random. W_q turns the constants into a fixed direction within the head
  dimensions that RoPE hardly turns, so a score is `sharpness` times a standard
  normal variable that depends on the key's token, its head and its layer.
- On top comes random W_q (`CONTENT`) over all dimensions, which makes scores
  depend on the query and, through the fast RoPE dimensions, on distance.

To leave end-to-end comparisons room, bf16 rounding is kept low: a layer writes
to a part of the residual channels only, so each is rounded less often. Random
signs in the final norm keep a tied head from repeating the last token.

Tokenizer: word level, `w0 w1 ... w1023`, no special tokens. transformers 5
replaces the tokenizer of every model of type qwen2 by its own class, which drops
all these words; so a copy lies in the subfolder `tokenizer`, away from the
model's config: serve with `--tokenizer PATH/tokenizer` and it works for every family.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "phi3", "qwen3_moe", "mixtral")

CONSTANTS = 8  # hidden channels that are the same in every embedding
CONSTANT_RANGE = (1.0, 2.0)  # their values; the other channels are standard normal
CONTENT = 0.5  # standard deviation of the scores' part that depends on the query
ROPE_THETA = 1e6
SLOW_FROM = 0.75  # rotary pairs from this share of the frequencies on hardly turn
ATTENTION_GAIN = 0.5  # size of what attention adds where it writes, before averaging
MLP_GAIN = 0.3
ATTENTION_CHANNELS = 0.25  # share of the residual channels that an attention writes to
MLP_CHANNELS = 0.25
EXPERTS = 4
EXPERTS_PER_TOKEN = 2
ROUTER = 8.0  # standard deviation of router logits
BIAS = 0.1  # standard deviation of Qwen2's biases
NORM_SPREAD = 0.05  # of norm weights around their mean
FINAL_NORM = 0.15  # keeps logits of a tied head within a few units


def make_checkpoint(
    path: str | Path,
    family: str,
    *,
    layers: int = 8,
    hidden: int = 256,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    intermediate: int = 512,
    tied: bool = True,
    vocab: int = 1024,
    seed: int = 0,
    sharpness: float = 3.5,
    max_positions: int = 32768,
    window: int | None = None,
    full: Sequence[int] = (),
) -> Path:
    """Write config.json, model.safetensors (bf16) and a word-level tokenizer to `path`.

    A higher `sharpness` concentrates attention on fewer tokens, so that a
    top_p keeps fewer blocks, and lets bf16 rounding weigh more. With a `window`
    all layers but those of `full` attend to so many tokens.
    """
    if family not in FAMILIES:
        raise ValueError(f"family {family!r} is not one of {FAMILIES}")
    if family == "phi3" and head_dim * heads != hidden:
        raise ValueError("phi3 has no head_dim of its own: it must be hidden / heads")
    shape = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "tie_word_embeddings": tied,
        "vocab_size": vocab,
        "max_position_embeddings": max_positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "sliding_window": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family == "qwen3_moe":
        shape |= {"num_experts": EXPERTS, "moe_intermediate_size": intermediate, "norm_topk_prob": True}
    if family == "mixtral":
        shape["num_local_experts"] = EXPERTS
    if family in ("qwen3_moe", "mixtral"):
        shape["num_experts_per_tok"] = EXPERTS_PER_TOKEN
    if family == "phi3":
        shape["original_max_position_embeddings"] = max_positions
    else:
        shape["head_dim"] = head_dim
    if window is not None:
        kinds = ["full_attention" if layer in full else "sliding_attention" for layer in range(layers)]
        shape |= {"sliding_window": window, "layer_types": kinds}
    config = AutoConfig.for_model(family, **shape)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = random_weights(
        {name: tensor.shape for name, tensor in model.named_parameters()},
        config,
        head_dim=head_dim,
        generator=torch.Generator().manual_seed(seed),
        sharpness=sharpness,
    )
    model.load_state_dict(weights, strict=not tied)
    path = Path(path)
    model.to(torch.bfloat16).save_pretrained(path)
    for folder in (path, path / "tokenizer"):
        write_tokenizer(folder, vocab)
    return path


def random_weights(
    shapes: dict[str, torch.Size],
    config: PretrainedConfig,
    *,
    head_dim: int,
    generator: torch.Generator,
    sharpness: float,
) -> dict[str, Tensor]:
    """fp32 tensors for the parameter names and shapes of one of `FAMILIES`."""
    heads = config.num_attention_heads
    hidden = config.hidden_size
    low, high = CONSTANT_RANGE
    constants = low + (high - low) * torch.rand(CONSTANTS, generator=generator)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    def make(name: str, shape: torch.Size) -> Tensor:
        module, kind = name.split(".")[-2:]
        if kind == "bias":
            return normal(*shape, std=BIAS)
        if module == "norm":
            signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
            weight = signs * FINAL_NORM * (1 + normal(*shape, std=NORM_SPREAD))
            weight[:CONSTANTS] = 0
            return weight
        if module == "q_norm":
            return query_rms(sharpness, head_dim) * (1 + normal(*shape, std=NORM_SPREAD))
        if module.endswith("norm"):
            return 1 + normal(*shape, std=NORM_SPREAD)
        if module == "embed_tokens":
            embeddings = normal(*shape)
            embeddings[:, :CONSTANTS] = constants
            return embeddings
        if module == "lm_head":
            return normal(*shape)
        if module == "gate":
            return normal(*shape, std=ROUTER / math.sqrt(hidden))
        if kind == "down_proj":  # [experts, hidden, intermediate]: the channels they write to differ
            return torch.stack([make("mlp.down_proj.weight", shape[1:]) for _ in range(shape[0])])
        if module in ("o_proj", "down_proj"):
            attention = module == "o_proj"
            gain = ATTENTION_GAIN if attention else MLP_GAIN
            share = ATTENTION_CHANNELS if attention else MLP_CHANNELS
            weight = normal(*shape, std=gain / math.sqrt(shape[1]))
            silent = torch.randperm(shape[0], generator=generator)[int(share * shape[0]) :]
            weight[silent] = 0
            weight[:CONSTANTS] = 0
            return weight
        weight = normal(*shape, std=1 / math.sqrt(hidden))
        if module in ("q_proj", "qkv_proj"):
            rows = heads * head_dim
            level = query_level(sharpness, head_dim)
            weight[:rows] = query_weight(weight[:rows], head_dim, constants, level, generator)
        return weight

    return {name: make(name, shape) for name, shape in shapes.items()}


def slow_dimensions(head_dim: int) -> Tensor:
    """Head dimensions of the rotary pairs (i, i + head_dim / 2) that turn slowest."""
    half = head_dim // 2
    first = torch.arange(int(half * SLOW_FROM), half)
    return torch.cat([first, first + half])


def query_level(sharpness: float, head_dim: int) -> float:
    """Size of each slow dimension of a query that gives scores a standard
    deviation of `sharpness` over keys of unit variance."""
    return sharpness * math.sqrt(head_dim / len(slow_dimensions(head_dim)))


def query_rms(sharpness: float, head_dim: int) -> float:
    """Root mean square of a query, which Qwen3's norm has to restore."""
    slow_share = len(slow_dimensions(head_dim)) / head_dim
    return math.sqrt(CONTENT**2 + slow_share * query_level(sharpness, head_dim) ** 2)


def query_weight(noise: Tensor, head_dim: int, constants: Tensor, level: float, generator: torch.Generator) -> Tensor:
    """[heads * head_dim, hidden]: `noise` for the content part, and the constant
    channels mapped to `level` times a random sign in each slow dimension of a head."""
    weight = noise * CONTENT
    per_head = weight.view(-1, head_dim, weight.shape[1])
    slow = slow_dimensions(head_dim)
    signs = torch.randint(0, 2, (len(per_head), len(slow), 1), generator=generator) * 2 - 1
    per_head[:, slow, :CONSTANTS] = signs * level * constants / constants.square().sum()
    return weight


def write_tokenizer(path: Path, vocab: int) -> None:
    """tokenizer.json and tokenizer_config.json: words `w0 w1 ...`, split at spaces."""
    words = {f"w{i}": i for i in range(vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path.mkdir(exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1_000_000,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
