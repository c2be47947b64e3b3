"""A stack of blocks over stacked parameters.

`lax.scan` runs over the stack, so that compile time does not grow with depth. Layers may differ by a pattern that is
repeated: then what is scanned is one round of the pattern, and the parameters of the stack are

    {"attention": ..., "mlp": ..., ...}              leaves [L, ...]      where all layers are alike
    {"0": {...}, "1": {...}}                         leaves [L/2, ...]    with a pattern of two
    {"start_0": {...}, "0": ..., "1": ..., "end_0": {...}}               with layers that are in no whole round
    {"layer_0": {...}, "layer_1": {...}, ...}        a tree a layer       after `unstack`, which decoding wants
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from gptjax.distributed.parameters import Declared
from gptjax.distributed.sharding import ShardingRules
from gptjax.nn.block import Block, Context
from gptjax.nn.module import ParamFactory, wants
from gptjax.nn.pipeline import pipeline
from gptjax.nn.remat import rematerialised
from gptjax.types import Array, Key, Params, UserError

UNROLLED = 12
"""Depth up to which the scan over layers is unrolled: 8 to 15 % off a training step on CPU, where slices are copies."""


class Stack(nn.Module):
    """x [B, T, D] -> [B, T, D] through `first`, then `repeats` times through `pattern`, then `last`."""

    pattern: tuple[Block, ...]
    repeats: int
    first: tuple[Block, ...] = ()
    last: tuple[Block, ...] = ()
    remat: str | None = None
    """What the backward pass keeps, not computes again: a name in `remat.POLICIES`; none: everything."""
    microbatches: int | None = None
    """Parts that a batch goes through stages in, one behind the other; none: as many as there are stages."""
    rules: ShardingRules = ShardingRules()
    """`layers` cuts the repeats into stages of a `pipeline`."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """One for each layer."""
        return (*self.first, *self.pattern * self.repeats, *self.last)

    @nn.compact
    def __call__(
        self, x: Array, context: Context, slots: tuple[Any, ...] | None = None, key: Key | None = None
    ) -> tuple[Array, tuple[Any, ...] | None]:
        """`slots`: for decoding, those of each layer; the new ones come back. `key`: for dropout, in training alone."""
        if self.is_initializing():
            variables = self._init(self.make_rng("params"), x, context)
            for name, tree in variables["params"].items():
                self.param(name, lambda _, tree=tree: tree)
            if wants(self, "info"):
                for name, tree in variables["info"].items():
                    self.put_variable("info", name, tree)
            return x, slots  # of the right shape; to run the layers is needless, and a pipeline wants more rows
        params: Mapping[str, Params] = self.variables["params"]
        if slots is not None or "layer_0" in params:
            if key is not None:
                raise UserError(
                    'rngs: got a key "dropout", must be none with a cache or after `unstack`, which are for decoding; '
                    "train the stacked parameters"
                )
            return self._one_by_one(unstack(self, params), x, context, slots)

        context = self._with_first(x, context, lambda: _layer_of(self, params, 0))
        losses: list[Any] = []

        def run(block: Block, x: Array, context: Context, params: Params, key: Key | None) -> tuple[Array, Any]:
            rngs = None if key is None else {"dropout": key}
            (x, _), sown = block.apply({"params": params}, x, context, rngs=rngs, mutable=["losses"])
            return x, sown

        run = rematerialised(run, self.remat, static=(0,))

        def ends(name: str, blocks: Sequence[Block], x: Array, key: Key | None) -> Array:
            for i, block in enumerate(blocks):
                x, sown = run(block, x, context, params[f"{name}_{i}"], _fold_in(key, i))
                losses.append(sown)
            return x

        def round(x: Array, context: Context, params: Params, key: Key | None) -> tuple[Array, Any]:
            if len(self.pattern) == 1:
                return run(self.pattern[0], x, context, params, key)
            sown = []
            for i, block in enumerate(self.pattern):
                x, one = run(block, x, context, params[str(i)], _fold_in(key, i))
                sown.append(one)
            return x, sown

        def rounds(x: Array, context: Context, params: Params, keys: Key | None, part: Any = None) -> tuple[Array, Any]:
            """All that there are, or a stage's, of a batch or of a part of it."""
            if keys is not None and part is not None:
                keys = jax.vmap(jax.random.fold_in, (0, None))(keys, part)
            count = len(jax.tree.leaves(params)[0])
            unroll = count if self.repeats * len(self.pattern) <= UNROLLED else 1
            x, sown = lax.scan(lambda x, layer: round(x, context, *layer), x, (params, keys), unroll=unroll)
            return x, _sums(sown)

        begin, middle, end = (None,) * 3 if key is None else jax.random.split(key, 3)
        x = ends("start", self.first, x, begin)
        if self.repeats:
            stacked = {name: tree for name, tree in params.items() if not name.startswith(("start_", "end_"))}
            keys = None if middle is None else jax.random.split(middle, self.repeats)
            if stages := self.rules.mesh_axes("layers"):
                keys = None if keys is None else jax.reshard(keys, PartitionSpec(stages))
                x, sown = pipeline(rounds, stacked, keys, x, context, stages, self.microbatches)
            else:
                x, sown = rounds(x, context, stacked, keys)
            losses.append(sown)
        x = ends("end", self.last, x, end)
        for name, total in _sums(losses).items():
            ParamFactory(self).add_loss(name, total)
        return x, None

    def _init(self, key: Key, x: Array, context: Context) -> dict[str, dict[str, Params]]:
        """ "params" as `__call__` wants them, every layer's from its own key, and "info" on them."""

        def one(block: Block, key: Key) -> Any:
            return block.init(key, x, context, mutable=["params", "info"])

        def round(key: Key) -> dict[str, dict[str, Params]]:
            if len(self.pattern) == 1:
                return one(self.pattern[0], key)
            layers = {str(i): one(block, jax.random.fold_in(key, i)) for i, block in enumerate(self.pattern)}
            return {kind: {i: layer[kind] for i, layer in layers.items()} for kind in ("params", "info")}

        begin, middle, end = jax.random.split(key, 3)
        params, info = {}, {}
        if self.repeats:
            stacked = jax.vmap(round)(jax.random.split(middle, self.repeats))
            params = jax.tree.map(lambda x: _over_stages(x, self.rules.mesh_axes("layers") or None), stacked["params"])
            declared = lambda x: isinstance(x, Declared)  # noqa: E731
            info = jax.tree.map(lambda x: Declared(x.info.stack(self.repeats)), stacked["info"], is_leaf=declared)
        for name, blocks, key in (("start", self.first, begin), ("end", self.last, end)):
            for i, block in enumerate(blocks):
                layer = one(block, jax.random.fold_in(key, i))
                params[f"{name}_{i}"], info[f"{name}_{i}"] = layer["params"], layer["info"]
        return {"params": params, "info": info}

    def _with_first(self, x: Array, context: Context, params: Callable[[], Params], slots: Any = None) -> Context:
        """With the first layer's values, for the layers that mix them in. That layer runs for it, but of what it makes
        nothing else is read, so that the compiler leaves the rest out."""
        if not any(block.attention.mixes for block in self.blocks):
            return context
        _, kept = self.blocks[0].apply({"params": params()}, x, context, slots, mutable=["kept"])
        if not jax.tree.leaves(kept):
            kind = type(self.blocks[0].attention).__name__
            raise UserError(
                f"model.leading_layers: got {kind}, must be MultiHeadAttention, whose values later layers mix in"
            )
        (first,) = jax.tree.leaves(kept)
        return dataclasses.replace(context, first=first)

    def _one_by_one(
        self, params: Mapping[str, Params], x: Array, context: Context, slots: tuple[Any, ...] | None
    ) -> tuple[Array, tuple[Any, ...] | None]:
        context = self._with_first(x, context, lambda: params["layer_0"], None if slots is None else slots[0])
        new = []
        for i, block in enumerate(self.blocks):
            kept = None if slots is None else slots[i]
            x, kept = block.apply({"params": params[f"layer_{i}"]}, x, context, kept)
            new.append(kept)
        return x, None if slots is None else tuple(new)


