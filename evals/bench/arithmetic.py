"""Numbers of repetitions: spreads, paired ratios, and whether two groups differ."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Median, range and the values themselves, in the order of the repetitions."""
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": values}


def compare(slow: Sequence[float], fast: Sequence[float]) -> dict[str, Any]:
    """How many times faster: the ratio of medians, and the spread of the paired ratios."""
    return {
        "ratio": statistics.median(slow) / statistics.median(fast),
        "paired": spread(a / b for a, b in zip(slow, fast, strict=True)),
    }


def within_spread(ours: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """How many times faster ours are, and whether the groups differ by no more than the runs of either do."""
    middle, middle_of_ours = statistics.median(reference), statistics.median(ours)
    widest = max(max(group) - min(group) for group in (ours, reference))
    return {
        "ratio": middle / middle_of_ours,
        "spread": widest / middle,
        "within": abs(middle_of_ours - middle) <= widest,
    }


def size_label(tokens: int) -> str:
    """16384 -> 16K, 655 -> 655."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def rotated(jobs: Sequence[Any], by: int) -> list[Any]:
    """The jobs in turn, beginning with another each time."""
    return [jobs[(i + by) % len(jobs)] for i in range(len(jobs))]
