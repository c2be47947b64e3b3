"""Arrangements of a block's sublayers (attention, MLP) around the residual stream, each a subclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax

from gptjax.nn.module import ParamFactory
from gptjax.types import Array, PyTree

Norm = Callable[[str, Array], Array]
"""`norm("norm_1", x)`: the model's normalisation, with parameters of that name."""


@dataclasses.dataclass(frozen=True)
class Residual:
    """Three steps of a `Block`, each one line in a subclass. With i the number of a sublayer f, from 1:

        x = begin(x, x0)
        x = add(i, x, f(read(i, x)))            for attention, cross-attention and MLP, if present
        x = end(x)

    x and x0, the first block's input, are [B, T, D]. Between `begin` and `end`, x may be of any type.
    """

    final_norm: ClassVar[bool] = True
    """True if the stream needs a norm after the last block."""

    def begin(self, param: ParamFactory, norm: Norm, x: Array, x0: Array) -> Any:
        """Stream at the start of a block."""
        return x

    def read(self, norm: Norm, i: int, x: PyTree) -> Array:
        """Input of sublayer i, [B, T, D]."""
        return x

    def add(self, norm: Norm, i: int, x: PyTree, y: Array) -> PyTree:
        """Stream after sublayer i with output y [B, T, D]."""
        return x + y

    def end(self, x: PyTree) -> Array:
        """Output of the block."""
        return x


class PreNorm(Residual):
    """x = x + f(norm(x)): GPT-2, Llama. Xiong et al. 2020, arXiv:2002.04745."""

    def read(self, norm, i, x):
        return norm(f"norm_{i}", x)


class PreNormButFirst(PreNorm):
    """`PreNorm` whose first sublayer reads the stream itself: ModernBERT's first layer, after the embedding's norm."""

    def read(self, norm, i, x):
        return x if i == 1 else norm(f"norm_{i}", x)


@dataclasses.dataclass(frozen=True)
class ScaledPreNorm(PreNorm):
    """x = x + multiplier f(norm(x)), with a constant multiplier: Granite, and MiniCPM (arXiv:2404.06395)."""

    multiplier: float = 1.0
    """Factor of every sublayer's output: about 1 / sqrt(L)."""

    def add(self, norm, i, x, y):
        return x + self.multiplier * y


class PostNorm(Residual):
    """x = norm(x + f(x)): "Attention Is All You Need" (arXiv:1706.03762) and BERT."""

    final_norm = False

    def add(self, norm, i, x, y):
        return norm(f"norm_{i}", x + y)


class SandwichNorm(PreNorm):
    """x = x + norm(f(norm(x))): Gemma 2 and 3. Ding et al. 2021, arXiv:2105.13290."""

    def add(self, norm, i, x, y):
        return x + norm(f"post_norm_{i}", y)


class OutputNorm(Residual):
    """x = x + norm(f(x)): OLMo 2 (arXiv:2501.00656)."""

    def add(self, norm, i, x, y):
        return x + norm(f"norm_{i}", y)


class NoResidual(Residual):
    """x = f(x): no residual stream, for recurrent networks."""

    final_norm = False

    def add(self, norm, i, x, y):
        return y


@dataclasses.dataclass(frozen=True)
class Parallel(Residual):
    """x = x + f_1(norm(x)) + f_2(norm(x)): attention and MLP in parallel, as in GPT-J, GPT-NeoX and PaLM."""

    shared: bool = False
    """One norm for all sublayers, as in GPT-J. False: one each, as in GPT-NeoX."""

    def begin(self, param, norm, x, x0):
        return x, norm("norm_1", x) if self.shared else x, 0.0  # (stream, sublayers' input, sum of updates)

    def read(self, norm, i, x):
        return x[1] if self.shared else norm(f"norm_{i}", x[1])

    def add(self, norm, i, x, y):
        return x[0], x[1], x[2] + y

    def end(self, x):
        return x[0] + x[2]


@dataclasses.dataclass(frozen=True)
class ScaledStream(PreNorm):
    """`PreNorm` of a x + b x0, with learned a and b per layer, so that layers can read the embeddings: nanochat, after
    modded-nanogpt (github.com/KellerJordan/modded-nanogpt)."""

    stream_scale: float = 1.0
    """Initial a."""
    input_scale: float = 0.1
    """Initial b."""

    def begin(self, param, norm, x, x0):
        a = param("stream_scale", (), (), jax.nn.initializers.constant(self.stream_scale))
        b = param("input_scale", (), (), jax.nn.initializers.constant(self.input_scale))
        return a * x + b * x0
