"""FlashAttention-2 (Dao 2023, arXiv:2307.08691) over segments, for NVIDIA GPUs: Triton through Pallas.

cuDNN knows no segments, but as a bias of shape [B, 1, T, S]. Here a block of queries visits the blocks of keys that its
segments reach, and compares numbers of segments only in blocks where they differ: documents of a fifth of a row cost
less than one document. Nothing of size T x S is in memory, and any numbers of segments in any order are right.

jax 0.11 deprecates Pallas's Triton backend. Where it is gone, cuDNN and the bias take over.

    forward      y = softmax(scale q k^T) v, and the logarithm of the softmax's denominator
    keys         dk, dv of a block of keys, over the blocks of queries that see it
    queries      dq of a block of queries, over the blocks of keys that it sees
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from gptjax.kernels import target
from gptjax.kernels.attention import sharding
from gptjax.kernels.attention.spec import SAVED, Mask, Options
from gptjax.types import Array

LOWEST = -1e30
"""Score of a hidden key: finite, so that a query that sees none has finite values."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Block sizes of a kernel, and Triton's warps and stages."""

    queries: int
    keys: int
    warps: int
    stages: int


TILES = {
    64: {"forward": Tiles(64, 64, 4, 3), "keys": Tiles(32, 64, 4, 3), "queries": Tiles(64, 32, 4, 3)},
    128: {"forward": Tiles(128, 64, 4, 2), "keys": Tiles(64, 64, 4, 2), "queries": Tiles(128, 128, 8, 2)},
}
"""Head size up to which they hold -> kernel -> tiles, measured on an H100 and an H200 (benchmarks/README.md)."""


def unsupported_reason(q: Array, k: Array, v: Array, mask: Mask, options: Options) -> str | None:
    """Reason this implementation cannot handle the inputs (completes "it ..."), or None."""
    if target.backend() != "gpu":
        return f"needs a GPU, got {target.backend()}"
    if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        return "needs Pallas's Triton backend, which this version of jax does not have"
    if {x.dtype for x in (q, k, v)} not in ({jnp.dtype("bfloat16")}, {jnp.dtype("float16")}):
        return f"needs q, k and v all bfloat16 or all float16, got {q.dtype}, {k.dtype}, {v.dtype}"
    T, S, H = q.shape[1], k.shape[1], q.shape[-1]
    if H not in (16, 32, 64, 128) or v.shape[-1] != H:
        return f"needs heads of 16, 32, 64 or 128, keys and values alike, got {H} and {v.shape[-1]}"
    if T % 128 or S % 128:
        return f"needs multiples of 128 queries and keys, got {T} and {S}"
    if mask.query_segments is None or mask.prefix is not None or mask.offset is not None:
        return "needs segments (without them cuDNN is faster), no prefix and no offset"
    if mask.causal and T != S:
        return "needs as many queries as keys for a causal mask"
    if options != Options(scale=options.scale):
        return "has no bias, softcap, sinks or dropout"
    return sharding.unsupported_reason(q, k, v)


def attention(q: Array, k: Array, v: Array, mask: Mask, options: Options) -> Array:
    """As `gptjax.kernels.attention.attention`."""
    kernel = functools.partial(_attention, Seen(mask.causal, mask.window), options.scale_of(q))
    arrays = q, k, v, mask.query_segments, mask.key_segments
    return sharding.on_each_device(kernel, ("BTNH", "BSKH", "BSKH", "BT", "BS"), *arrays)


@dataclasses.dataclass(frozen=True)
class Seen:
    """The static part of a mask."""

    causal: bool
    window: int | None

    def visible(self, rows: Array, columns: Array, row_segments: Array, column_segments: Array) -> Array:
        """bool, of positions and segments of queries and of keys, broadcast."""
        seen = row_segments == column_segments
        if self.causal:
            seen &= columns <= rows
        if self.window is not None:
            seen &= jnp.abs(rows - columns) < self.window
        return seen

    def cost(self, q: Array, k: Array, count: int) -> Any:
        """`pl.CostEstimate` of `count` products of visible scores and heads, where every row is one document."""
        from jax.experimental import pallas as pl

        (B, T, N, H), S = q.shape, k.shape[1]
        seen = S / 2 if self.causal else S
        if self.window is not None:
            seen = min(seen, self.window if self.causal else 2 * self.window - 1)
        each = int(B * N * T * seen)
        return pl.CostEstimate(flops=2 * count * each * H, transcendentals=each, bytes_accessed=0)

    def of_blocks(self, rows: Array, columns: Array, row_segments: Array, column_segments: Array) -> Array:
        """bool [queries, keys], of positions and segments of a block of each."""
        return self.visible(rows[:, None], columns[None, :], row_segments[:, None], column_segments[None, :])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(seen: Seen, scale: float, *arrays: Array) -> Array:
    return _forward(seen, scale, *arrays)[0]


