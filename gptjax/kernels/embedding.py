"""Token embedding lookup."""

from __future__ import annotations

import jax

from gptjax.kernels.linear import PackedWeight
from gptjax.types import Array


def embed(table: Array | PackedWeight, ids: Array, table_sharding=None, out_sharding=None) -> Array:
    """Look up rows of the table: table [V, D], ids int32 [B, T] -> [B, T, D].

    The shardings are PartitionSpecs. None: no mesh. The table is all-gathered over the width first: the partitioner
    would replicate the lookup in a table sharded over both axes.
    """
    if isinstance(table, PackedWeight):
        return table.take(ids, out_sharding)
    if out_sharding is None:
        return table[ids]

    @jax.checkpoint  # jax 0.10 would save the ids with automatic axes, which no explicit `partial_map` can return
    def rows(table: Array, ids: Array) -> Array:
        return table.at[ids].get(out_sharding=out_sharding)

    return rows(jax.reshard(table, table_sharding), ids)
