"""Recurrent layers in place of attention, and recurrent language models as baselines.

    Transformer(RecurrentConfig(vocab=256, layers=2, width=512))                          a stacked LSTM
    Transformer(RecurrentConfig(vocab=256, layers=2, width=512, attention=GRU()))

They train and decode like any other model: the cache has the state after each token, as that of attention has its key
and value. A recurrent layer can be part of a transformer:
`TransformerConfig(..., pattern=(LayerOverrides(attention=GRU()), LayerOverrides()))`.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from gptjax.distributed.sharding import ShardingRules
from gptjax.kernels.attention import Mask
from gptjax.kernels.linear import linear
from gptjax.nn import cache as kv
from gptjax.nn.mixer import SequenceMixer
from gptjax.nn.mlp import MLP
from gptjax.nn.module import ParamFactory, zeros
from gptjax.nn.positions import Positions
from gptjax.nn.residual import NoResidual, Residual
from gptjax.nn.transformer import TransformerConfig
from gptjax.types import Array, Key, UserError

State = tuple[Array, ...]
"""[B, D] each. The first is the layer's output."""


@dataclasses.dataclass(frozen=True)
class Recurrent(SequenceMixer):
    """A part `cell(param, x [B, T, D], positions, mask, cache) -> (y [B, T, D], cache)`: y_t depends on x_0 .. x_t.

    The state is zero at the start of each segment. The cache entry has the state after each token, arrays [B, 1, S, D]:
    as much memory as keys and values, but any token can be the last one.

    layer = LSTM() params = layer.init(key, x, positions) y, _ = layer.apply(params, x, positions)
    """

    sequential = True

    gates: ClassVar[int]
    """G, matrix products per unit."""
    states: ClassVar[int] = 1
    """Number of arrays in the state."""

    @abc.abstractmethod
    def step(self, state: State, read: Array, said: Array) -> State:
        """Next state, from the products with the input and with the previous output, [B, G, D] each, biases
        included."""

    def __call__(
        self,
        param: ParamFactory,
        x: Array,
        positions: Array | None = None,
        mask: Mask = Mask(),
        cache: State | None = None,
        **options: Any,
    ) -> tuple[Array, State | None]:
        (B, T, D), G, rules = x.shape, self.gates, param.rules
        if not mask.causal or mask.prefix is not None:
            raise UserError(
                f"model.attention: got {type(self).__name__}, which is causal, must be a bidirectional one "
                "in an encoder, as `cross_attention` and with a prefix"
            )
        if cache is None and (cut := rules.mesh_axes("sequence")):
            raise UserError(f"mesh.{cut[0]}: shards sequences, must be 1: recurrent layers read tokens in order")
        # PyTorch's deviation, that of U(-1, 1) / sqrt(D).
        spread = jax.nn.initializers.normal((3 * D) ** -0.5)
        into = param("input", (D, G, D), ("embed", None, None), spread, scale_init=False)
        read = linear(x, into, rules("batch", "sequence", None, None))
        read = read + param("input_bias", (G, D), (None, None), self.input_bias_init, kind="other")
        again = param("recurrent", (D, G, D), ("embed", None, None), spread, scale_init=False)
        again = again if (whole := rules(None, None, None)) is None else jax.reshard(again, whole)
        bias = param("recurrent_bias", (G, D), (None, None), zeros, kind="other")
        segments, begins = mask.query_segments, jnp.zeros((B, T), bool)
        before = tuple(jnp.zeros((B, D), x.dtype, out_sharding=rules("batch", None)) for _ in range(self.states))
        if cache is not None:
            before = tuple(kv.last(entry, mask)[:, 0] for entry in cache)  # of a row without tokens, another text's
            begins = jnp.broadcast_to(mask.distance(T, 1)[..., 0] == 0, (B, T))
        elif segments is not None:
            begins = jnp.concatenate([jnp.zeros_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], 1)

        def step(state: State, inputs: tuple[Array, Array]) -> tuple[State, Array]:
            read, begins = inputs
            state = tuple(jnp.where(begins[:, None], 0, part) for part in state)
            new = self.step(state, read, linear(state[0], again, rules("batch", None, None)) + bias)
            return new, new[0]

        inputs = read.swapaxes(0, 1), begins.T
        if cache is None:
            return lax.scan(step, before, inputs)[1].swapaxes(0, 1), None

        def keep(t: Array, carry: tuple[State, State]) -> tuple[State, State]:
            at = functools.partial(lax.dynamic_index_in_dim, index=t, keepdims=False)
            state, _ = step(carry[0], (at(inputs[0]), at(inputs[1])))
            pairs = zip(carry[1], state, strict=True)
            return state, tuple(lax.dynamic_update_index_in_dim(all, one, t, 0) for all, one in pairs)

        # Padding is at the end: the loop does not reach it.
        length = T if segments is None else jnp.max(jnp.sum(segments > 0, 1))
        empty = jnp.zeros((T, B, D), x.dtype, out_sharding=rules(None, "batch", None))
        _, states = lax.fori_loop(0, length, keep, (before, (empty,) * self.states))
        states = tuple(part.swapaxes(0, 1) for part in states)
        new = tuple(kv.write(entry, part[:, :, None], mask) for entry, part in zip(cache, states, strict=True))
        return states[0], new

    def input_bias_init(
        self, key: Key, shape: tuple[int, ...], dtype: DTypeLike, out_sharding: PartitionSpec | None = None
    ) -> Array:
        """Initial biases [G, D] of the products with the input."""
        return zeros(key, shape, dtype, out_sharding=out_sharding)

    def init_cache(
        self, batch: int, size: int, width: int, dtype: DTypeLike = "float32", rules: ShardingRules = ShardingRules()
    ) -> State:
        """States after each token, [B, 1, S, D] each."""
        sharding = rules("batch", None, None, None)
        return tuple(jnp.zeros((batch, 1, size, width), dtype, out_sharding=sharding) for _ in range(self.states))

    def matmul_params(self, width: int, length: int) -> int:
        return 2 * self.gates * width**2


