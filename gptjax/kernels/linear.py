"""The dense layer: a product that contracts x's last axes with w's first ones."""

from __future__ import annotations

import jax

from gptjax.types import Array


def linear(x: Array, w: Array, out_sharding=None, contract: int = 1) -> Array:
    """x [..., *C] times w [*C, *O] -> [..., *O], contracting the `contract` axes C. `out_sharding`: a PartitionSpec."""
    dims = (tuple(range(x.ndim - contract, x.ndim)), tuple(range(contract)))
    return jax.lax.dot_general(x, w, (dims, ((), ())), out_sharding=out_sharding)
