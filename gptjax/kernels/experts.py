"""What a mixture of experts computes beside its router: tokens sorted by expert, rows times their expert's matrix.

A token that goes to k experts makes k *assignments*. An assignment has a row of what the experts compute, next to the
other rows of its expert.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gptjax.kernels import target
from gptjax.types import Array

BLOCKS = (512, 64)
"""Rows that a CPU multiplies at a time: large blocks first, small ones for the rest. Multiples of one another. A TPU
takes tiles of the first's size."""

WIDEST = 2_048
"""Bytes of a row, or of a column, of the part of a matrix whose gradient a TPU sums up at a time: as many as fit its
fast memory."""


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """Where the rows of A assignments are among the R rows, some of them spare, that E experts compute."""

    sizes: Array
    """int32 [E], how many rows each expert has."""
    assignment: Array
    """int32 [R], what each row computes; A for a row that computes nothing."""
    row: Array
    """int32 [A], where each assignment is computed; R for one that is not."""
    capacity: int | None = None
    """Each expert has this many rows, empty ones included; none: just its own, one expert's after the other's."""

    def send(self, x: Array) -> Array:
        """[A, D], an assignment each -> [R, D], a row each."""
        return _take(x, self.assignment, self.row)

    def back(self, y: Array) -> Array:
        """[R, D], a row each -> [A, D], an assignment each; 0 for one that was not computed."""
        return _take(y, self.row, self.assignment)

    def dot(self, x: Array, w: Array, implementation: str | None = None) -> Array:
        """x [R, D], w [E, D, F] -> [R, F], each row times the matrix of its expert."""
        if self.capacity is None:
            return grouped_dot(x, w, self.sizes, implementation)
        y = jnp.einsum("ECD,EDF->ECF", x.reshape(len(w), self.capacity, -1), w)
        return y.reshape(-1, w.shape[-1])

    def of_expert(self, b: Array, ids: Array) -> Array:
        """b [E, F], a vector each expert, ids int32 [A] -> [R, F], the vector of each row's expert."""
        return self.send(jax.nn.one_hot(ids, len(b), dtype=b.dtype)) @ b


