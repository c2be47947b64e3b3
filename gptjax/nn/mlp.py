"""Feed-forward layers of a block, as parts (see `module.py`): dense or gated, with various activations.

Dense:  down(act(up(x)))                 Gated:  down(act(gate(x)) * up(x))          (Shazeer 2020, arXiv:2002.05202)
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from gptjax.kernels.linear import linear
from gptjax.nn.module import ParamFactory, Part, zeros
from gptjax.nn.remat import named
from gptjax.types import Array


@dataclasses.dataclass(frozen=True)
class MLP(Part):
    """A part `mlp(param, x [B, T, D], hidden F) -> [B, T, D]`. A subclass defines the activation, and whether it is
    gated."""

    gated: ClassVar[bool] = False
    routes: ClassVar[bool] = False
    """True: tokens compete for something, so a call also takes `mask` bool [B, T], False for padding."""

    @property
    def drops_tokens(self) -> bool:
        """True: training drops tokens, and so needs the rng "dropout"."""
        return False

    @property
    def axes(self) -> tuple[tuple[str, str, int], ...]:
        """(logical axis, field, size) of axes that a mesh may shard, besides the hidden units."""
        return ()

    def activation(self, x: Array) -> Array:
        raise NotImplementedError

    def inner(self, *expanded: Array) -> Array:
        """Elementwise part between the matrix products: (up) or, gated, (gate, up), each [..., F] -> [..., F]."""
        if self.gated:
            gate, up = expanded
            return self.activation(gate) * up
        return self.activation(*expanded)

    def __call__(
        self, param: ParamFactory, x: Array, hidden: int, bias: bool = False, output_scale: float = 1.0
    ) -> Array:
        """x [B, T, D] -> [B, T, D]. `output_scale` is a factor of the initial output weights, as in `Attention`."""
        width, rules = x.shape[-1], param.rules
        inner = rules("batch", "sequence", "ffn")

        def expand(name: str) -> Array:
            y = named(linear(x, param(name, (width, hidden), ("embed", "ffn")), inner), f"mlp_{name}")
            return y + param(f"{name}_bias", (hidden,), ("ffn",), zeros) if bias else y

        # The backward pass recomputes the activation instead of keeping its [B, T, F] intermediates.
        y = jax.checkpoint(self.inner)(*map(expand, ("gate", "up") if self.gated else ("up",)))
        y = named(y, "mlp_hidden")
        down = param("down", (hidden, width), ("ffn", "embed"), jax.nn.initializers.normal(0.02 * output_scale))
        y = linear(y, down, rules("batch", "sequence", None))
        return y + param("down_bias", (width,), (None,), zeros) if bias else y

    def matmul_params(self, width: int, hidden: int) -> int:
        """Multiplications per token."""
        return width * hidden * (3 if self.gated else 2)


@dataclasses.dataclass(frozen=True)
class GELU(MLP):
    """x * Phi(x), Phi the normal distribution function. Hendrycks and Gimpel 2016, arXiv:1606.08415."""

    approximate: bool = True
    """Use the tanh approximation of Phi, as in GPT-2. False: exact, as in BERT."""

    def activation(self, x: Array) -> Array:
        return jax.nn.gelu(x, approximate=self.approximate)


class ReLU(MLP):
    """max(x, 0), as in "Attention Is All You Need" and T5."""

    def activation(self, x: Array) -> Array:
        return jax.nn.relu(x)


class ReLUSquared(MLP):
    """max(x, 0)^2. So et al. 2021, arXiv:2109.08668."""

    def activation(self, x: Array) -> Array:
        return jnp.square(jax.nn.relu(x))


class SwiGLU(MLP):
    """Gated, with silu(x) = x * sigmoid(x), as in Llama."""

    gated = True

    def activation(self, x: Array) -> Array:
        return jax.nn.silu(x)


@dataclasses.dataclass(frozen=True)
class ClampedSwiGLU(MLP):
    """down(gate sigmoid(alpha gate) (up + 1)), with gate and up clamped first, as in gpt-oss (arXiv:2508.10925)."""

    gated = True
    limit: float = 7.0
    """Upper bound of gate, and bound of |up|."""
    alpha: float = 1.702
    """Slope of the sigmoid. With 1.702, gate * sigmoid is close to GELU."""

    def inner(self, *expanded: Array) -> Array:
        gate, up = expanded
        gate = jnp.minimum(gate, self.limit)
        return gate * jax.nn.sigmoid(self.alpha * gate) * (jnp.clip(up, -self.limit, self.limit) + 1)


class GeGLU(GELU):
    """Gated, with GELU, as in Gemma and T5 1.1."""

    gated = True
