"""Write a model and its tokenizer to a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from gptjax.data.tokenizers import Tokenizer
from gptjax.interop.gguf import model as gguf_model
from gptjax.interop.gguf import tokenizer as gguf_tokenizer
from gptjax.interop.gguf.container import ALIGNMENT, Value, header
from gptjax.interop.gguf.encodings import F32, WRITTEN, Encoding
from gptjax.io import atomic
from gptjax.types import UserError


def write(
    path: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    tokenizer: Tokenizer,
    dtype: str = "f16",
    chat_template: str | None = None,
) -> None:
    """Write a model and its tokenizer to the file `path`.

    config         a Hugging Face config.json, of a family in `gptjax.interop.gguf.architectures`
    tensors        Hugging Face's name -> values of any float type, matrices as [out, in] (GPT-2's as [in, out])
    dtype          dtype of the matrices: f32, f16, bf16, q8_0 or q4_0; see `encoding_of` for the exceptions
    chat_template  Jinja, as in a tokenizer_config.json

    Tensors are converted and written one at a time. Raises UserError for a model, a tensor or a tokenizer that the
    format cannot express. After an error there is no new file at `path`.
    """
    if dtype not in WRITTEN:
        raise UserError(f"dtype: got {dtype!r}, must be one of {', '.join(WRITTEN)}")
    path = Path(path)
    model = gguf_model.describe(config, tensors)
    metadata: dict[str, Value] = {
        "general.type": "model",
        "general.architecture": model.architecture,
        "general.name": path.stem,
        "general.file_type": WRITTEN[dtype].file_type or 0,
        "general.quantization_version": 2,
        **model.metadata,
        **gguf_tokenizer.metadata(tokenizer, model.vocab),
    }
    if chat_template is not None:
        metadata["tokenizer.chat_template"] = chat_template
    encodings = [encoding_of(weight.name, weight.shape, dtype) for weight in model.weights]
    table = [(w.name, w.shape, encoding) for w, encoding in zip(model.weights, encodings, strict=True)]
    with atomic.new(path) as partial, partial.open("wb") as file:
        file.write(header(metadata, table))
        _pad(file)
        for weight, encoding in zip(model.weights, encodings, strict=True):
            file.write(_encode(weight, encoding).data)
            _pad(file)


def encoding_of(name: str, shape: tuple[int, ...], dtype: str) -> Encoding:
    """Encoding of a tensor in a file of `dtype`: f32 for vectors, biases, learned positions and routers, and for rows
    that are not a whole number of blocks; in q4_0, q8_0 for the embedding and the head."""
    exact = len(shape) == 1 or name.endswith(".bias") or name == "position_embd.weight" or ".ffn_gate_inp." in name
    if dtype == "q4_0" and name in ("token_embd.weight", "output.weight"):
        dtype = "q8_0"
    encoding = WRITTEN[dtype]
    return F32 if exact or shape[-1] % encoding.values else encoding


def _encode(weight: gguf_model.Weight, encoding: Encoding) -> np.ndarray:
    values = np.ascontiguousarray(weight.read(), np.float32)
    try:
        with np.errstate(over="raise"):
            encoded = encoding.write(values)
    except FloatingPointError:
        raise UserError(f"dtype: {weight.name} has values too large for float16; choose bf16 or f32") from None
    if encoding.name == "bf16" and np.any(np.isinf(encoded.view(ml_dtypes.bfloat16)) & np.isfinite(values.reshape(-1))):
        raise UserError(f"dtype: {weight.name} has values too large for bf16; choose f32")
    return encoded.view(np.uint8)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))
