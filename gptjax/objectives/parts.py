"""What parts of a model add to any loss: a router's balance, say."""

from __future__ import annotations

from typing import Any

import jax

from gptjax.types import Array, Metrics


def with_parts(loss: Array, weight: Array, sown: Any, metrics: Metrics) -> Metrics:
    """The metrics with "loss", and with an entry for everything that parts of the model sowed (`Weight.loss`), which is
    in the loss too. loss is a sum of this weight; what is sown is a mean, so it counts as often as the weight says."""
    added = {path[-1].key: value for path, value in jax.tree_util.tree_leaves_with_path(sown)}
    total = loss + weight * sum(added.values())
    return {"loss": (total, weight), **metrics, **{name: (value * weight, weight) for name, value in added.items()}}
