"""Learning-rate schedules over optax: linear warmup, then constant or decaying."""

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
    """Base class: linear warmup to the peak learning rate. With w warmup steps, step i <= w has
    `learning_rate (i + 1) / (w + 1)`: never 0, and the peak at step w. The subclass gives the steps after the warmup.
    """

    warmup: int = 0
    """Warmup steps."""

    def __post_init__(self):
        check(self.warmup >= 0, "optimizer.schedule.warmup", self.warmup, "0 or more steps")

    @abc.abstractmethod
    def after_warmup(self, learning_rate: float, steps: int, total: int) -> optax.Schedule:
        """Step, from 0 at the end of the warmup -> learning rate, for the `steps` steps after it of `total`."""

    def build(self, learning_rate: float, steps: int) -> optax.Schedule:
        """Step, from 0 -> learning rate, for a run of `steps`. Raises UserError when the warmup is longer."""
        check(self.warmup <= steps, "optimizer.schedule.warmup", self.warmup, f"at most the {steps} steps of the run")
        warmup = optax.linear_schedule(learning_rate / (self.warmup + 1), learning_rate, self.warmup)
        after = self.after_warmup(learning_rate, max(steps - self.warmup, 1), steps)
        return optax.join_schedules([warmup, after], [self.warmup])


@dataclasses.dataclass(frozen=True)
class Constant(Schedule):
    """Constant after the warmup."""

    def after_warmup(self, learning_rate: float, steps: int, total: int) -> optax.Schedule:
        return optax.constant_schedule(learning_rate)


@dataclasses.dataclass(frozen=True)
class _Decaying(Schedule):
    final_fraction: float = 0.0
    """Final learning rate as a fraction of the peak."""

    def __post_init__(self):
        super().__post_init__()
        check(
            0 <= self.final_fraction <= 1,
            "optimizer.schedule.final_fraction",
            self.final_fraction,
            "a fraction of the learning rate, 0 to 1",
        )


@dataclasses.dataclass(frozen=True)
class Linear(_Decaying):
    """Linear decay to `final_fraction` at the end of the run."""

    def after_warmup(self, learning_rate: float, steps: int, total: int) -> optax.Schedule:
        return optax.linear_schedule(learning_rate, self.final_fraction * learning_rate, steps)


@dataclasses.dataclass(frozen=True)
class Cosine(_Decaying):
    """Cosine decay (SGDR, arXiv:1608.03983): `learning_rate (f + (1 - f) (1 + cos(pi x)) / 2)`, f the `final_fraction`
    and x the fraction of the steps after the warmup that are done."""

    final_fraction: float = 0.1
    """Final learning rate as a fraction of the peak."""

    def after_warmup(self, learning_rate: float, steps: int, total: int) -> optax.Schedule:
        return optax.cosine_decay_schedule(learning_rate, steps, alpha=self.final_fraction)


@dataclasses.dataclass(frozen=True)
class WarmupStableDecay(_Decaying):
    """Constant, then linear decay over the last part of the run (MiniCPM, arXiv:2404.06395). A checkpoint from before
    the decay can be trained further."""

    decay: float = 0.2
    """Fraction of all steps, at the end of the run, over which the learning rate decays."""

    def __post_init__(self):
        super().__post_init__()
        check(
            0 < self.decay <= 1,
            "optimizer.schedule.decay",
            self.decay,
            "a fraction of the steps, more than 0 and at most 1",
        )

    def after_warmup(self, learning_rate: float, steps: int, total: int) -> optax.Schedule:
        fall = min(max(round(self.decay * total), 1), steps)
        return optax.linear_schedule(
            learning_rate, self.final_fraction * learning_rate, fall, transition_begin=steps - fall
        )
