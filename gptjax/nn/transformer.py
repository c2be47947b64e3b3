"""The decoder-only transformer: embedding, L pre-norm blocks, final norm, head. This is the GPT."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gptjax.kernels.attention import Mask
from gptjax.kernels.embedding import embed
from gptjax.kernels.linear import linear
from gptjax.nn import cache as kv
from gptjax.nn.attention import MultiHeadAttention
from gptjax.nn.cache import Cache
from gptjax.nn.mlp import MLP, SwiGLU
from gptjax.nn.module import Layer, Module, normal
from gptjax.nn.norms import Norm, RMSNorm
from gptjax.nn.positions import Positions, RoPE
from gptjax.sharding import Rules
from gptjax.types import Array, Key, Params, UserError

UNROLLED = 12
"""Depth up to which the scan over layers is unrolled: 8 to 15 % off a training step on CPU, where slices are copies."""


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The shape and the parts of a decoder."""

    vocab: int
    """V, the number of token ids."""
    layers: int
    """L, the number of blocks."""
    width: int
    """D, the size of the residual stream."""
    heads: int
    """N, the number of query heads."""
    kv_heads: int | None = None
    """K, the number of key/value heads that the query heads share; none: one each."""
    head_size: int | None = None
    """H, the size of a head; none: width / heads."""
    hidden: int | None = None
    """F, the hidden size of the MLP; none: 4 x width, or 8/3 x width rounded up to a multiple of 8 when gated."""
    positions: Positions = RoPE()
    """Position encoding."""
    norm: Norm = RMSNorm()
    """Normalisation before attention, before the MLP and before the head."""
    mlp: MLP = SwiGLU()
    """Feed-forward part."""
    bias: bool = False
    """Whether the linear layers have biases."""
    dropout: float = 0.0
    """Share of embeddings, attention probabilities and residual updates that training drops."""
    tied: bool = True
    """Whether the head is the transposed embedding."""
    remat: str | None = None
    """What the backward pass keeps, not computes again: a name in `jax.checkpoint_policies`; none: everything."""
    dtype: str = "float32"
    """Compute dtype: float32 or bfloat16. Parameters are float32 always."""

    def __post_init__(self):
        for field in ("vocab", "layers", "width", "heads"):
            if getattr(self, field) < 1:
                raise UserError(f"model.{field}: got {getattr(self, field)}, must be at least 1")
        if self.head_size is None and self.width % self.heads:
            divisors = [n for n in range(1, self.width + 1) if self.width % n == 0]
            near = sorted(divisors, key=lambda n: abs(n - self.heads))[:3]
            raise UserError(
                f"model.heads: got {self.heads}, which does not divide model.width {self.width}; "
                f"use {', '.join(map(str, sorted(near)))}, or set model.head_size"
            )
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise UserError(f"model.kv_heads: got {self.kv_heads}, must divide model.heads {self.heads}")
        if isinstance(self.positions, RoPE) and self.H % 2:
            raise UserError(f"model.head_size: got {self.H}, must be even for rotary positions, which turn pairs")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout: got {self.dropout}, must be at least 0 and less than 1")
        if self.remat is not None and not hasattr(jax.checkpoint_policies, self.remat):
            names = ", ".join(name for name in dir(jax.checkpoint_policies) if not name.startswith("_"))
            raise UserError(f"model.remat: got {self.remat!r}, must be None or one of {names}")
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"model.dtype: got {self.dtype!r}, must be float32 or bfloat16")

    @property
    def H(self) -> int:
        """The size of a head."""
        return self.head_size or self.width // self.heads

    @property
    def K(self) -> int:
        """The number of key/value heads."""
        return self.kv_heads or self.heads

    @property
    def F(self) -> int:
        """The hidden size of the MLP."""
        return self.hidden or (-(-8 * self.width // 24) * 8 if self.mlp.gated else 4 * self.width)

    def flops(self, length: int) -> int:
        """FLOPs of training on one token, forward and backward, at this context length: 6 for every weight of a matrix
        product, and 12 D T a layer for attention scores and sums (PaLM, arXiv:2204.02311, appendix B; not halved for
        causality, as is usual)."""
        attention = self.width * self.H * (2 * self.heads + 2 * self.K)
        mlp = self.width * self.F * (3 if self.mlp.gated else 2)
        weights = self.layers * (attention + mlp) + self.vocab * self.width
        return 6 * weights + 12 * self.layers * self.heads * self.H * length


def dropout(x: Array, rate: float, key: Key | None) -> Array:
    """x with a share `rate` of its elements zeroed and the rest scaled up to keep the mean; x itself without a key."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


class Block(Module, kw_only=True):
    """x + attention(norm(x)), then x + mlp(norm(x)): the pre-norm block of GPT-2. x [B, T, D] -> [B, T, D]."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: Array, positions: Array, mask: Mask, slots: tuple[Array, Array] | None = None
    ) -> tuple[Array, tuple[Array, Array] | None]:
        c = self.config
        scale = (2 * c.layers) ** -0.5
        layer = functools.partial(Layer, rules=self.rules, dtype=c.dtype)
        attention = MultiHeadAttention(
            heads=c.heads,
            head_size=c.H,
            kv_heads=c.K,
            positions=c.positions,
            bias=c.bias,
            dropout=c.dropout,
            scale=scale,
            rules=self.rules,
            dtype=c.dtype,
            name="attention",
        )

        def drop(y: Array) -> Array:
            return dropout(y, c.dropout, self.make_rng("dropout") if self.has_rng("dropout") else None)

        y, slots = attention(layer(part=c.norm, name="norm_1")(x), positions, mask, slots)
        x = x + drop(y)
        h = layer(part=c.norm, name="norm_2")(x)
        y = layer(part=c.mlp, name="mlp")(h, c.F, c.bias, scale, self.rules)
        return x + drop(y), slots


class Transformer(nn.Module):
    """Tokens to next-token logits.

        model = Transformer(TransformerConfig(vocab=256, layers=4, width=128, heads=4))
        params = model.init(jax.random.key(0), tokens)["params"]
        logits, _ = model.apply({"params": params}, tokens)                 # [B, T] -> [B, T, V]

    The blocks' parameters are stacked, with a leading axis L, and `lax.scan` runs over them, so that compile time does
    not grow with depth. With a cache the layers are unrolled instead; `unstack` the parameters once before a loop of
    decoding steps. Dropout is on when the rng "dropout" is given.
    """

    config: TransformerConfig
    rules: Rules = Rules()

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        segments: Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[Array, Cache | None]:
        """tokens int32 [B, T] -> logits [B, T, V] in the compute dtype, and the cache with T more slots filled.

        positions  int32 [B, T], places within the document; None: 0 .. T-1, after what the cache holds
        segments   int32 [B, T]; tokens attend within their own segment only; None: all one segment
        """
        c, rules = self.config, self.rules
        if positions is None:
            start = cache.length if cache is not None else 0
            positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
        dropout_key = self.make_rng("dropout") if c.dropout and self.has_rng("dropout") else None
        layer = functools.partial(Layer, rules=rules, dtype=c.dtype)

        table = self.param("embedding", lambda key: _init(key, (c.vocab, c.width), rules("vocab", "embed")))
        table = jnp.asarray(table, c.dtype)
        x = embed(table, tokens, rules("vocab", None), rules("batch", "sequence", None))
        x = layer(part=c.positions, name="positions")(x, positions)
        x = dropout(x, c.dropout, None if dropout_key is None else jax.random.fold_in(dropout_key, 0))
        x, cache = self._blocks(x, positions, segments, cache, dropout_key)
        x = layer(part=c.norm, name="norm")(x)
        if c.tied:
            head = table.T
        else:
            head = self.param("head", lambda key: _init(key, (c.width, c.vocab), rules("embed", "vocab")))
        logits = linear(x, jnp.asarray(head, c.dtype), rules("batch", "sequence", "vocab"))
        return logits, cache

    def _blocks(
        self, x: Array, positions: Array, segments: Array | None, cache: Cache | None, dropout_key: Key | None
    ) -> tuple[Array, Cache | None]:
        c = self.config
        block = Block(config=c, rules=self.rules, parent=None)

        def init(key: Key) -> Params:
            one = functools.partial(block.init, x=x, positions=positions, mask=Mask())
            return jax.vmap(lambda key: one(key)["params"])(jax.random.split(key, c.layers))

        if self.is_initializing():
            self.param("blocks", init)
        stack = self.get_variable("params", "blocks")

        def run(x: Array, params: Params, mask: Mask, key: Key | None, slots=None):
            rngs = None if key is None else {"dropout": key}
            return block.apply({"params": params}, x, positions, mask, slots, rngs=rngs)

        if cache is None:
            mask = Mask(query_segments=segments, key_segments=segments)

            def body(x: Array, layer: tuple[Params, Key | None]):
                return run(x, layer[0], mask, layer[1])[0], None

            if c.remat is not None:
                body = jax.checkpoint(body, policy=getattr(jax.checkpoint_policies, c.remat))
            keys = None if dropout_key is None else jax.random.split(jax.random.fold_in(dropout_key, 1), c.layers)
            unroll = c.layers if c.layers <= UNROLLED else 1
            return lax.scan(body, x, (stack, keys), unroll=unroll)[0], None

        if segments is None:
            segments = jnp.ones_like(x[..., 0], jnp.int32)
        filled = kv.write(cache.segments, segments, cache.length, axis=1)
        mask = Mask(offset=cache.length, query_segments=segments, key_segments=filled)
        slots = []
        for params, keys, values in zip(unstack(stack), cache.keys, cache.values, strict=True):
            x, new = run(x, params, mask, None, (keys, values))
            slots.append(new)
        keys, values = zip(*slots, strict=True)
        return x, Cache(keys, values, filled, cache.length + x.shape[1])


def unstack(blocks: Params) -> tuple[Params, ...]:
    """Stacked block parameters, leaves [L, ...] -> one tree a layer. Does nothing to what is unstacked already."""
    if isinstance(blocks, tuple):
        return blocks
    layers = jax.tree.leaves(blocks)[0].shape[0]
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], blocks) for i in range(layers))


def make_cache(config: TransformerConfig, batch: int, size: int, rules: Rules = Rules()) -> Cache:
    """An empty cache of `size` slots for this model."""
    sharding = rules("batch", "kv_heads", None, None)
    return kv.empty(config.layers, batch, size, config.K, config.H, config.dtype, sharding)


def count(params: Params) -> int:
    """How many numbers there are in a tree of parameters."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def _init(key: Key, shape: tuple[int, ...], sharding) -> Array:
    return normal(key, shape, jnp.float32, out_sharding=sharding)
