"""A stack of blocks as data, and the tree of its parameters.

Layers follow a repeated pattern, between `leading` and `trailing` layers. Parameters are stacked over the R repeats, so
that compile time does not grow with depth:

    {"attention": ..., "mlp": ..., ...}              leaves [R, ...]      if all layers are alike
    {"0": {...}, "1": {...}}                         leaves [R, ...]      with a pattern of two
    {"leading_0": {...}, "0": ..., "1": ..., "trailing_0": {...}}         with leading and trailing layers
    {"layer_0": {...}, "layer_1": {...}, ...}        one tree per layer   after `unstack`, for decoding

`scan.py` runs the stack in training, `decode.py` layer by layer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from gptjax.distributed.parameters import Declared
from gptjax.distributed.sharding import ShardingRules
from gptjax.nn.block import Block, Context
from gptjax.nn.remat import Remat
from gptjax.types import Array, Key, Params, PyTree, UserError


@dataclasses.dataclass(frozen=True)
class Stack:
    """`leading` blocks, then `repeats` times the `pattern`, then `trailing` blocks."""

    pattern: tuple[Block, ...]
    """Blocks that repeat."""
    repeats: int
    """R, number of repeats."""
    leading: tuple[Block, ...] = ()
    """Blocks before the pattern."""
    trailing: tuple[Block, ...] = ()
    """Blocks after the pattern."""
    remat: Remat = None
    """Activations that the backward pass saves. None: all."""
    microbatches: int | None = None
    """Number of pipeline microbatches. None: one per pipeline stage."""
    chunks: int = 1
    """Chunks of layers per pipeline stage."""
    rules: ShardingRules = ShardingRules()
    """Mesh axes of the logical axes. `layers` shards the repeats into the stages of a `pipeline`."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks, one per layer."""
        return (*self.leading, *self.pattern * self.repeats, *self.trailing)

    @property
    def uses_first_values(self) -> bool:
        """True if any layer uses the first layer's values."""
        return any(block.attention.uses_first_values for block in self.blocks)

    @property
    def named_leading(self) -> dict[str, Block]:
        """Leading blocks by the names of their parameters."""
        return {f"leading_{i}": block for i, block in enumerate(self.leading)}

    @property
    def named_pattern(self) -> dict[str, Block]:
        """Blocks of the pattern by the names of their parameters; "" for a single block."""
        return {"" if len(self.pattern) == 1 else str(i): block for i, block in enumerate(self.pattern)}

    @property
    def named_trailing(self) -> dict[str, Block]:
        """Trailing blocks by the names of their parameters."""
        return {f"trailing_{i}": block for i, block in enumerate(self.trailing)}

    def init(self, key: Key, x: Array, context: Context) -> dict[str, dict[str, Any]]:
        """Initial parameters, each layer's from its own key, as "params", and their `Declared` as "info"."""

        def layers(blocks: Mapping[str, Block], key: Key) -> dict[str, dict[str, Any]]:
            variables: dict[str, dict[str, Any]] = {"params": {}, "info": {}}
            for i, (name, block) in enumerate(blocks.items()):
                own = jax.random.fold_in(key, i) if name else key
                layer: PyTree = block.init(own, x, context, mutable=["params", "info"])
                variables["params"][name], variables["info"][name] = layer["params"], layer["info"]
            return variables

        def declared(leaf: object) -> bool:
            return isinstance(leaf, Declared)

        leading, middle, trailing = jax.random.split(key, 3)
        first, last = layers(self.named_leading, leading), layers(self.named_trailing, trailing)
        params, info = ({**first[kind], **last[kind]} for kind in ("params", "info"))
        if self.repeats:
            keys, stages = jax.random.split(middle, self.repeats), self.rules.mesh_axes("layers") or None
            # A loop, as kernels of attention may have no batching rule; the layers' outputs are not computed.
            stacked = lax.map(functools.partial(layers, self.named_pattern), keys)
            new, about = (tree.get("", tree) for tree in (stacked["params"], stacked["info"]))
            params |= jax.tree.map(lambda leaf: _over_stages(leaf, stages), new)
            info |= jax.tree.map(lambda leaf: Declared(leaf.info.stack(self.repeats)), about, is_leaf=declared)
        return {"params": params, "info": info}

    def location(self, layer: int) -> tuple[tuple[str, ...], int | None]:
        """Location of a layer's parameters: the path of its tree, and its index in the leaves if they are stacked."""
        scanned = layer - len(self.leading)
        if scanned < 0:
            return (f"leading_{layer}",), None
        repeat, i = divmod(scanned, len(self.pattern))
        if repeat >= self.repeats:
            return (f"trailing_{scanned - self.repeats * len(self.pattern)}",), None
        return (() if len(self.pattern) == 1 else (str(i),)), repeat

    def repeated(self, params: Mapping[str, Params]) -> Params:
        """Stacked parameters, without those of leading and trailing layers."""
        return {name: tree for name, tree in params.items() if not name.startswith(("leading_", "trailing_"))}

    def layer(self, params: Mapping[str, Params], layer: int) -> Params:
        """Parameters of one layer."""
        if "layer_0" in params:
            return params[f"layer_{layer}"]
        path, index = self.location(layer)
        tree: Params = params
        for name in path:
            tree = tree[name]
        return tree if index is None else jax.tree.map(lambda x: _over_stages(x, None)[index], self.repeated(tree))

    def unstack(self, params: Mapping[str, Params]) -> Mapping[str, Params]:
        """Parameters as one tree per layer, "layer_0" and so on. Unchanged if they are unstacked already."""
        if "layer_0" in params:
            return params
        return {f"layer_{layer}": self.layer(params, layer) for layer in range(len(self.blocks))}

    def with_first_values(
        self, params: Mapping[str, Params], x: Array, context: Context, cache: PyTree = None
    ) -> Context:
        """`context` with the first layer's values, if any layer uses them. This runs the first layer; the compiler
        removes the rest of its output.

        cache  entry of the first layer
        """
        if not self.uses_first_values:
            return context
        variables = {"params": self.layer(params, 0)}
        _, found = self.blocks[0].apply(variables, x, context, cache, mutable=["intermediates"])
        try:
            values = found["intermediates"]["attention"]["values"]
        except KeyError:
            kind = type(self.blocks[0].attention).__name__
            raise UserError(
                f"model.leading_layers: got {kind}, must be MultiHeadAttention, whose values later layers use"
            ) from None
        return dataclasses.replace(context, first_values=values)


def _over_stages(leaf: Array, stages: tuple[str, ...] | None) -> Array:
    """leaf [R, ...] with its first axis sharded over these mesh axes. None: not sharded."""
    spec: tuple[Any, ...] = tuple(getattr(getattr(jax.typeof(leaf), "sharding", None), "spec", ()))
    if not spec or (stages is None and spec[0] is None):
        return leaf
    return jax.reshard(leaf, PartitionSpec(stages, *spec[1:]))
