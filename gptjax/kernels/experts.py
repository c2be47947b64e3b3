"""The experts of a mixture: dispatch of tokens to experts, and the grouped matrix product.

A token that is routed to k experts has k *assignments*. The experts compute rows; each assignment has one row, next to
the other rows of its expert.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gptjax.kernels import target
from gptjax.kernels.linear import PackedWeight, linear
from gptjax.types import Array, PyTree

BLOCKS = (512, 64)
"""Block sizes in rows on a CPU: large blocks first, small ones for the remainder; multiples of one another. A TPU uses
tiles of the first size."""

WIDEST = 2_048
"""Maximum bytes of a row or column of a tile of the weight gradient on TPU, so that it fits the fast memory."""


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """Mapping between A assignments and the R rows that E experts compute, some of which are spare."""

    sizes: Array
    """int32 [E], number of rows of each expert."""
    assignment: Array
    """int32 [R], assignment of each row; A for a spare row."""
    row: Array
    """int32 [A], row of each assignment; R for a dropped one."""
    capacity: int | None = None
    """Rows per expert, including spare ones. None: the experts' own rows, contiguous."""

    def permute(self, x: Array) -> Array:
        """Gather assignments into rows: [A, D] -> [R, D]. Spare rows are not defined: no result depends on them."""
        return _take(x, self.assignment, self.row, self._outside)

    def unpermute(self, y: Array) -> Array:
        """Gather rows into assignments: [R, D] -> [A, D]; 0 for a dropped assignment."""
        return _take(y, self.row, self.assignment, self._outside)

    def dot(self, x: Array, w: Array | PackedWeight, implementation: str | None = None) -> Array:
        """Multiply each row by the matrix of its expert: x [R, D], w [E, D, F] -> [R, F]."""
        if self.capacity is None:
            return grouped_dot(x, w, self.sizes, implementation)
        w = jnp.asarray(w)
        y = jnp.einsum("ECD,EDF->ECF", x.reshape(len(w), self.capacity, -1), w)
        return y.reshape(-1, w.shape[-1])

    def per_row(self, b: Array, ids: Array) -> Array:
        """The vector of each row's expert: b [E, F], expert of each assignment ids int32 [A] -> [R, F]."""
        rows: Array = _take(jax.nn.one_hot(ids, len(b), dtype=b.dtype), self.assignment, self.row, "fill")
        return rows @ b

    @property
    def _outside(self) -> str:
        """Mode of gathers. Without a capacity nothing is dropped, and `grouped_dot` ignores spare rows: they need not
        be 0, which would take another pass over all rows on a TPU."""
        return "clip" if self.capacity is None else "fill"


