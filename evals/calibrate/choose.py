"""Which heads score where, and how much is dropped: candidates by what they save, of what loses few needed places."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from statistics import fmean
from typing import Any

import numpy as np

from evals.bench.shapes import ModelShape
from evals.calibrate.model import BLOCK, HOP_BLOCKS, WINDOWS
from evals.calibrate.ranks import RULE, Sample, rank_shares
from scripts.fork import ForkError

# Strictest first. One step of them is the margin: the next stricter amount must lose nothing either.
AMOUNTS = {
    "keep_ratio": (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
    "top_p": (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99),
}
BEST_HEADS, MAX_HEADS = 9, 4  # of a layer: those tried together, those that score together
MAX_CUTS = 4
WORTH_A_CUT = 0.02  # of the computed share
FEWEST = 8  # prompts that can tell of a loss
MAY_BE_LOST = 0.15  # of a part's needed places: an answer may have been read before its place was dropped
MEAN_RANK = 0.1  # of what the question names; .5 is chance
NEXT_CANDIDATE = 1.05  # of what the one before computes
TINY = 1e-9


@dataclass(frozen=True)
class Cut:
    """One selection layer: `heads` of layer `layer` ask with the last `num_queries` tokens."""

    layer: int
    heads: tuple[int, ...]
    num_queries: int
    by: str = "top_p"
    amount: float = 1.0

    def entry(self) -> dict[str, Any]:
        """Of a profile's `selection_layers`."""
        return {
            "layer": self.layer,
            "heads": list(self.heads),
            "num_queries": self.num_queries,
            self.by: self.amount,
        }


@dataclass(frozen=True)
class Plan:
    cuts: tuple[Cut, ...]
    hops: int

    def settings(self) -> dict[str, Any]:
        """What `--uniprefill-config` takes."""
        found = {"selection_layers": [c.entry() for c in self.cuts], "top_p_over": "middle", "hops": self.hops}
        return found | ({"hop_blocks": HOP_BLOCKS} if self.hops == 2 else {})

    def with_cut(self, cut: Cut) -> Plan:
        return replace(self, cuts=(*self.cuts, cut))