def dispatch(ids: Array, experts: int, capacity: int | None = None) -> Dispatch:
    """ids int32 [A], the expert of each assignment; one that is no expert (>= `experts`) is computed elsewhere.

    With a capacity, an expert computes only that many of its assignments, the first; the others are dropped (Switch
    Transformers, arXiv:2101.03961, section 2.2).
    """
    order = jnp.argsort(ids)
    place = jnp.argsort(order)
    sizes = jnp.sum(ids[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    if capacity is None:
        most = BLOCKS[0 if target.backend() == "tpu" else -1]  # so many, that whole tiles of a TPU stay whole
        spare = jnp.full(min(len(ids), most), len(ids))
        return Dispatch(sizes, jnp.concatenate([order, spare]), place)
    starts = jnp.cumsum(sizes) - sizes
    rank = place - starts.at[ids].get(mode="clip")
    row = jnp.where((rank < capacity) & (ids < experts), ids * capacity + rank, experts * capacity)
    slot = jnp.arange(capacity)
    first = order.at[starts[:, None] + slot].get(mode="clip")
    assignment = jnp.where(slot < sizes[:, None], first, len(ids)).reshape(-1)
    return Dispatch(jnp.minimum(sizes, capacity), assignment, row, capacity)


@jax.custom_vjp
def _take(x: Array, there: Array, back: Array) -> Array:
    """x [M, D], there int [P] -> x[there] [P, D], zero where `there` is M. `back` is its inverse, with which the
    gradient too is a lookup: a CPU takes long to add up what is scattered."""
    return x.at[there].get(mode="fill", fill_value=0)


def _take_backward(back: Array, g: Array) -> tuple[Array, None, None]:
    return g.at[back].get(mode="fill", fill_value=0), None, None


_take.defvjp(lambda x, there, back: (_take(x, there, back), back), _take_backward)


def grouped_dot(x: Array, w: Array, sizes: Array, implementation: str | None = None) -> Array:
    """x [R, D], w [E, D, F], sizes int32 [E] -> [R, F]. The first sizes[0] rows are multiplied with w[0], the next
    sizes[1] with w[1] and so on; rows that are left over become 0. The last min(BLOCKS[-1], R / 2) must be left
    over, for the last block to end in: `dispatch` sees to it.

    implementation  "ragged": `jax.lax.ragged_dot`, what a GPU gets; "tiled": the same with a kernel for the gradient
                    of w, what a TPU gets; "blocks": a loop over blocks of rows, what a CPU gets: several times faster
                    there, and matrices of groups without rows are not read
    """
    if implementation is None:
        implementation = {"cpu": "blocks", "tpu": "tiled"}.get(target.backend(), "ragged")
    return {"blocks": _in_blocks, "ragged": lax.ragged_dot, "tiled": _tiled}[implementation](x, w, sizes)


# Tiled. XLA's TPU backend has kernels for x w and for the gradient of x, which skip what no group needs. It makes the
# gradient of w one dense product, of every group with all rows: E times the work. Here that is a Pallas kernel of jax's
# (after MegaBlocks, arXiv:2211.15841), which goes through the rows once, a tile at a time.


@jax.custom_vjp
def _tiled(x: Array, w: Array, sizes: Array) -> Array:
    return lax.ragged_dot(x, w, sizes)


def _tiled_backward(saved: Any, g: Array) -> tuple[Array, Array, None]:
    # Imported when it is needed, as it takes a while. (The package has a function of the module's name.)
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    x, w, sizes = saved
    (dx,) = jax.linear_transpose(lambda x: lax.ragged_dot(x, w, sizes), x)(g)
    rows = BLOCKS[0]
    x, g = (jnp.pad(a, ((0, -len(a) % rows), (0, 0))) for a in (x, g))  # nothing to add to what `dispatch` made
    tiles = rows, *(_tile(size, WIDEST // w.dtype.itemsize) for size in w.shape[1:])
    interpret = target.backend() != "tpu"
    return dx, tgmm(x.T, g, sizes, w.dtype, tiles, interpret=interpret), None


_tiled.defvjp(lambda x, w, sizes: (_tiled(x, w, sizes), (x, w, sizes)), _tiled_backward)


def _tile(size: int, widest: int) -> int:
    """The largest part of a side that the kernel takes at a time, whole lanes of 128 and no rest where that can be."""
    return next((part for part in range(widest, 0, -128) if size % part == 0), min(size, widest))


# In blocks. Every group is walked through in blocks of rows, large ones first. The last may reach into the next group:
# what it reads there counts as 0, and what it writes there is written over when that group's turn comes.


@jax.custom_vjp
def _in_blocks(x: Array, w: Array, sizes: Array) -> Array:
    return _forward(x, w, sizes)[0]


def _forward(x: Array, w: Array, sizes: Array) -> tuple[Array, Any]:
    blocks = _blocks(x)

    def group(e: Array, start: Array, end: Array, y: Array) -> Array:
        matrix = lax.dynamic_index_in_dim(w, e, keepdims=False)

        def block(at: Array, size: int, y: Array) -> Array:
            return _write(y, _read(x, at, size, end) @ matrix, at)

        return _each_block(start, end, blocks, block, y)

    y = _each_group(sizes, group, jnp.zeros((len(x), w.shape[2]), x.dtype))
    return y, (x, w, sizes)


def _backward(saved: Any, g: Array) -> tuple[Array, Array, None]:
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


def _each_group(sizes: Array, body: Callable[[Array, Array, Array, Any], Any], carry: Any) -> Any:
    """carry = body(group, its first row, its end, carry) for every group that has rows."""
    ends = jnp.cumsum(sizes)
    present = jnp.flatnonzero(sizes, size=len(sizes))

    def one(i: Array, carry: Any) -> Any:
        e = present[i]
        return body(e, ends[e] - sizes[e], ends[e], carry)

    return lax.fori_loop(0, jnp.count_nonzero(sizes), one, carry)


def _each_block(
    start: Array, end: Array, blocks: tuple[int, ...], body: Callable[[Array, int, Any], Any], carry: Any
) -> Any:
    """carry = body(first row, how many, carry) for blocks that cover the rows from start to end."""
    end = start + (end - start + blocks[-1] - 1) // blocks[-1] * blocks[-1]
    for size in blocks:
        count = (end - start) // size
        carry = lax.fori_loop(
            0, count, lambda i, carry, start=start, size=size: body(start + i * size, size, carry), carry
        )
        start = start + count * size
    return carry


def _blocks(x: Array) -> tuple[int, ...]:
    """The sizes of block that it is worth while to use for x, of which the last fits between its groups and its end."""
    rows = len(x) - min(BLOCKS[-1], len(x) // 2)
    return tuple(size for size in BLOCKS if size <= rows) or (rows,)


def _read(x: Array, at: Array, size: int, end: Array) -> Array:
    inside = at + jnp.arange(size) < end
    return jnp.where(inside[:, None], lax.dynamic_slice_in_dim(x, at, size), 0)


def _write(y: Array, rows: Array, at: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(y, rows.astype(y.dtype), at, 0)
