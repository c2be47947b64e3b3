"""Differentially private training, DP-SGD (Abadi et al. 2016, arXiv:1607.00133).

A step draws each of N sequences with probability q, clips the gradient of each to norm C, and adds noise to their sum:

    g = (sum_i g_i min(1, C / |g_i|) + z C normal) / (q N)

The parameters after T such steps are (epsilon, delta)-differentially private: with any one sequence added to the data
or removed, every outcome is at most e^epsilon times as likely, but for a probability delta. Google's dp-accounting
finds the least z.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec

from gptjax.distributed.sharding import axes_of
from gptjax.types import Array, Batch, Key, Metrics, Params, UserError

OVERFLOW = 0.1
"""Share of delta for steps that draw more sequences than a batch has room for."""


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """Numbers of the private gradient."""

    rate: float
    """q, probability of each sequence to be in a step."""
    noise: float
    """z, standard deviation of the noise, in units of `clip`."""
    clip: float
    """C, maximum norm of the gradient of one sequence's mean loss."""
    sequences: int
    """N, number of sequences."""
    epsilon: float
    """Bound of the privacy loss after the last step."""
    delta: float
    """Probability that it does not hold."""

    @property
    def expected(self) -> float:
        """q N, mean number of sequences per step."""
        return self.rate * self.sequences

    def describe(self, batch: int) -> str:
        """Line about the promise and its price.

        batch  room of a batch, in sequences"""
        return (
            f"epsilon {self.epsilon:g}, delta {self.delta:g} for each of {self.sequences:,} sequences: a step has "
            f"about {self.expected:.1f}, at most {batch} of them, and noise of {self.noise:.3g} times the "
            f"clipping norm {self.clip:g}; tokenizer, losses and other stages are not covered"
        )

    def clipped(self, gradient: Callable[..., Any]) -> Callable[..., tuple[Params, tuple[Metrics, dict]]]:
        """Sum of the clipped gradients of each sequence's mean loss, with the batch's metrics. On a mesh each device
        has whole parameters for its sequences.

        gradient  (params, batch, key, *frozen) -> gradient of the batch's summed loss, and (metrics, updates)
        """

        def each(
            params: Params, sequence: Batch, key: Key, frozen: tuple[Params, ...]
        ) -> tuple[Params, Array, Metrics]:
            batch = jax.tree.map(lambda x: x[None], sequence)
            grads, (metrics, updates) = gradient(params, batch, key, *frozen)
            if jax.tree.leaves(updates):
                raise UserError(
                    "privacy: got DifferentialPrivacy, must be None with a model that updates parameters by the tokens "
                    "of a batch, such as a router's balance bias"
                )
            weight = jnp.maximum(metrics["loss"][1], 1e-8)
            norm = optax.tree.norm(grads) / weight
            factor = jnp.where(norm > self.clip, self.clip / norm, 1) / weight
            return jax.tree.map(lambda g: g * factor, grads), norm > self.clip, metrics

        def sums(params: Params, batch: Batch, keys: Array, frozen: tuple[Params, ...]) -> tuple[Params, Metrics]:
            grads, clipped, metrics = jax.vmap(each, (None, 0, 0, None))(params, batch, keys, frozen)
            clipped = clipped.astype(jnp.float32), (metrics["loss"][1] > 0).astype(jnp.float32)
            return jax.tree.map(lambda x: jnp.sum(x, 0), (grads, metrics | {"clipped": clipped}))

        def summed(params: Params, batch: Batch, key: Key, *frozen: Params) -> tuple[Params, tuple[Metrics, dict]]:
            rows: Array = jax.tree.leaves(batch)[0]
            keys, mesh = jax.random.split(key, len(rows)), jax.sharding.get_abstract_mesh()
            over = () if mesh.empty else axes_of(jax.typeof(rows).sharding.spec[0])
            if not over:
                total, metrics = sums(params, batch, keys, frozen)
                return total, (metrics, {})
            from gptjax.distributed.partial_map import partial_map

            whole, frozen = jax.tree.map(lambda x: jax.reshard(x, _without(x, over)), (params, frozen))
            split, same = PartitionSpec(over), PartitionSpec()
            on_each = partial_map(lambda *args: lax.psum(sums(*args), over), over, (same, split, split, same), same)
            total, metrics = on_each(whole, batch, jax.reshard(keys, split), frozen)
            total = jax.tree.map(lambda g, p: jax.reshard(g, jax.typeof(p).sharding.spec), total, params)
            return total, (metrics, {})

        return summed

    def noisy(self, grads: Params, key: Key) -> Params:
        """Sums of clipped gradients -> the private gradient g."""
        leaves, tree = jax.tree.flatten(grads)
        found = []
        for g, own in zip(leaves, jax.random.split(key, len(leaves)), strict=True):
            like = None if jax.sharding.get_abstract_mesh().empty else jax.typeof(g).sharding.spec
            noise = jax.random.normal(own, g.shape, g.dtype, out_sharding=like)
            found.append((g + self.noise * self.clip * noise) / self.expected)
        return jax.tree.unflatten(tree, found)


