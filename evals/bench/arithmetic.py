"""The benchmark's arithmetic: medians, paired ratios, the FLOP model, expected gains."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Segments = Sequence[tuple[int, int]]
"""(layers in the segment, prompt tokens alive in it), in order."""


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Median, range and the values themselves, in the order of the repetitions."""
    values = list(values)
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "values": values,
    }


def compare(slow: Sequence[float], fast: Sequence[float]) -> dict[str, Any]:
    """How many times faster: the ratio of medians, and the spread of the paired ratios."""
    return {
        "ratio": statistics.median(slow) / statistics.median(fast),
        "paired": spread(a / b for a, b in zip(slow, fast, strict=True)),
    }


def within_spread(ours: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """Whether two groups of runs differ by more than the runs of either differ among themselves."""
    middle = statistics.median(reference)
    widest = max(max(group) - min(group) for group in (ours, reference))
    ratio = statistics.median(ours) / middle
    return {
        "ratio": ratio,
        "spread": widest / middle,
        "within": abs(ratio - 1) <= widest / middle,
    }


@dataclass(frozen=True)
class LinearAttention:
    """A gated delta-rule layer: heads of keys and values and their widths."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class ModelShape:
    """A decoder with grouped-query attention and gated MLPs.

    Attributes:
        ffn: intermediate width that one token uses: of experts, those routed to it and the shared one.
        kinds: "full", "sliding" or "linear", a layer each.
        window: tokens that a sliding layer's query sees.
        gated: whether full attention has an output gate, as wide as its queries.

    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    kinds: tuple[str, ...]
    window: int = 0
    gated: bool = False
    linear: LinearAttention | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """From a Hugging Face config.json."""
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        layers = config["num_hidden_layers"]
        types = config.get("layer_types") or ["full_attention"] * layers
        ffn = config["intermediate_size"]
        if config.get("num_experts"):
            ffn = config["num_experts_per_tok"] * config["moe_intermediate_size"]
            ffn += config.get("shared_expert_intermediate_size", 0)
        linear = None
        if "linear_attention" in types:
            linear = LinearAttention(
                config["linear_num_key_heads"],
                config["linear_num_value_heads"],
                config["linear_key_head_dim"],
                config["linear_value_head_dim"],
            )
        return cls(
            layers=layers,
            hidden=hidden,
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            ffn=ffn,
            kinds=tuple(kind.removesuffix("_attention") for kind in types),
            window=(config.get("sliding_window") or 0) if "sliding_attention" in types else 0,
            gated=linear is not None,
            linear=linear,
        )

    @classmethod
    def of(cls, model: Path) -> ModelShape:
        """Of a model folder."""
        return cls.from_config(json.loads((model / "config.json").read_text()))

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers that keep them, 16 bit each."""
        return sum(kind != "linear" for kind in self.kinds) * 2 * self.kv_heads * self.head_dim * 2


def linear_flops(shape: ModelShape, kind: str = "full") -> int:
    """Matrix products of one token in one layer of a kind; a linear layer's state counts in."""
    mlp = 3 * shape.hidden * shape.ffn
    if kind == "linear":
        assert shape.linear is not None
        keys = shape.linear.key_heads * shape.linear.key_dim
        values = shape.linear.value_heads * shape.linear.value_dim
        # Projections to q, k, v and the gate, and back; the state is read, corrected and read again.
        projections = shape.hidden * (2 * keys + 2 * values) + values * shape.hidden
        return 2 * (projections + 3 * values * shape.linear.key_dim + mlp)
    attention = shape.heads * shape.head_dim
    queries = attention * (2 if shape.gated else 1)
    qkv = shape.hidden * (queries + 2 * shape.kv_heads * shape.head_dim)
    return 2 * (qkv + attention * shape.hidden + mlp)


def attention_flops(shape: ModelShape, tokens: int, kind: str = "full") -> int:
    """Causal attention of a whole prompt in one layer: q·k and p·v, of the pairs that see each other."""
    if kind == "linear":
        return 0
    pairs = tokens * tokens // 2
    if kind == "sliding" and tokens > shape.window:
        pairs = shape.window * shape.window // 2 + (tokens - shape.window) * shape.window
    return 2 * 2 * pairs * shape.heads * shape.head_dim


def prefill_flops(shape: ModelShape, segments: Segments) -> int:
    total = first = 0
    for layers, tokens in segments:
        for kind in shape.kinds[first : first + layers]:
            total += tokens * linear_flops(shape, kind) + attention_flops(shape, tokens, kind)
        first += layers
    return total


@dataclass(frozen=True)
class Floor:
    """The least that scoring a prompt's blocks in one layer takes, and what our kernels add.

    Attributes:
        bytes: keys and queries read once, masses written once.
        flops: q·k of every query and key (the causal corner of the last queries is not taken off).
        workspace_bytes: what the kernels write and read again between them.

    """

    bytes: int
    flops: int
    workspace_bytes: int

    def seconds(self, bandwidth: float, rate: float) -> dict[str, float]:
        """By unit, at bytes and FLOPs a second; `floor` is the larger."""
        memory, compute = self.bytes / bandwidth, self.flops / rate
        return {"memory": memory, "compute": compute, "floor": max(memory, compute)}


def selection_floor(shape: ModelShape, tokens: int, num_queries: int, block_size: int, element_size: int = 2) -> Floor:
    blocks = -(-tokens // block_size)
    keys = tokens * shape.kv_heads * shape.head_dim * element_size
    queries = num_queries * shape.heads * shape.head_dim * element_size
    scores = blocks * num_queries * shape.heads * 4
    return Floor(
        bytes=keys + queries + blocks * 4,
        flops=2 * num_queries * shape.heads * tokens * shape.head_dim,
        workspace_bytes=3 * scores,  # written once, read by the denominators and by the masses
    )


def flop_gain(shape: ModelShape, segments: Segments) -> float:
    """Dense FLOPs over pruned FLOPs; selection is free here, and so is everything else."""
    prompt = segments[0][1]
    return prefill_flops(shape, [(shape.layers, prompt)]) / prefill_flops(shape, segments)


def predicted_seconds(dense_seconds: Mapping[int, float], segments: Segments) -> float:
    """A pruned prefill made of dense ones: each segment at the speed of its kept length."""
    total = sum(layers for layers, _ in segments)
    return sum(layers / total * dense_seconds[tokens] for layers, tokens in segments)


def efficiency(dense: Mapping[int, Sequence[float]], pruned: Sequence[float], segments: Segments) -> dict[str, Any]:
    """The measured gain against the gain that the layers would give at the kept lengths.

    Args:
        dense: seconds of dense prefills, per length, one a repetition; has every length
            alive in a segment.
        pruned: seconds of the pruned prefills of the same repetitions.
        segments: of the pruned prefills.

    """
    middle = {tokens: statistics.median(seconds) for tokens, seconds in dense.items()}
    predicted = [
        predicted_seconds({tokens: seconds[i] for tokens, seconds in dense.items()}, segments)
        for i in range(len(pruned))
    ]
    prompt = segments[0][1]
    gain = compare(dense[prompt], pruned)
    expected = middle[prompt] / predicted_seconds(middle, segments)
    return {
        "gain": gain,
        "expected_gain": expected,
        "efficiency": gain["ratio"] / expected,
        "paired_efficiency": spread(p / t for p, t in zip(predicted, pruned, strict=True)),
    }


def segments_of(report: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The segments of a request's report."""
    return [(segment["layers"][1] - segment["layers"][0] + 1, segment["tokens_in"]) for segment in report["segments"]]


def size_label(tokens: int) -> str:
    """16384 -> 16K, 655 -> 655."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
