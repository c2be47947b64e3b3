"""The common parts of objectives: a model's logits, auxiliary losses of its parts, and sums over tokens in chunks, so
that no array of all logits [B, T, V] exists.

    nll, logsumexp = per_token(cross_entropy, deferred, targets)                            # [B, T] each
    loss, _ = weighted_sums(cross_entropy, deferred, weights, targets)                      # sum_bt w_bt nll_bt

A function of logits [..., V] gives values [...] of each token. `weighted_sums` knows the weights of these values before
the backward pass: it computes the gradient in the forward pass, where the logits are at hand, and has no more FLOPs
than whole logits. `per_token` leaves the weights open: its backward pass computes the logits again, a third more FLOPs
of the head. Both accept whole logits as well.

On a mesh each device splits its own tokens into chunks; the gradient of the unembedding is summed over devices once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from gptjax.distributed.sharding import axes_of, reshard
from gptjax.kernels import target
from gptjax.kernels.cross_entropy import DeferredLogits, Logits
from gptjax.types import Array, Batch, Key, Metrics, Params

COLLECTIONS = ["losses", "deferred_logits"]
"""Collections that objectives ask a model for."""
CHUNK = {"cpu": 2**26, "gpu": 2**31, "tpu": 2**29}
"""Platform -> bytes of float32 logits of a chunk, if there are more than four times as many on a device. A chunk costs
reading and writing the gradient of the unembedding: on an H100, 10 % of the products' time at 4,096 tokens."""
TILE = 128
"""Rows of a chunk are a multiple of this many, if they are more than 1,024: the tiles of a GPU's and TPU's products."""

Function = Callable[..., tuple[Array, ...]]
"""(logits [..., V], *arrays [..., *], *constants) -> values float32 [...] of each token."""


def logits_of(apply: Callable, params: Params, batch: Batch, key: Key | None = None) -> tuple[Logits, Any]:
    """Logits of a batch, deferred if the model can, and the auxiliary losses of its parts, for `with_parts`.

    apply  a language model's: `apply({"params": params}, tokens, positions, segments) -> (logits [B, T, V], cache)`
    key    None: no dropout
    """
    rngs = {} if key is None else {"rngs": {"dropout": key}}
    inputs = ({"params": params}, batch.tokens, batch.positions, batch.segments)
    return logits_in(apply(*inputs, mutable=COLLECTIONS, **rngs))


def logits_in(output: Any) -> tuple[Logits, Any]:
    """Logits and auxiliary losses, from what `apply(..., mutable=COLLECTIONS)` returned."""
    (logits, _), sown = output
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


def per_token(f: Function, logits: Logits, *arrays: Any, constants: Any = (), chunk: int | None = None) -> Any:
    """f(logits, *arrays, *constants): a tuple of float32 [B, T], with a gradient to the logits alone.

    arrays     trees of arrays [B, T, *]; f gets the rows of a chunk's tokens, [tokens, *]
    constants  trees of arrays that f gets as they are
    chunk      tokens per chunk on a device. None: as many as `CHUNK` says
    """
    if not isinstance(logits, DeferredLogits):
        return f(logits, *arrays, *constants)
    if (size := _chunk_size(logits, chunk)) is None:
        return f(logits.logits(_specs(logits)[2]), *arrays, *constants)

    @jax.custom_vjp
    def values(deferred: DeferredLogits, arrays: Any, constants: Any) -> Any:
        return _values(f, size, deferred, arrays, constants)

    def forward(*given: Any) -> Any:
        trained, (deferred, arrays, constants) = _trained(given[0]), _plain(given)
        return _values(f, size, deferred, arrays, constants), (trained, deferred, arrays, constants)

    def backward(saved: Any, gradients: Sequence[Any]) -> Any:
        trained, deferred, arrays, constants = saved
        there = [i for i, g in enumerate(gradients) if not isinstance(g, SymbolicZero)]
        if not there:
            return None, None, None

        def weighted(logits: Array, gradients: Sequence[Array], *rest: Any) -> tuple[Array]:
            found = f(logits, *rest)
            return (functools.reduce(jnp.add, (g * found[i] for i, g in zip(there, gradients, strict=True))),)

        arrays = (tuple(gradients[i] for i in there), *arrays)
        ones = jnp.ones_like(arrays[0][0])
        return _values_and_gradient(weighted, size, trained, deferred, ones, arrays, constants)[1], None, None

    values.defvjp(forward, backward, symbolic_zeros=True)
    return values(logits, jax.tree.map(jnp.asarray, arrays), constants)


