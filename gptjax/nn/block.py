"""Transformer block: attention and MLP around the residual stream."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.distributed.sharding import ShardingRules
from gptjax.kernels.attention import Mask
from gptjax.nn.attention import Attention, MultiHeadAttention
from gptjax.nn.mixer import SequenceMixer
from gptjax.nn.mlp import MLP, SwiGLU
from gptjax.nn.module import ParamFactory
from gptjax.nn.norms import Norm, RMSNorm
from gptjax.nn.remat import named
from gptjax.nn.residual import PreNorm, Residual
from gptjax.types import Array, Key, PyTree, UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Inputs common to all blocks of a stack."""

    positions: Array
    """int32 [B, T], positions within the document."""
    mask: Mask
    """Attention mask."""
    bias: Array | None = None
    """float32 [N, T, S] or [B, N, T, S], added to attention scores."""
    x0: Array | None = None
    """[B, T, D], input of the first block. None: this is the first block."""
    tokens: Array | None = None
    """int32 [B, T]."""
    first_values: Array | None = None
    """[B, T, K, H], values of the first block's attention, see `ValueResidual`."""
    encoder_output: Array | None = None
    """[B, S, D], for cross-attention."""
    encoder_mask: Mask = Mask(causal=False)
    """Mask of cross-attention."""

    def map_batch(self, function: Callable[[Array], Array]) -> Context:
        """Apply `function` to every array whose first axis is B."""

        def mask(mask: Mask) -> Mask:
            names = ("query_segments", "key_segments", "prefix")
            return dataclasses.replace(mask, **{name: jax.tree.map(function, getattr(mask, name)) for name in names})

        names = ("positions", "x0", "tokens", "first_values", "encoder_output")
        rows = {name: jax.tree.map(function, getattr(self, name)) for name in names}
        return dataclasses.replace(self, mask=mask(self.mask), encoder_mask=mask(self.encoder_mask), **rows)


def dropout(x: Array, rate: float, key: Key | None) -> Array:
    """Zero elements of x with probability `rate` and divide the rest by 1 - rate. key=None: return x."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


class Block(nn.Module):
    """Transformer layer, x [B, T, D] -> [B, T, D]. With `PreNorm`, whose `read` is the norm and whose `add` is a sum:

        x = x + attention(norm_1(x))
        x = x + cross_attention(norm_2(x))           if there is one
        x = x + mlp(norm_3(x))                       norm_2 without cross-attention

    Alone:

        block = Block(attention=MultiHeadAttention(heads=8, head_size=64), hidden=2_048)
        y, _ = block.apply(params, x, Context(positions, Mask()))

    The cache entry is that of `attention.init_cache`; with cross-attention, a pair of it and that of
    `cross_attention.init_cross_cache`. The rng "dropout" enables dropout.
    """

    attention: SequenceMixer = MultiHeadAttention()
    """Sequence mixer."""
    mlp: MLP | None = SwiGLU()
    """Feed-forward part. None: no MLP."""
    hidden: int = 0
    """F, the hidden size of the MLP."""
    norm: Norm = RMSNorm()
    """Normalisation."""
    residual: Residual = PreNorm()
    """Arrangement of the sublayers around the residual stream."""
    cross_attention: Attention | None = None
    """Attention to `context.encoder_output`, between self-attention and MLP. None: no cross-attention."""
    bias: bool = False
    """Biases in the MLP."""
    dropout: float = 0.0
    """Dropout rate of attention probabilities and residual updates."""
    layer_drop: float = 0.0
    """Probability of skipping this block in training (LayerDrop, arXiv:1909.11556)."""
    output_scale: float = 1.0
    """Factor of the initial weights that write to the residual stream."""
    hidden_init_scale: float = 1.0
    """Factor of the initial hidden matrices."""
    rules: ShardingRules = ShardingRules()
    """Mesh axes of the parameters' logical axes."""
    dtype: str = "float32"
    """Compute dtype."""
    float8: bool = False
    """In training, compute the products of matrices in 8 bits."""

    @nn.compact
    def __call__(self, x: Array, context: Context, cache: PyTree = None) -> tuple[Array, PyTree]:
        """Output, and new cache entry or None."""
        param = ParamFactory.for_module(self, self.rules, self.dtype, self.hidden_init_scale, self.float8)
        norm = functools.partial(self._norm, param)
        read, add = functools.partial(self.residual.read, norm), functools.partial(self.residual.add, norm)
        c, options = context, {"output_scale": self.output_scale, "dropout": self.dropout}
        encoder_output, before = c.encoder_output, x
        if self.cross_attention is not None and cache is not None:
            cache, encoder_output = cache

        x = self.residual.begin(param, norm, x, x if c.x0 is None else c.x0)

        shared = {"bias": c.bias, "tokens": c.tokens, "first_values": c.first_values}
        attention, key = param.child("attention"), self._key() if self.dropout else None
        y, cache = self.attention(attention, read(1, x), c.positions, c.mask, cache, **shared, **options, key=key)
        x = add(1, x, self._dropout(param, "attention", y))

        if self.cross_attention is not None:
            if encoder_output is None:
                raise UserError("encoder_output: got None, must be given to a model that has cross-attention")
            attention, key = param.child("cross_attention"), self._key() if self.dropout else None
            shared = {"encoder_output": encoder_output}
            y, _ = self.cross_attention(
                attention, read(2, x), c.positions, c.encoder_mask, **shared, **options, key=key
            )
            x = add(2, x, self._dropout(param, "cross_attention", y))

        if self.mlp is not None:
            i = 2 if self.cross_attention is None else 3
            segments = c.mask.query_segments if self.mlp.routes else None
            padded = {} if segments is None else {"mask": segments > 0}
            y = self.mlp(param.child("mlp"), read(i, x), self.hidden, self.bias, self.output_scale, **padded)
            x = add(i, x, self._dropout(param, "mlp", y))

        x = self.residual.end(x)
        if self.layer_drop and (key := self._key()) is not None:
            x = jnp.where(jax.random.bernoulli(key, self.layer_drop), before, x)
        return x, cache if self.cross_attention is None or cache is None else (cache, encoder_output)

    def _norm(self, param: ParamFactory, name: str, x: Array) -> Array:
        y = self.norm(param.child(name), x)
        param.capture(f"{name}_output", y)
        return y

    def _dropout(self, param: ParamFactory, name: str, y: Array) -> Array:
        """Dropout on the output of a sublayer."""
        param.capture(f"{name}_output", y)
        y = named(y, f"{name.removeprefix('cross_')}_output")
        return dropout(y, self.dropout, self._key())

    def _key(self) -> Key | None:
        """A new dropout key. None: no dropout."""
        return self.make_rng("dropout") if self.has_rng("dropout") else None
