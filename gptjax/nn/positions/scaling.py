"""How rotary frequencies are changed to read further than a model was trained.

Pair i of R turned numbers has the frequency f_i = theta^(-2i/R), in radians a token. A scaling gives others in their
place. High frequencies tell near tokens apart and are best left alone; low ones have not made a whole turn within the
training length, and beyond it come to angles that the model has never seen.
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
    DeepSeek multiplies its attention scores by the square of it, beside what `YaRN.amplitude` does."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


@dataclasses.dataclass(frozen=True)
class LinearScaling(Scaling):
    """f_i / factor: positions are squeezed into the training length ("position interpolation", arXiv:2306.15595)."""

    factor: float
    """How many times longer the text may be."""

    def __post_init__(self):
        _at_least("factor", self.factor, 1)

    def frequencies(self, theta: float, size: int) -> np.ndarray:
        return super().frequencies(theta, size) / self.factor


@dataclasses.dataclass(frozen=True)
class NTKScaling(Scaling):
    """A larger base, theta factor^(R/(R-2)): the highest frequency stays, the lowest is divided by factor ("NTK-aware",
    arXiv:2309.00071, section 3.1). The same at every length, unlike the "dynamic" kind, with which keys in a cache
    would be of another base than queries."""

    factor: float
    """How many times longer the text may be."""

    def __post_init__(self):
        _at_least("factor", self.factor, 1)

    def check(self, size: int) -> None:
        if size < 4:
            raise UserError(f"positions.scaling: got NTKScaling, which needs 4 or more turned numbers; got {size}")

    def frequencies(self, theta: float, size: int) -> np.ndarray:
        return super().frequencies(theta * self.factor ** (size / (size - 2)), size)


@dataclasses.dataclass(frozen=True)
class YaRN(Scaling):
    """arXiv:2309.00071, equations 19 to 23, as their authors' program and `transformers` compute them:

        (1 - r_i) f_i + r_i f_i / factor,    r_i = clip((i - low) / (high - low), 0, 1)

    where a pair of index low makes `beta_fast` turns within the original length, one of index high `beta_slow`. Cosine
    and sine are multiplied by 0.1 ln(factor) + 1, so scores by its square.
    """

    factor: float
    """How many times longer the text may be."""
    original: int
    """Length that the model was trained at."""
    beta_fast: float = 32.0
    """Pairs that make more turns than this within the original length are left alone."""
    beta_slow: float = 1.0
    """Pairs that make fewer turns than this are divided by the factor."""
    attention_factor: float | None = None
    """What cosine and sine are multiplied by; none: as the paper says."""
    mscale: float | None = None
    """With `mscale_all_dim`, cosine and sine are multiplied by mscale(factor, mscale) / mscale(factor, mscale_all_dim):
    DeepSeek."""
    mscale_all_dim: float | None = None
    """See `mscale`."""
    truncate: bool = True
    """Whether low and high are rounded to whole pairs, outwards; gpt-oss does not."""

    def __post_init__(self):
        _at_least("factor", self.factor, 1)
        _at_least("original", self.original, 1)
        if not 0 < self.beta_slow < self.beta_fast:
            raise UserError(
                f"positions.scaling.beta_slow: got {self.beta_slow}, must be more than 0 and less than beta_fast "
                f"{self.beta_fast}"
            )

    def frequencies(self, theta: float, size: int) -> np.ndarray:
        low, high = (
            size * math.log(self.original / (2 * math.pi * turns)) / (2 * math.log(theta))
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        # size - 1 is no index of a pair, but it is their program's bound, and published models were trained with it.
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
    """That of Llama 3.1 (arXiv:2407.21783 and its program). With n_i = original f_i / (2 pi) turns within the original
    length:

        s_i f_i + (1 - s_i) f_i / factor,    s_i = clip((n_i - low) / (high - low), 0, 1)
    """

    factor: float = 8.0
    """How many times longer the text may be."""
    low: float = 1.0
    """Pairs that make fewer turns than this are divided by the factor ("low_freq_factor")."""
    high: float = 4.0
    """Pairs that make more turns than this are left alone ("high_freq_factor")."""
    original: int = 8_192
    """Length that the model was trained at."""

    def __post_init__(self):
        _at_least("factor", self.factor, 1)
        _at_least("original", self.original, 1)
        if not 0 < self.low < self.high:
            raise UserError(
                f"positions.scaling.low: got {self.low}, must be more than 0 and less than high {self.high}"
            )

    def frequencies(self, theta: float, size: int) -> np.ndarray:
        plain = super().frequencies(theta, size)
        turns = self.original * plain / (2 * math.pi)
        smooth = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return plain * (smooth + (1 - smooth) / self.factor)


@dataclasses.dataclass(frozen=True)
class LongRoPE(Scaling):
    """f_i / factors_i with factors found by search (arXiv:2402.13753), as in Phi-3. Cosine and sine are multiplied by
    sqrt(1 + ln(factor) / ln(original)).

    There are two lists, and `length` decides: the choice cannot follow the text as it grows, as then keys in a cache
    would be of another choice than queries.
    """

    short: tuple[float, ...]
    """R/2 factors for texts up to the original length."""
    long: tuple[float, ...]
    """R/2 factors for longer ones."""
    original: int
    """Length that the model was trained at."""
    factor: float
    """How many times longer the text may be."""
    length: int | None = None
    """The longest text that will be read; none: original * factor."""
    attention_factor: float | None = None
    """What cosine and sine are multiplied by; none: as above."""

    def __post_init__(self):
        _at_least("factor", self.factor, 1)
        _at_least("original", self.original, 2)

    def for_context_length(self, length: int) -> Self:
        return dataclasses.replace(self, length=length)

    @property
    def factors(self) -> tuple[float, ...]:
        """The list that is used."""
        length = self.original * self.factor if self.length is None else self.length
        return self.long if length > self.original else self.short

    def check(self, size: int) -> None:
        for name, factors in (("short", self.short), ("long", self.long)):
            if len(factors) != size // 2:
                raise UserError(
                    f"positions.scaling.{name}: got {len(factors)} numbers, must be {size // 2}, one a pair"
                )

    def frequencies(self, theta: float, size: int) -> np.ndarray:
        return super().frequencies(theta, size) / np.asarray(self.factors)

    @property
    def amplitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original))


def _at_least(field: str, value: float, least: int) -> None:
    if not value >= least:
        raise UserError(f"positions.scaling.{field}: got {value}, must be at least {least}")
