"""Sampling of the next token from logits: greedy, or random after the usual filters."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from gptjax.types import Array, Key, UserError


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling settings, applied in this order: repetition penalty, temperature, top-k, top-p, min-p.

    A pytree: the fields in use, and top-k, which is a shape, are part of its structure; their values are leaves. So one
    compiled program serves every temperature, and contains only the filters in use.
    """

    temperature: float = 1.0
    """Divisor of the logits. 0: greedy, the most likely token."""
    top_k: int | None = None
    """Sample from the k most likely tokens. None: no limit."""
    top_p: float | None = None
    """Sample from the smallest set of most likely tokens with this total probability (nucleus). None: no limit."""
    min_p: float | None = None
    """Sample from tokens with at least this fraction of the highest probability. None: no limit."""
    repetition_penalty: float = 1.0
    """Above 1: tokens of the prompt and of the text so far become less likely (Keskar et al. 2019, section 4.1)."""

    def __post_init__(self):
        def check(name: str, ok: bool, rule: str):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and ok):
                raise UserError(f"{name}: got {value}, must be {rule}")

        check("temperature", self.temperature >= 0, "0 (greedy) or more")
        check("top_k", self.top_k is None or (self.top_k >= 1 and self.top_k == int(self.top_k)), "1 or more")
        check("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1")
        check("min_p", self.min_p is None or 0 <= self.min_p <= 1, "between 0 and 1")
        check("repetition_penalty", self.repetition_penalty > 0, "above 0 (1 is no penalty)")

    @property
    def greedy(self) -> bool:
        """True: the most likely token is taken."""
        return _off(self.temperature, 0)

    @property
    def penalises(self) -> bool:
        """True: `sample` needs the tokens seen so far."""
        return not _off(self.repetition_penalty, 1)

    def tree_flatten(self):
        off = {"temperature": (0, 1), "top_p": (1,), "min_p": (0,), "repetition_penalty": (1,)}
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        leaves = {name: x for name, x in fields.items() if name != "top_k" and not _off(x, *off[name])}
        return tuple(leaves.values()), (tuple(leaves), tuple((n, x) for n, x in fields.items() if n not in leaves))

    @classmethod
    def tree_unflatten(cls, structure, leaves):
        # No checks here: the leaves may be tracers.
        names, static = structure
        self = object.__new__(cls)
        for name, value in (*zip(names, leaves, strict=True), *static):
            object.__setattr__(self, name, value)
        return self


def sample(logits: Array, keys: Key, settings: Sampling, seen: Array | None = None) -> Array:
    """Sample the next token of each sequence, int32 [B].

    logits  [B, V] of any float type
    keys    [B], one per sequence, so that sequences are independent
    seen    bool [B, V], tokens that the repetition penalty applies to; needed only with a penalty

    Exactly `top_k` tokens pass top-k even with ties; all tokens tied at the threshold pass top-p.
    """
    logits = logits.astype(jnp.float32)
    if settings.penalises:
        if seen is None:
            raise ValueError("a repetition penalty needs `seen`")
        penalty = settings.repetition_penalty
        logits = jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    if settings.greedy:
        return argmax(logits)
    ids = None
    if settings.top_k is not None and settings.top_k < logits.shape[-1]:
        logits, ids = jax.lax.top_k(logits, settings.top_k)  # everything after this works on [B,k]
    # The difference comes before the quotient, whose rounding depends on how it is compiled: so the weight of the most
    # likely token is exactly 1, whatever the temperature, and no filter removes it.
    most = logits.max(-1, keepdims=True)
    below = logits - most
    if not _off(settings.temperature, 1):
        below = below / jnp.maximum(settings.temperature, jnp.finfo(jnp.float32).tiny)  # smaller ones may round to 0
    weights = jnp.where(logits == most, 1, jnp.exp(below))  # [B,V]
    if settings.top_p is not None and not _off(settings.top_p, 1):
        weights = _nucleus(weights, settings.top_p)
    if settings.min_p is not None and not _off(settings.min_p, 0):
        weights = jnp.where(weights >= settings.min_p, weights, 0)
    choice = _draw(weights, jax.vmap(jax.random.uniform)(keys))
    return choice if ids is None else jnp.take_along_axis(ids, choice[:, None], 1)[:, 0]


def argmax(x: Array) -> Array:
    """Index of the first maximum of each row, [B, V] -> int32 [B]: two plain reductions, which are faster on CPUs than
    one over pairs."""
    index = jnp.arange(x.shape[-1], dtype=jnp.int32)
    first = jnp.where(x == x.max(-1, keepdims=True), index, x.shape[-1]).min(-1)
    return jnp.minimum(first, x.shape[-1] - 1)  # in range even if all logits are NaN


def _nucleus(weights: Array, top_p: Array | float) -> Array:
    """Zero all but the smallest set of largest weights [B, V] with `top_p` of the sum (Holtzman et al. 2020).

    The threshold is the largest t with sum(weights >= t) >= top_p * sum(weights). It is found by bisection over the
    bits of t, as non-negative float32 are ordered like their bits: exact, and on CPU 15 times faster than sorting a
    vocabulary of 50,000.
    """
    bits = jax.lax.bitcast_convert_type(weights, jnp.int32)
    enough = top_p * weights.sum(-1)

    def narrow(i, threshold):
        higher = threshold | (1 << (29 - i))  # bit 30 is not set in numbers up to 1
        mass = jnp.where(bits >= higher[:, None], weights, 0).sum(-1)
        return jnp.where(mass >= enough, higher, threshold)

    threshold = jax.lax.fori_loop(0, 30, narrow, jnp.zeros_like(bits[:, 0]))
    return jnp.where(bits >= threshold[:, None], weights, 0)


def _draw(weights: Array, uniform: Array, block: int = 128) -> Array:
    """Sample an index of each row in proportion to weights [B, V], given uniform [B] in [0, 1): int32 [B].

    Inverts the cumulative sum, first over blocks, then within one: 40 times faster on CPU than one Gumbel per token.
    """
    rows, size = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -size % block))).reshape(rows, -1, block)
    masses = blocks.sum(-1)
    outer, rest = _invert(masses, uniform * masses.sum(-1))
    inner, _ = _invert(jnp.take_along_axis(blocks, outer[:, None, None], 1)[:, 0], rest)
    return outer * block + inner


def _invert(weights: Array, x: Array) -> tuple[Array, Array]:
    """Invert the cumulative sum of weights [B, n] at x [B]: the index [B], and the remainder of x within it."""
    ends = jnp.cumsum(weights, -1)
    # Rounding must not push x beyond either end, where an index may have no weight.
    x = jnp.clip(x, 0, jnp.nextafter(ends[:, -1], 0.0))
    index = jnp.sum(ends <= x[:, None], -1, dtype=jnp.int32)
    start = jnp.take_along_axis(ends - weights, index[:, None], 1)[:, 0]
    return index, x - start


def _off(value, *constants: float) -> bool:
    """True if a field is known to be unused: None, or a Python number without an effect."""
    return value is None or (isinstance(value, int | float) and value in constants)