def _forward(seen: Seen, scale: float, *arrays: Array) -> tuple[Array, tuple[Array, ...]]:
    q, k, v, q_segments, k_segments = arrays
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    tiles = _tiles("forward", H)
    bounds = _bounds(seen, q_segments, k_segments, tiles.queries, tiles.keys)
    one, whole, flat = _specs(tiles.queries, H, N // K)
    limits, own, others = _mask_specs(tiles.queries, S)
    y, logsumexp = _call(
        "attention_forward",
        functools.partial(_forward_kernel, seen, scale, tiles),
        (T // tiles.queries, B, N),
        tiles,
        [limits, one, whole(S), whole(S), own, others],
        [one, flat],
        [q, jax.ShapeDtypeStruct((B, N, T), jnp.float32)],
        seen.cost(q, k, 2),
    )(bounds, q, k, v, q_segments, k_segments)
    y, logsumexp = checkpoint_name(y, SAVED), checkpoint_name(logsumexp, SAVED)
    return y, (*arrays, y, logsumexp)


def _backward(seen: Seen, scale: float, saved: tuple[Array, ...], g: Array) -> tuple[Any, ...]:
    q, k, v, q_segments, k_segments, y, logsumexp = saved
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    groups = N // K
    along = jnp.einsum("btnh,btnh->bnt", g.astype(jnp.float32), y.astype(jnp.float32))

    tiles = _tiles("queries", H)
    bounds = _bounds(seen, q_segments, k_segments, tiles.queries, tiles.keys)
    one, whole, flat = _specs(tiles.queries, H, groups)
    limits, own, others = _mask_specs(tiles.queries, S)
    (dq,) = _call(
        "attention_queries",
        functools.partial(_queries_kernel, seen, scale, tiles),
        (T // tiles.queries, B, N),
        tiles,
        [limits, one, whole(S), whole(S), own, others, one, flat, flat],
        [one],
        [q],
        seen.cost(q, k, 3),
    )(bounds, q, k, v, q_segments, k_segments, g, logsumexp, along)

    tiles = _tiles("keys", H)
    bounds = _bounds(seen, q_segments, k_segments, tiles.queries, tiles.keys, by_keys=True)
    one, _, _ = _specs(tiles.keys, H, 1)
    limits, own, others = _mask_specs(tiles.keys, T)
    group = _spec((None, T, groups, H), lambda j, b, n: (b, 0, n, 0))
    flat = _spec((None, groups, T), lambda j, b, n: (b, n, 0))
    dk, dv = _call(
        "attention_keys",
        functools.partial(_keys_kernel, seen, scale, tiles),
        (S // tiles.keys, B, K),
        tiles,
        [limits, group, one, one, others, own, group, flat, flat],
        [one, one],
        [k, v],
        seen.cost(q, k, 4),
    )(bounds, q, k, v, q_segments, k_segments, g, logsumexp, along)
    return dq, dk, dv, None, None


_attention.defvjp(_forward, _backward)


def _forward_kernel(seen: Seen, scale: float, tiles: Tiles, *refs: Any) -> None:
    """A block of queries of a head: y [queries, H] and logsumexp [queries], in bits."""
    from jax.experimental import pallas as pl

    bounds, q_ref, k_ref, v_ref, q_segments_ref, k_segments_ref, y_ref, logsumexp_ref = refs
    q, q_segments, rows = q_ref[...], q_segments_ref[...], _positions(pl.program_id(0), tiles.queries)

    def block(masked: bool) -> Callable[..., Any]:
        def body(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, y = carry
            keys = pl.ds(j * tiles.keys, tiles.keys)
            scores = _dot(q, k_ref[keys, :], 1) * (scale * math.log2(math.e))
            if masked:
                visible = seen.of_blocks(rows, _positions(j, tiles.keys), q_segments, k_segments_ref[keys])
                scores = jnp.where(visible, scores, LOWEST)
            higher = jnp.maximum(top, scores.max(1))
            p, keep = jnp.exp2(scores - higher[:, None]), jnp.exp2(top - higher)
            v = v_ref[keys, :]
            return higher, total * keep + p.sum(1), y * keep[:, None] + _dot(p.astype(v.dtype), v)

        return body

    carry = (
        jnp.full(tiles.queries, LOWEST, jnp.float32),
        jnp.zeros(tiles.queries, jnp.float32),
        jnp.zeros((tiles.queries, q.shape[1]), jnp.float32),
    )
    top, total, y = _loops(bounds, block, carry)
    total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    y_ref[...] = (y / total[:, None]).astype(y_ref.dtype)
    logsumexp_ref[...] = top + jnp.log2(total)


def _queries_kernel(seen: Seen, scale: float, tiles: Tiles, *refs: Any) -> None:
    """A block of queries of a head: dq [queries, H]."""
    from jax.experimental import pallas as pl

    bounds, q_ref, k_ref, v_ref, q_segments_ref, k_segments_ref, g_ref, logsumexp_ref, along_ref, dq_ref = refs
    q, g, logsumexp, along = q_ref[...], g_ref[...], logsumexp_ref[...], along_ref[...]
    q_segments, rows = q_segments_ref[...], _positions(pl.program_id(0), tiles.queries)

    def block(masked: bool) -> Callable[..., Any]:
        def body(j: Array, dq: Array) -> Array:
            keys = pl.ds(j * tiles.keys, tiles.keys)
            k = k_ref[keys, :]
            scores = _dot(q, k, 1) * (scale * math.log2(math.e))
            p = jnp.exp2(scores - logsumexp[:, None])
            if masked:
                visible = seen.of_blocks(rows, _positions(j, tiles.keys), q_segments, k_segments_ref[keys])
                p = jnp.where(visible, p, 0.0)
            ds = p * (_dot(g, v_ref[keys, :], 1) - along[:, None])
            return dq + _dot(ds.astype(k.dtype), k)

        return body

    dq = _loops(bounds, block, jnp.zeros((tiles.queries, q.shape[1]), jnp.float32))
    dq_ref[...] = (dq * scale).astype(dq_ref.dtype)


def _keys_kernel(seen: Seen, scale: float, tiles: Tiles, *refs: Any) -> None:
    """A block of keys of a key head: dk and dv [keys, H], summed over the query heads of its group."""
    from jax.experimental import pallas as pl

    bounds, q_ref, k_ref, v_ref, q_segments_ref, k_segments_ref, g_ref, logsumexp_ref, along_ref, dk_ref, dv_ref = refs
    k, v = k_ref[...], v_ref[...]
    k_segments, columns = k_segments_ref[...], _positions(pl.program_id(0), tiles.keys)

    def block(head: int) -> Callable[[bool], Callable[..., Any]]:
        def body(masked: bool, i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            dk, dv = carry
            queries = pl.ds(i * tiles.queries, tiles.queries)
            q, g = q_ref[queries, head, :], g_ref[queries, head, :]
            scores = _dot(k, q, 1) * (scale * math.log2(math.e))
            p = jnp.exp2(scores - logsumexp_ref[head, queries][None, :])
            if masked:
                rows = _positions(i, tiles.queries)
                visible = seen.visible(
                    rows[None, :], columns[:, None], q_segments_ref[queries][None, :], k_segments[:, None]
                )
                p = jnp.where(visible, p, 0.0)
            dv = dv + _dot(p.astype(g.dtype), g)
            ds = p * (_dot(v, g, 1) - along_ref[head, queries][None, :])
            return dk + _dot(ds.astype(q.dtype), q), dv

        return lambda masked: functools.partial(body, masked)

    carry = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    for head in range(q_ref.shape[1]):
        carry = _loops(bounds, block(head), carry)
    dk, dv = carry
    dk_ref[...] = (dk * scale).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


def _loops(bounds: Any, block: Callable[[bool], Callable[..., Any]], carry: Any) -> Any:
    """`block(masked)` over blocks start .. full_start with the mask, .. full_end without it, .. end with it."""
    start, full_start, full_end, end = (bounds[i] for i in range(4))
    carry = lax.fori_loop(start, full_start, block(True), carry)
    carry = lax.fori_loop(full_start, full_end, block(False), carry)
    return lax.fori_loop(full_end, end, block(True), carry)


def _bounds(seen: Seen, q_segments: Array, k_segments: Array, queries: int, keys: int, by_keys: bool = False) -> Array:
    """int32 [B, blocks of queries, 4]: of the blocks of keys that a block of queries sees, start and end, and within
    those the start and end of a range that it sees completely. by_keys: the other way round."""
    T, S = q_segments.shape[1], k_segments.shape[1]
    low_q, high_q, low_k, high_k = (
        reduce(x.reshape(len(x), -1, size), axis=-1)
        for x, size in ((q_segments, queries), (k_segments, keys))
        for reduce in (jnp.min, jnp.max)
    )
    low_q, high_q, low_k, high_k = low_q[:, :, None], high_q[:, :, None], low_k[:, None], high_k[:, None]
    first_q, first_k = jnp.arange(0, T, queries)[:, None], jnp.arange(0, S, keys)[None]
    last_q, last_k = first_q + queries - 1, first_k + keys - 1
    some = (low_q <= high_k) & (low_k <= high_q)
    full = (low_q == high_q) & (low_k == high_k) & (low_q == low_k)
    if seen.causal:
        some &= first_k <= last_q
        full &= last_k <= first_q
    if seen.window is not None:
        some &= (first_q - last_k < seen.window) & (first_k - last_q < seen.window)
        full &= (last_q - first_k < seen.window) & (last_k - first_q < seen.window)
    if by_keys:
        some, full = some.swapaxes(1, 2), full.swapaxes(1, 2)
    count, at = some.shape[2], jnp.arange(some.shape[2])
    start = jnp.min(jnp.where(some, at, count), axis=2)
    end = jnp.max(jnp.where(some, at + 1, 0), axis=2)
    # The first range of full blocks: what follows it, or an end of the row, is compared number by number.
    full_start = jnp.min(jnp.where(full, at, count), axis=2)
    after = (at > full_start[..., None]) & ~full
    full_end = jnp.min(jnp.where(after, at, count), axis=2)
    none = full_start == count
    full_start, full_end = jnp.where(none, end, full_start), jnp.where(none, end, full_end)
    start = jnp.minimum(start, end)
    return jnp.stack([start, jnp.maximum(start, full_start), full_end, end], axis=-1).astype(jnp.int32)


def _tiles(kernel: str, size: int) -> Tiles:
    return next(tiles[kernel] for largest, tiles in TILES.items() if size <= largest)


def _dot(a: Array, b: Array, contract: int = 0) -> Array:
    """Product of two matrices in float32, over the last axis of a and this axis of b."""
    return lax.dot_general(a, b, (((1,), (contract,)), ((), ())), preferred_element_type=jnp.float32)


def _positions(block: Any, size: int) -> Array:
    return block * size + jnp.arange(size)


def _call(
    name: str, kernel: Callable[..., None], grid: Any, tiles: Tiles, inputs: Any, outputs: Any, like: Any, cost: Any
) -> Any:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=inputs,
        out_specs=outputs,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like],
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        cost_estimate=cost,
        interpret=target.backend() != "gpu",
        name=name,
    )


def _spec(shape: tuple[int | None, ...], index: Callable[..., tuple[Any, ...]]) -> Any:
    """Blocks of an array, from the program (block, row, head); None: an axis of which a program sees one element."""
    from jax.experimental import pallas as pl

    return pl.BlockSpec(shape, index)


def _specs(block: int, size: int, groups: int) -> Any:
    """Specs of a program's own block and head, of its key head's whole row (a function of the row's length), and of its
    block's numbers in an array [B, N, T]."""
    return (
        _spec((None, block, None, size), lambda i, b, n: (b, i, n, 0)),
        lambda length: _spec((None, length, None, size), lambda i, b, n: (b, 0, n // groups, 0)),
        _spec((None, None, block), lambda i, b, n: (b, n, i)),
    )


def _mask_specs(own: int, length: int) -> Any:
    """Specs of the bounds, of the segments of the program's own block, and of those of a whole row."""
    return (
        _spec((None, None, 4), lambda i, b, n: (b, i, 0)),
        _spec((None, own), lambda i, b, n: (b, i)),
        _spec((None, length), lambda i, b, n: (b, 0)),
    )
