"""Base classes of `LanguageModel`, `EncoderModel`, `TextToText`, `ClassifierModel` and `RegressorModel`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import digest, to_json
from gptjax.data.tokenizers import Tokenizer
from gptjax.data.tokenizers.tokenizer import add_bos_eos
from gptjax.distributed.parameters import declared, flat
from gptjax.distributed.sharding import DEFAULT_RULES, ShardingRules, fetch, on_mesh_of, reshard
from gptjax.inference.generate import round_up
from gptjax.io import atomic
from gptjax.nn import BackboneConfig, ModelConfig
from gptjax.protocols import Module
from gptjax.types import Array, Params, UserError

if TYPE_CHECKING:
    from gptjax.nn import Pooling


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model configuration with parameters and tokenizer. Raises UserError if they do not match."""

    config: ModelConfig
    """Architecture."""
    params: Params = dataclasses.field(repr=False)
    """Parameters, as `config.build().init` returns them."""
    tokenizer: Tokenizer
    """Tokenizer."""
    rules: ShardingRules = dataclasses.field(default=DEFAULT_RULES, kw_only=True)
    """Sharding of the parameters over their mesh, on which the model runs."""

    def __post_init__(self):
        _check(self.config, self.params, self.tokenizer)

    def save(self, path: str | Path) -> None:
        """Write a new folder for `load`: config.json, params.npz, tokenizer/. Raises UserError if it exists."""
        from gptjax.inference.quantise import to_arrays

        with _new_folder(path) as folder:
            config = {"model": to_json(self.config), "tokenizer": self.tokenizer.fingerprint, **self._settings}
            config = json.loads(json.dumps(config, default=dataclasses.asdict))
            config |= {"sha256": digest(config)}
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            # numpy's format lacks bfloat16; float32 has the same values.
            arrays: dict[str, Any] = {
                name: np.asarray(x, np.float32 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype)
                for name, x in to_arrays(self.params).items()
            }
            np.savez(folder / "params.npz", **arrays)
            self.tokenizer.save(folder / "tokenizer")

    def save_hf(self, path: str | Path, dtype: str = "float32", model_type: str | None = None) -> None:
        """Write a new folder for `transformers` and `load`; see `gptjax.interop.huggingface.save_hf`."""
        from gptjax.interop.huggingface import save_hf

        about = {"dtype": dtype, "model_type": model_type, **self._hf_settings}
        with _new_folder(path) as folder:
            save_hf(folder, self.config, self.params, self.tokenizer, **about)

    @property
    def _settings(self) -> dict[str, Any]:
        """Settings that a folder stores beside the configuration, by field name."""
        return {}

    @property
    def _hf_settings(self) -> dict[str, Any]:
        """Those of them that a folder for `transformers` has."""
        return self._settings

    @classmethod
    def settings_of_hf(cls, path: Path, config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
        """Settings, by field name, in the files of a folder for `transformers`."""
        return {}

    @classmethod
    def settings_of_run(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Settings, by field name, from the data of a run's stage, as JSON."""
        return {}

    @property
    def _module(self) -> Any:
        return self.config.build(self.rules)

    def _check_ids(self, tokens: Array | np.ndarray | Sequence[int] | Sequence[Sequence[int]]) -> None:
        """Raise UserError for ids outside of the vocabulary, where a lookup gives some other row, and for too many."""
        ids = np.asarray(tokens)
        if not np.issubdtype(ids.dtype, np.integer):
            raise UserError(f"tokens: got {ids.dtype}, must be integers")
        if ids.size and not 0 <= ids.min() <= ids.max() < self.config.vocab:
            raise UserError(f"tokens: got ids {ids.min()} to {ids.max()}, must be 0 to {self.config.vocab - 1}")
        self._check_length(ids.shape[-1])

    def _check_length(self, length: int) -> None:
        limit = self.config.max_positions
        if limit is not None and length > limit:
            raise UserError(f"tokens: got {length}, must be at most {limit}, the number of positions of this model")


@dataclasses.dataclass(frozen=True, eq=False)
class TextEncoder(Model):
    """A model with one stack of layers, which can embed texts.

    Texts are read between the tokenizer's `bos` and `eos` ([CLS] and [SEP] in BERT), if it has them.
    """

    def embed(
        self, texts: str | Sequence[str], pooling: Pooling | None = None, normalise: bool = True, batch: int = 32
    ) -> np.ndarray:
        """One vector per text, float32 [n, D], pooled from the last layer's hidden states, `bos` and `eos` included.

        pooling    `Mean()`, `First()` ([CLS]), or `Last()`, which attends to everything in a decoder. None: `Mean()`
        normalise  divide vectors by their norm, so that dot products are cosines
        batch      texts per forward pass: changes speed and memory only
        """
        from gptjax.nn import Embedder, Mean

        embedder = Embedder(self._backbone, self.rules, pooling=pooling or Mean(), normalise=normalise)
        return self._forward_texts(embedder, texts, batch)

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Number of tokens that `embed` reads of each text."""
        return [len(self._add_bos_eos(ids)) for ids in self.tokenizer.encode_batch(texts)]

    @property
    def _backbone(self) -> BackboneConfig:
        """Configuration of the stack."""
        if not isinstance(self.config, BackboneConfig):
            raise UserError(f"model: got {type(self.config).__name__}, must be a decoder or an encoder to embed texts")
        return self.config

    def _forward_texts(
        self, module: Module, texts: str | Sequence[str], batch: int, length: int | None = None
    ) -> np.ndarray:
        """Outputs of a module of `nn.heads` for texts, float32 [n, ...], from their first `length` tokens."""
        ids = [
            self._add_bos_eos(ids) for ids in self.tokenizer.encode_batch([texts] if isinstance(texts, str) else texts)
        ]
        if not all(ids):
            raise UserError("texts: got an empty one, must have at least one character for this tokenizer")
        return self._forward_ids(module, [text[:length] for text in ids], batch)

    def _forward_ids(self, module: Module, ids: Sequence[Sequence[int]], batch: int) -> np.ndarray:
        """Outputs of a module of `nn.heads`, one per text, for texts as ids: float32 [n, ...]."""
        return np.stack([out[0] for out in self._outputs(module, ids, batch)])

    def _outputs(
        self, module: Module, ids: Sequence[Sequence[int]], batch: int, types: Sequence[Sequence[int]] | None = None
    ) -> list[np.ndarray]:
        """Outputs of a module of `nn.heads` for texts as ids, float32 [M, ...] of documents or [T, ...] of tokens.
        types: those of each text's tokens. None: all 0"""
        found: dict[int, np.ndarray] = {}
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # sorted by length, to minimise padding
        with on_mesh_of(self.params):
            for start in range(0, len(order), batch):
                group = order[start : start + batch]
                tokens, segments = self._batch([ids[i] for i in group])
                kinds = None if types is None else padded([types[i] for i in group], tokens.shape)
                out = forward(module, self.params, tokens, segments, kinds)
                out = out[0] if isinstance(out, tuple) else out
                found |= zip(group, fetch(out).astype(np.float32), strict=True)
        return [found[i] for i in range(len(ids))]

    def _add_bos_eos(self, ids: Sequence[int]) -> list[int]:
        """Token ids of a text between `bos` and `eos`."""
        return add_bos_eos(ids, self.tokenizer)

    def _batch(self, texts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Batch of texts: tokens and segments int32 [n, T], padded to one of a few lengths."""
        longest = max(map(len, texts))
        self._check_length(longest)
        shape = len(texts), min(round_up(longest), self.config.max_positions or sys.maxsize)
        return padded(texts, shape), padded([[1] * len(ids) for ids in texts], shape)


def padded(rows: Sequence[Sequence[int]], shape: tuple[int, int]) -> np.ndarray:
    """int32 of this shape, with 0 behind each row."""
    found = np.zeros(shape, np.int32)
    for number, row in enumerate(rows):
        found[number, : len(row)] = row
    return found


@functools.partial(jax.jit, static_argnums=0)
def forward(
    module: Module,
    params: Params,
    tokens: Array | np.ndarray,
    segments: Array | np.ndarray | None = None,
    token_types: Array | np.ndarray | None = None,
) -> Any:
    """Forward pass of tokens int32 [B, T], with their segments and types [B, T], on the parameters' mesh."""
    rules = module.rules.for_batch_size(len(tokens))
    rows = {"segments": segments, "token_types": token_types}
    rows = {name: reshard(x, rules("batch", None)) for name, x in rows.items() if x is not None}
    module = module.clone(rules=rules)
    return module.apply({"params": params}, reshard(tokens, rules("batch", None)), **rows)


@contextlib.contextmanager
def _new_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder, renamed to `path` on success. Raises UserError if `path` exists."""
    path = Path(path).expanduser()
    if path.exists():
        raise UserError(f"path: got {path}, which exists; choose another or delete it")
    with atomic.new(path) as partial:
        partial.mkdir()
        yield partial


def _check(config: ModelConfig, params: Params, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab > config.vocab:
        raise UserError(
            f"tokenizer: got one of {tokenizer.vocab} ids, must be at most {config.vocab}, the model's vocabulary; "
            "use the tokenizer the model was trained with"
        )
    want = {name: x.shape for name, x in declared(config.build()).items()}
    got = {name: x.shape for name, x in flat(params).items()}
    for name in sorted(want.keys() | got.keys()):
        if want.get(name) != got.get(name):
            raise UserError(
                f"params: got {name} of shape {got.get(name, '(absent)')}, must be {want.get(name, '(absent)')} "
                "for this model configuration"
            )
