"""Parameter groups: an optimizer, with its learning rate and weight decay, for each kind of parameter.

    Groups(
        Muon(learning_rate=5e-3),
        {
            "embedding": Group(HasKind("embedding"), AdamW(learning_rate=0.3)),
            "head": Group(HasKind("head"), AdamW(learning_rate=4e-3)),
            "scalars": Group(MaxAxes(0), AdamW(learning_rate=0.5)),
        },
    )

A new predicate is a subclass of `Predicate`.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Self, get_args

import jax
import optax

from gptjax.distributed.parameters import Kind, ParamInfo
from gptjax.optim.optimizers import Optimizer, partition
from gptjax.optim.schedules import Schedule, check
from gptjax.types import Params


@dataclasses.dataclass(frozen=True)
class Predicate(abc.ABC):
    """A selection of parameters by their declaration."""

    @abc.abstractmethod
    def __call__(self, info: ParamInfo) -> bool:
        """True if the parameter is selected."""


@dataclasses.dataclass(frozen=True)
class HasKind(Predicate):
    """Parameters of one kind: "matrix", "embedding", "head" or "other"; see `gptjax.distributed.parameters.Kind`."""

    kind: Kind

    def __post_init__(self):
        kinds = get_args(Kind)
        check(self.kind in kinds, "optimizer.groups.when.kind", self.kind, f"one of {', '.join(kinds)}")

    def __call__(self, info: ParamInfo) -> bool:
        return info.kind == self.kind


@dataclasses.dataclass(frozen=True)
class HasAxis(Predicate):
    """Parameters with this logical axis, such as "vocab" or "experts"."""

    axis: str

    def __call__(self, info: ParamInfo) -> bool:
        return self.axis in info.axes


@dataclasses.dataclass(frozen=True)
class MaxAxes(Predicate):
    """Parameters with at most this many axes, not counting layers and experts: 0 for scalars, 1 for vectors too."""

    axes: int

    def __call__(self, info: ParamInfo) -> bool:
        return len(info.shape) - info.batch <= self.axes


@dataclasses.dataclass(frozen=True)
class Group:
    """A group of parameters and its optimizer."""

    when: Predicate
    """Predicate of the group's parameters."""
    optimizer: Optimizer
    """Optimizer of the group."""


@dataclasses.dataclass(frozen=True)
class Groups:
    """One optimizer per group of parameters. A parameter belongs to the first group whose predicate selects it.

    Each optimizer sees only its own parameters: `clip` bounds the norm of their gradient.
    """

    default: Optimizer
    """Optimizer of the remaining parameters."""
    groups: dict[str, Group]
    """Name -> group."""

    def __post_init__(self):
        check("default" not in self.groups, "optimizer.groups", "default", "another name: that is of the others")

    @property
    def learning_rate(self) -> float:
        """Peak learning rate of the default."""
        return self.default.learning_rate

    def learning_rate_schedule(self, steps: int) -> optax.Schedule:
        """Step, from 0 -> learning rate of the default, for a run of `steps`."""
        return self.default.learning_rate_schedule(steps)

    def with_schedule(self, schedule: Schedule) -> Self:
        """These optimizers with another schedule."""
        groups = {
            name: dataclasses.replace(group, optimizer=group.optimizer.with_schedule(schedule))
            for name, group in self.groups.items()
        }
        return dataclasses.replace(self, default=self.default.with_schedule(schedule), groups=groups)

    def build(self, steps: int, info: Params, width_multiplier: float = 1.0) -> optax.GradientTransformation:
        """The optax transformation for a run of `steps`; see `Optimizer.build`. Raises UserError for a group that has
        no parameter."""

        def name(info: ParamInfo) -> str:
            return next((name for name, group in self.groups.items() if group.when(info)), "default")

        used = {name(i) for i in jax.tree.leaves(info)}
        for group in self.groups:
            check(group in used, f"optimizer.groups.{group}", self.groups[group].when, "of a parameter of the model")

        def transform(name: str, info: Params) -> optax.GradientTransformation:
            optimizer = self.groups[name].optimizer if name in self.groups else self.default
            return optimizer.build(steps, info, width_multiplier)

        return partition(info, name, transform)
