"""Write GGUF, the file format of llama.cpp: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

A header, metadata as key and value, a table of tensors, then their data, each aligned to 32 bytes; all little-endian.
`gguf_model` defines the keys and tensors of a model, `gguf_tokenizer` the keys of its tokenizer.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from gptjax.data.tokenizers import Tokenizer
from gptjax.interop import gguf_model, gguf_tokenizer
from gptjax.io import atomic
from gptjax.types import UserError

VERSION = 3
ALIGNMENT = 32
Value = bool | int | float | str | Sequence[str] | Sequence[int] | Sequence[float]
"""Metadata: bool, uint32, float32, text, or a list of texts, int32 or float32."""


def write(
    path: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    tokenizer: Tokenizer,
    dtype: str = "f16",
    chat_template: str | None = None,
) -> None:
    """Write a model and its tokenizer to the file `path`.

    config         a Hugging Face config.json: llama, mistral, qwen2, qwen3 or gpt2
    tensors        Hugging Face's name -> values of any float type, matrices as [out, in] (GPT-2's as [in, out])
    dtype          dtype of the matrices: f32, f16, bf16 or q8_0. Vectors and learned positions are always f32; with
                   q8_0, so are matrices whose rows are not a multiple of 32 long.
    chat_template  Jinja, as in a tokenizer_config.json

    Tensors are converted and written one at a time. Raises UserError for a model, a tensor or a tokenizer that the
    format cannot express. After an error there is no new file at `path`.
    """
    if dtype not in ENCODINGS:
        raise UserError(f"dtype: got {dtype!r}, must be one of {', '.join(ENCODINGS)}")
    path = Path(path)
    model = gguf_model.describe(config, tensors)
    metadata: dict[str, Value] = {
        "general.type": "model",
        "general.architecture": model.architecture,
        "general.name": path.stem,
        "general.file_type": ENCODINGS[dtype].file_type,
        "general.quantization_version": 2,
        **model.metadata,
        **gguf_tokenizer.metadata(tokenizer, model.vocab),
    }
    if chat_template is not None:
        metadata["tokenizer.chat_template"] = chat_template
    encodings = [_encoding(weight, dtype) for weight in model.weights]
    with atomic.new(path) as partial, partial.open("wb") as file:
        file.write(_header(metadata, model.weights, encodings))
        _pad(file)
        for weight, encoding in zip(model.weights, encodings, strict=True):
            file.write(_encode(weight, encoding).data)
            _pad(file)


@dataclasses.dataclass(frozen=True)
class Encoding:
    """Storage format of a tensor's values."""

    type: int
    """ggml's number of the tensor type."""
    file_type: int
    """llama.cpp's number of the type of a file that mostly uses this encoding."""
    block: int
    """Values per block; the length of a row is a multiple of it."""
    size: int
    """Bytes per block."""
    encode: Callable[[np.ndarray], np.ndarray]
    """float32 -> stored values, in row-major order."""


def q8_0(x: np.ndarray) -> np.ndarray:
    """float32 [..., 32 n] -> structured [...], blocks of a float16 scale and 32 int8: x ~ scale * int8.

    scale = max|x| / 127 over the block, int8 = x / scale rounded to nearest, halves away from zero, before the scale is
    itself rounded to float16."""
    blocks = x.reshape(-1, 32)
    out = np.empty(len(blocks), [("scale", "<f2"), ("values", "i1", 32)])
    for start in range(0, len(blocks), 4_096):  # 4,096 blocks fit in a cache
        chunk = blocks[start : start + 4_096]
        scale = np.abs(chunk).max(-1, keepdims=True) / np.float32(127)
        # A scale too small for float16 becomes 0 there, so the values of a scale without an inverse do not matter.
        values = chunk * np.divide(1, scale, out=np.zeros_like(scale), where=scale >= np.finfo(np.float32).tiny)
        # Adding 0.5 itself would round the number just below 0.5 up to 1.
        values += np.copysign(np.nextafter(np.float32(0.5), np.float32(0)), values)
        out["scale"][start : start + 4_096] = scale[:, 0]
        out["values"][start : start + 4_096] = values  # truncated towards zero
    return out


ENCODINGS = {
    "f32": Encoding(0, 0, 1, 4, lambda x: x.astype("<f4", copy=False)),
    "f16": Encoding(1, 1, 1, 2, lambda x: x.astype("<f2")),
    "bf16": Encoding(30, 32, 1, 2, lambda x: x.astype(ml_dtypes.bfloat16).view("<u2")),
    "q8_0": Encoding(8, 7, 32, 34, q8_0),
}
"""Values of `dtype`."""


def _encoding(weight: gguf_model.Weight, dtype: str) -> Encoding:
    """Encoding of a tensor in a file of `dtype`. Vectors and GPT-2's positions are f32: ggml adds only float32."""
    encoding = ENCODINGS[dtype]
    exact = len(weight.shape) == 1 or weight.name == "position_embd.weight" or weight.shape[-1] % encoding.block
    return ENCODINGS["f32"] if exact else encoding


def _encode(weight: gguf_model.Weight, encoding: Encoding) -> np.ndarray:
    values = np.ascontiguousarray(weight.read(), np.float32)
    try:
        with np.errstate(over="raise"):
            encoded = np.ascontiguousarray(encoding.encode(values))
    except FloatingPointError:
        raise UserError(f"dtype: {weight.name} has values too large for float16; choose bf16 or f32") from None
    if encoding is ENCODINGS["bf16"] and np.any(np.isinf(encoded.view(ml_dtypes.bfloat16)) & np.isfinite(values)):
        raise UserError(f"dtype: {weight.name} has values too large for bf16; choose f32")
    return encoded.view(np.uint8)


def _header(
    metadata: Mapping[str, Value], weights: Sequence[gguf_model.Weight], encodings: Sequence[Encoding]
) -> bytes:
    """All bytes before the data."""
    fields = [b"GGUF", struct.pack("<IQQ", VERSION, len(weights), len(metadata))]
    fields += [_text(key) + _value(value) for key, value in metadata.items()]
    offset = 0
    for weight, encoding in zip(weights, encodings, strict=True):
        shape = weight.shape[::-1]  # ggml lists dimensions from the innermost
        fields.append(_text(weight.name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, encoding.type, offset))
        size = prod(shape) // encoding.block * encoding.size
        offset += size + -size % ALIGNMENT
    return b"".join(fields)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    """Encode the number of a value's type, and the value."""
    if isinstance(value, bool):  # before int: a bool is an int too
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if value and isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))  # type: ignore[arg-type]
    kind, letter = (6, "f") if value and isinstance(value[0], float) else (5, "i")
    return struct.pack(f"<IIQ{len(value)}{letter}", 9, kind, len(value), *value)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))