def weighted_sums(
    f: Function, logits: Logits, weights: Any, *arrays: Any, constants: Any = (), chunk: int | None = None
) -> Any:
    """sum_bt weights_bt f(logits, *arrays, *constants)_bt: a tuple of float32 scalars, of which the first alone has a
    gradient, to the logits alone. weights float32 [B, T]; the others as in `per_token`."""
    weights = jnp.asarray(weights)
    if not isinstance(logits, DeferredLogits) or (size := _chunk_size(logits, chunk)) is None:
        first, *others = per_token(f, logits, *arrays, constants=constants, chunk=chunk)
        return (jnp.sum(weights * first), *(lax.stop_gradient(jnp.sum(weights * x)) for x in others))

    @jax.custom_vjp
    def sums(deferred: DeferredLogits, weights: Array, arrays: Any, constants: Any) -> Any:
        return tuple(jnp.sum(weights * x) for x in _values(f, size, deferred, arrays, constants))

    def forward(*given: Any) -> Any:
        deferred, weights, arrays, constants = _plain(given)
        values, gradient = _values_and_gradient(f, size, _trained(given[0]), deferred, weights, arrays, constants)
        return tuple(jnp.sum(weights * x) for x in values), gradient

    def backward(gradient: DeferredLogits, of: Sequence[Any]) -> Any:
        if isinstance(of[0], SymbolicZero):
            return None, None, None, None
        return jax.tree.map(lambda x: (x * of[0]).astype(x.dtype), gradient), None, None, None

    sums.defvjp(forward, backward, symbolic_zeros=True)
    return sums(logits, weights, jax.tree.map(jnp.asarray, arrays), constants)


