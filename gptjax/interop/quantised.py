"""Dequantisation of published 4-bit and 8-bit weights to bfloat16.

    tensors = dequantised(Tensors(folder), config["quantization_config"])
    np.asarray(tensors["model.layers.0.mlp.up_proj.weight"])     # computed now, not kept

MXFP4 (gpt-oss; the OCP Microscaling Formats specification 1.0): x_blocks uint8 [E, O, G, 16] and x_scales uint8
[E, O, G] are x [E, I, O] with I = 32 G. A byte holds two 4-bit numbers (e2m1), the lower half first; the numbers of a
group are multiplied by 2^(scale - 127). bfloat16 represents all of these numbers exactly.

FP8 in blocks (DeepSeek-V3, arXiv:2412.19437, section 3.3; Qwen 3): x float8 [O, I], where each block, usually 128 by
128, is multiplied by its entry of x_scale_inv [ceil(O / 128), ceil(I / 128)]. The products are rounded, as in
DeepSeek's own program.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from gptjax.interop import packed
from gptjax.types import UserError

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the lower three bits; the fourth and highest bit is the sign."""
STRIP = 128
"""Rows computed at a time: intermediate results take several times their memory."""
SIGN, REST = 0x8000_0000, 0x07F0_0000
"""Bits of a float32 that take the sign and the other bits of an e4m3."""


@dataclasses.dataclass(frozen=True, eq=False)
class Quantised:
    """A quantised tensor, dequantised each time it is converted to an array."""

    shape: tuple[int, ...]
    codes: np.ndarray
    scales: np.ndarray
    dtype = np.dtype(ml_dtypes.bfloat16)


class MXFP4(Quantised):
    """[E, I, O] from codes [E, O, G, 16] and scales [E, O, G]."""

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        experts, inputs, outputs = self.shape
        codes, scales = (x.reshape(experts * outputs, -1, x.shape[-1]) for x in (self.codes, self.scales[..., None]))
        pairs = np.empty(codes.shape, np.uint32)
        for i in range(0, len(pairs), STRIP):
            strip = slice(i, i + STRIP)
            pairs[strip] = _pairs()[scales[strip], codes[strip]]
        return pairs.view(self.dtype).reshape(experts, outputs, inputs).swapaxes(1, 2)


@dataclasses.dataclass(frozen=True, eq=False)
class BlockFP8(Quantised):
    """[O, I] from codes [O, I] and one scale per block."""

    block: tuple[int, ...]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        values, (rows, columns) = np.empty(self.shape, self.dtype), self.block
        for i, scales in enumerate(self.scales.astype(np.float32)):
            strip = slice(i * rows, (i + 1) * rows)
            # Shift an e4m3's bits into a float32, whose exponent bias is higher by 120. `astype` takes five times as
            # long and differs only for NaN, which no weight is.
            bits = self.codes[strip].view(np.int8).astype(np.int32) << 20
            numbers = (bits & np.uint32(SIGN | REST).view(np.int32)).view(np.float32)
            values[strip] = numbers * np.float32(2.0**120) * np.repeat(scales, columns)[: self.shape[1]]
        return values


@dataclasses.dataclass(frozen=True)
class Dequantised(Mapping[str, Any]):
    """All tensors, under the names of the model that is not quantised."""

    names: Mapping[str, str]
    """Name -> name in `whole` of the tensor, or of a quantised tensor's codes."""
    whole: Mapping[str, np.ndarray]
    scales: Mapping[str, np.ndarray]
    """Scales of the quantised tensors. They are small copies, as the file keeps only its last views in memory."""
    block: tuple[int, ...] | None
    """Shape of FP8's blocks. None: MXFP4."""

    def __getitem__(self, name: str) -> Any:
        codes, scales = self.whole[self.names[name]], self.scales.get(name)
        if scales is None:
            return codes
        if self.block is None:
            if codes.dtype == np.uint8 and codes.ndim == 4 and codes.shape == (*scales.shape, 16):
                experts, outputs, groups, _ = codes.shape
                return MXFP4((experts, 32 * groups, outputs), codes, scales)
        elif codes.dtype == ml_dtypes.float8_e4m3fn and scales.shape == _blocks(codes.shape, self.block):
            return BlockFP8(codes.shape, codes, scales, self.block)
        raise UserError(
            f"tensors: {name}: got {codes.dtype} {codes.shape} with scales {scales.shape}, must be "
            f"{'uint8 with one for each 16' if self.block is None else f'float8_e4m3fn with one for each {self.block}'}"
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def dequantised(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The tensors of a model with this `quantization_config`, dequantised on access. Raises UserError for another
    method and, on access, for a tensor that does not fit."""
    if config is None:
        return tensors
    method, block = config.get("quant_method"), config.get("weight_block_size") or ()
    if method in packed.METHODS:
        return packed.unpack(tensors, config)
    if method != "mxfp4" and (method, len(block)) != ("fp8", 2):
        raise UserError(
            f"config.json: quantization_config: got {method}, must be {', '.join(packed.METHODS)}, mxfp4, or fp8 "
            "with a weight_block_size; use the model's bfloat16 version"
        )
    codes, scales = ("_blocks", "_scales") if method == "mxfp4" else ("", "_scale_inv")
    found = [name.removesuffix(scales) for name in tensors if name.endswith(scales)]
    found = [name for name in found if name + codes in tensors]
    halves = {name + end for name in found for end in (codes, scales)}
    names = {name: name for name in tensors if name not in halves} | {name: name + codes for name in found}
    copies = {name: np.array(tensors[name + scales]) for name in found}
    return Dequantised(names, tensors, copies, None if method == "mxfp4" else tuple(block))


def _blocks(shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[int, ...]:
    """Number of blocks along each axis of a matrix; the last block may be partial."""
    return tuple(-(-size // step) for size, step in zip(shape, block, strict=False))


@functools.cache
def _pairs() -> np.ndarray:
    """Table [scale 256, byte 256] of two bfloat16 numbers, as a uint32."""
    numbers, byte = np.array([*E2M1, *(-x for x in E2M1)], np.float32), np.arange(256)
    with np.errstate(over="ignore"):  # the last scale means NaN
        pairs = np.ldexp(np.stack([numbers[byte & 15], numbers[byte >> 4]], -1), byte[:, None, None] - 127)
    return pairs.astype(ml_dtypes.bfloat16).view(np.uint32)[..., 0]
