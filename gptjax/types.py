"""Types that all packages share. Dimension letters: B batch, T query length, S key length, D width,
N heads, K key/value heads, H head size, F hidden, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

Array = jax.Array
Key = jax.Array
"""A typed random key, `jax.random.key(0)`."""
Params = Any
"""A nested dict of arrays."""
PyTree = Any
"""Any nesting of dicts, tuples, lists and registered dataclasses, with arrays, or other leaves, in it."""
Json = Any
"""A value read from JSON, or from a table: dict, list, str, int, float, bool or None, not yet checked."""
BESIDE = "objective"
"""Name, in the trained parameters, of those that an objective trains beside the model's."""
Metrics = dict[str, tuple[Array, Array]]
"""Name -> (sum, weight). Sums add up over microbatches, steps and hosts; the division happens once, at the end."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed sequences of tokens, all `[B, T]`: numpy on the host, `jax.Array` on devices.

    tokens     int32    input tokens
    targets    int32    next tokens: `targets[b, t]` follows `tokens[b, t]` in the same document
    weights    float32  weight of each target in the loss; 0 on padding and context
    segments   int32    number of the token's document in its sequence, from 1; 0: padding
    positions  int32    position within the document, from 0
    """

    tokens: Array | np.ndarray
    targets: Array | np.ndarray
    weights: Array | np.ndarray
    segments: Array | np.ndarray
    positions: Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pair(Batch):
    """A batch of sequence-to-sequence pairs with sources `[B, S]`: translation, T5.

    source            int32    tokens of the encoder
    source_segments   int32    a target attends to the source of its own segment; 0: padding
    source_positions  int32    position within the source, from 0
    """

    source: Array | np.ndarray
    source_segments: Array | np.ndarray
    source_positions: Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Labelled(Batch):
    """A batch whose documents have labels: segment m of sequence b has the label `labels[b, m - 1]`.

    labels  [B, M]: int32, class, from 0; -1: no document, or one without a weight; of a regression float32, number
    """

    labels: Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AnswerSpans(Labelled):
    """A batch of questions, each before its passage, one per sequence.

    labels  int32 [B, 3]: first token of the passage, first and last token of the answer, which are 0 if it has none;
            -1: padding
    """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenLabelled(Batch):
    """A batch whose tokens have labels: `targets[b, t]` is the class of `tokens[b, t]`, and `weights[b, t]` its
    weight."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SimilarPairs(Batch):
    """A batch of pairs of similar texts, one pair per sequence, in segments 1 and 2."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PreferencePairs(Batch):
    """A batch of pairs of conversations, one pair per sequence: segment 1 has the chosen reply, segment 2 the rejected
    one. Only the tokens of the replies have a weight.

    margins  float32 [B]  degree to which the chosen reply is better, for reward models. None: 0
    """

    margins: Array | np.ndarray | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LabelledReplies(Batch):
    """A batch of conversations whose last reply people found desirable or not, one per sequence. Only the tokens of
    that reply have a weight.

    desirable  float32 [B]  1: desirable; 0: undesirable, or padding
    """

    desirable: Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Episodes(Batch):
    """A batch of replies that a policy wrote, one per sequence, with their rewards. Replies to one prompt are one
    group, whose sequences follow one another. Tokens that the policy chose have a weight of 1; those of the prompt and
    of tools have none.

    logprobs     float32 [B, T]  log-probability of each target in the distribution that it was drawn from; 0 without a
                                 weight
    versions     int32 [B, T]    training step of the policy that drew each target; -1 without a weight
    rewards      float32 [B]     reward of the whole reply
    groups       int32 [B]       number of its prompt in the batch, from 0; -1: no reply, or one that does not count
    finished     float32 [B]     1: the reply ended by itself; 0: cut off at its maximum length
    temperature  float32 [B]     temperature of sampling: probabilities are softmax(logits / temperature)
    """

    logprobs: Array | np.ndarray
    versions: Array | np.ndarray
    rewards: Array | np.ndarray
    groups: Array | np.ndarray
    finished: Array | np.ndarray
    temperature: Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FrozenModel:
    """A model that a training step reads and does not train, such as a teacher: an argument of the step."""

    params: Params
    module: Any = dataclasses.field(metadata={"static": True})
    """A `protocols.Module`."""


Loss = Callable[[Params, Batch, Key | None], Metrics]
"""An objective of a certain model: metrics whose "loss" entry is the (sum, weight) to minimise. No key: no dropout."""


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of an evaluation: numbers for programs, a few lines of Markdown for people."""

    title: str
    """Heading in the report."""
    values: dict[str, float]
    """Name -> number; units in the name."""
    markdown: str
    """The finding, to read."""
    items: tuple[Mapping[str, Any], ...] = ()
    """Results of single items, of JSON types: with "item", its "cluster" and its "outcome" if they have a mean. A run
    writes them as JSON lines beside its report."""


class UserError(ValueError):
    """A user's mistake. The message is one line that names the field, its value and the legal values; the command line
    prints only that line and exits with code 2."""


class Unavailable(UserError):
    """A service that a run needs does not answer. A run that trains stops at a checkpoint, to be resumed later."""


def one_line(error: BaseException) -> str:
    """An error's message on one line, or the name of its type if it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__
