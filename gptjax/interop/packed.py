"""Published integer weights: how each program lays them out, and the numbers that they stand for.

    tensors = unpack(Tensors(folder), config["quantization_config"])
    np.asarray(tensors["model.layers.0.mlp.up_proj.weight"])     # computed now, not kept

O outputs, I inputs, G groups of inputs; b bits. A word is an int32 with 32 / b integers, the lowest bits first.

compressed-tensors  weight int8 [O, I], or weight_packed words [O, I b/32] of q + 2^(b-1); weight_scale [O, G]; for
                    uneven ranges weight_zero_point; w = s (q - z). (vllm-project/compressed-tensors)
gptq                qweight words [I b/32, O], qzeros words [G, O b/32], scales [G, O], g_idx [I], the group of each
                    input; w = s (q - z - 1), in the format "gptq_v2" s (q - z). (Frantar et al. 2022, arXiv:2210.17323)
awq                 qweight words [I, O/8], qzeros words [G, O/8], scales [G, O], of 4 bits; a word holds outputs
                    0, 2, 4, 6, 1, 3, 5, 7; w = s (q - z). (Lin et al. 2023, arXiv:2306.00978)
bitsandbytes        int8: weight [O, I] and SCB [O], w = q SCB / 127 (Dettmers et al. 2022, arXiv:2208.07339). fp4 and
                    nf4: two indices of the table quant_map a byte, the first in the higher half, times the block's
                    absmax, which may be quantised again (Dettmers et al. 2023, arXiv:2305.14314)
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from gptjax.types import UserError

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Output of each four bits of a word, from the lowest."""
HALVES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
STATES = ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4"
Make = Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """A quantised tensor, dequantised each time it is converted to an array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Make
    """Computes the float32 array."""
    integers: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None
    """Computes int8 [O, I] and scales float32 [O, G] of which this is the product. None: it is none."""
    bits: int = 8
    """Size of the integers."""

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return self.make().astype(self.dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.asarray(self)[index]


@dataclasses.dataclass(frozen=True)
class Unpacked(Mapping[str, Any]):
    """All tensors, under the names of the model that is not quantised."""

    whole: Mapping[str, np.ndarray]
    names: Mapping[str, Callable[[], Packed] | None]
    """Name -> function that describes the quantised tensor. None: it is in `whole`."""

    def __getitem__(self, name: str) -> Any:
        make = self.names[name]
        return self.whole[name] if make is None else make()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def unpack(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tensors of a model with this `quantization_config`, whose method is a key of `METHODS`. Raises UserError for
    a setting that is not supported."""
    read, ends, main = METHODS[config["quant_method"]](config)
    found = [name.removesuffix(main) for name in tensors if name.endswith(main)]
    found = [stem for stem in found if any(stem + end in tensors for end in ends)]
    parts = {stem + end for stem in found for end in (main, *ends)}
    states = tuple(stem + main + "." for stem in found)
    rest = [n for n in tensors if n not in parts and not n.startswith(states)]
    names: dict[str, Callable[[], Packed] | None] = dict.fromkeys(rest)
    for stem in found:
        names[stem + "weight"] = functools.partial(_checked, read, tensors, stem)
    return Unpacked(tensors, names)


def _checked(read: Callable[[Mapping[str, np.ndarray], str], Packed], tensors: Any, stem: str) -> Packed:
    try:
        return read(tensors, stem)
    except (KeyError, ValueError, IndexError, TypeError, ZeroDivisionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"tensors: {stem}weight: got tensors that do not fit its quantisation ({error})") from None