def keep(mass: np.ndarray, num_tokens: int, by: str, amount: float) -> np.ndarray:
    """[blocks] bool: the blocks of `num_tokens` alive tokens that stay; top_p is over the middle. mass [blocks]."""
    start = min(-(-RULE.sink_tokens // BLOCK), len(mass))
    end = max(start, (num_tokens - RULE.recent_tokens) // BLOCK)
    kept = np.ones(len(mass), dtype=bool)
    kept[start:end] = False
    middle = mass[start:end].astype(np.float64)
    order = np.argsort(-middle, kind="stable")
    if by == "keep_ratio":
        budget = max(0, math.ceil(amount * len(mass)) - (len(mass) - len(middle)))
    elif amount >= 1 or not middle.sum():
        budget = len(middle)
    else:
        sums = np.cumsum(middle[order] / middle.sum())
        budget = int((np.concatenate([[0.0], sums[:-1]]) < amount).sum())
    kept[start + order[:budget]] = True
    return kept


def second_hop(mass: np.ndarray, hops: np.ndarray, num_tokens: int) -> np.ndarray:
    """[blocks]: what the tokens of the heaviest middle blocks look at. mass [blocks], hops [blocks, blocks]."""
    middle = np.where(~keep(mass, num_tokens, "keep_ratio", 0.0), mass, 0.0)
    best = np.argsort(-middle, kind="stable")[:HOP_BLOCKS]
    return hops[best[middle[best] > 0]].sum(0)


class Trial:
    """What plans would do to prompts, by the masses of their dense prefill."""

    def __init__(self, samples: Sequence[Sample], layers: Sequence[int], shape: ModelShape) -> None:
        self.samples, self.shape = samples, shape
        self.row = {layer: i for i, layer in enumerate(layers)}
        self.telling = [sample for sample in samples if sample.tells]

    def apply(self, plan: Plan, sample: Sample) -> tuple[list[int], np.ndarray]:
        """(tokens alive after each cut, indices of the blocks alive at the end)."""
        alive = np.arange(len(sample.middle))
        tokens: list[int] = []
        num_tokens = sample.num_tokens
        for cut in plan.cuts:
            row, heads = self.row[cut.layer], list(cut.heads)
            mass = sample.mass[row, heads, WINDOWS.index(cut.num_queries)].sum(0)[alive]
            kept = keep(mass, num_tokens, cut.by, cut.amount)
            if plan.hops == 2 and sample.hops is not None:
                hop = second_hop(mass, sample.hops[row, heads].sum(0)[np.ix_(alive, alive)], num_tokens)
                kept |= keep(hop, num_tokens, cut.by, cut.amount) if hop.any() else False
            alive = alive[kept]
            num_tokens -= int((~kept).sum()) * BLOCK  # the last block, the only one that may be partial, stays
            tokens.append(num_tokens)
        return tokens, alive

    def computed(self, plan: Plan) -> float:
        """Mean share of the dense prefill's FLOPs.

        Of prompts without a recorded second hop it is that of the first, and what the second adds to the others.
        """
        one = replace(plan, hops=1)
        shares = [self._share(plan, sample) for sample in self.samples]
        followed = [i for i, sample in enumerate(self.samples) if sample.hops is not None]
        if plan.hops == 1 or not followed:
            return fmean(shares)
        extra = fmean(shares[i] - self._share(one, self.samples[i]) for i in followed)
        return fmean(
            share + (0 if sample.hops is not None else extra)
            for share, sample in zip(shares, self.samples, strict=True)
        )

    def _share(self, plan: Plan, sample: Sample) -> float:
        tokens, _ = self.apply(plan, sample)
        ends = [cut.layer + 1 for cut in plan.cuts] + [self.shape.layers]
        layers = [b - a for a, b in pairwise([0, *ends])]
        return 1 / self.shape.flop_gain(list(zip(layers, [sample.num_tokens, *tokens], strict=True)))

    def held(self, plan: Plan) -> list[bool]:
        """For each telling prompt whether every block that it needs is alive at the end."""
        return [set(np.flatnonzero(s.needed)) <= set(self.apply(plan, s)[1]) for s in self.telling]

    def rank_facts(self, cut: Cut) -> dict[str, float]:
        """Mean and worst rank of what the question names, by the cut's heads, over all telling prompts."""
        row, window = self.row[cut.layer], WINDOWS.index(cut.num_queries)
        named = [s for s in self.telling if s.asked_for.any()]
        ranks = [float(rank_shares(s.mass[row, list(cut.heads), window].sum(0), s.asked_for, s.middle)) for s in named]
        return {"mean": fmean(ranks), "worst": max(ranks)}

    def recall(self, plan: Plan) -> float:
        return fmean(self.held(plan))

    def scorers(self, hops: int) -> dict[int, Cut]:
        """By layer the heads and the window whose summed mass ranks best what the plan's first score must find.

        Without the layers where even these rank by chance.
        """
        best = {layer: self._scorer(layer, hops) for layer in self.row}
        return {layer: cut for layer, cut in best.items() if self.rank_facts(cut)["mean"] <= MEAN_RANK}

    def _scorer(self, layer: int, hops: int) -> Cut:
        """Of all sets of a few of the best heads, and all windows: what ranks best on average."""
        num_heads = self.samples[0].mass.shape[1]
        found = []
        for window in range(len(WINDOWS)):
            single = self._quality(layer, window, np.eye(num_heads, dtype=np.float32), hops)
            best = sorted(sorted(range(num_heads), key=single.__getitem__)[:BEST_HEADS])
            sets = [heads for count in range(1, MAX_HEADS + 1) for heads in combinations(best, count)]
            members = np.zeros((len(sets), num_heads), dtype=np.float32)
            for row, heads in zip(members, sets, strict=True):
                row[list(heads)] = 1
            found.append(min(zip(self._quality(layer, window, members, hops), sets, [window] * len(sets), strict=True)))
        _, heads, window = min(found)
        return Cut(layer, heads, WINDOWS[window])

    def _quality(self, layer: int, window: int, members: np.ndarray, hops: int) -> list[tuple[float, float]]:
        """For each set of heads the mean rank of what its summed mass must find; then the middle mass on it, negative.

        Less is better. members: [sets, heads] fp32, 1 for those in the set.
        """
        row = self.row[layer]
        ranks, shares = [], []
        for sample in self.telling:
            mass = members @ sample.mass[row, :, window]
            asked_for, middle = sample.needed, sample.middle
            rank = np.zeros(len(members))
            if hops == 2 and sample.hops is not None:
                asked_for, followed = sample.asked_for, sample.needed & ~sample.asked_for
                if followed.any():
                    every = np.tensordot(members, sample.hops[row], 1)
                    hop = np.stack([second_hop(*both, sample.num_tokens) for both in zip(mass, every, strict=True)])
                    rank = np.minimum(*(rank_shares(scores, followed, middle) for scores in (mass, hop)))
            if asked_for.any():
                rank = np.maximum(rank, rank_shares(mass, asked_for, middle))
                shares.append(mass[:, asked_for].sum(1) / np.maximum(mass[:, middle].sum(1), TINY))
            ranks.append(rank)
        means, shares = np.mean(ranks, 0).round(3), np.mean(shares, 0)
        return [(float(mean), -float(share)) for mean, share in zip(means, shares, strict=True)]

    def plans(self) -> Iterator[Plan]:
        """Those that hold; of each with several cuts also those with fewer.

        Raises:
            ForkError: if too few prompts can tell of a loss.

        """
        if len(self.telling) < FEWEST:
            raise ForkError(
                f"The model answers {sum(s.right for s in self.samples)} of {len(self.samples)} prompts, and only "
                f"{len(self.telling)} of them can tell of a loss, where {FEWEST} are needed; raise --prompts, "
                "choose other LENGTHS or a model that answers."
            )
        scorers = {hops: self.scorers(hops) for hops in (1, 2)}
        can_follow = any(sample.hops is not None for sample in self.telling)
        firsts = [
            plan
            for hops in ((1, 2) if can_follow else (1,))
            for plan in self._held_with_another_cut(Plan((), hops), scorers[hops])
        ]
        for first in firsts:
            grown = [first]
            while len(grown) < MAX_CUTS:
                further = list(self._held_with_another_cut(grown[-1], scorers[first.hops]))
                best = min(further, key=self.computed, default=None)
                if best is None or self.computed(best) > (1 - WORTH_A_CUT) * self.computed(grown[-1]):
                    break
                grown.append(best)
            yield from grown

    def _held_with_another_cut(self, plan: Plan, scorers: dict[int, Cut]) -> Iterator[Plan]:
        after = plan.cuts[-1].layer if plan.cuts else -1
        for layer, scorer in scorers.items():
            if layer <= after:
                continue
            for by, amounts in AMOUNTS.items():
                for stricter, amount in pairwise(amounts):
                    if self.recall(plan.with_cut(replace(scorer, by=by, amount=stricter))) >= 1 - MAY_BE_LOST:
                        yield plan.with_cut(replace(scorer, by=by, amount=amount))
                        break


def milder(plan: Plan) -> Iterator[Plan]:
    """The plan with more kept at every cut, a step at a time."""
    for steps in range(1, max(map(len, AMOUNTS.values()))):
        places = [min(AMOUNTS[cut.by].index(cut.amount) + steps, len(AMOUNTS[cut.by]) - 1) for cut in plan.cuts]
        cuts = [replace(cut, amount=AMOUNTS[cut.by][i]) for cut, i in zip(plan.cuts, places, strict=True)]
        yield replace(plan, cuts=tuple(cuts))


def candidates(trial: Trial, check: Trial) -> list[Plan]:
    """Plans that hold on both, made from `trial`, the cheapest first.

    Each is at least 5 % dearer than the one before that is first cut after the same layer. What they cost is the mean
    over the prompts of both.

    Raises:
        ForkError: if too few prompts can tell of a loss.

    """
    plans = [
        plan
        for plan in dict.fromkeys(other for plan in trial.plans() for other in (plan, *milder(plan)))
        if check.recall(plan) >= 1 - MAY_BE_LOST
    ]
    chosen: list[Plan] = []
    dearest: dict[int, float] = {}
    costs = [(plan, fmean(part.computed(plan) for part in (trial, check))) for plan in plans]
    for plan, computed in sorted(costs, key=lambda found: found[1]):
        layer = plan.cuts[0].layer
        if dearest.get(layer, 0.0) * NEXT_CANDIDATE <= computed < 1:
            dearest[layer] = computed
            chosen.append(plan)
    return chosen
