"""The table's arithmetic: paired differences with their 95 % intervals, kept shares, ratios of times."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from evals.bench.arithmetic import compare

Z = 1.959963984540054  # 95 %, two-sided
RESAMPLES = 10_000
RESAMPLES_AT_ONCE = 100
SCORE = "score (Tango)"
BOOTSTRAP = "paired bootstrap"


def score_interval(gained: int, lost: int, n: int) -> tuple[float, float]:
    """95 % interval of the difference of two paired shares: Tango's score interval (Statistics in Medicine 17, 1998).

    gained, lost: pairs where only the second, only the first is right; n: all pairs. Unlike the bootstrap it does not
    collapse to zero width where no pair differs: then it is ±z²/(n + z²).
    """

    def standardized(delta: float) -> float:
        a = 2 * n
        b = -gained - lost + (2 * n - gained + lost) * delta
        c = -lost * delta * (1 - delta)
        p_lost = max(0.0, (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a))
        variance = n * (2 * p_lost + delta * (1 - delta))
        distance = gained - lost - n * delta
        if variance <= 0:
            return math.copysign(math.inf, distance) if distance else 0.0
        return distance / math.sqrt(variance)

    observed = (gained - lost) / n
    low = _falls_to(standardized, Z, -1.0, observed)
    high = _falls_to(standardized, -Z, observed, 1.0)
    return low, high


def _falls_to(function: Callable[[float], float], value: float, low: float, high: float) -> float:
    """Where the decreasing function reaches the value, between low and high."""
    for _ in range(60):
        middle = (low + high) / 2
        if function(middle) > value:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def bootstrap_interval(differences: Sequence[float]) -> tuple[float, float]:
    """95 % percentile interval of the mean of paired differences, samples resampled, from a fixed seed."""
    values = np.asarray(differences, dtype=float)
    rng = np.random.default_rng(0)
    shape = (RESAMPLES_AT_ONCE, len(values))
    rounds = RESAMPLES // RESAMPLES_AT_ONCE
    means = np.concatenate([values[rng.integers(len(values), size=shape)].mean(axis=1) for _ in range(rounds)])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def paired_difference(dense: Sequence[float], pruned: Sequence[float]) -> dict[str, Any]:
    """Pruned minus dense, samples in the same order, scores in [0, 1].

    The interval is Tango's where every score is 0 or 1, or where no sample differs; else the paired bootstrap's.
    """
    differences = [b - a for a, b in zip(dense, pruned, strict=True)]
    worse, better = sum(d < 0 for d in differences), sum(d > 0 for d in differences)
    binary = {*dense, *pruned} <= {0.0, 1.0}
    if binary or not worse + better:
        method, interval = SCORE, score_interval(better, worse, len(differences))
    else:
        method, interval = BOOTSTRAP, bootstrap_interval(differences)
    return {
        "difference": fmean(differences),
        "interval": list(interval),
        "interval_method": method,
        "better_pruned": better,
        "worse_pruned": worse,
    }


def kept_shares(report: Mapping[str, Any]) -> list[float]:
    """Share of the prompt alive after each cut."""
    return [segment["tokens_in"] / report["prompt_tokens"] for segment in report["segments"][1:]]


def mean_kept(reports: Sequence[Mapping[str, Any]]) -> list[float]:
    """Mean share of the prompt alive after each cut, over the prompts that were pruned."""
    shares = [kept_shares(report) for report in reports if report["outcome"] == "pruned"]
    return [fmean(cut) for cut in zip(*shares, strict=True)]


def make_row(
    place: Mapping[str, Any],
    dense: Sequence[float],
    pruned: Sequence[float],
    reports: Sequence[Mapping[str, Any]],
    times: Sequence[tuple[float, float]],
) -> dict[str, Any]:
    """One line of the table.

    Args:
        place: task, length and setting of the line.
        dense: scores, one a sample.
        pruned: scores of the same samples in the same order.
        reports: what UniPrefill reported for the pruned requests.
        times: (dense, pruned) seconds to the first token, measured in turn.

    """
    return _row(
        place,
        dense,
        pruned,
        mean_kept(reports),
        Counter(report["reason"] for report in reports if report["outcome"] != "pruned"),
        times,
    )


def _row(
    place: Mapping[str, Any],
    dense: Sequence[float],
    pruned: Sequence[float],
    kept: list[float],
    not_pruned: Mapping[str, int],
    times: Sequence[tuple[float, float]],
) -> dict[str, Any]:
    dense_seconds, pruned_seconds = [pair[0] for pair in times], [pair[1] for pair in times]
    return {
        **place,
        "samples": len(dense),
        "dense": fmean(dense),
        "pruned": fmean(pruned),
        **paired_difference(dense, pruned),
        "kept": kept,
        "not_pruned": dict(not_pruned),
        "ttft": compare(dense_seconds, pruned_seconds) if times else None,
        "ttft_seconds": {"dense": dense_seconds, "pruned": pruned_seconds},
        "scores": {"dense": list(dense), "pruned": list(pruned)},
    }


def pooled(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The line of several tasks together, all of one length and setting: every sample counts the same."""
    pruned = [(row["samples"] - sum(row["not_pruned"].values()), row["kept"]) for row in rows if row["kept"]]
    prompts = sum(count for count, _ in pruned)
    cuts = zip(*([count * share for share in kept] for count, kept in pruned), strict=True)
    times = [
        pair for row in rows for pair in zip(row["ttft_seconds"]["dense"], row["ttft_seconds"]["pruned"], strict=True)
    ]
    return _row(
        {"task": "all", "length": rows[0]["length"], "setting": rows[0]["setting"]},
        [score for row in rows for score in row["scores"]["dense"]],
        [score for row in rows for score in row["scores"]["pruned"]],
        [sum(cut) / prompts for cut in cuts],
        sum((Counter(row["not_pruned"]) for row in rows), Counter()),
        times,
    )