@dataclasses.dataclass(frozen=True)
class LSTM(Recurrent):
    """Long short-term memory (Hochreiter and Schmidhuber 1997) with a forget gate (Gers et al. 2000), as in PyTorch:

    i, f, o = sigmoid(...),  g = tanh(...)            each of W x_t + b + U h_(t-1) + b', in the order i, f, g, o c_t =
    f c_(t-1) + i g,   h_t = o tanh(c_t)
    """

    forget_bias: float = 1.0
    """Initial bias of the forget gate. Above 0 it remembers (Jozefowicz et al. 2015)."""

    gates = 4
    states = 2

    def step(self, state: State, read: Array, said: Array) -> State:
        i, f, g, o = jnp.unstack(read + said, axis=1)
        c = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(c), c

    def input_bias_init(
        self, key: Key, shape: tuple[int, ...], dtype: DTypeLike, out_sharding: PartitionSpec | None = None
    ) -> Array:
        bias = jnp.array([0, self.forget_bias, 0, 0], dtype)[:, None]
        return jnp.broadcast_to(bias, shape, out_sharding=out_sharding)


@dataclasses.dataclass(frozen=True)
class GRU(Recurrent):
    """Gated recurrent unit (Cho et al. 2014, arXiv:1406.1078), as in PyTorch, with the reset gate after the product:

    r, z = sigmoid(W x_t + b + U h_(t-1) + b')                                         products in the order r, z, n n =
    tanh(W_n x_t + b_n + r (U_n h_(t-1) + b'_n)),   h_t = (1 - z) n + z h_(t-1)
    """

    gates = 3

    def step(self, state: State, read: Array, said: Array) -> State:
        (r, z, n), (r2, z2, n2) = jnp.unstack(read, axis=1), jnp.unstack(said, axis=1)
        r, z = jax.nn.sigmoid(r + r2), jax.nn.sigmoid(z + z2)
        return ((1 - z) * jnp.tanh(n + r * n2) + z * state[0],)


@dataclasses.dataclass(frozen=True)
class RecurrentConfig(TransformerConfig):
    """Recurrent language model: embedding, stacked cells, head. Dropout is between layers and not in time, as in
    Zaremba et al. 2014 (arXiv:1409.2329)."""

    heads: int = 1
    """N, number of query heads of attention layers, if the pattern has any."""
    positions: Positions = Positions()
    """Position encoding. None needed: cells read in order."""
    attention: SequenceMixer = LSTM()
    """The cell."""
    mlp: MLP | None = None
    """Feed-forward part after each cell. None: no MLP."""
    residual: Residual = NoResidual()
    """Arrangement of cells: none, or `PreNorm()` for a residual stream, which deep stacks need."""
