"""Learning rates over a run: a linear warmup to the learning_rate, then constant or falling to a floor. Over optax."""

from __future__ import annotations

import abc
import dataclasses

import optax

from gptjax.types import UserError


def check(ok: bool, field: str, got: object, must: str) -> None:
    if not ok:
        raise UserError(f"{field}: got {got}, must be {must}")


@dataclasses.dataclass(frozen=True)
class Schedule(abc.ABC):
    """A learning rate over a run. With w warmup steps, step i <= w has `peak (i + 1) / (w + 1)`: never 0, and the peak
    at step w. What follows is up to the subclass."""

    warmup: int = 0
    """Steps over which the learning rate rises to its peak."""

    def __post_init__(self):
        check(self.warmup >= 0, "optimizer.schedule.warmup", self.warmup, "0 or more steps")

    @abc.abstractmethod
    def after_warmup(self, learning_rate: float, steps: int, total: int) -> optax.Schedule:
        """The learning rate of the `steps` steps that are left of `total`, counted from the end of the warmup."""

    def build(self, learning_rate: float, steps: int) -> optax.Schedule:
        """Step, from 0 -> learning rate, for a run of `steps`. Raises UserError when the warmup is longer."""
        check(self.warmup <= steps, "optimizer.schedule.warmup", self.warmup, f"at most the {steps} steps of the run")
        warmup = optax.linear_schedule(learning_rate / (self.warmup + 1), learning_rate, self.warmup)
        after = self.after_warmup(learning_rate, max(steps - self.warmup, 1), steps)
        return optax.join_schedules([warmup, after], [self.warmup])


@dataclasses.dataclass(frozen=True)
class Constant(Schedule):
    """Stays at the peak."""

    def after_warmup(self, learning_rate: float, steps: int, total: int) -> optax.Schedule:
        return optax.constant_schedule(learning_rate)


@dataclasses.dataclass(frozen=True)
class _Decaying(Schedule):
    final_fraction: float = 0.0
    """Where the learning rate ends, as a share of its peak."""

    def __post_init__(self):
        super().__post_init__()
        check(
            0 <= self.final_fraction <= 1,
            "optimizer.schedule.final_fraction",
            self.final_fraction,
            "a share of the learning_rate, 0 to 1",
        )


@dataclasses.dataclass(frozen=True)
class Linear(_Decaying):
    """Falls in a straight line from the peak to the floor at the end of the run."""

    def after_warmup(self, learning_rate: float, steps: int, total: int) -> optax.Schedule:
        return optax.linear_schedule(learning_rate, self.final_fraction * learning_rate, steps)


@dataclasses.dataclass(frozen=True)
class Cosine(_Decaying):
    """Falls from the peak to the floor along half a cosine (SGDR, arXiv:1608.03983):
    `peak (floor + (1 - floor) (1 + cos(pi x)) / 2)` with x the share of the steps after the warmup that is over."""

    final_fraction: float = 0.1
    """Where the learning rate ends, as a share of its peak."""

    def after_warmup(self, learning_rate: float, steps: int, total: int) -> optax.Schedule:
        return optax.cosine_decay_schedule(learning_rate, steps, alpha=self.final_fraction)


@dataclasses.dataclass(frozen=True)
class WarmupStableDecay(_Decaying):
    """Stays at the learning_rate, then falls in a straight line to the floor over the last part of the run (MiniCPM,
    arXiv:2404.06395): what was trained up to the fall can be trained further."""

    decay: float = 0.2
    """The last part of the run, as a share of all its steps, over which the learning rate falls."""

    def __post_init__(self):
        super().__post_init__()
        check(
            0 < self.decay <= 1,
            "optimizer.schedule.decay",
            self.decay,
            "a share of the steps, more than 0 and at most 1",
        )

    def after_warmup(self, learning_rate: float, steps: int, total: int) -> optax.Schedule:
        fall = min(max(round(self.decay * total), 1), steps)
        return optax.linear_schedule(
            learning_rate, self.final_fraction * learning_rate, fall, transition_begin=steps - fall
        )
