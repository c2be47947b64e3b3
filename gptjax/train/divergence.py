"""Policies for a loss or gradient norm that is not finite or spikes: stop, skip the step, or roll back.

    Stage(..., divergence=Skip())       # skip bad steps
    Stage(..., divergence=RollBack())   # restore the last checkpoint, and skip its batches up to the bad one

A step is bad if its loss or gradient norm is not finite, or is more than `spike` standard deviations above its mean
over the last `window` good steps: the rule of OLMo 2 (arXiv:2501.00656; `SkipStepOptimizer` in OLMo-core, with 6 and
128). Spikes are detected once half of the window is filled. The check is part of the step, before the update, so that a
bad step changes no parameter. Its statistics are part of the state, so that a resumed run decides alike.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from gptjax.types import Array, Metrics, UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepStatistics:
    """Statistics of previous steps."""

    good: Array
    """float32 [2, window]: loss and gradient norm of the last good steps, in order."""
    count: Array
    """int32 scalar: number of good steps."""
    skipped: Array
    """int32 scalar: number of bad steps."""
    consecutive_bad: Array
    """int32 scalar: number of consecutive bad steps until now. Beyond the limit no step is applied."""


@dataclasses.dataclass(frozen=True)
class Stop:
    """Raise `Diverged` if a number is not finite; the last checkpoint is good. Costs nothing."""

    rollbacks = 0

    def statistics(self) -> StepStatistics | None:
        """Initial statistics in the training state. None: none needed."""
        return None

    def fault(self, values: Mapping[str, float]) -> str | None:
        """Name of the metric of a step that ends the run. None: the run goes on."""
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        return "loss" if "loss" in bad else next(iter(bad), None)


@dataclasses.dataclass(frozen=True)
class Skip(Stop):
    """Skip the update of a bad step: parameters, optimizer (with its schedule) and average do not change."""

    spike: float | None = 6.0
    """Number of standard deviations above the mean that counts as a spike. None: only numbers that are not finite are
    bad."""
    window: int = 128
    """Number of good steps in mean and deviation."""
    limit: int = 10
    """Number of consecutive bad steps that raises `Diverged`."""

    def __post_init__(self):
        if self.spike is not None and not self.spike > 0:
            raise UserError(f"divergence.spike: got {self.spike}, must be positive, or None")
        if self.window < 2:
            raise UserError(f"divergence.window: got {self.window}, must be at least 2")
        if self.limit < 1:
            raise UserError(f"divergence.limit: got {self.limit}, must be at least 1")

    @property
    def patience(self) -> int:
        """Consecutive bad steps tolerated before training stops."""
        return self.limit

    def statistics(self) -> StepStatistics:
        zero = jnp.zeros((), jnp.int32)
        return StepStatistics(jnp.zeros((2, self.window), jnp.float32), zero, zero, zero)

    def fault(self, values: Mapping[str, float]) -> str | None:
        if skipped := int(values.get("consecutive_skipped", 0)):
            return "loss" if skipped >= self.patience else None
        return super().fault(values)

    def check(self, statistics: StepStatistics, loss: Array, norm: Array) -> tuple[Array, StepStatistics, Metrics]:
        """(True if the step is good, new statistics, metrics). Part of the jitted step."""
        now = jnp.stack([loss, norm]).astype(jnp.float32)
        good = jnp.isfinite(now).all()
        if self.spike is not None:
            filled = jnp.arange(self.window) >= self.window - statistics.count
            mean = statistics.good.mean(1, where=filled)
            limit = mean + self.spike * statistics.good.std(1, where=filled)
            good &= (now <= limit).all() | (statistics.count < self.window // 2)
        good &= statistics.consecutive_bad < self.patience
        after = StepStatistics(
            jnp.where(good, jnp.concatenate([statistics.good[:, 1:], now[:, None]], 1), statistics.good),
            statistics.count + good,
            statistics.skipped + ~good,
            jnp.where(good, 0, statistics.consecutive_bad + 1),
        )
        one = jnp.ones(())
        return good, after, {"skipped": (after.skipped, one), "consecutive_skipped": (after.consecutive_bad, one)}


@dataclasses.dataclass(frozen=True)
class RollBack(Skip):
    """Restore the last checkpoint, and skip its batches up to the bad step (PaLM, arXiv:2204.02311)."""

    limit: int = 3
    """Maximum number of rollbacks in a stage. The next bad step raises `Diverged`."""

    @property
    def rollbacks(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.limit

    @property
    def patience(self) -> int:
        return 1


class Diverged(RuntimeError):
    """Raised if loss or gradient norm diverges. `step` is the first bad step."""

    def __init__(self, message: str, step: int = 0):
        super().__init__(message)
        self.step = step
