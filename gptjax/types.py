"""The few types that every room shares. Dimension letters: B batch, T query length, S key length, D width,
N heads, K key/value heads, H head size, F hidden, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

Array = jax.Array
Key = jax.Array
"""A typed random key, `jax.random.key(0)`."""
Params = Any
"""A nested dict of arrays."""
Metrics = dict[str, tuple[Array, Array]]
"""Name -> (sum, weight). Sums add up over microbatches, steps and hosts; the division happens once, at the end."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed token rows, all `[B, T]`. numpy on the host, `jax.Array` once on the devices.

    tokens     int32    what the model reads
    targets    int32    what it should say next: `targets[b, t]` follows `tokens[b, t]` in the same document
    weights    float32  how much each target counts; 0 on padding and on text that is only context
    segments   int32    which document of the row a token is of, from 1; 0 is padding
    positions  int32    place within the document, from 0
    """

    tokens: Array | np.ndarray
    targets: Array | np.ndarray
    weights: Array | np.ndarray
    segments: Array | np.ndarray
    positions: Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pair(Batch):
    """A batch whose rows are each written with a source in view, `[B, S]`: translation, T5.

    source            int32    what the encoder reads
    source_segments   int32    a target sees what is of its own segment in the source; 0 is padding
    source_positions  int32    place within the document, from 0
    """

    source: Array | np.ndarray
    source_segments: Array | np.ndarray
    source_positions: Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Labelled(Batch):
    """A batch whose documents each have a label. What the row's segment m is of has the label `labels[b, m - 1]`.

    labels  int32, [B, M]: a class, from 0; -1 where there is no document, or none that counts
    """

    labels: Array | np.ndarray


Loss = Callable[[Params, Batch, Key | None], Metrics]
"""An objective of a certain model: metrics whose "loss" entry is the (sum, weight) to minimise. No key: no dropout."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What an evaluation finds: numbers for programs, a few lines of Markdown for people."""

    title: str
    """Heading in the report."""
    values: dict[str, float]
    """Name -> number; units in the name."""
    markdown: str
    """The finding, to read."""


class UserError(ValueError):
    """A mistake in what the user gave. Its text is one line that names the field, what it got and what it can be;
    the command line prints it alone and leaves with exit code 2."""


def one_line(error: BaseException) -> str:
    """An error's message, or its type where it has none, to be part of a line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