def dispatch(ids: Array, experts: int, capacity: int | None = None, limit: Array | None = None) -> Dispatch:
    """Sort assignments by expert. ids int32 [A]: expert of each assignment; ids >= `experts` belong to other devices,
    or to no expert.

    capacity  maximum number of rows per expert; later assignments are dropped (Switch Transformers, arXiv:2101.03961,
              section 2.2). None: no limit
    limit     int32 scalar, a smaller maximum that depends on the data. None: `capacity`
    """
    order = jnp.argsort(ids)
    position = jnp.argsort(order)
    sizes = jnp.sum(ids[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    if capacity is None:
        count = BLOCKS[0 if target.backend() == "tpu" else -1]  # on TPU a whole tile, so that R stays a multiple of it
        spare = jnp.full(min(len(ids), count), len(ids))
        return Dispatch(sizes, jnp.concatenate([order, spare]), position)
    limit = jnp.asarray(capacity) if limit is None else jnp.minimum(limit, capacity)
    starts = jnp.cumsum(sizes) - sizes
    rank = position - starts.at[ids].get(mode="clip")
    row = jnp.where((rank < limit) & (ids < experts), ids * capacity + rank, experts * capacity)
    slot = jnp.arange(capacity)
    first = order.at[starts[:, None] + slot].get(mode="clip")
    assignment = jnp.where(slot < jnp.minimum(sizes, limit)[:, None], first, len(ids)).reshape(-1)
    return Dispatch(jnp.minimum(sizes, limit), assignment, row, capacity)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _take(x: Array, there: Array, back: Array, mode: str) -> Array:
    """x [M, D], there int [P] -> x[there] [P, D]; where `there` is M, zero ("fill") or x[M - 1] ("clip"). `back` is the
    inverse of `there`: with it the gradient is a gather too, as scatter-add is slow on a CPU."""
    return x.at[there].get(mode=mode, fill_value=0 if mode == "fill" else None)


def _take_backward(mode: str, back: Array, g: Array) -> tuple[Array, None, None]:
    return _take(g, back, back, mode), None, None


_take.defvjp(lambda x, there, back, mode: (_take(x, there, back, mode), back), _take_backward)


def grouped_dot(x: Array, w: Array | PackedWeight, sizes: Array, implementation: str | None = None) -> Array:
    """Grouped matrix product: x [R, D], w [E, D, F], sizes int32 [E] -> [R, F].

    The first sizes[0] rows are multiplied by w[0], the next sizes[1] by w[1] and so on; the remaining rows become 0. At
    least the last min(BLOCKS[-1], R / 2) rows must remain, as padding of the last block; `dispatch` adds them.

    implementation  "ragged" (GPU): `jax.lax.ragged_dot`; "tiled" (TPU): the same with a kernel for the gradient of w;
                    "blocks" (CPU): a loop over blocks of rows, several times faster there, which does not read the
                    matrices of empty groups; quantised ones always take it. None: by the platform
    """
    if isinstance(w, PackedWeight):
        return _forward(x, w, sizes)[0]
    if implementation is None:
        implementation = {"cpu": "blocks", "tpu": "tiled"}.get(target.backend(), "ragged")
    return {"blocks": _in_blocks, "ragged": lax.ragged_dot, "tiled": _tiled}[implementation](x, w, sizes)


# Tiled. XLA's TPU backend has kernels for x w and for the gradient of x that skip unneeded blocks, but computes the
# gradient of w as one dense product of every group with all rows: E times the work. Here that is jax's Pallas kernel
# (after MegaBlocks, arXiv:2211.15841), which reads the rows once, tile by tile.


@jax.custom_vjp
def _tiled(x: Array, w: Array, sizes: Array) -> Array:
    return lax.ragged_dot(x, w, sizes)


def _tiled_backward(saved: PyTree, g: Array) -> tuple[Array, Array, None]:
    # Imported here because it takes a while. (The package has a function of the module's name.)
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    x, w, sizes = saved
    (dx,) = jax.linear_transpose(lambda x: lax.ragged_dot(x, w, sizes), x)(g)
    rows = BLOCKS[0]
    x, g = (jnp.pad(a, ((0, -len(a) % rows), (0, 0))) for a in (x, g))  # no padding for rows made by `dispatch`
    tiles = rows, *(_tile(size, WIDEST // w.dtype.itemsize) for size in w.shape[1:])
    interpret = target.backend() != "tpu"
    return dx, tgmm(x.T, g, sizes, w.dtype, tiles, interpret=interpret), None


_tiled.defvjp(lambda x, w, sizes: (_tiled(x, w, sizes), (x, w, sizes)), _tiled_backward)


def _tile(size: int, widest: int) -> int:
    """The largest tile size up to `widest` that is a multiple of 128 lanes and divides the axis, if there is one."""
    return next((tile for tile in range(widest, 0, -128) if size % tile == 0), min(size, widest))


# Blocks. Every group is processed in blocks of rows, large ones first. The last block may reach into the next group:
# what it reads there counts as 0, and what it writes there is overwritten by that group.


@jax.custom_vjp
def _in_blocks(x: Array, w: Array, sizes: Array) -> Array:
    return _forward(x, w, sizes)[0]


def _forward(x: Array, w: Array | PackedWeight, sizes: Array) -> tuple[Array, Any]:
    blocks = _blocks(x)

    def group(e: Array, start: Array, end: Array, y: Array) -> Array:
        matrix = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, e, keepdims=False), w)

        def block(at: Array, size: int, y: Array) -> Array:
            return _write(y, linear(_read(x, at, size, end), matrix), at)

        return _each_block(start, end, blocks, block, y)

    y = _each_group(sizes, group, jnp.zeros((len(x), w.shape[2]), x.dtype))
    return y, (x, w, sizes)


def _backward(saved: PyTree, g: Array) -> tuple[Array, Array, None]:
    x, w, sizes = saved
    blocks = _blocks(x)
    tall = x.shape[1] > g.shape[1]  # the product of two tall matrices is faster with the narrower one transposed

    def group(e: Array, start: Array, end: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        matrix = lax.dynamic_index_in_dim(w, e, keepdims=False)

        def block(at: Array, size: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            dx, total = carry
            a, b = _read(x, at, size, end), _read(g, at, size, end)
            dx = _write(dx, b @ matrix.T, at)
            if tall:
                a, b = b, a
            along = (((0,), (0,)), ((), ()))
            return dx, total + lax.dot_general(a, b, along, preferred_element_type=jnp.float32)

        dx, dw = carry
        total = jnp.zeros(matrix.shape[::-1] if tall else matrix.shape, jnp.float32)
        dx, total = _each_block(start, end, blocks, block, (dx, total))
        total = (total.T if tall else total).astype(w.dtype)
        return dx, lax.dynamic_update_index_in_dim(dw, total, e, 0)

    dx, dw = _each_group(sizes, group, (jnp.zeros_like(x), jnp.zeros_like(w)))
    return dx, dw, None


_in_blocks.defvjp(_forward, _backward)


def _each_group(sizes: Array, body: Callable[[Array, Array, Array, PyTree], PyTree], carry: PyTree) -> PyTree:
    """carry = body(group, first row, end, carry) for every group with rows."""
    ends = jnp.cumsum(sizes)
    present = jnp.flatnonzero(sizes, size=len(sizes))

    def step(i: Array, carry: PyTree) -> PyTree:
        e = present[i]
        return body(e, ends[e] - sizes[e], ends[e], carry)

    return lax.fori_loop(0, jnp.count_nonzero(sizes), step, carry)


def _each_block(
    start: Array, end: Array, blocks: tuple[int, ...], body: Callable[[Array, int, PyTree], PyTree], carry: PyTree
) -> Any:
    """carry = body(first row, block size, carry) for blocks that cover the rows from start to end."""
    end = start + (end - start + blocks[-1] - 1) // blocks[-1] * blocks[-1]
    for size in blocks:
        count = (end - start) // size
        carry = lax.fori_loop(
            0, count, lambda i, carry, start=start, size=size: body(start + i * size, size, carry), carry
        )
        start = start + count * size
    return carry


def _blocks(x: Array) -> tuple[int, ...]:
    """Block sizes for x. The last one fits into the padding after its groups."""
    rows = len(x) - min(BLOCKS[-1], len(x) // 2)
    return tuple(size for size in BLOCKS if size <= rows) or (rows,)


def _read(x: Array, at: Array, size: int, end: Array) -> Array:
    inside = at + jnp.arange(size) < end
    return jnp.where(inside[:, None], lax.dynamic_slice_in_dim(x, at, size), 0)


def _write(y: Array, rows: Array, at: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(y, rows.astype(y.dtype), at, 0)
