"""Scaling of rotary frequencies, for contexts longer than in training.

Pair i of R rotated numbers has the frequency f_i = theta^(-2i/R), in radians per token. A scaling changes it. High
frequencies distinguish near tokens and are best left unchanged. Low ones have not completed a period within the
training length; beyond it they reach angles that the model was not trained on.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Self

import numpy as np

from gptjax.nn.positions.rope import Scaling
from gptjax.types import UserError


def mscale(factor: float, weight: float = 1.0) -> float:
    """0.1 weight ln(factor) + 1: YaRN's correction for the flatter attention over a context `factor` times as long.
    DeepSeek multiplies attention scores by its square, in addition to `YaRN.amplitude`."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


@dataclasses.dataclass(frozen=True)
class LinearScaling(Scaling):
    """f_i / factor: positions are compressed into the training length ("position interpolation", arXiv:2306.15595)."""

    factor: float
    """Ratio of the context length to that of training."""

    def __post_init__(self):
        _at_least("factor", self.factor, 1)

    def frequencies(self, theta: float, size: int) -> np.ndarray:
        return super().frequencies(theta, size) / self.factor


@dataclasses.dataclass(frozen=True)
class NTKScaling(Scaling):
    """A larger base, theta factor^(R/(R-2)): the highest frequency stays, the lowest is divided by factor ("NTK-aware",
    arXiv:2309.00071, section 3.1). It is independent of the length, unlike "dynamic" scaling, in which cached keys
    would have another base than queries."""

    factor: float
    """Ratio of the context length to that of training."""

    def __post_init__(self):
        _at_least("factor", self.factor, 1)

    def check(self, size: int) -> None:
        if size < 4:
            raise UserError(f"positions.scaling: got NTKScaling, which needs 4 or more rotated numbers; got {size}")

    def frequencies(self, theta: float, size: int) -> np.ndarray:
        return super().frequencies(theta * self.factor ** (size / (size - 2)), size)


@dataclasses.dataclass(frozen=True)
class YaRN(Scaling):
    """YaRN (arXiv:2309.00071, equations 19 to 23), as computed by the authors' code and `transformers`:

        (1 - r_i) f_i + r_i f_i / factor,    r_i = clip((i - low) / (high - low), 0, 1)

    where pair low has `beta_fast` periods within the original length, pair high `beta_slow`. Cosine and sine are
    multiplied by 0.1 ln(factor) + 1, scores by its square.
    """

    factor: float
    """Ratio of the context length to that of training."""
    original_length: int
    """Context length of training."""
    beta_fast: float = 32.0
    """Pairs with more periods than this within the original length are unchanged."""
    beta_slow: float = 1.0
    """Pairs with fewer periods than this are divided by the factor."""
    attention_factor: float | None = None
    """Factor of cosine and sine. None: that of the paper."""
    mscale: float | None = None
    """With `mscale_all_dim`, cosine and sine are multiplied by mscale(factor, mscale) / mscale(factor, mscale_all_dim):
    DeepSeek."""
    mscale_all_dim: float | None = None
    """See `mscale`."""
    truncate: bool = True
    """Round low and high outwards to whole pairs. False in gpt-oss."""

    def __post_init__(self):
        _at_least("factor", self.factor, 1)
        _at_least("original_length", self.original_length, 1)
        if not 0 < self.beta_slow < self.beta_fast:
            raise UserError(
                f"positions.scaling.beta_slow: got {self.beta_slow}, must be more than 0 and less than beta_fast "
                f"{self.beta_fast}"
            )

    def frequencies(self, theta: float, size: int) -> np.ndarray:
        low, high = (
            size * math.log(self.original_length / (2 * math.pi * turns)) / (2 * math.log(theta))
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        # size - 1 is not the index of a pair, but the bound in their code, which published models were trained with.
        low, high = max(low, 0), min(high, size - 1)
        ramp = np.clip((np.arange(size // 2) - low) / (high - low if high != low else 1e-3), 0, 1)
        return super().frequencies(theta, size) * (1 - ramp + ramp / self.factor)

    @property
    def amplitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return mscale(self.factor, self.mscale) / mscale(self.factor, self.mscale_all_dim)
        return mscale(self.factor)


@dataclasses.dataclass(frozen=True)
class Llama3Scaling(Scaling):
    """Llama 3.1 (arXiv:2407.21783 and its code). With n_i = original_length f_i / (2 pi) periods within the original
    length:

        s_i f_i + (1 - s_i) f_i / factor,    s_i = clip((n_i - low) / (high - low), 0, 1)
    """

    factor: float = 8.0
    """Ratio of the context length to that of training."""
    low: float = 1.0
    """Pairs with fewer periods than this are divided by the factor ("low_freq_factor")."""
    high: float = 4.0
    """Pairs with more periods than this are unchanged ("high_freq_factor")."""
    original_length: int = 8_192
    """Context length of training."""

    def __post_init__(self):
        _at_least("factor", self.factor, 1)
        _at_least("original_length", self.original_length, 1)
        if not 0 < self.low < self.high:
            raise UserError(
                f"positions.scaling.low: got {self.low}, must be more than 0 and less than high {self.high}"
            )

    def frequencies(self, theta: float, size: int) -> np.ndarray:
        plain = super().frequencies(theta, size)
        turns = self.original_length * plain / (2 * math.pi)
        smooth = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return plain * (smooth + (1 - smooth) / self.factor)


@dataclasses.dataclass(frozen=True)
class LongRoPE(Scaling):
    """f_i / factors_i with factors found by search (arXiv:2402.13753), as in Phi-3. Cosine and sine are multiplied by
    sqrt(1 + ln(factor) / ln(original_length)).

    `length` selects one of two lists. The selection does not change while a text grows, since cached keys would then
    have another one than queries.
    """

    short: tuple[float, ...]
    """R/2 factors for texts up to the original length."""
    long: tuple[float, ...]
    """R/2 factors for longer texts."""
    original_length: int
    """Context length of training."""
    factor: float
    """Ratio of the context length to that of training."""
    length: int | None = None
    """Maximum text length. None: original_length * factor."""
    attention_factor: float | None = None
    """Factor of cosine and sine. None: as above."""

    def __post_init__(self):
        _at_least("factor", self.factor, 1)
        _at_least("original_length", self.original_length, 2)

    def for_context_length(self, length: int) -> Self:
        return dataclasses.replace(self, length=length)

    @property
    def factors(self) -> tuple[float, ...]:
        """Selected list."""
        length = self.original_length * self.factor if self.length is None else self.length
        return self.long if length > self.original_length else self.short

    def check(self, size: int) -> None:
        for name, factors in (("short", self.short), ("long", self.long)):
            if len(factors) != size // 2:
                raise UserError(
                    f"positions.scaling.{name}: got {len(factors)} numbers, must be {size // 2}, one per pair"
                )

    def frequencies(self, theta: float, size: int) -> np.ndarray:
        return super().frequencies(theta, size) / np.asarray(self.factors)

    @property
    def amplitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))


def _at_least(field: str, value: float, least: int) -> None:
    if not value >= least:
        raise UserError(f"positions.scaling.{field}: got {value}, must be at least {least}")