def _fold_in(key: Key | None, data: int) -> Key | None:
    return None if key is None else jax.random.fold_in(key, data)


def _sums(sown: Any) -> dict[str, Array]:
    """What blocks sowed, the sum over layers for each name."""
    totals: dict[str, Array] = {}
    for path, value in jax.tree_util.tree_leaves_with_path(sown):
        name = path[-1].key
        totals[name] = totals.get(name, 0.0) + jnp.sum(value)
    return totals


def place(stack: Stack, layer: int) -> tuple[tuple[str, ...], int | None]:
    """Where the parameters of a layer lie: the names that lead to its tree, and its index in the leaves, if stacked."""
    scanned = layer - len(stack.first)
    if scanned < 0:
        return (f"start_{layer}",), None
    repeat, i = divmod(scanned, len(stack.pattern))
    if repeat >= stack.repeats:
        return (f"end_{scanned - stack.repeats * len(stack.pattern)}",), None
    return (() if len(stack.pattern) == 1 else (str(i),)), repeat


def unstack(stack: Stack, params: Mapping[str, Params]) -> Mapping[str, Params]:
    """The stack's parameters as a tree a layer, "layer_0" and so on. Does nothing to what is unstacked already."""
    if "layer_0" in params:
        return params
    return {f"layer_{layer}": _layer_of(stack, params, layer) for layer in range(len(stack.blocks))}


def _layer_of(stack: Stack, params: Mapping[str, Params], layer: int) -> Params:
    names, index = place(stack, layer)
    tree: Any = params
    for name in names:
        tree = tree[name]
    if index is None:
        return tree
    tree = {name: leaf for name, leaf in tree.items() if not name.startswith(("start_", "end_"))}
    return jax.tree.map(lambda leaf: _layer(leaf, index), tree)


def _layer(leaf: Array, index: int) -> Array:
    """leaf [L, ...] -> [...], on all stages of a pipeline where they share out the layers."""
    return _over_stages(leaf, None)[index]


def _over_stages(leaf: Array, stages: tuple[str, ...] | None) -> Array:
    """leaf [L, ...] with its layers cut over these mesh axes, or whole."""
    spec: tuple[Any, ...] = tuple(getattr(getattr(jax.typeof(leaf), "sharding", None), "spec", ()))
    if not spec or (stages is None and spec[0] is None):
        return leaf
    return jax.reshard(leaf, PartitionSpec(stages, *spec[1:]))
