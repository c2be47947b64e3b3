"""Ring attention, context parallelism with point-to-point communication: keys and values are passed around a ring of
devices, queries stay on their device (Liu et al. 2023, arXiv:2310.01889).

A device has T queries and S = T keys of every sequence. It receives blocks of keys and values one after the other and
updates an online softmax (arXiv:1805.02867) with each:

    top' = max(top, max_s score_ts)        total' = total e^(top - top') + sum_s e^(score_ts - top')
    y' = y e^(top - top') + sum_s e^(score_ts - top') v_s                       and finally y / total

A device holds at most two blocks of keys, and the scores of one chunk of queries with one block. The backward pass
sends the blocks around again, each with its gradient, and recomputes the scores. Each of n devices sends blocks of K
and V n - 1 times in the forward pass and n - 1 times in the backward pass, there with their float32 gradients, which
return to their device in one more step.

A block that the mask hides from a whole chunk of queries is passed on without computation. Under a causal mask each
device has two pieces of a sequence (`zigzag`), so half of every block to compute. Blocks outside the window of all
queries are not sent.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from gptjax.kernels.attention import sharding, zigzag
from gptjax.kernels.attention.spec import SAVED, Mask, Options
from gptjax.types import Array, PyTree

CHUNK = 128
"""Queries per chunk, if it divides T. Scores are computed for one chunk and one block at a time."""


def unsupported_reason(q: Array, k: Array, v: Array, mask: Mask, options: Options) -> str | None:
    """Reason this implementation cannot handle the inputs (completes "it ..."), or None."""
    if not sharding.shards_sequence(q, k, v):
        return "needs sequences sharded into equal parts, queries and keys alike"
    if options.bias is not None or options.dropout:
        return "has no bias or dropout"
    if mask.offset is not None:
        return "needs queries and keys at the same positions"
    return None


def attention(q: Array, k: Array, v: Array, mask: Mask, options: Options) -> Array:
    """As `gptjax.kernels.attention.attention`."""
    mesh_axes = sharding.sequence_axes(q)
    length = q.shape[1] // sharding.num_shards(q, 1)
    balanced = mask.causal and mask.window is None and mask.prefix is None and length % 2 == 0
    pieces = 2 if balanced else 1
    form = _Form(mesh_axes, mask.causal, mask.window, options.scale_of(q), options.softcap, pieces)

    def kernel(q, k, v, sinks, query_segments, key_segments, prefix) -> Any:
        if not balanced:
            return _ring(form, q, k, v, sinks, query_segments, key_segments, prefix)
        rows = jax.tree.map(lambda x: zigzag.zigzag_split(x, mesh_axes), (q, k, v, query_segments, key_segments))
        return zigzag.zigzag_merge(_ring(form, *rows[:3], sinks, *rows[3:], prefix), mesh_axes)

    axes = ("BTNH", "BSKH", "BSKH", "N", "BT", "BS", "BS")
    given = options.sinks, mask.query_segments, mask.key_segments, mask.prefix
    return sharding.on_each_device(kernel, axes, q, k, v, *given)


@dataclasses.dataclass(frozen=True)
class _Form:
    """Static settings of the ring."""

    axes: tuple[str, ...]
    """Mesh axes over which sequences are sharded."""
    causal: bool
    window: int | None
    scale: float
    softcap: float | None
    pieces: int
    """Pieces of a sequence per device: 1, or 2 in `zigzag` order."""

    def hops(self, keys: _Keys) -> int:
        """Number of times a block is passed on."""
        last = lax.axis_size(self.axes) - 1
        if self.window is None or not self.causal or keys.prefix is not None:
            return last
        return min(last, -(-(self.window - 1) // keys.k.shape[1]))

    def starts(self, device: Array | int, size: int) -> list[Any]:
        """Positions at which a device's pieces of a sequence start. size: total length of its pieces."""
        if self.pieces == 1:
            return [device * size]
        return [piece * (size // 2) for piece in (device, 2 * lax.axis_size(self.axes) - 1 - device)]

    def blocks(self, keys: _Keys, hop: Array | int) -> list[_Keys]:
        """The pieces of the block from the device `hop` places before this one."""
        size = keys.k.shape[1]
        starts = self.starts((lax.axis_index(self.axes) - hop) % lax.axis_size(self.axes), size)
        pieces = [jax.tree.map(lambda x, i=i: jnp.split(x, self.pieces, axis=1)[i], keys) for i in range(self.pieces)]
        return [dataclasses.replace(piece, start=start) for piece, start in zip(pieces, starts, strict=True)]

    def scores(self, chunk: _Chunk, keys: _Keys) -> tuple[Array, Array | None]:
        """Scores float32 [B, K, G, C, S], -1e30 if hidden; and tanh(score / softcap), or None."""
        scores = self.scale * _dot("BKGCH,BSKH->BKGCS", chunk.q, keys.k)
        tanh = None
        if self.softcap is not None:
            tanh = jnp.tanh(scores / self.softcap)
            scores = self.softcap * tanh
        mask = Mask(self.causal, self.window, chunk.start - keys.start, chunk.segments, keys.segments, keys.prefix)
        visible = mask.visible(chunk.q.shape[3], keys.k.shape[1])
        return scores if visible is None else jnp.where(visible[:, :, None], scores, -1e30), tanh

    def reaches(self, chunk: _Chunk, keys: _Keys) -> Array:
        """True if any of these keys is visible to any of these queries."""
        distance, queries, size = chunk.start - keys.start, chunk.q.shape[3], keys.k.shape[1]
        visible = jnp.array(True)
        if self.causal and keys.prefix is None:
            visible &= distance + queries > 0
        if self.window is not None:
            visible &= jnp.maximum(distance - size, -distance - queries) + 1 < self.window
        return visible


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Chunk:
    """A chunk of queries; with a leading axis, all chunks."""

    start: Array
    """int32, position of the first query in its sequence."""
    q: Array
    """[B, K, G, C, H]"""
    segments: Array | None
    """int32 [B, C]"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Keys:
    """A block of keys and values, which is passed around the ring."""

    k: Array
    """[B, S, K, H]"""
    v: Array
    """[B, S, K, Hv]"""
    segments: Array | None
    """int32 [B, S]"""
    prefix: Array | None
    """bool [B, S]"""
    start: Any = None
    """int32, position of the first key in its sequence. None: keys of several pieces."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(
    form: _Form,
    q: Array,
    k: Array,
    v: Array,
    sinks: Array | None,
    query_segments: Array | None,
    key_segments: Array | None,
    prefix: Array | None,
) -> Array:
    """Attention on each device: q [B, T, N, H], k [B, S, K, H], v [B, S, K, Hv] and the rest -> [B, T, N, Hv]."""
    return _forward(form, q, k, v, sinks, query_segments, key_segments, prefix)[0]


def _forward(form, q, k, v, sinks, query_segments, key_segments, prefix):
    chunks, keys = _chunks(form, q, k.shape[2], query_segments), _Keys(k, v, key_segments, prefix)
    hops = form.hops(keys)

    def see(hop: Array | int, keys: _Keys, carry: PyTree) -> PyTree:
        def one(inputs: PyTree) -> PyTree:
            chunk, seen = inputs
            for block in form.blocks(keys, hop):
                seen = lax.cond(form.reaches(chunk, block), add, lambda chunk, block, seen: seen, chunk, block, seen)
            return seen

        def add(chunk: _Chunk, keys: _Keys, seen: PyTree) -> PyTree:
            top, total, y = seen
            scores, _ = form.scores(chunk, keys)
            new = jnp.maximum(top, scores.max(-1))
            p, fade = jnp.exp(scores - new[..., None]), jnp.exp(top - new)
            more = _dot("BKGCS,BSKH->BKGCH", p.astype(keys.v.dtype), keys.v)
            return new, total * fade + p.sum(-1), y * fade[..., None] + more

        return lax.map(one, (chunks, carry))

    def body(carry: PyTree, hop: Array) -> tuple[PyTree, None]:
        keys, seen = carry
        return (_pass_on(form, keys), see(hop, keys, seen)), None

    top = jnp.full(chunks.q.shape[:-1], -1e30, jnp.float32)
    carry = keys, (top, jnp.zeros_like(top), jnp.zeros((*top.shape, v.shape[-1]), jnp.float32))
    (last, carry), _ = lax.scan(body, carry, jnp.arange(hops))
    top, total, y = see(hops, last, carry)
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(1, *chunks.q.shape[2:4], 1)
        new = jnp.maximum(top, sink)
        fade = jnp.exp(top - new)
        top, total, y = new, total * fade + jnp.exp(sink - new), y * fade[..., None]
    y, logsumexp = checkpoint_name((_whole(y / total[..., None]).astype(q.dtype), top + jnp.log(total)), SAVED)
    return y, (q, keys, sinks, query_segments, y, logsumexp)


def _backward(form, saved, g):
    q, keys, sinks, query_segments, y, logsumexp = saved
    K, hops = keys.k.shape[2], form.hops(keys)
    chunks, dy = _chunks(form, q, K, query_segments), _chunks(form, g, K, None).q
    # sum_s p_s dp_s = g . y
    along = jnp.sum(dy.astype(jnp.float32) * _chunks(form, y, K, None).q.astype(jnp.float32), -1)

    def see(hop: Array | int, keys: _Keys, dq: Array, dkeys: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        def one(dkeys: PyTree, inputs: PyTree) -> PyTree:
            queries, dq = inputs
            parts = [tuple(jnp.split(x, form.pieces, axis=1)[i] for x in dkeys) for i in range(form.pieces)]
            for i, block in enumerate(form.blocks(keys, hop)):
                reached = form.reaches(queries[0], block)
                dq, parts[i] = lax.cond(reached, add, lambda queries, block, *sums: sums, queries, block, dq, parts[i])
            return tuple(jnp.concatenate(pieces, axis=1) for pieces in zip(*parts, strict=True)), dq

        def add(queries: PyTree, keys: _Keys, dq: Array, dkeys: PyTree) -> PyTree:
            chunk, g, along, logsumexp = queries
            scores, tanh = form.scores(chunk, keys)
            p = jnp.exp(scores - logsumexp[..., None])
            dv = _dot("BKGCS,BKGCH->BSKH", p.astype(g.dtype), g)
            ds = p * (_dot("BKGCH,BSKH->BKGCS", g, keys.v) - along[..., None])
            ds = ds if tanh is None else ds * (1 - jnp.square(tanh))
            ds = (ds * form.scale).astype(chunk.q.dtype)
            dk = _dot("BKGCS,BKGCH->BSKH", ds, chunk.q)
            return dq + _dot("BKGCS,BSKH->BKGCH", ds, keys.k), (dkeys[0] + dk, dkeys[1] + dv)

        dkeys, dq = lax.scan(one, dkeys, ((chunks, dy, along, logsumexp), dq))
        return dq, dkeys

    def body(carry: PyTree, hop: Array) -> tuple[PyTree, None]:
        keys, dq, dkeys = carry
        dq, dkeys = see(hop, keys, dq, dkeys)
        return (_pass_on(form, keys), dq, _pass_on(form, dkeys)), None

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (keys.k, keys.v))
    carry = keys, jnp.zeros(chunks.q.shape, jnp.float32), zeros
    (last, dq, dkeys), _ = lax.scan(body, carry, jnp.arange(hops))
    dq, dkeys = see(hops, last, dq, dkeys)
    dk, dv = _pass_on(form, dkeys, -hops)  # back to their device
    dsinks = None
    if sinks is not None:
        sunk = jnp.exp(sinks.astype(jnp.float32).reshape(1, *chunks.q.shape[2:4], 1) - logsumexp)
        dsinks = -jnp.sum(sunk * along, (0, 1, 4)).reshape(sinks.shape).astype(sinks.dtype)
    return _whole(dq).astype(q.dtype), dk.astype(q.dtype), dv.astype(q.dtype), dsinks, None, None, None


_ring.defvjp(_forward, _backward)


def _pass_on(form: _Form, tree: PyTree, hops: int = 1) -> PyTree:
    """Receive the tree of the device `hops` places before this one."""
    n = lax.axis_size(form.axes)
    if hops % n == 0:
        return tree
    pairs = [(i, (i + hops) % n) for i in range(n)]
    return jax.tree.map(lambda x: lax.ppermute(x, form.axes, pairs), tree)


def _chunks(form: _Form, q: Array, K: int, segments: Array | None) -> _Chunk:
    """Split q [B, T, N, H] into chunks, [T / C, B, K, G, C, H]; query heads are grouped by key head."""
    B, T, N, H = q.shape
    piece = T // form.pieces
    size = CHUNK if piece % CHUNK == 0 else piece
    starts = [start + jnp.arange(0, piece, size) for start in form.starts(lax.axis_index(form.axes), T)]
    q = q.reshape(B, T // size, size, K, N // K, H).transpose(1, 0, 3, 4, 2, 5)
    if segments is not None:
        segments = segments.reshape(B, T // size, size).swapaxes(0, 1)
    return _Chunk(jnp.concatenate(starts), q, segments)


def _whole(y: Array) -> Array:
    """Merge chunks, the inverse of `_chunks`: [T / C, B, K, G, C, H] -> [B, T, N, H]."""
    chunks, B, K, G, size, H = y.shape
    return y.transpose(1, 0, 4, 2, 3, 5).reshape(B, chunks * size, K * G, H)


def _dot(axes: str, a: Array, b: Array) -> Array:
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)
