"""The needle model for training: Llama's arithmetic in a form that hands out its queries and keys.

`export.py` writes the same weights under Llama's names; there the computation is checked against transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evals.needle import prompts as P

TYPE_STD = 0.35  # of the components that words of a kind share, at the start


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int = 1024
    hidden_size: int = 256
    num_layers: int = 8
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 256
    rope_theta: float = 1e8
    rms_norm_eps: float = 1e-6
    sliding_window: int = 128
    sliding_layers: tuple[int, ...] = ()

    @property
    def group_size(self) -> int:
        return self.num_heads // self.num_kv_heads


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.config = config
        self.sliding = index in config.sliding_layers
        hidden, head_dim = config.hidden_size, config.head_dim
        self.attention_norm = nn.Parameter(torch.ones(hidden))
        self.mlp_norm = nn.Parameter(torch.ones(hidden))
        self.q = nn.Linear(hidden, config.num_heads * head_dim, bias=False)
        self.k = nn.Linear(hidden, config.num_kv_heads * head_dim, bias=False)
        self.v = nn.Linear(hidden, config.num_kv_heads * head_dim, bias=False)
        self.o = nn.Linear(config.num_heads * head_dim, hidden, bias=False)
        self.gate = nn.Linear(hidden, config.intermediate_size, bias=False)
        self.up = nn.Linear(hidden, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, hidden, bias=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        length = q.shape[2]
        k = k.repeat_interleave(self.config.group_size, 1)
        v = v.repeat_interleave(self.config.group_size, 1)
        if length > 256:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool).tril()
        scores = torch.matmul(q * self.config.head_dim**-0.5, k.transpose(-1, -2)).masked_fill(~mask, -1e9)
        return torch.matmul(scores.softmax(-1, dtype=torch.float32).to(v.dtype), v)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        batch, length, _ = x.shape
        h = rms_norm(x, self.attention_norm, config.rms_norm_eps)
        q = self.q(h).view(batch, length, config.num_heads, -1).transpose(1, 2)
        k = self.k(h).view(batch, length, config.num_kv_heads, -1).transpose(1, 2)
        v = self.v(h).view(batch, length, config.num_kv_heads, -1).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = self.attend(q, k, v, mask if self.sliding else None)
        x = x + self.o(out.transpose(1, 2).reshape(batch, length, -1))
        h = rms_norm(x, self.mlp_norm, config.rms_norm_eps)
        return x + self.down(F.silu(self.gate(h)) * self.up(h)), q, k


class NeedleModel(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.final_norm = nn.Parameter(torch.full((config.hidden_size,), 0.15))
        exponent = torch.arange(0, config.head_dim, 2).double() / config.head_dim
        self.register_buffer("inverse_frequency", config.rope_theta**-exponent, persistent=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Words of a kind (function, key, value, filler) share a component, and all words one; queries start like
        their keys, outputs like the transpose of values, the MLP silent. Without this start the model does not find
        retrieval within the budget."""
        config, dim = self.config, self.config.head_dim
        nn.init.normal_(self.embedding.weight, std=0.5)
        for words in (P.FUNCTION_WORDS, P.KEYS, P.VALUES, P.FILLER):
            rows = [P.TOKEN_ID[word] for word in words]
            self.embedding.weight[rows] += torch.randn(config.hidden_size) * TYPE_STD
        self.embedding.weight += torch.randn(config.hidden_size) * TYPE_STD
        for layer in self.layers:
            for linear in (layer.q, layer.k, layer.gate, layer.up):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(layer.down.weight)
            for kv in range(config.num_kv_heads):
                value = torch.linalg.qr(torch.randn(config.hidden_size, dim))[0].t()
                layer.v.weight[kv * dim : (kv + 1) * dim] = value
                for head in range(kv * config.group_size, (kv + 1) * config.group_size):
                    rows = slice(head * dim, (head + 1) * dim)
                    layer.o.weight[:, rows] = 0.1 * value.t()
                    key = layer.k.weight[kv * dim : (kv + 1) * dim]
                    layer.q.weight[rows] = 0.3 * key + math.sqrt(1 - 0.3**2) * layer.q.weight[rows]

    def forward(self, ids: Tensor, positions: Tensor, select: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Logits of the tokens where `select` is true, and each layer's rotated (q, k)."""
        angle = positions.double()[..., None] * self.inverse_frequency
        x = self.embedding(ids)
        if torch.is_autocast_enabled("cpu"):
            x = x.bfloat16()
        cos, sin = angle.cos().to(x.dtype)[:, None], angle.sin().to(x.dtype)[:, None]
        mask = None
        if self.config.sliding_layers:
            distance = torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])[None]
            mask = (distance >= 0) & (distance < self.config.sliding_window)
        queries_keys = []
        for layer in self.layers:
            x, q, k = layer(x, cos, sin, mask)
            queries_keys.append((q, k))
        x = rms_norm(x, self.final_norm, self.config.rms_norm_eps)
        return F.linear(x[select], self.embedding.weight), queries_keys