def _chunk_size(deferred: DeferredLogits, chunk: int | None) -> int | None:
    """Tokens per chunk on a device; None: all of them."""
    (B, T, _), V = deferred.hidden.shape, deferred.unembedding.shape[1]
    _, axes, spec = _specs(deferred)
    row = 4 * V // _shards(() if spec is None else axes_of(spec[2]))
    tokens = B * T // _shards(axes)
    if chunk is None:
        most = CHUNK.get(target.backend(), CHUNK["cpu"])
        chunk = tokens if tokens * row <= 4 * most else max(most // row, 1)
    return None if chunk >= tokens else chunk


def _values(f: Function, size: int, deferred: DeferredLogits, arrays: Any, constants: Any) -> tuple[Array, ...]:
    """float32 [B, T] each."""

    def values_of(hidden: Array, deferred: Any, arrays: Any, constants: Any) -> tuple[Array, ...]:
        def of_chunk(chunk: Any) -> tuple[Array, ...]:
            return _of_chunk(f, dataclasses.replace(deferred, hidden=chunk[0]), chunk[1], constants)

        values = lax.map(of_chunk, _chunks((hidden, arrays), size))
        return _joined(values, hidden.shape[:2])

    tokens, axes, _ = _specs(deferred)
    local = _mapped(values_of, axes, (tokens, PartitionSpec(), tokens, PartitionSpec()), tokens)
    return local(deferred.hidden, dataclasses.replace(deferred, hidden=None), reshard(arrays, tokens), constants)


def _values_and_gradient(
    f: Function,
    size: int,
    trained: dict[str, None],
    deferred: DeferredLogits,
    weights: Array,
    arrays: Any,
    constants: Any,
) -> tuple[tuple[Array, ...], DeferredLogits]:
    """float32 [B, T] each, and the gradient of the weighted sum of the first; None for what is not trained."""
    tokens, axes, _ = _specs(deferred)
    shared = {name: getattr(deferred, name) for name in ("unembedding", "bias") if name in trained}

    def gradient_of(hidden: Array, deferred: Any, weights: Array, arrays: Any, constants: Any) -> Any:
        def of_chunk(total: dict[str, Array], chunk: Any) -> Any:
            hidden, weights, arrays = chunk

            def loss(of: dict[str, Array]) -> tuple[Array, tuple[Array, ...]]:
                values = _of_chunk(f, dataclasses.replace(deferred, **{"hidden": hidden} | of), arrays, constants)
                return jnp.sum(weights * values[0]), values

            of = {"hidden": hidden} if "hidden" in trained else {}
            gradient, values = jax.grad(loss, has_aux=True)(of | {name: getattr(deferred, name) for name in shared})
            total = {name: x + gradient[name].astype(x.dtype) for name, x in total.items()}
            return total, (values, gradient.get("hidden"))

        zeros = {name: _zeros(getattr(deferred, name)) for name in shared}
        total, (values, d_hidden) = lax.scan(of_chunk, zeros, _chunks((hidden, weights, arrays), size))
        if axes:  # compilers for TPUs and GPUs make a reduce-scatter of it, where the parameter is sharded
            total = lax.psum(total, axes)
        total = {name: x.astype(getattr(deferred, name).dtype) for name, x in total.items()}
        return _joined(values, hidden.shape[:2]), total, _joined(d_hidden, hidden.shape[:2])

    given = tokens, PartitionSpec(), tokens, tokens, PartitionSpec()
    local = _mapped(gradient_of, axes, given, (tokens, PartitionSpec(), tokens))
    without = dataclasses.replace(deferred, hidden=None)
    values, total, d_hidden = local(deferred.hidden, without, *reshard((weights, arrays), tokens), constants)
    gradient = dataclasses.replace(deferred, unembedding=None, bias=None, hidden=d_hidden)
    return values, dataclasses.replace(gradient, **{n: reshard(x, _spec(shared[n])) for n, x in total.items()})


def _mapped(f: Callable[..., Any], axes: tuple[str, ...], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """f of each device's tokens, if they are sharded over `axes`."""
    if not axes:
        return f
    from gptjax.distributed.partial_map import partial_map

    return partial_map(f, axes, in_specs, out_specs)


def _of_chunk(f: Function, deferred: DeferredLogits, arrays: Any, constants: Any) -> tuple[Array, ...]:
    """f of the tokens of a chunk, hidden [tokens, D]."""
    spec = _spec(deferred.unembedding)
    return f(deferred.logits(None if spec is None else PartitionSpec(None, spec[1])), *arrays, *constants)


def _chunks(tree: Any, size: int) -> Any:
    """Arrays [B, T, *] in equal chunks of at most `size` tokens, [chunks, tokens, *]; the last is padded with 0."""

    def split(x: Array) -> Array:
        tokens = x.shape[0] * x.shape[1]
        count = -(-tokens // size)
        length = -(-tokens // count)
        length = -(-length // TILE) * TILE if length > 1_024 else length
        x = x.reshape(tokens, *x.shape[2:])
        x = jnp.pad(x, ((0, count * length - tokens), *[(0, 0)] * (x.ndim - 1)))
        return x.reshape(count, length, *x.shape[1:])

    return jax.tree.map(split, tree)


def _joined(tree: Any, rows: tuple[int, ...]) -> Any:
    """Inverse of `_chunks`: [B, T, *]."""
    tokens = math.prod(rows)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:tokens].reshape(*rows, *x.shape[2:]), tree)


def _specs(deferred: DeferredLogits) -> tuple[PartitionSpec | None, tuple[str, ...], PartitionSpec | None]:
    """PartitionSpec of arrays [B, T], its mesh axes, and that of the logits [B, T, V]. None: no mesh."""
    hidden, unembedding = _spec(deferred.hidden), _spec(deferred.unembedding)
    if hidden is None or unembedding is None:
        return None, (), None
    axes = (*axes_of(hidden[0]), *axes_of(hidden[1]))
    return PartitionSpec(*hidden[:2]), axes, PartitionSpec(*hidden[:2], unembedding[1])


def _spec(x: Array) -> PartitionSpec | None:
    """PartitionSpec of an array, with an entry for each axis. None: no mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return None
    spec = jax.typeof(x).sharding.spec
    return PartitionSpec(*spec, *[None] * (x.ndim - len(spec)))


def _shards(axes: tuple[str, ...]) -> int:
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)


def _zeros(x: Array) -> Array:
    return jnp.zeros(x.shape, jnp.float32, out_sharding=_spec(x))


def _trained(deferred: Any) -> dict[str, None]:
    """Names of the arrays of which a gradient is wanted, as a tree without leaves; `deferred` as a `custom_vjp` with
    symbolic zeros gets it."""
    names = ("hidden", "unembedding", "bias")
    return {name: None for name in names if getattr(getattr(deferred, name), "perturbed", False)}


def _plain(tree: Any) -> Any:
    """The arrays of what a `custom_vjp` with symbolic zeros gets."""
    return jax.tree.map(lambda x: x.value, tree, is_leaf=lambda x: hasattr(x, "perturbed"))
