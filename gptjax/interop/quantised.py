"""Published weights of four and eight bits, as the bfloat16 numbers that they stand for.

    tensors = dequantised(Tensors(folder), config["quantization_config"])
    np.asarray(tensors["model.layers.0.mlp.up_proj.weight"])     # computed now, and not kept

MXFP4 (gpt-oss; the OCP Microscaling Formats specification 1.0): x_blocks uint8 [E, O, G, 16] and x_scales uint8
[E, O, G] are x [E, I, O], where I = 32 G. A byte holds two numbers of four bits (e2m1), the lower half first, and those
of a group are multiplied by 2^(scale - 127). bfloat16 has all of these numbers.

FP8 in blocks (DeepSeek-V3, arXiv:2412.19437, section 3.3; Qwen 3): x float8 [O, I], where each block, mostly of 128 by
128, is multiplied by one of x_scale_inv [ceil(O / 128), ceil(I / 128)]. The products are rounded, as in DeepSeek's own
program.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from gptjax.types import UserError

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What three bits mean; the fourth and highest is the sign."""
STRIP = 128
"""How many rows are computed at a time: what lies between takes several times their memory."""
SIGN, REST = 0x8000_0000, 0x07F0_0000
"""Where a float32 has the bits of an e4m3."""


@dataclasses.dataclass(frozen=True, eq=False)
class Quantised:
    """A tensor whose values are computed each time it becomes an array."""

    shape: tuple[int, ...]
    codes: np.ndarray
    scales: np.ndarray
    dtype = np.dtype(ml_dtypes.bfloat16)


class MXFP4(Quantised):
    """[E, I, O] of codes [E, O, G, 16] and scales [E, O, G]."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        experts, inputs, outputs = self.shape
        codes, scales = (x.reshape(experts * outputs, -1, x.shape[-1]) for x in (self.codes, self.scales[..., None]))
        pairs = np.empty(codes.shape, np.uint32)
        for i in range(0, len(pairs), STRIP):
            strip = slice(i, i + STRIP)
            pairs[strip] = _pairs()[scales[strip], codes[strip]]
        return pairs.view(self.dtype).reshape(experts, outputs, inputs).swapaxes(1, 2)


@dataclasses.dataclass(frozen=True, eq=False)
class BlockFP8(Quantised):
    """[O, I] of codes [O, I] and scales, one for each block."""

    block: tuple[int, ...]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values, (rows, columns) = np.empty(self.shape, self.dtype), self.block
        for i, scales in enumerate(self.scales.astype(np.float32)):
            strip = slice(i * rows, (i + 1) * rows)
            # The bits of a number, where a float32 has them whose exponent counts from 120 lower. `astype` takes five
            # times as long, and would differ for not-a-number alone, which no weight is.
            bits = self.codes[strip].view(np.int8).astype(np.int32) << 20
            numbers = (bits & np.uint32(SIGN | REST).view(np.int32)).view(np.float32)
            values[strip] = numbers * np.float32(2.0**120) * np.repeat(scales, columns)[: self.shape[1]]
        return values


@dataclasses.dataclass(frozen=True)
class Dequantised(Mapping[str, Any]):
    """All tensors under the names that they have where none is quantised."""

    names: Mapping[str, str]
    """Name -> the one in `whole`, of a quantised tensor's codes."""
    whole: Mapping[str, np.ndarray]
    scales: Mapping[str, np.ndarray]
    """Those of the quantised tensors. They are small, and no views of a file, which keeps few of them in memory."""
    block: tuple[int, ...] | None
    """The shape of FP8's blocks; None: MXFP4."""

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
    """The tensors of a model with this `quantization_config`, none of them quantised. Raises UserError for another
    method than these two, and, when it is asked for, for a tensor that does not fit."""
    if config is None:
        return tensors
    method, block = config.get("quant_method"), config.get("weight_block_size") or ()
    if method != "mxfp4" and (method, len(block)) != ("fp8", 2):
        raise UserError(
            f"config.json: quantization_config: got {method}, must be mxfp4 or fp8 with a weight_block_size; "
            "take the model's copy in bfloat16"
        )
    codes, scales = ("_blocks", "_scales") if method == "mxfp4" else ("", "_scale_inv")
    found = [name.removesuffix(scales) for name in tensors if name.endswith(scales)]
    found = [name for name in found if name + codes in tensors]
    halves = {name + end for name in found for end in (codes, scales)}
    names = {name: name for name in tensors if name not in halves} | {name: name + codes for name in found}
    copies = {name: np.array(tensors[name + scales]) for name in found}
    return Dequantised(names, tensors, copies, None if method == "mxfp4" else tuple(block))


def _blocks(shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[int, ...]:
    """How many blocks there are along each side of a matrix; the last may be cut short."""
    return tuple(-(-size // step) for size, step in zip(shape, block, strict=False))


@functools.cache
def _pairs() -> np.ndarray:
    """Two bfloat16 numbers, as a uint32, by their scale and their byte: [256, 256]."""
    numbers, byte = np.array([*E2M1, *(-x for x in E2M1)], np.float32), np.arange(256)
    with np.errstate(over="ignore"):  # by the last scale, which stands for no number
        pairs = np.ldexp(np.stack([numbers[byte & 15], numbers[byte >> 4]], -1), byte[:, None, None] - 127)
    return pairs.astype(ml_dtypes.bfloat16).view(np.uint32)[..., 0]
