"""Normalisation layers, as parts (see `module.py`). Statistics are float32 in every compute dtype."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from gptjax.nn.module import ParamFactory, Part, ones, zeros
from gptjax.types import Array


@dataclasses.dataclass(frozen=True)
class Norm(Part):
    """A part `norm(param, x [..., D]) -> [..., D]`."""

    eps: float = 1e-5
    """Added to the variance, to avoid division by zero."""

    def __call__(self, param: ParamFactory, x: Array) -> Array:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class LayerNorm(Norm):
    """(x - mean) / sqrt(variance + eps) * scale + bias, over the last axis. Ba et al. 2016, arXiv:1607.06450."""

    bias: bool = True
    """Add a learned bias."""
    per_head: bool = False
    """A scale, and a bias, for each head of queries and keys x [..., N, H], as in StableLM 2 and Command R+."""

    def __call__(self, param: ParamFactory, x: Array) -> Array:
        axes = 2 if self.per_head else 1
        declare = functools.partial(param, shape=x.shape[-axes:], axes=(None,) * axes, kind="other")
        y = self._standardise(x) * declare("scale", init=ones)
        return y + declare("bias", init=zeros) if self.bias else y

    # The backward pass recomputes it from x instead of keeping intermediates.
    @functools.partial(jax.checkpoint, static_argnums=0)
    def _standardise(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        return (y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class RMSNorm(Norm):
    """x / sqrt(mean(x^2) + eps) * scale, over the last axis. Zhang and Sennrich 2019, arXiv:1910.07467."""

    scale: bool = True
    """Multiply by a learned scale."""
    plus_one: bool = False
    """Parametrise the scale as 1 + parameter, as in Gemma."""

    def __call__(self, param: ParamFactory, x: Array) -> Array:
        y = self._standardise(x)
        if not self.scale:
            return y
        scale = param("scale", x.shape[-1:], (None,), zeros if self.plus_one else ones)
        return y * (1 + scale if self.plus_one else scale)

    @functools.partial(jax.checkpoint, static_argnums=0)
    def _standardise(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        return (y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)).astype(x.dtype)
