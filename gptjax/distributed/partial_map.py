"""`jax.shard_map` over some axes of an explicit mesh that keeps arrays sharded over the others.

At the edge of a `shard_map`, jax 0.10 names the mapped axes alone and closes all dimensions. So whatever crosses it,
residuals of the backward pass included, is gathered over the other explicit axes. (XLA undoes this for TPUs, not for
CPUs.) Dimensions stay open if the other axes are automatic. Hence arrays cross the edge with automatic axes, between an
explicit sharding outside and one inside, and residuals cross it as results do.

jax 0.11 leaves dimensions open: this file can go with support for 0.10, as its test will say.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType, PartitionSpec, get_abstract_mesh, use_abstract_mesh

from gptjax.distributed.sharding import axes_of
from gptjax.types import PyTree


def partial_map(
    f: Callable[..., Any], axes: tuple[str, ...], in_specs: PyTree, out_specs: PyTree
) -> Callable[..., Any]:
    """As `jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes), check_vma=False)`.

    f may not close over arrays. Differentiable in reverse mode.
    """
    if jax.__version_info__ >= (0, 11):
        return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes), check_vma=False)

    def call(*args: PyTree) -> PyTree:
        leaves, tree = jax.tree.flatten(args)
        specs = _spec_of_each_leaf(in_specs, args)

        def flat(*leaves: jax.Array) -> PyTree:
            return f(*tree.unflatten(leaves))

        @jax.custom_vjp
        def differentiable(*leaves: jax.Array) -> PyTree:
            return _across_edge(flat, axes, specs, out_specs)(*leaves)

        def forward(*given: Any) -> tuple[PyTree, PyTree]:
            """The result, and the backward pass with its residuals, stacked over `axes`."""
            active = [i for i, leaf in enumerate(given) if leaf.perturbed]

            def linearized(*leaves: jax.Array) -> PyTree:
                def of_active(*some: jax.Array) -> PyTree:
                    replaced = dict(zip(active, some, strict=True))
                    return flat(*(replaced.get(i, leaf) for i, leaf in enumerate(leaves)))

                y, pullback = jax.vjp(of_active, *(leaves[i] for i in active))
                return y, jax.tree.map(lambda x: x[None], pullback)

            out = out_specs, PartitionSpec(axes)
            y, pullback = _across_edge(linearized, axes, specs, out)(*(leaf.value for leaf in given))
            return y, (dict.fromkeys(active), pullback)

        def backward(saved: PyTree, gradient: PyTree) -> PyTree:
            active, pullback = saved
            copies = math.prod(get_abstract_mesh().shape[name] for name in axes)
            wanted = tuple(specs[i] for i in active)
            gradient = jax.tree.map(_zeros_if_symbolic, gradient, is_leaf=lambda x: isinstance(x, SymbolicZero))
            given = _spec_of_each_leaf(out_specs, gradient)

            def transposed(gradient: PyTree, pullback: PyTree) -> PyTree:
                # What all devices return counts once; what all devices read has a gradient from each.
                leaves, tree = jax.tree.flatten(gradient)
                leaves = [x if any(spec) else x / copies for x, spec in zip(leaves, given, strict=True)]
                found = jax.tree.map(lambda x: x[0], pullback)(tree.unflatten(leaves))
                return tuple(x if any(spec) else lax.psum(x, axes) for x, spec in zip(found, wanted, strict=True))

            found = _across_edge(transposed, axes, (out_specs, PartitionSpec(axes)), wanted)(gradient, pullback)
            by_leaf = dict(zip(active, found, strict=True))
            return tuple(by_leaf.get(i) for i in range(len(specs)))

        differentiable.defvjp(forward, backward, symbolic_zeros=True)
        return differentiable(*leaves)

    return call


def _across_edge(
    f: Callable[..., Any], axes: tuple[str, ...], in_specs: PyTree, out_specs: PyTree
) -> Callable[..., Any]:
    """`partial_map` without derivatives."""

    def call(*args: PyTree) -> PyTree:
        mesh = get_abstract_mesh()
        others = [name for name in mesh.explicit_axes if name not in axes]
        automatic, explicit = (dict.fromkeys(others, kind) for kind in (AxisType.Auto, AxisType.Explicit))
        inside = jax.tree.map(lambda x: _only(others, _spec(x)), args)
        results: list[Any] = []  # their specs inside

        def body(*args: PyTree) -> PyTree:
            mesh = get_abstract_mesh()
            with use_abstract_mesh(mesh.update_axis_types(explicit)):
                y = f(*jax.reshard(args, inside))
            results.append(jax.tree.map(_spec, y))
            return jax.reshard(y, jax.tree.map(lambda x: PartitionSpec(*[None] * x.ndim), y))

        with use_abstract_mesh(mesh.update_axis_types(automatic)):
            args = jax.reshard(args, jax.tree.map(lambda x: _only(axes, _spec(x)), args))
            y = jax.shard_map(body, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes), check_vma=False)(
                *args
            )
        leaves, tree = jax.tree.flatten(y)
        places = map(_both, _spec_of_each_leaf(out_specs, y), jax.tree.leaves(results[-1], is_leaf=_is_spec))
        return tree.unflatten(jax.reshard(leaves, list(places)))

    return call


def _zeros_if_symbolic(x: Any) -> Any:
    if not isinstance(x, SymbolicZero):
        return x
    like: Any = x.aval
    return jnp.zeros(like.shape, like.dtype, device=like.sharding)


def _is_spec(x: object) -> bool:
    return isinstance(x, PartitionSpec)


def _spec(x: jax.Array) -> PartitionSpec:
    return jax.typeof(x).sharding.spec


def _spec_of_each_leaf(specs: PyTree, tree: PyTree) -> tuple[PartitionSpec, ...]:
    """Specs of the leaves of a tree, of which `specs` is a prefix."""
    each = jax.tree.map(lambda spec, part: jax.tree.map(lambda _: spec, part), specs, tree, is_leaf=_is_spec)
    return tuple(jax.tree.leaves(each, is_leaf=_is_spec))


def _only(axes: Collection[str], spec: PartitionSpec) -> PartitionSpec:
    """The spec without other mesh axes than these."""
    return PartitionSpec(*(tuple(name for name in axes_of(part) if name in axes) or None for part in spec))


def _both(one: PartitionSpec, other: PartitionSpec) -> PartitionSpec:
    """The spec of an array sharded as both say."""
    parts = itertools.zip_longest(one, other)
    return PartitionSpec(*((*axes_of(a), *axes_of(b)) or None for a, b in parts))
