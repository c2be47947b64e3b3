"""How the sublayers of a block (attention, MLP) are joined to the residual stream. A new way is one more subclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax

from gptjax.nn.module import ParamFactory
from gptjax.types import Array

Sublayer = Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Residual:
    """A part `residual(param, x, start, norm, sublayers) -> x`, everything [B, T, D].

    start      the stream as the first block got it
    norm       `norm(name, x)`: the model's normalisation, with parameters under that name
    sublayers  attention, cross-attention where there is one, MLP
    """

    final_norm: ClassVar[bool] = True
    """Whether the stream still needs a norm after the last block."""

    def __call__(
        self,
        param: ParamFactory,
        x: Array,
        start: Array,
        norm: Callable[[str, Array], Array],
        sublayers: Sequence[Sublayer],
    ) -> Array:
        raise NotImplementedError


class PreNorm(Residual):
    """x + f(norm(x)) for each sublayer f in turn: GPT-2, Llama. Xiong et al. 2020, arXiv:2002.04745."""

    def __call__(self, param, x, start, norm, sublayers):
        for i, f in enumerate(sublayers, 1):
            x = x + f(norm(f"norm_{i}", x))
        return x


@dataclasses.dataclass(frozen=True)
class ScaledStream(PreNorm):
    """`PreNorm` of a x + b start, with a learned a and b for each layer, which so chooses how much of the embeddings it
    still reads: nanochat, after modded-nanogpt (github.com/KellerJordan/modded-nanogpt)."""

    stream: float = 1.0
    """a at the beginning."""
    start: float = 0.1
    """b at the beginning."""

    def __call__(self, param, x, start, norm, sublayers):
        a = param("stream_scale", (), (), jax.nn.initializers.constant(self.stream))
        b = param("input_scale", (), (), jax.nn.initializers.constant(self.start))
        return super().__call__(param, a * x + b * start, start, norm, sublayers)


class PostNorm(Residual):
    """norm(x + f(x)): "Attention Is All You Need" (arXiv:1706.03762) and BERT."""

    final_norm = False

    def __call__(self, param, x, start, norm, sublayers):
        for i, f in enumerate(sublayers, 1):
            x = norm(f"norm_{i}", x + f(x))
        return x


class SandwichNorm(Residual):
    """x + norm(f(norm(x))): Gemma 2 and 3. Ding et al. 2021, arXiv:2105.13290."""

    def __call__(self, param, x, start, norm, sublayers):
        for i, f in enumerate(sublayers, 1):
            x = x + norm(f"post_norm_{i}", f(norm(f"norm_{i}", x)))
        return x


class OutputNorm(Residual):
    """x + norm(f(x)): OLMo 2 (arXiv:2501.00656)."""

    def __call__(self, param, x, start, norm, sublayers):
        for i, f in enumerate(sublayers, 1):
            x = x + norm(f"norm_{i}", f(x))
        return x


class Chain(Residual):
    """f(x): no stream, each sublayer reads what the one before says. For layers of a recurrent network."""

    final_norm = False

    def __call__(self, param, x, start, norm, sublayers):
        for f in sublayers:
            x = f(x)
        return x


@dataclasses.dataclass(frozen=True)
class Parallel(Residual):
    """x + f_1(norm(x)) + f_2(norm(x)): attention and MLP side by side, as in GPT-J, GPT-NeoX and PaLM."""

    shared: bool = False
    """Whether the sublayers read the same norm, as in GPT-J, or one each, as in GPT-NeoX."""

    def __call__(self, param, x, start, norm, sublayers):
        if self.shared:
            h = norm("norm_1", x)
            return x + sum(f(h) for f in sublayers)
        return x + sum(f(norm(f"norm_{i}", x)) for i, f in enumerate(sublayers, 1))
