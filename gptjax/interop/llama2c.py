"""Read the `.bin` files of llama2.c (https://github.com/karpathy/llama2.c), Llama inference in one C file.

Three versions, all little-endian: 0, seven int32 and then float32 tensors; 1, the same after a header of 256 bytes, in
another order; 2, matrices as int8 with a float32 scale per group. A tensor's copies for all layers are consecutive.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.interop.rotary import halve
from gptjax.types import UserError

MAGIC = 0x616B3432  # "ak42"; version 0 begins with the width instead
HEADER = 256
"""Bytes before the tensors of versions 1 and 2."""
FREQUENCIES = "frequencies"
"""Cosines and sines in version 0, which nothing reads."""

_LAYER = "model.layers.{}."
_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_NORM_1, _NORM_2 = _LAYER + "input_layernorm.weight", _LAYER + "post_attention_layernorm.weight"
_ATTENTION = tuple(_LAYER + f"self_attn.{name}_proj.weight" for name in "qkvo")
_MLP = tuple(_LAYER + f"mlp.{name}_proj.weight" for name in ("gate", "down", "up"))
_ORDER = {
    0: (_EMBEDDING, _NORM_1, *_ATTENTION, _NORM_2, *_MLP, _NORM, FREQUENCIES, _HEAD),
    1: (_NORM_1, _NORM_2, _NORM, _EMBEDDING, *_ATTENTION, *_MLP, _HEAD),
    2: (_NORM_1, _NORM_2, _NORM, _EMBEDDING, *_ATTENTION, *_MLP, _HEAD),
}
"""Order of the tensors in each version; a name with a placeholder stands for all layers."""


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read a model in Hugging Face's form: the configuration of a `LlamaForCausalLM`, and name -> float32 tensor,
    matrices as [out, in].

    The file is memory-mapped and the tensors are read-only views of it, with two exceptions. Rows of queries and keys
    are permuted, in a copy: llama2.c pairs neighbouring channels in its rotary embedding, Hugging Face the halves of a
    head (see `rotary`). The int8 matrices of version 2 become float32 copies. The rotary base and the norms' epsilon
    are not in the format; they are llama2.c's 10,000 and 1e-5.

    Raises UserError for a file of another kind, with impossible sizes, or shorter or longer than its header says.
    """
    path = Path(path)
    head = _header(path)
    layout = list(_layout(head))
    expected = head.start + sum(entry.count * entry.nbytes for entry in layout)
    found = path.stat().st_size
    if expected != found:
        raise UserError(
            f"{path}: got {found:,} bytes, must be {expected:,} for the sizes in its header ({head.sizes}); "
            "it is damaged, truncated or not a llama2.c model"
        )
    data = np.asarray(np.memmap(path, np.uint8, mode="r"))
    tensors, start = {}, head.start
    for entry in layout:
        for layer in range(entry.count):
            tensor = entry.read(data[start : start + entry.nbytes])
            start += entry.nbytes
            if entry.name.endswith(("q_proj.weight", "k_proj.weight")):
                tensor = halve(tensor, len(tensor) // head.head_size)
            if entry.name != FREQUENCIES:
                tensors[entry.name.format(layer)] = tensor
    return head.config, tensors


class _Header(NamedTuple):
    version: int
    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    seq_len: int
    tie_embeddings: bool
    group: int
    """int8 values per scale; 0 before version 2."""

    @property
    def start(self) -> int:
        return HEADER if self.version else 28

    @property
    def head_size(self) -> int:
        return self.dim // self.n_heads

    @property
    def sizes(self) -> str:
        """The integers of the header, for messages."""
        return ", ".join(f"{name} {value}" for name, value in zip(self._fields[:8], self[:8], strict=True))

    @property
    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.dim,
            "intermediate_size": self.hidden_dim,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.seq_len,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10_000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tie_embeddings,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "float32",
            "attention_bias": False,
            "mlp_bias": False,
        }


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A tensor of the file, or the tensors of that name of all layers."""

    name: str
    shape: tuple[int, ...]
    count: int
    group: int
    """int8 values per scale; 0: float32."""

    @property
    def nbytes(self) -> int:
        """Bytes of one tensor."""
        size = prod(self.shape)
        return size + 4 * (size // self.group) if self.group else 4 * size

    def read(self, data: np.ndarray) -> np.ndarray:
        if not self.group:
            return data.view("<f4").reshape(self.shape)
        size = prod(self.shape)
        values, scales = data[:size].view(np.int8), data[size:].view("<f4")
        return (values.reshape(-1, self.group) * scales[:, None]).reshape(self.shape)


def _header(path: Path) -> _Header:
    """Read and check the header of `path`."""
    with path.open("rb") as file:
        data = file.read(HEADER)
    if len(data) < 28:
        raise UserError(f"{path}: got {len(data)} bytes, must be at least the 28 of a llama2.c header")
    versioned = struct.unpack_from("<I", data)[0] == MAGIC
    if not versioned:
        sizes = struct.unpack_from("<7i", data)
        # A negative vocabulary size means that the output layer is not tied to the embedding.
        head = _Header(0, *sizes[:5], abs(sizes[5]), sizes[6], tie_embeddings=sizes[5] > 0, group=0)
    elif len(data) < HEADER:
        raise UserError(f"{path}: got {len(data)} bytes, must be at least the {HEADER} of its header; it is truncated")
    else:
        version, *sizes, tied, group = struct.unpack_from("<8iBi", data, 4)
        if version not in (1, 2):
            raise UserError(f"{path}: got version {version}, must be a llama2.c model of version 0, 1 or 2")
        head = _Header(version, *sizes, tie_embeddings=bool(tied), group=group if version == 2 else 0)
    _check(path, head)
    return head


def _check(path: Path, head: _Header) -> None:
    problems = {
        "sizes above 0": min(head[1:8]) > 0,
        "a dim that n_heads divides into an even size": head.n_heads > 0 and head.dim % (2 * head.n_heads) == 0,
        "an n_heads that n_kv_heads divides": head.n_kv_heads > 0 and head.n_heads % head.n_kv_heads == 0,
        f"a group size (got {head.group}) that divides dim": head.version < 2
        or (head.group > 0 and head.dim % head.group == 0),
    }
    if wrong := [problem for problem, fine in problems.items() if not fine]:
        raise UserError(f"{path}: got {head.sizes}, must have {wrong[0]}; it is damaged or not a llama2.c model")


def _layout(head: _Header) -> Iterator[_Entry]:
    """The tensors of the file, in order."""
    D, F, V, L, K = head.dim, head.hidden_dim, head.vocab_size, head.n_layers, head.n_kv_heads * head.head_size
    shapes = {_EMBEDDING: (V, D), _HEAD: (V, D), _NORM: (D,), _NORM_1: (D,), _NORM_2: (D,)}
    shapes |= dict(zip(_ATTENTION, ((D, D), (K, D), (K, D), (D, D)), strict=True))
    shapes |= dict(zip(_MLP, ((F, D), (D, F), (F, D)), strict=True))
    shapes[FREQUENCIES] = (head.seq_len, head.head_size)  # both halves, cosines and sines
    for name in _ORDER[head.version]:
        if name != _HEAD or not head.tie_embeddings:
            shape = shapes[name]
            yield _Entry(name, shape, L if name.startswith(_LAYER) else 1, head.group if len(shape) == 2 else 0)
