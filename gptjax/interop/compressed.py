"""Models with quantised weights in the format of compressed-tensors, which vLLM and `transformers` load, in and out.

Matrices of linear layers are quantised, with 8 bits ("int-quantized") or 4 ("pack-quantized"); the embeddings and the
head are floats. `packed.py` has the layouts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gptjax.distributed.parameters import ParamInfo
from gptjax.inference.quantise.weights import on_mesh
from gptjax.interop.families import Piece
from gptjax.interop.packed import Packed, pack
from gptjax.kernels.quantised import QuantisedArray, grouped, packed
from gptjax.types import UserError

PACKED, SCALE, SHAPE = "_packed", "_scale", "_shape"
"""Suffixes of the tensors of a quantised matrix."""


@dataclasses.dataclass(frozen=True)
class Exported(Mapping[str, np.ndarray]):
    """Name -> tensor, assembled from parameters on access."""

    pieces: Mapping[str, list[Piece]]
    leaves: Mapping[str, Any]
    dtype: np.dtype
    """Dtype of the floats."""

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Name -> shape and dtype."""
        found: dict[str, jax.ShapeDtypeStruct] = {}
        for name, pieces in self.pieces.items():
            shape, leaf = pieces[0].shape, self.quantised(name)
            if leaf is None:
                found[name] = jax.ShapeDtypeStruct(shape, self.dtype)
                continue
            found[name + SCALE] = jax.ShapeDtypeStruct((shape[0], leaf.scales.shape[-2]), np.dtype(np.float32))
            if leaf.bits == 8:
                found[name] = jax.ShapeDtypeStruct(shape, np.dtype(np.int8))
            else:
                found[name + PACKED] = jax.ShapeDtypeStruct((shape[0], -(-shape[1] // 8)), np.dtype(np.int32))
                found[name + SHAPE] = jax.ShapeDtypeStruct((2,), np.dtype(np.int64))
        return found

    def quantised(self, name: str) -> QuantisedArray | None:
        """The first of the quantised parameters of a tensor. None: they are floats."""
        leaves = [self.leaves[piece.leaf] for piece in self.pieces[name]]
        found = [leaf for leaf in leaves if isinstance(leaf, QuantisedArray)]
        if not found:
            return None
        if len(found) < len(leaves) or len({(leaf.bits, leaf.group) for leaf in found}) > 1:
            raise UserError(f"params: got {name} quantised in part, must be alike: quantise the original model")
        return found[0]

    def _matrix(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Integers int8 [O, I] and scales float32 [O, G] of a quantised tensor."""
        shape = self.pieces[name][0].shape
        codes, scales, size = np.empty(shape, np.int8), np.empty(shape, np.float32), 1
        for piece in self.pieces[name]:
            leaf = self.leaves[piece.leaf]
            one = jax.tree.map(lambda x, piece=piece: x[piece.index] if piece.index else x, leaf)
            size = one.group
            ones = np.ones((*one.scales.shape, size), np.int8)
            for tensor, part in (
                (codes, dataclasses.replace(one, scales=np.ones(one.scales.shape, np.float32))),
                (scales, packed(ones, one.scales, 8, one.inputs, one.outputs)),
            ):
                view = piece.view(tensor)
                view[...] = np.asarray(part).reshape(view.shape)
        few = scales[:, ::size]
        if shape[1] % size or not np.array_equal(np.repeat(few, size, 1), scales):
            raise UserError(
                f"params: got {name}, whose published layout is not [outputs, inputs] as in a linear layer; "
                "write it in our own format (`save`, --to gptjax)"
            )
        return codes, few

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.pieces or self.quantised(name) is not None:
            stem = next(
                name.removesuffix(end) for end in (SCALE, PACKED, SHAPE, "") if name.removesuffix(end) in self.pieces
            )
            codes, scales = self._matrix(stem)
            if name.endswith(SHAPE):
                return np.array(codes.shape, np.int64)
            return scales if name.endswith(SCALE) else codes if name == stem else pack(codes + 8, 4)
        tensor = np.empty(self.pieces[name][0].shape, self.dtype)
        for piece in self.pieces[name]:
            leaf = self.leaves[piece.leaf]
            view = piece.view(tensor)
            values = np.asarray(leaf[piece.index] if piece.index else leaf).reshape(view.shape)
            with np.errstate(over="ignore"):
                view[...] = values
            if values.dtype != tensor.dtype and np.any(np.isinf(view) & np.isfinite(values)):
                raise UserError(f"dtype: {name} has values too large for {tensor.dtype}; choose float32 or bfloat16")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def config(exported: Exported, head: str) -> dict[str, Any] | None:
    """The `quantization_config` of a model. None: it is not quantised. Raises UserError for what a linear layer of the
    format cannot have.

    head  the tensor of the head
    """
    found = {name: leaf for name in exported.pieces if (leaf := exported.quantised(name)) is not None}
    if not found:
        return None
    for name, leaf in found.items():
        if any(leaf.table or piece.leaf == "head" for piece in exported.pieces[name]):
            raise UserError(f"embeddings: got {name} quantised, must be floats: quantise with embeddings=False")
        if len(exported.pieces[name][0].shape) != 2:
            raise UserError(f"params: got {name}, must be a matrix to be quantised; write it in our own format")
    kinds = {(leaf.bits, leaf.group if leaf.scales.shape[-2] > 1 else None): name for name, leaf in found.items()}
    if len(kinds) > 1:
        some = "; ".join(f"{bits} bits, {group or 'all'} inputs in {name}" for (bits, group), name in kinds.items())
        raise UserError(
            f"group: got several ({some}), must be one that divides the inputs of every matrix; or write our own "
            "format (--to gptjax), which may have several"
        )
    bits, group = next(iter(kinds))
    number = {"num_bits": bits, "type": "int", "symmetric": True, "observer": "minmax"}
    weights = {**number, "strategy": "group" if group else "channel", "group_size": group, "dynamic": False}
    inputs = {**number, "num_bits": 8, "strategy": "token", "dynamic": True, "observer": None} if bits == 8 else None
    form = "int-quantized" if bits == 8 else "pack-quantized"
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": [head.removesuffix(".weight") or "lm_head"],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": form}
        },
    }


def quantised_leaf(
    pieces: Sequence[Piece], tensors: Mapping[str, Any], leaf: jax.ShapeDtypeStruct, info: ParamInfo
) -> QuantisedArray | None:
    """The parameter of these pieces with the files' own integers. None: they are not all integers with scales per
    output and group of inputs, or are of experts on a mesh."""
    stack = leaf.shape[: len(pieces[0].index)]
    if not info.is_matrix or len(stack) != info.batch or (leaf.sharding is not None and info.batch > info.stacked):
        return None
    _, inputs, outputs = info.split(leaf.shape)
    codes, scales, bits = [], [], set()
    for piece in pieces:
        tensor = tensors[piece.tensor]
        if not isinstance(tensor, Packed) or tensor.integers is None:
            return None
        integers, few = tensor.integers()
        size = integers.shape[1] // few.shape[1]
        wide, shape = np.repeat(few, size, 1), leaf.shape[len(stack) :]
        one, steps = (grouped(piece.view(x).reshape(shape), info.inputs)[0] for x in (integers, wide))  # [F, inputs]
        if one.shape[1] % size:
            return None
        one, steps = (x.reshape(len(x), -1, size).swapaxes(0, 1) for x in (one, steps))
        if not np.all(steps == steps[..., :1]):
            return None
        codes.append(one)
        scales.append(steps[..., 0])
        bits.add(tensor.bits)
    if len(bits) > 1 or len({x.shape for x in codes}) > 1 or (bits == {4} and codes[0].shape[-1] % 2):
        return None
    whole, steps = (np.stack(x).reshape(*stack, *x[0].shape) for x in (codes, scales))
    return on_mesh(packed(whole, steps, bits.pop(), inputs, outputs), leaf.sharding, info)
