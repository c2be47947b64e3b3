"""Two layouts of a rotary head. Rotary embeddings turn pairs of a head's H channels; files differ in which are a pair.

Meta's checkpoints, llama2.c and GGUF's "llama" pair neighbours: (0, 1), (2, 3), ...  Hugging Face pairs the halves:
(0, H/2), (1, H/2 + 1), ...  The frequencies are the same, so a permutation of the rows that make queries and keys leads
from one to the other, and attention, which sums over channels, stays what it was.
"""

from __future__ import annotations

import numpy as np


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Half-split -> interleaved: rows [heads * H, ...] of a query or key projection, or of its bias."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def halve(rows: np.ndarray, heads: int) -> np.ndarray:
    """Interleaved -> half-split, the inverse of `interleave`."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