def _without(x: Array, names: Sequence[str]) -> PartitionSpec:
    """The spec of an array without these mesh axes."""
    axes = (tuple(name for name in axes_of(axis) if name not in names) for axis in jax.typeof(x).sharding.spec)
    return PartitionSpec(*(axis or None for axis in axes))


UNKNOWN = Mechanism(math.nan, math.nan, math.nan, 0, math.nan, math.nan)
"""Mechanism for data that are not known, to plan with: it trains nothing."""


@dataclasses.dataclass(frozen=True)
class DifferentialPrivacy:
    """(epsilon, delta)-differential privacy of a stage's training sequences, for adding or removing one of them.

    With `NoPacking` a sequence is a document. With other packings documents are spread over several sequences, and are
    protected less. The promise covers the parameters alone: not the tokenizer, which may have been trained on the same
    texts, nor losses and other metrics, nor other stages. It holds while the run's folder, which has the random seed,
    is kept secret: publish what `gptjax convert` writes.
    """

    epsilon: float = 8.0
    """Bound of the privacy loss: 1 is strong, 8 weak but common for language models."""
    delta: float = 1e-6
    """Probability that the bound does not hold. Less than 1 / N, the number of sequences."""
    clip: float = 1.0
    """C, maximum norm of the gradient of one sequence's mean loss."""

    def __post_init__(self):
        for field in ("epsilon", "clip"):
            if not 0 < getattr(self, field) < math.inf:
                raise UserError(f"privacy.{field}: got {getattr(self, field)}, must be more than 0")
        if not 0 < self.delta < 1:
            raise UserError(f"privacy.delta: got {self.delta}, must be more than 0 and less than 1")

    def rate(self, sequences: int, batch: int, steps: int) -> float:
        """q, the highest probability with which `steps` batches have room for what is drawn of N = `sequences`, but for
        a share of delta. Raises UserError for a delta that promises nothing, or a batch without room."""
        if self.delta * sequences >= 1:
            raise UserError(
                f"privacy.delta: got {self.delta:g}, must be less than 1 / {sequences:,}, the number of sequences: "
                "else training that reveals one of them whole would keep the promise"
            )
        return _rate(sequences, batch, steps, OVERFLOW * self.delta / (1 + math.exp(min(self.epsilon, 700))))

    def mechanism(self, sequences: int, batch: int, steps: int) -> Mechanism:
        """Mechanism with the least noise for `steps` steps on N = `sequences` sequences, of which a batch has room for
        `batch`. It takes some seconds. Raises UserError as `rate`, and without dp-accounting."""
        rate = self.rate(sequences, batch, steps)
        noise = least_noise(rate, steps, self.epsilon, (1 - OVERFLOW) * self.delta)
        return Mechanism(rate, noise, self.clip, sequences, self.epsilon, self.delta)


@functools.cache
def _rate(sequences: int, batch: int, steps: int, overflow: float) -> float:
    """The highest q with which any of `steps` draws of Binomial(N, q) sequences is more than a batch with probability
    `overflow` at most."""
    from scipy import stats

    def fits(rate: float) -> bool:
        return math.log(steps) + float(stats.binom.logsf(batch, sequences, rate)) <= math.log(overflow)

    if batch >= sequences or fits(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@functools.cache
def least_noise(rate: float, steps: int, epsilon: float, delta: float) -> float:
    """z, the least noise of `steps` Gaussian mechanisms on Poisson samples that keeps the promise, by Google's
    dp-accounting (the distribution of the privacy loss, arXiv:2106.08567). Raises UserError without that library."""
    try:
        import dp_accounting as accounting
        from dp_accounting import pld, rdp
    except ImportError:
        raise UserError("privacy: it needs the dp-accounting library; pip install 'gptjax[privacy]'") from None

    def event(noise: float) -> Any:
        step = accounting.PoissonSampledDpEvent(rate, accounting.GaussianDpEvent(noise))
        return accounting.SelfComposedDpEvent(step, steps)

    # Renyi privacy is fast and at most about twice too careful: it says where to look. Sums of other than whole orders
    # may not converge.
    fast = functools.partial(rdp.RdpAccountant, orders=[*range(2, 65), 128, 256, 512])
    # Losses are rounded up to multiples. A tenth of the library's own time, for at most 0.2 % more noise.
    interval = max(1e-4, min(1e-3, epsilon / 1_000)) if steps <= 1_000 else 1e-4
    exact = functools.partial(pld.PLDAccountant, value_discretization_interval=interval)
    upper: float = accounting.calibrate_dp_mechanism(fast, event, epsilon, delta, tol=1e-3)
    try:
        bracket = accounting.ExplicitBracketInterval(upper / 2, upper)
        return float(accounting.calibrate_dp_mechanism(exact, event, epsilon, delta, bracket, tol=1e-3))
    except ValueError:  # it is not there
        return float(upper)
