"""The table's arithmetic: paired differences with their 95 % intervals, kept shares, ratios of times."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.stats import bootstrap, norm

from evals.bench.arithmetic import compare

Z = float(norm.ppf(0.975))  # 95 %, two-sided
RESAMPLES = 10_000
RESAMPLES_AT_ONCE = 100  # bounds the memory
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
            return math.copysign(2 * Z, distance) if distance else 0.0
        return max(-2 * Z, min(2 * Z, distance / math.sqrt(variance)))  # finite, for the root finder

    def solve(level: float, low: float, high: float) -> float:
        """Where the standardized distance, which falls, passes the level; the end where it stays on one side of it."""
        if standardized(low) <= level:
            return low
        if standardized(high) >= level:
            return high
        return float(brentq(lambda delta: standardized(delta) - level, low, high))

    observed = (gained - lost) / n
    return solve(Z, -1.0, observed), solve(-Z, observed, 1.0)


def bootstrap_interval(differences: Sequence[float]) -> tuple[float, float]:
    """95 % percentile interval of the mean of paired differences, samples resampled, from a fixed seed."""
    values = np.asarray(differences, dtype=float)
    if len(values) == 1:  # scipy wants two
        return float(values[0]), float(values[0])
    found = bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, batch=RESAMPLES_AT_ONCE, method="percentile", rng=0
    ).confidence_interval
    return float(found.low), float(found.high)


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


def computed_share(report: Mapping[str, Any]) -> float:
    """Share of the prompt's tokens that the average layer computed."""
    if report["outcome"] != "pruned":
        return 1.0
    layers = [last - first + 1 for first, last in (segment["layers"] for segment in report["segments"])]
    tokens = [segment["tokens_in"] for segment in report["segments"]]
    return sum(n * t for n, t in zip(layers, tokens, strict=True)) / (sum(layers) * report["prompt_tokens"])


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
        fmean(map(computed_share, reports)) if reports else None,
        Counter(report["reason"] for report in reports if report["outcome"] != "pruned"),
        times,
    )


def _row(
    place: Mapping[str, Any],
    dense: Sequence[float],
    pruned: Sequence[float],
    kept: list[float],
    computed: float | None,
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
        "computed": computed,
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
        {"task": "all", **{key: rows[0][key] for key in ("length", "setting", "method")}},
        [score for row in rows for score in row["scores"]["dense"]],
        [score for row in rows for score in row["scores"]["pruned"]],
        [sum(cut) / prompts for cut in cuts],
        fmean(row["computed"] for row in rows for _ in range(row["samples"])),
        sum((Counter(row["not_pruned"]) for row in rows), Counter()),
        times,
    )
