"""The two channel layouts of a rotary head. Rotary embeddings rotate pairs of a head's H channels; files differ in the
pairing.

Meta's checkpoints, llama2.c and GGUF's "llama" pair neighbours: (0, 1), (2, 3), ...  Hugging Face pairs the halves:
(0, H/2), (1, H/2 + 1), ...  The frequencies are the same, so permuting the rows of the query and key projections
converts between them; attention sums over channels and does not change.
"""

from __future__ import annotations

import numpy as np


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Half-split -> interleaved: rows [heads * H, ...] of a query or key projection, or of its bias."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def halve(rows: np.ndarray, heads: int) -> np.ndarray:
    """Interleaved -> half-split, the inverse of `interleave`."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
