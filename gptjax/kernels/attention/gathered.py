"""Context parallelism by all-gather: keys and values of sharded sequences are all-gathered, queries stay on their
device (Llama 3, arXiv:2407.21783, section 3.3.2).

A device receives (n - 1) / n of all K and V, and in the backward pass sends as much of their gradients. It holds the
keys and values of whole sequences, which are small with few key heads; `ring` holds those of two devices.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
from jax import lax

from gptjax.kernels.attention import chunked, plain, sharding
from gptjax.kernels.attention.spec import Mask, Options
from gptjax.types import Array, PyTree


def unsupported_reason(q: Array, k: Array, v: Array, mask: Mask, options: Options) -> str | None:
    """Reason this implementation cannot handle the inputs (completes "it ..."), or None."""
    if not sharding.shards_sequence(q, k, v):
        return "needs sequences sharded into equal parts, queries and keys alike"
    if options.dropout:
        return "has no dropout"
    if mask.offset is not None:
        return "needs queries and keys at the same positions"
    return None


def attention(q: Array, k: Array, v: Array, mask: Mask, options: Options) -> Array:
    """As `gptjax.kernels.attention.attention`."""
    kernel = functools.partial(_attend, sharding.sequence_axes(q), mask, options)
    axes = ("BTNH", "BSKH", "BSKH", "N", "NT.", "BT", "BS", "BS")
    given = options.sinks, options.bias, mask.query_segments, mask.key_segments, mask.prefix
    return sharding.on_each_device(kernel, axes, q, k, v, *given)


def _attend(axes: tuple[str, ...], mask: Mask, options: Options, q: Array, k: Array, v: Array, *given: PyTree) -> Array:
    sinks, bias, query_segments, *of_keys = given
    gather = functools.partial(lax.all_gather, axis_name=axes, axis=1, tiled=True)
    k, v, key_segments, prefix = jax.tree.map(gather, (k, v, *of_keys))
    start = lax.axis_index(axes) * q.shape[1]
    mask = Mask(mask.causal, mask.window, start, query_segments, key_segments, prefix)
    options = dataclasses.replace(options, sinks=sinks, bias=bias)
    form = plain if q.shape[1] % chunked.CHUNK else chunked
    return form.attention(q, k, v, mask, options)
