"""An encoder behind one door; it fills in what is hidden, and makes vectors of texts:

bert = gptjax.load("google-bert/bert-base-uncased", kind=gptjax.EncoderModel)
bert.fill("Paris is the [MASK] of France.")[0][0].text
bert.embed(["A text.", "Another."])                           # float32 [2, 768]
bert.save_hf("for/transformers")
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.distributed.sharding import on_mesh_of
from gptjax.models.model import TextEncoder, run
from gptjax.nn import EncoderConfig
from gptjax.types import Array, UserError


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A token that may be the one behind a mask."""

    text: str
    id: int
    probability: float


@dataclasses.dataclass(frozen=True, eq=False)
class EncoderModel(TextEncoder):
    """A model that reads, as BERT. Raises UserError when it, its parameters and its tokenizer don't fit together."""

    config: EncoderConfig

    def logits(
        self, tokens: Array | np.ndarray | Sequence[Sequence[int]], segments: Array | np.ndarray | None = None
    ) -> Array:
        """tokens int [B, T] -> logits [B, T, V] of what each is, in the compute dtype.

        segments  int [B, T]; tokens see their own segment only, so padding has one of its own, 0; None: all one"""
        ids = jnp.asarray(tokens, jnp.int32)
        segments = None if segments is None else jnp.asarray(segments, jnp.int32)
        self._fits(ids.shape[-1])
        with on_mesh_of(self.params):
            return run(self._module, self.params, ids, segments)[0]

    def fill(self, text: str, top: int = 5) -> list[list[Candidate]]:
        """The `top` likeliest tokens for each mask of the text, from left to right: each mask by itself, while all are
        hidden. A mask is written as the tokenizer names it: "[MASK]" for BERT."""
        if not 1 <= top <= self.tokenizer.vocab:
            raise UserError(f"top: got {top}, must be 1 to {self.tokenizer.vocab}, the tokens there are")
        mask = self.tokenizer.specials.get("<|mask|>")
        names = [name for name, i in self.tokenizer.specials.items() if i == mask]
        if mask is None:
            raise UserError("tokenizer: got one without a mask, must have one to fill in; <|mask|> is its name")
        parts = re.split("|".join(map(re.escape, names)), text)
        if len(parts) == 1:
            raise UserError(f"text: got none of {' or '.join(names)} in it, must be at least one, for what is hidden")
        first, *rest = self.tokenizer.encode_batch(parts)
        ids = self._frame([*first, *(i for part in rest for i in (mask, *part))])
        tokens, segments = self._rows([ids])
        logits = np.asarray(self.logits(tokens, segments), np.float32)[0, : len(ids), : self.tokenizer.vocab]
        return [self._likeliest(logits[at], top) for at, token in enumerate(ids) if token == mask]

    def _likeliest(self, logits: np.ndarray, top: int) -> list[Candidate]:
        """Of logits [V]."""
        probabilities = np.asarray(jax.nn.softmax(logits))
        ids = np.argsort(-logits, kind="stable")[:top].tolist()
        return [Candidate(self.tokenizer.decode([i]), i, float(probabilities[i])) for i in ids]