def words(packed: np.ndarray, bits: int, axis: int, size: int | None = None) -> np.ndarray:
    """The integers uint8 of words along an axis, the first `size` of them. None: all."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    parts = (np.moveaxis(packed.view(np.uint32), axis, -1)[..., None] >> shifts) & np.uint32(2**bits - 1)
    integers = parts.astype(np.uint8).reshape(*parts.shape[:-2], -1)
    return np.moveaxis(integers if size is None else integers[..., :size], -1, axis)


def pack(integers: np.ndarray, bits: int) -> np.ndarray:
    """Words int32 of integers [O, I] that are at least 0; the last word is filled up with zeros."""
    each = 32 // bits
    padded = np.pad(integers.astype(np.uint32), ((0, 0), (0, -integers.shape[1] % each)))
    shifted = padded.reshape(len(padded), -1, each) << np.arange(0, 32, bits, dtype=np.uint32)
    return np.bitwise_or.reduce(shifted, -1).view(np.int32)


def _product(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None = None) -> np.ndarray:
    """s (q - z) float32 [O, I], with s and z [O, G]."""
    group = codes.shape[1] // scales.shape[1]
    if group * scales.shape[1] != codes.shape[1] or len(scales) not in (1, len(codes)):
        raise ValueError(f"{codes.shape} integers with {scales.shape} scales")
    q = codes.astype(np.float32).reshape(len(codes), -1, group)
    q = q if zeros is None else q - zeros.astype(np.float32)[..., None]
    return (q * scales.astype(np.float32)[..., None]).reshape(codes.shape)


def _compressed(config: Mapping[str, Any]) -> Any:
    formats = {group.get("format") or config.get("format") for group in (config.get("config_groups") or {}).values()}
    known = ("int-quantized", "naive-quantized", "pack-quantized", "float-quantized")
    if not formats or not formats <= set(known):
        raise UserError(
            f"config.json: quantization_config.format: got {', '.join(map(str, formats))}, must be {', '.join(known)}"
        )
    if config.get("transform_config") or (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise UserError("config.json: quantization_config: got sparsity or transforms, must have none")
    sizes = {group["weights"]["num_bits"] for group in config["config_groups"].values()}
    if not sizes <= {4, 8}:
        raise UserError(f"config.json: quantization_config: got weights of {sizes} bits, must be 4 or 8")

    def read(tensors: Mapping[str, np.ndarray], stem: str) -> Packed:
        scales = np.array(tensors[stem + "weight_scale"])
        scales = scales.reshape(len(scales) if scales.ndim else 1, -1)
        half = scales.dtype if scales.dtype in HALVES.values() else HALVES["bfloat16"]
        zero, index = (stem + end in tensors for end in ("weight_zero_point", "weight_g_idx"))
        if stem + "weight_packed" not in tensors:
            codes = tensors[stem + "weight"]
            zeros = np.array(tensors[stem + "weight_zero_point"]).reshape(scales.shape) if zero else None
            make = functools.partial(_product, codes, scales, zeros)
            ours = codes.dtype == np.int8 and (zeros is None or not zeros.any())
            integers = (lambda: (codes, scales.astype(np.float32))) if ours and len(scales) == len(codes) else None
            return Packed(codes.shape, half, make, integers)
        shape = tuple(int(n) for n in tensors[stem + "weight_shape"])
        packed = tensors[stem + "weight_packed"]
        (bits,) = (b for b in sorted(sizes) if -(-shape[1] * b // 32) == packed.shape[1])
        offset = 2 ** (bits - 1)

        def codes_() -> np.ndarray:
            return (words(packed, bits, 1, shape[1]).astype(np.int16) - offset).astype(np.int8)

        def make_() -> np.ndarray:
            zeros = None
            if zero:
                packed_zeros = np.array(tensors[stem + "weight_zero_point"])
                zeros = words(packed_zeros, bits, 0, shape[0]).astype(np.int16) - offset
            if not index:
                return _product(codes_(), scales, zeros)
            return _by_index(codes_().T, scales.T, None if zeros is None else zeros.T, tensors[stem + "weight_g_idx"]).T

        ours = not zero and not index
        return Packed(shape, half, make_, (lambda: (codes_(), scales.astype(np.float32))) if ours else None, bits)

    ends = "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_packed"
    main = "weight_packed" if formats == {"pack-quantized"} else "weight"
    if len(formats) > 1 and "pack-quantized" in formats:
        raise UserError("config.json: quantization_config: got several formats, must be one")
    return read, ends, main


def _by_index(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, index: np.ndarray) -> np.ndarray:
    """s (q - z) [I, O] of integers [I, O] with s and z [G, O], and the group of each input."""
    q = codes.astype(np.float32)
    q = q if zeros is None else q - zeros.astype(np.float32)[index]
    return q * scales.astype(np.float32)[index]


def _gptq(config: Mapping[str, Any]) -> Any:
    bits, form = config.get("bits"), config.get("checkpoint_format") or "gptq"
    if bits not in (2, 4, 8) or form not in ("gptq", "gptq_v2"):
        raise UserError(
            f"config.json: quantization_config: got GPTQ with {bits} bits in the format {form}, must be 2, 4 or 8 bits "
            "in gptq or gptq_v2"
        )

    def read(tensors: Mapping[str, np.ndarray], stem: str) -> Packed:
        codes, zeros = tensors[stem + "qweight"], np.array(tensors[stem + "qzeros"])
        scales = np.array(tensors[stem + "scales"])
        inputs, outputs = codes.shape[0] * 32 // bits, codes.shape[1]
        index = np.array(tensors[stem + "g_idx"]) if stem + "g_idx" in tensors else None
        index = np.arange(inputs) // (inputs // len(scales)) if index is None else index

        def make() -> np.ndarray:
            z = words(zeros, bits, 1, outputs).astype(np.int16) + (form == "gptq")
            return np.ascontiguousarray(_by_index(words(codes, bits, 0, inputs), scales, z, index).T)

        return Packed((outputs, inputs), scales.dtype, make)

    return read, ("qzeros", "scales", "g_idx"), "qweight"


def _awq(config: Mapping[str, Any]) -> Any:
    bits, version = config.get("bits", config.get("w_bit")), str(config.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm":
        raise UserError(
            f"config.json: quantization_config: got AWQ with {bits} bits of version {version}, must be 4 and gemm"
        )

    def columns(packed: np.ndarray) -> np.ndarray:
        whole = words(packed, 4, 1)
        ordered = np.empty_like(whole).reshape(len(whole), -1, 8)
        ordered[..., AWQ_ORDER] = whole.reshape(ordered.shape)
        return ordered.reshape(whole.shape)

    def read(tensors: Mapping[str, np.ndarray], stem: str) -> Packed:
        codes, scales = tensors[stem + "qweight"], np.array(tensors[stem + "scales"])
        zeros = np.array(tensors[stem + "qzeros"])
        index = np.arange(len(codes)) // (len(codes) // len(scales))

        def make() -> np.ndarray:
            return np.ascontiguousarray(_by_index(columns(codes), scales, columns(zeros), index).T)

        return Packed((scales.shape[1], len(codes)), scales.dtype, make)

    return read, ("qzeros", "scales"), "qweight"


def _bitsandbytes(config: Mapping[str, Any]) -> Any:
    if config.get("load_in_4bit") or config.get("_load_in_4bit"):
        return _four_bits, tuple("weight" + state for state in STATES), "weight"
    if not (config.get("load_in_8bit") or config.get("_load_in_8bit")):
        raise UserError("config.json: quantization_config: got bitsandbytes without load_in_4bit or load_in_8bit")

    def read(tensors: Mapping[str, np.ndarray], stem: str) -> Packed:
        codes, form = tensors[stem + "weight"], tensors.get(stem + "weight_format")
        if form is not None and int(np.ravel(form)[0]) != 0:
            raise UserError(f"tensors: {stem}weight_format: got {np.ravel(form)[0]}, must be 0, by rows")
        scales = np.array(tensors[stem + "SCB"], np.float32)[:, None] / 127
        return Packed(codes.shape, HALVES["float16"], lambda: _product(codes, scales), lambda: (codes, scales))

    return read, ("SCB", "weight_format"), "weight"


def _four_bits(tensors: Mapping[str, np.ndarray], stem: str) -> Packed:
    name = stem + "weight"
    (state,) = (name + state for state in STATES if name + state in tensors)
    about = json.loads(tensors[state].tobytes())
    shape, codes = tuple(about["shape"]), tensors[name]

    def make() -> np.ndarray:
        absmax = np.array(tensors[f"{name}.absmax"])
        if absmax.dtype == np.uint8:
            scale = np.repeat(tensors[f"{name}.nested_absmax"], about["nested_blocksize"])[: absmax.size]
            absmax = tensors[f"{name}.nested_quant_map"][absmax] * scale + np.float32(about["nested_offset"])
        both = np.stack([codes.ravel() >> 4, codes.ravel() & 15], -1).ravel()[: int(np.prod(shape))]
        values = tensors[f"{name}.quant_map"][both]
        return (values * np.repeat(absmax, about["blocksize"])[: values.size]).astype(np.float32).reshape(shape)

    return Packed(shape, HALVES.get(about["dtype"], HALVES["bfloat16"]), make)


METHODS: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "compressed-tensors": _compressed,
    "gptq": _gptq,
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
}
"""`quant_method` -> quantization_config -> (reader of a matrix, suffixes of its tensors, suffix of its integers)."""
