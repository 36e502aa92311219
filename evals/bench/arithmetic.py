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
class ModelShape:
    """A decoder of equal layers with grouped-query attention and a gated MLP."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """From a Hugging Face config.json."""
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            hidden=hidden,
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            ffn=config["intermediate_size"],
        )

    @classmethod
    def of(cls, model: Path) -> ModelShape:
        """Of a model folder."""
        return cls.from_config(json.loads((model / "config.json").read_text()))

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers, 16 bit each."""
        return self.layers * 2 * self.kv_heads * self.head_dim * 2


def linear_flops(shape: ModelShape) -> int:
    """Matrix products of one token in one layer."""
    attention = shape.heads * shape.head_dim
    qkv = shape.hidden * (attention + 2 * shape.kv_heads * shape.head_dim)
    return 2 * (qkv + attention * shape.hidden + 3 * shape.hidden * shape.ffn)


def attention_flops(shape: ModelShape, tokens: int) -> int:
    """Causal attention of a whole prompt in one layer: q·k and p·v, half of the square."""
    return 2 * 2 * tokens * tokens // 2 * shape.heads * shape.head_dim


def prefill_flops(shape: ModelShape, segments: Segments) -> int:
    return sum(layers * (tokens * linear_flops(shape) + attention_flops(shape, tokens)) for layers, tokens in segments)


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
