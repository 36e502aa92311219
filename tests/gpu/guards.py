"""Buffers between bands of known bytes, so that a write beside them shows on any machine."""

from __future__ import annotations

import math
from typing import Any

import torch

BAND = 4096  # elements on either side
POISON = 0x5A


class Guards:
    """Hands out guarded buffers and tells which were written beside.

    Bands hold one byte everywhere; floating-point buffers themselves start as NaN and integer ones
    as that byte, so that an element nobody wrote shows too.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._whole: list[torch.Tensor] = []

    def empty(self, *size: int, dtype: torch.dtype) -> torch.Tensor:
        """A buffer of that size in the middle of its bands."""
        count = math.prod(size)
        whole = torch.empty(count + 2 * BAND, dtype=dtype, device=self.device)
        whole.view(torch.uint8).fill_(POISON)
        middle = whole[BAND : BAND + count]
        if dtype.is_floating_point:
            middle.fill_(math.nan)
        self._whole.append(whole)
        return middle.view(size)

    def holding(self, values: torch.Tensor) -> torch.Tensor:
        """A guarded copy."""
        return self.empty(*values.shape, dtype=values.dtype).copy_(values)

    def broken(self) -> int:
        """How many buffers were written beside."""
        bands = [band for whole in self._whole for band in (whole[:BAND], whole[-BAND:])]
        intact = [bool((band.view(torch.uint8) == POISON).all()) for band in bands]
        return sum(not (a and b) for a, b in zip(intact[::2], intact[1::2], strict=True))


class GuardedAllocations(torch.Tensor):
    """A tensor whose `new_empty` comes from `guards`: what the kernels' callers allocate by it."""

    guards: Guards

    @classmethod
    def of(cls, values: torch.Tensor, guards: Guards) -> GuardedAllocations:
        made = values.as_subclass(cls)
        made.guards = guards
        return made

    def new_empty(self, *size: Any, dtype: torch.dtype | None = None, device: Any = None) -> torch.Tensor:
        if device is not None:  # Triton's interpreter, for itself
            return self.as_subclass(torch.Tensor).new_empty(*size, dtype=dtype, device=device)
        shape = size[0] if isinstance(size[0], (tuple, list)) else size
        return self.guards.empty(*shape, dtype=dtype or self.dtype)
