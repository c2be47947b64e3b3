"""The common parts of objectives: a model's logits, and the auxiliary losses of its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from gptjax.kernels.deferred_logits import DeferredLogits, Logits
from gptjax.types import Array, Batch, Key, Metrics, Params


def logits_of(apply: Callable, params: Params, batch: Batch, key: Key | None = None) -> tuple[Logits, Any]:
    """Logits of a batch, deferred if the model can, and the auxiliary losses of its parts, for `with_parts`.

    apply  a language model's: `apply({"params": params}, tokens, positions, segments) -> (logits [B, T, V], cache)`
    key    None: no dropout
    """
    rngs = {} if key is None else {"rngs": {"dropout": key}}
    inputs = ({"params": params}, batch.tokens, batch.positions, batch.segments)
    (logits, _), sown = apply(*inputs, mutable=["losses", "deferred_logits"], **rngs)
    logits = {"next": logits, **deferred_logits(sown)}["next"]
    return logits, {name: tree for name, tree in sown.items() if name != "deferred_logits"}


def deferred_logits(sown: Any) -> dict[str, DeferredLogits]:
    """Name -> logits of each head that deferred them, from the collections that `apply` returned."""
    found = jax.tree_util.tree_leaves_with_path(
        sown.get("deferred_logits"), is_leaf=lambda x: isinstance(x, DeferredLogits)
    )
    return {path[-1].key: deferred for path, deferred in found}


def with_parts(loss: Array, weight: Array, sown: Any, metrics: Metrics) -> Metrics:
    """Add the auxiliary losses to the metrics and to "loss". `loss` is a sum with this weight; an auxiliary loss is a
    mean, so it is multiplied by the weight."""
    added = {path[-1].key: value for path, value in jax.tree_util.tree_leaves_with_path(sown)}
    total = loss + weight * sum(added.values())
    return {"loss": (total, weight), **metrics, **{name: (value * weight, weight) for name, value in added.items()}}
