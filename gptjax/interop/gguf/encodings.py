"""Storage formats of a tensor's values in GGUF files: floats, and blocks of integers with scales.

Blocks are structured arrays: `q8_0.dtype` has a field for the scale and one for the integers. Formats that have an
`encode` are written; all are read, into float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import ml_dtypes
import numpy as np

from gptjax.interop.gguf import blocks

STRIP = 4_096
"""Blocks computed at a time: they fit in a cache, and intermediate results take several times their memory."""


@dataclasses.dataclass(frozen=True)
class Encoding:
    """Storage format of a tensor's values."""

    name: str
    type: int
    """ggml's number of the tensor type."""
    block: np.dtype
    """A block, as it lies in the file."""
    values: int
    """Values per block; the length of a row is a multiple of it."""
    decode: Callable[[np.ndarray], np.ndarray] | None = None
    """[B] blocks -> float32 [B, values]. None: floats, which are read as they are."""
    encode: Callable[[np.ndarray], np.ndarray] | None = None
    """float32 [B, values] -> [B] blocks. None: not written."""
    file_type: int | None = None
    """llama.cpp's number of the type of a file that mostly uses this encoding, if such files are written."""

    @property
    def size(self) -> int:
        """Bytes per block."""
        return self.block.itemsize

    @property
    def dtype(self) -> np.dtype:
        """Type of the values that are read."""
        return self.block if self.decode is None else np.dtype(np.float32)

    def read(self, data: np.ndarray) -> np.ndarray:
        """Stored bytes -> values [B * values]; of floats, a view."""
        stored = data.view(self.block)
        if self.decode is None:
            return stored
        out = np.empty((len(stored), self.values), np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # of damaged scales
            for start in range(0, len(stored), STRIP):
                out[start : start + STRIP] = self.decode(stored[start : start + STRIP])
        return out.reshape(-1)

    def write(self, x: np.ndarray) -> np.ndarray:
        """float32 values -> stored blocks, in row-major order."""
        assert self.encode is not None
        rows = x.reshape(-1, self.values)
        out = np.empty(len(rows), self.block)
        for start in range(0, len(rows), STRIP):
            out[start : start + STRIP] = self.encode(rows[start : start + STRIP])
        return out


def _float(name: str, number: int, dtype: type, file_type: int) -> Encoding:
    return Encoding(
        name, number, np.dtype(dtype).newbyteorder("<"), 1, None, lambda x: x[:, 0].astype(dtype), file_type
    )


F32 = _float("f32", 0, np.float32, 0)
ENCODINGS = (
    F32,
    _float("f16", 1, np.float16, 1),
    _float("bf16", 30, ml_dtypes.bfloat16, 32),
    Encoding("q4_0", 2, blocks.Q4_0, 32, blocks.read_q4_0, blocks.write_q4_0, 2),
    Encoding("q4_1", 3, blocks.Q4_1, 32, blocks.read_q4_1),
    Encoding("q5_0", 6, blocks.Q5_0, 32, blocks.read_q5_0),
    Encoding("q5_1", 7, blocks.Q5_1, 32, blocks.read_q5_1),
    Encoding("q8_0", 8, blocks.Q8_0, 32, blocks.read_q8_0, blocks.write_q8_0, 7),
    Encoding("q2_k", 10, blocks.Q2_K, 256, blocks.read_q2_k),
    Encoding("q3_k", 11, blocks.Q3_K, 256, blocks.read_q3_k),
    Encoding("q4_k", 12, blocks.Q4_K, 256, blocks.read_q4_k),
    Encoding("q5_k", 13, blocks.Q5_K, 256, blocks.read_q5_k),
    Encoding("q6_k", 14, blocks.Q6_K, 256, blocks.read_q6_k),
    Encoding("mxfp4", 39, blocks.MXFP4, 32, blocks.read_mxfp4),
)
BY_NUMBER = {encoding.type: encoding for encoding in ENCODINGS}
WRITTEN = {encoding.name: encoding for encoding in ENCODINGS if encoding.encode is not None}
"""Values of `dtype` of a file that is written."""
UNREADABLE = {
    **{9: "q8_1", 15: "q8_k", 16: "iq2_xxs", 17: "iq2_xs", 18: "iq3_xxs", 19: "iq1_s", 20: "iq4_nl", 21: "iq3_s"},
    **{22: "iq2_s", 23: "iq4_xs", 24: "i8", 25: "i16", 26: "i32", 27: "i64", 28: "f64", 29: "iq1_m", 34: "tq1_0"},
    **{35: "tq2_0", 40: "nvfp4", 41: "q1_0"},
}
"""ggml's names of types that are not read, for messages."""
