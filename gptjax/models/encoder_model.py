"""API of an encoder: it predicts masked tokens, and embeds texts:

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
from gptjax.models.model import TextEncoder, forward
from gptjax.nn import EncoderConfig
from gptjax.types import Array, UserError


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A candidate for a masked token."""

    text: str
    id: int
    probability: float


@dataclasses.dataclass(frozen=True, eq=False)
class EncoderModel(TextEncoder):
    """An encoder such as BERT. Raises UserError if configuration, parameters and tokenizer do not match."""

    config: EncoderConfig

    def logits(
        self, tokens: Array | np.ndarray | Sequence[Sequence[int]], segments: Array | np.ndarray | None = None
    ) -> Array:
        """tokens int [B, T] -> logits [B, T, V] of each token, in the compute dtype.

        segments  int [B, T]; tokens attend to their own segment only. Padding is segment 0. None: a single segment
        """
        self._check_ids(tokens)
        ids = jnp.asarray(tokens, jnp.int32)
        segments = None if segments is None else jnp.asarray(segments, jnp.int32)
        with on_mesh_of(self.params):
            return forward(self._module, self.params, ids, segments)[0]

    def fill(self, text: str, top: int = 5) -> list[list[Candidate]]:
        """The `top` most likely tokens for each mask of the text, in order. Each is predicted independently, with all
        masks in place. A mask is written as in the tokenizer: "[MASK]" for BERT."""
        if not 1 <= top <= self.tokenizer.vocab:
            raise UserError(f"top: got {top}, must be 1 to {self.tokenizer.vocab}, the size of the vocabulary")
        mask = self.tokenizer.specials.get("<|mask|>")
        names = [name for name, i in self.tokenizer.specials.items() if i == mask]
        if mask is None:
            raise UserError("tokenizer: got one without a mask token, must have one; its name is <|mask|>")
        before, after = (r"\s*" if strips else "" for strips in self.tokenizer.strips(mask))
        parts = re.split(f"{before}(?:{'|'.join(map(re.escape, names))}){after}", text)
        if len(parts) == 1:
            raise UserError(f"text: got none of {' or '.join(names)} in it, must have at least one mask")
        first, *rest = self.tokenizer.encode_batch(parts)
        ids = self._add_bos_eos([*first, *(i for part in rest for i in (mask, *part))])
        tokens, segments = self._batch([ids])
        logits = np.asarray(self.logits(tokens, segments), np.float32)[0, : len(ids), : self.tokenizer.vocab]
        return [self._likeliest(logits[at], top) for at, token in enumerate(ids) if token == mask]

    def _likeliest(self, logits: np.ndarray, top: int) -> list[Candidate]:
        """Most likely tokens of logits [V]."""
        probabilities = np.asarray(jax.nn.softmax(logits))
        ids = np.argsort(-logits, kind="stable")[:top].tolist()
        return [Candidate(self.tokenizer.decode([i]), i, float(probabilities[i])) for i in ids]
