"""Training of a pruned model: its zeros stay.

KeepZeros(AdamW(learning_rate=1e-4))
"""

from __future__ import annotations

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
import optax

from gptjax.optim.groups import Groups
from gptjax.optim.optimizers import Optimizer
from gptjax.optim.schedules import Schedule
from gptjax.types import Params


@dataclasses.dataclass(frozen=True)
class KeepZeros:
    """An optimizer that leaves the elements of matrices alone that are exactly 0: with those of a pruned model
    (`gptjax prune`) as the start, it recovers what pruning cost (Han et al. 2015, arXiv:1506.02626, section 3). A
    matrix that is all zeros, as an adapter's may be at its start, never changes."""

    optimizer: Optimizer | Groups
    """The optimizer of all else."""

    @property
    def learning_rate(self) -> float:
        """Peak learning rate."""
        return self.optimizer.learning_rate

    def learning_rate_schedule(self, steps: int) -> optax.Schedule:
        """Step, from 0 -> learning rate, for a run of `steps`."""
        return self.optimizer.learning_rate_schedule(steps)

    def with_schedule(self, schedule: Schedule) -> Self:
        """This optimizer with another schedule."""
        return dataclasses.replace(self, optimizer=self.optimizer.with_schedule(schedule))

    def build(self, steps: int, info: Params, width_multiplier: float = 1.0) -> optax.GradientTransformation:
        """The optax transformation for a run of `steps`; see `Optimizer.build`."""

        def keep(updates: Params, params: Params) -> Params:
            return jax.tree.map(lambda u, p, i: jnp.where(p == 0, 0, u) if i.is_matrix else u, updates, params, info)

        return optax.chain(self.optimizer.build(steps, info, width_multiplier), optax.stateless(keep))
