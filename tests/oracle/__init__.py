"""The independent oracle: the algorithm in fp32 on Hugging Face models.

With `tests/` on sys.path: `from oracle import Oracle, make_checkpoint`.
"""

from .checkpoints import FAMILIES, make_checkpoint
from .oracle import Cut, Oracle, OracleResult
from .selection import Selection, SelectionRule, select_blocks

__all__ = [
    "FAMILIES",
    "Cut",
    "Oracle",
    "OracleResult",
    "Selection",
    "SelectionRule",
    "make_checkpoint",
    "select_blocks",
]
