"""Looking up token embeddings."""

from __future__ import annotations

import jax

from gptjax.types import Array


def embed(table: Array, ids: Array, table_sharding=None, out_sharding=None) -> Array:
    """table [V, D], ids int32 [B, T] -> [B, T, D].

    The shardings are PartitionSpecs, None without a mesh. The table is gathered over the width first: a table sharded
    on both axes would make the partitioner replicate the lookup.
    """
    if out_sharding is None:
        return table[ids]
    return jax.reshard(table, table_sharding).at[ids].get(out_sharding=out_sharding)
