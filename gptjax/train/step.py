"""Training step: gradient, accumulation over microbatches, optimizer, parameter average. One jitted function with
donated state, for a CPU, a GPU or a TPU pod."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import lax

from gptjax.distributed.sharding import split_microbatches
from gptjax.distributed.xla import Value
from gptjax.train.divergence import Skip, Stop
from gptjax.train.privacy import Mechanism
from gptjax.train.state import State
from gptjax.types import Array, Batch, Key, Metrics, Params, PyTree

Tree = TypeVar("Tree")
Updates = Any
"""Subtree of the parameters, with a function () -> Array for each of them."""


def make_step(
    objective: Callable[..., Metrics],
    apply: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    accumulate: int = 1,
    ema: float | None = None,
    divergence: Stop = Stop(),
    prepare: Callable[..., Batch] = lambda params, batch, *frozen: batch,
    mechanism: Mechanism | None = None,
    rounded: Callable[[Params], Params] = lambda params: params,
    compiler_options: Mapping[str, Value] | None = None,
) -> jax.stages.Wrapped:
    """Make the jitted function (state, batch, *frozen) -> (state, metrics). It donates the state.

    objective         an `Objective`, (apply, params, batch, key, *frozen) -> metrics; `frozen` is not trained
    apply             `Module.apply`
    optimizer         trains all parameters but those that the model's parts update themselves (`ParamFactory.update`)
    accumulate        microbatches per step; the gradient is that of the whole batch
    ema               decay of the parameter average in the state. None: no average
    divergence        a `Skip` checks each step: a bad one changes neither parameters, optimizer state nor average
    prepare           (params, batch, *frozen) -> batch: what is computed once from the whole batch, without a gradient
    mechanism         clips the gradient of each sequence and adds noise, for privacy. None: does not
    rounded           parameters -> those whose loss and gradient are computed. The gradient changes the former,
                      straight through the rounding (Bengio et al. 2013, arXiv:1308.3432)
    compiler_options  of XLA; see `distributed/xla.py`

    The loss is a weighted sum: microbatches are summed, and the gradient is divided by the total weight once.
    """

    def loss(params: Params, batch: Batch, key: Key, *frozen: Params) -> tuple[Array, tuple[Metrics, Updates]]:
        reported: list[Updates] = []

        def reporting(*args: Any, mutable: Sequence[str] = (), **kwargs: Any) -> Any:
            output, found = apply(*args, mutable=[*mutable, "updates"], **kwargs)
            reported.append(found.pop("updates", {}))
            return (output, found) if mutable else output

        metrics = objective(reporting, params, batch, key, *frozen)
        return metrics["loss"][0], (metrics, functools.reduce(_added, reported) if reported else {})

    gradient = jax.grad(loss, has_aux=True)
    if mechanism is not None:
        gradient = mechanism.clipped(gradient)

    def accumulated(params: Params, batch: Batch, key: Key, *frozen: Params) -> tuple[Params, tuple[Metrics, Updates]]:
        keys = jax.random.split(key, accumulate)
        return sum_microbatches(lambda part, key: gradient(params, part, key, *frozen), accumulate, batch, keys)

    def step(state: State, batch: Batch, *frozen: Params) -> tuple[State, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        key, of_noise = (key, key) if mechanism is None else jax.random.split(key)
        seen = rounded(state.params)
        batch = prepare(seen, batch, *frozen)
        grads, (metrics, reported) = (accumulated if accumulate > 1 else gradient)(seen, batch, key, *frozen)
        weight = jnp.maximum(metrics["loss"][1], 1e-8)
        grads = jax.tree.map(lambda g: g / weight, grads) if mechanism is None else mechanism.noisy(grads, of_noise)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params = _updated(params, reported) if reported else params
        average = state.ema
        if ema is not None:
            change = 1 - ema
            # `optax.incremental_update` rounds twice, (1 - change) a + change p, and changes an average of equal
            # numbers.
            average = jax.tree.map(lambda a, p: a + change * (p - a), average, params)
        norm = optax.tree.norm(grads)
        metrics = metrics | {"gradient_norm": (norm, jnp.ones(()))}
        statistics = None
        if isinstance(divergence, Skip):
            assert state.statistics is not None
            good, statistics, judged = divergence.check(state.statistics, metrics["loss"][0] / weight, norm)
            after, before = (params, opt_state, average), (state.params, state.opt_state, state.ema)
            params, opt_state, average = jax.tree.map(lambda new, old: lax.select(good, new, old), after, before)
            metrics |= judged
        return State(state.step + 1, params, opt_state, state.key, average, statistics), metrics

    return jax.jit(step, donate_argnums=0, compiler_options=dict(compiler_options or {}))


def sum_microbatches(function: Callable[..., Tree], count: int, batch: Batch, *others: Array) -> Tree:
    """Sum of function(microbatch, *others), computed for one of `count` microbatches after the other to save memory.

    others  arrays [count, ...], an element for each microbatch
    """
    if count == 1:
        return function(batch, *(x[0] for x in others))
    parts = (jax.tree.map(lambda x: split_microbatches(x, count), batch), *others)
    first = function(*jax.tree.map(lambda x: x[0], parts))
    return lax.scan(
        lambda total, part: (_added(total, function(*part)), None), first, jax.tree.map(lambda x: x[1:], parts)
    )[0]


def divide(metrics: Metrics) -> dict[str, float]:
    """Fetch metrics from the devices and divide each sum by its weight."""
    fetched = jax.device_get(metrics)
    return {name: float(total) / max(float(weight), 1e-8) for name, (total, weight) in fetched.items()}


def _added(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, a, b)


def _updated(params: Params, updates: Updates) -> Params:
    """Add the updates that the model's parts report. Parameters that are not trained here have none."""
    if not isinstance(params, Mapping):
        return params + updates()
    return {name: _updated(x, updates[name]) if name in updates else x for name, x in params.items()}
