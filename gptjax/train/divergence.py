"""What a run does about a loss or gradient that is not finite, or leaps: stop, skip the step, or roll back.

    Stage(..., divergence=Skip())       # leave such steps out
    Stage(..., divergence=RollBack())   # from the last checkpoint on, without the batches up to the bad one

A step is bad where its loss or gradient norm is not finite, or is more than `spike` standard deviations above its mean
over the last `window` good steps: the rule of OLMo 2 (arXiv:2501.00656; `SkipStepOptimizer` in OLMo-core, with 6 and
128). Only once half of the window is filled are there spikes. It is judged inside the step, before the update, so a bad
step changes no parameter; what it is judged by is part of the state, so that a resumed run judges alike.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from gptjax.types import Array, Metrics, UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Watch:
    """What the steps before were like."""

    good: Array
    """float32 [2, window]: loss and gradient norm of the last good steps, the newest last."""
    count: Array
    """int32 scalar: good steps so far."""
    skipped: Array
    """int32 scalar: bad steps so far."""
    run: Array
    """int32 scalar: bad steps one after the other, up to now. At its limit it only grows: nothing is trained then."""


@dataclasses.dataclass(frozen=True)
class Stop:
    """Raise `Diverged` where a number is not finite; the last checkpoint is good. Costs nothing."""

    rollbacks = 0

    def watch(self) -> Watch | None:
        """What the state is to hold before the first step."""
        return None


@dataclasses.dataclass(frozen=True)
class Skip(Stop):
    """Leave the update of a bad step out: parameters, optimizer (with its schedule) and average stay as they are."""

    spike: float | None = 6.0
    """Standard deviations above the mean that are a spike; none: only what is not finite is bad."""
    window: int = 128
    """Good steps that mean and deviation are taken over."""
    limit: int = 10
    """Bad steps one after the other that end the run with `Diverged`."""

    def __post_init__(self):
        if self.spike is not None and not self.spike > 0:
            raise UserError(f"divergence.spike: got {self.spike}, must be positive, or none")
        if self.window < 2:
            raise UserError(f"divergence.window: got {self.window}, must be at least 2")
        if self.limit < 1:
            raise UserError(f"divergence.limit: got {self.limit}, must be at least 1")

    @property
    def patience(self) -> int:
        """Bad steps one after the other that the step goes on after."""
        return self.limit

    def watch(self) -> Watch:
        zero = jnp.zeros((), jnp.int32)
        return Watch(jnp.zeros((2, self.window), jnp.float32), zero, zero, zero)

    def judge(self, watch: Watch, loss: Array, norm: Array) -> tuple[Array, Watch, Metrics]:
        """(whether this step is to be applied, the watch after it, metrics): called inside the jitted step."""
        now = jnp.stack([loss, norm]).astype(jnp.float32)
        good = jnp.isfinite(now).all()
        if self.spike is not None:
            filled = jnp.arange(self.window) >= self.window - watch.count
            mean = watch.good.mean(1, where=filled)
            limit = mean + self.spike * watch.good.std(1, where=filled)
            good &= (now <= limit).all() | (watch.count < self.window // 2)
        good &= watch.run < self.patience
        after = Watch(
            jnp.where(good, jnp.concatenate([watch.good[:, 1:], now[:, None]], 1), watch.good),
            watch.count + good,
            watch.skipped + ~good,
            jnp.where(good, 0, watch.run + 1),
        )
        one = jnp.ones(())
        return good, after, {"skipped": (after.skipped, one), "skipped_in_a_row": (after.run, one)}


@dataclasses.dataclass(frozen=True)
class RollBack(Skip):
    """Go back to the last checkpoint and on from there, with the batches after the bad one (PaLM, arXiv:2204.02311)."""

    limit: int = 3
    """Times to roll back in the whole stage; the bad step after them ends the run with `Diverged`."""

    @property
    def rollbacks(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.limit

    @property
    def patience(self) -> int:
        return 1


class Diverged(RuntimeError):
    """The loss, or its gradient, is not what it should be any more. `step` is the first bad one."""

    def __init__(self, message: str, step: int = 0):
        super().__init__(message)
        self.step = step
