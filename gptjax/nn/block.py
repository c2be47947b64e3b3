"""The block of a transformer: attention and MLP, joined to the residual stream."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.distributed.sharding import ShardingRules
from gptjax.kernels.attention import Mask
from gptjax.nn.attention import Attention, MultiHeadAttention
from gptjax.nn.mlp import MLP, SwiGLU
from gptjax.nn.module import Layer, ParamFactory
from gptjax.nn.norms import Norm, RMSNorm
from gptjax.nn.residual import PreNorm, Residual
from gptjax.types import Array, Key, UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every block of a stack sees beside its input."""

    positions: Array
    """int32 [B, T], places within the document."""
    mask: Mask
    """Which tokens see which."""
    bias: Array | None = None
    """float32 [N, T, S], added to attention scores."""
    start: Array | None = None
    """[B, T, D], what the first block got."""
    tokens: Array | None = None
    """int32 [B, T]."""
    first: Array | None = None
    """[B, T, K, H], the values of the first block's attention, for attention that mixes them in."""
    source: Array | None = None
    """[B, S, D], what cross-attention reads."""
    source_mask: Mask = Mask(causal=False)
    """Which tokens of the source cross-attention sees."""

    def over_rows(self, function: Callable[[Array], Array]) -> Context:
        """With the function of every array whose first axis is B."""

        def mask(mask: Mask) -> Mask:
            names = ("query_segments", "key_segments", "prefix")
            return dataclasses.replace(mask, **{name: jax.tree.map(function, getattr(mask, name)) for name in names})

        rows = {
            n: jax.tree.map(function, getattr(self, n)) for n in ("positions", "start", "tokens", "first", "source")
        }
        return dataclasses.replace(self, mask=mask(self.mask), source_mask=mask(self.source_mask), **rows)


def dropout(x: Array, rate: float, key: Key | None) -> Array:
    """x with a share `rate` of its elements zeroed and the rest scaled up to keep the mean; x itself without a key."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


class Block(nn.Module):
    """x [B, T, D] -> [B, T, D]. Alone:

        block = Block(attention=MultiHeadAttention(heads=8, head_size=64), hidden=2_048)
        y, _ = block.apply(params, x, Context(positions, Mask()))

    With slots, those of a `Cache`'s layer, for incremental decoding: what `attention.slots` makes, and in a block that
    has cross-attention the pair of that and of what `cross.memory` makes of the source. Dropout is on when the rng
    "dropout" is given.
    """

    attention: Attention = MultiHeadAttention()
    mlp: MLP | None = SwiGLU()
    """None: there is none."""
    hidden: int = 0
    """F, the hidden size of the MLP."""
    norm: Norm = RMSNorm()
    residual: Residual = PreNorm()
    cross_attention: Attention | None = None
    """Attention to `context.source`, between the other two; none: there is none."""
    bias: bool = False
    """Whether the MLP's linear layers have biases."""
    dropout: float = 0.0
    """Share of attention probabilities and residual updates that training drops."""
    drop: float = 0.0
    """Share of the times that training leaves this block out (LayerDrop, arXiv:1909.11556)."""
    output_scale: float = 1.0
    """Multiplies the initial weights of what is added to the stream."""
    matrix_scale: float = 1.0
    """Multiplies the initial hidden matrices."""
    rules: ShardingRules = ShardingRules()
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array, context: Context, slots: Any = None) -> tuple[Array, Any]:
        layer = functools.partial(Layer, rules=self.rules, dtype=self.dtype, matrix_scale=self.matrix_scale)
        scales = {"output_scale": self.output_scale}

        def key() -> Key | None:
            return self.make_rng("dropout") if self.has_rng("dropout") else None

        def draw() -> dict[str, Any]:
            return {"dropout": self.dropout, "key": key() if self.dropout else None}

        source = context.source
        if self.cross_attention is not None and slots is not None:
            slots, source = slots

        def attend(h: Array) -> Array:
            nonlocal slots
            module = layer(part=self.attention, name="attention")
            args = (h, context.positions, context.mask, slots)
            seen = {"bias": context.bias, "tokens": context.tokens, "first": context.first}
            y, slots = module(*args, **seen, **scales, **draw())
            return dropout(y, self.dropout, key())

        def cross(part: Attention, h: Array) -> Array:
            module = layer(part=part, name="cross_attention")
            y, _ = module(h, context.positions, context.source_mask, source=source, **scales, **draw())
            return dropout(y, self.dropout, key())

        def feed(part: MLP, h: Array) -> Array:
            y = layer(part=part, name="mlp")(h, self.hidden, self.bias, self.output_scale)
            return dropout(y, self.dropout, key())

        def norm(name: str, h: Array) -> Array:
            return layer(part=self.norm, name=name)(h)

        sublayers: list[Callable[[Array], Array]] = [attend]
        if self.cross_attention is not None:
            if source is None:
                raise UserError("source: got none, must be given to a model that has cross-attention")
            sublayers.append(functools.partial(cross, self.cross_attention))
        if self.mlp is not None:
            sublayers.append(functools.partial(feed, self.mlp))
        start = x if context.start is None else context.start
        y = self.residual(ParamFactory(self, self.rules, self.dtype), x, start, norm, sublayers)
        skip = key() if self.drop else None
        if skip is not None:
            y = jnp.where(jax.random.bernoulli(skip, self.drop), x, y)
        return y, slots if self.cross_attention is None or slots is None else (slots, source)
