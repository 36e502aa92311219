"""Which blocks of a prompt survive a selection layer: pure functions on masses.

Written from the text of the algorithm. "Alive" counts prompt tokens only:
output tokens never enter a mass, a block or a forced region.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class SelectionRule:
    """How much a selection layer keeps. Exactly one of `top_p` and `keep_ratio` is set."""

    top_p: float | None = None
    keep_ratio: float | None = None
    top_p_over: Literal["all", "middle"] = "all"
    block_size: int = 64
    num_queries: int = 128
    sink_tokens: int = 128
    recent_tokens: int = 128
    heads: tuple[int, ...] | None = None
    hops: Literal[1, 2] = 1
    hop_blocks: int = 4

    def __post_init__(self) -> None:
        if (self.top_p is None) == (self.keep_ratio is None):
            raise ValueError("set exactly one of top_p and keep_ratio")
        if self.top_p_over not in ("all", "middle"):
            raise ValueError(f"top_p_over must be 'all' or 'middle', not {self.top_p_over!r}")
        if not 1 <= self.num_queries <= self.recent_tokens:
            raise ValueError("num_queries must be at least 1 and at most recent_tokens")
        if self.block_size < 1 or self.sink_tokens < 0:
            raise ValueError("block_size must be at least 1 and sink_tokens at least 0")


@dataclass(frozen=True)
class Selection:
    """The choice made at one cut, and how near to a tie it was.

    mass:   [blocks] float64, normalised over all blocks.
    forced: [blocks] bool, kept whatever their mass.
    ranked: [blocks] bool, those that compete for the budget: all of them for
            top_p over "all", the ones that are not forced otherwise.
    kept:   [blocks] bool, the result.
    threshold_margin: distance from top_p to the nearest cumulated mass at a
            block boundary, in the normalisation of the ranking; inf where no
            threshold decides (keep_ratio, top_p >= 1, nothing ranked).
    rank_margin: mass of the last ranked block inside the budget less that of
            the first one outside, in the same normalisation; inf where every
            ranked block, or none, is inside.
    """

    rule: SelectionRule
    mass: Tensor
    forced: Tensor
    ranked: Tensor
    kept: Tensor
    threshold_margin: float
    rank_margin: float

    def undecided(self, tolerance: float) -> Tensor:
        """[blocks] bool: blocks that could be decided otherwise by masses that
        each differ from ours by a factor between 1 - tolerance and 1 + tolerance.

        Conservative: a block outside this mask is decided the same way under
        any such change; one inside it might be.
        """
        contested = self.ranked & ~self.forced
        low, high = self.mass * (1 - tolerance), self.mass * (1 + tolerance)
        # [block, other]: does `other` come before `block` in some / every such ranking?
        others = self.ranked[None, :] & ~torch.eye(len(self.mass), dtype=torch.bool)
        maybe_before = others & (high[None, :] >= low[:, None])
        surely_before = others & (low[None, :] > high[:, None])
        if self.rule.top_p is None:
            budget = _keep_ratio_budget(self.rule, self.forced)
            surely_kept = maybe_before.sum(1) < budget
            surely_dropped = surely_before.sum(1) >= budget
        elif self.rule.top_p >= 1:
            surely_kept, surely_dropped = contested, torch.zeros_like(contested)
        else:
            total = self.mass[self.ranked].sum()
            most = _largest_share((maybe_before * self.mass).sum(1), total, tolerance)
            least = _largest_share((surely_before * self.mass).sum(1), total, -tolerance)
            surely_kept = most < self.rule.top_p
            surely_dropped = least >= self.rule.top_p
        return contested & ~surely_kept & ~surely_dropped

    def disputed(self, kept: Tensor, tolerance: float) -> list[int]:
        """Blocks where `kept` ([blocks] bool) differs from ours and no tie excuses it."""
        return torch.nonzero((kept != self.kept) & ~self.undecided(tolerance)).flatten().tolist()


@dataclass(frozen=True)
class TwoHops:
    """Two selections at one cut: what either keeps is kept.

    asking: ascending indices of the blocks whose tokens asked in the second hop.
    asking_margin: by how much, relatively, the least of them outweighs the
            heaviest of the others; inf if there are none.
    """

    first: Selection
    second: Selection
    asking: list[int]
    asking_margin: float

    @property
    def rule(self) -> SelectionRule:
        return self.first.rule

    @property
    def mass(self) -> Tensor:
        return self.first.mass

    @property
    def kept(self) -> Tensor:
        return self.first.kept | self.second.kept

    def undecided(self, tolerance: float) -> Tensor:
        """As `Selection.undecided`, given that the same blocks ask."""
        first, second = (hop.undecided(tolerance) for hop in (self.first, self.second))
        surely_kept = (self.first.kept & ~first) | (self.second.kept & ~second)
        return (first | second) & ~surely_kept


def asking_blocks(selection: Selection) -> tuple[list[int], float]:
    """`TwoHops.asking` and its margin, by the masses of the first score."""
    open_blocks = torch.nonzero(~selection.forced).flatten()
    mass, order = torch.sort(selection.mass[open_blocks], descending=True, stable=True)
    count = selection.rule.hop_blocks
    margin = float(1 - mass[count] / mass[count - 1]) if len(mass) > count else math.inf
    return sorted(open_blocks[order[:count]].tolist()), margin


def _largest_share(part: Tensor, total: Tensor, tolerance: float) -> Tensor:
    """`part` / `total` when `part` grows by `tolerance` and the rest shrinks by it."""
    grown = part * (1 + tolerance)
    return grown / (grown + (total - part) * (1 - tolerance))


def block_masses(token_mass: Tensor, block_size: int) -> Tensor:
    """[tokens] -> [blocks] float64 sums; the last block may be partial."""
    blocks = torch.arange(len(token_mass)) // block_size
    sums = torch.zeros(int(blocks[-1]) + 1, dtype=torch.float64)
    return sums.index_add_(0, blocks, token_mass.double())


def forced_blocks(num_tokens: int, rule: SelectionRule) -> Tensor:
    """[blocks] bool: blocks with one of the first sink or last recent alive tokens."""
    token = torch.arange(num_tokens)
    forced = (token < rule.sink_tokens) | (token >= num_tokens - rule.recent_tokens)
    return block_masses(forced, rule.block_size) > 0


def _keep_ratio_budget(rule: SelectionRule, forced: Tensor) -> int:
    """How many blocks that are not forced a keep_ratio leaves room for."""
    assert rule.keep_ratio is not None
    num_forced = int(forced.sum())
    return max(num_forced, math.ceil(rule.keep_ratio * len(forced))) - num_forced


def select_blocks(mass: Tensor, num_tokens: int, rule: SelectionRule) -> Selection:
    """Decide on blocks by their masses ([blocks], any scale) over `num_tokens` alive tokens."""
    mass = mass.double() / mass.double().sum()
    forced = forced_blocks(num_tokens, rule)
    over_all = rule.top_p is not None and rule.top_p_over == "all"
    ranked = torch.ones_like(forced) if over_all else ~forced

    candidates = torch.nonzero(ranked).flatten()
    # A stable sort leaves equal masses in the order of their indices.
    share, order = torch.sort(mass[candidates], descending=True, stable=True)
    share = share / share.sum()
    threshold_margin = math.inf
    if rule.top_p is None:
        inside = torch.arange(len(share)) < _keep_ratio_budget(rule, forced)
    elif rule.top_p >= 1:
        inside = torch.ones_like(share, dtype=torch.bool)
    else:
        cumulated = torch.cumsum(share, 0)
        before = torch.cat([share.new_zeros(1), cumulated])[: len(share)]
        inside = before < rule.top_p
        if len(share):
            threshold_margin = float((cumulated - rule.top_p).abs().min())
    budget = int(inside.sum())
    rank_margin = float(share[budget - 1] - share[budget]) if 0 < budget < len(share) else math.inf

    kept = forced.clone()
    kept[candidates[order[inside]]] = True
    return Selection(rule, mass, forced, ranked, kept, threshold_margin, rank_margin)
