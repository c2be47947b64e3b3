"""Auxiliary losses of a model's parts, such as a router's load balance, which are added to any loss."""

from __future__ import annotations

from typing import Any

import jax

from gptjax.types import Array, Metrics


def with_parts(loss: Array, weight: Array, sown: Any, metrics: Metrics) -> Metrics:
    """Add the auxiliary losses to the metrics and to "loss". `loss` is a sum with this weight; an auxiliary loss is a
    mean, so it is multiplied by the weight."""
    added = {path[-1].key: value for path, value in jax.tree_util.tree_leaves_with_path(sown)}
    total = loss + weight * sum(added.values())
    return {"loss": (total, weight), **metrics, **{name: (value * weight, weight) for name, value in added.items()}}
