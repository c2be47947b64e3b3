"""Attention to pages equals the reference on the keys that they hold, and a row has the same bits in any company."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.kernels.attention import Mask, attention
from gptjax.kernels.attention.reference import reference
from gptjax.nn import cache as kv

B, N, H, PAGE, PAGES, POOL = 4, 4, 8, 16, 20, 90
"""A row has at most 320 tokens: three blocks of 128, the last of them not whole."""
LENGTHS = np.array([0, 131, 300, 17], np.int32)

CASES = {
    "plain": ({}, {}, N),
    "grouped": ({}, {}, 2),
    "one key head": ({}, {}, 1),
    "window": ({"window": 40}, {}, N),
    "softcap": ({}, {"softcap": 2.0, "scale": 0.7}, N),
    "sinks": ({}, {"sinks": np.linspace(-1, 2, N).astype(np.float32)}, 2),
    "bias": ({}, {"bias": True}, 2),
}


def filled(kv_heads: int, width: int = H, seed: int = 0):
    """Keys of each row [B, S, K, H], and a pool and a table of shuffled pages with the same ones; the rest of the pool
    is noise."""
    numpy = np.random.default_rng(seed)
    keys = numpy.normal(size=(B, PAGE * PAGES, kv_heads, width)).astype(np.float32)
    pool = numpy.normal(size=(POOL, kv_heads, PAGE, width)).astype(np.float32) * 100
    table = np.random.default_rng(9).permutation(np.arange(1, POOL))[: B * PAGES].reshape(B, PAGES).astype(np.int32)
    pool[table] = keys.reshape(B, PAGES, PAGE, kv_heads, width).swapaxes(2, 3)
    return keys, pool, table


@pytest.mark.sampled
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("T", [1, PAGE])
def test_it_equals_the_reference_whatever_the_company(name, T):
    fields, options, kv_heads = CASES[name]
    (k, k_pool, table), (v, v_pool, _) = filled(kv_heads), filled(kv_heads, 12, seed=0)
    q = jnp.asarray(np.random.default_rng(2).normal(size=(B, T, N, H)), jnp.float32)
    mask = Mask(offset=jnp.asarray(LENGTHS), **fields)
    if "bias" in options:
        slope = np.linspace(0.01, 0.1, N, dtype=np.float32)[:, None, None]
        options = {"bias": -slope * jnp.abs(mask.distance(T, PAGE * PAGES))[:, None].astype(jnp.float32)}

    def paged(q, rows):
        own = dataclasses.replace(mask, offset=jnp.asarray(LENGTHS)[rows], pages=jnp.asarray(table)[rows])
        more = {"bias": options["bias"][rows]} if "bias" in options else options
        k, v = (jnp.asarray(pool).swapaxes(1, 2) for pool in (k_pool, v_pool))
        return attention(q[rows], k, v, own, **more)

    run = jax.jit(paged)
    everyone = np.arange(B)
    together = run(q, everyone)
    np.testing.assert_allclose(together, reference(q, k, v, mask, **options), rtol=1e-5, atol=1e-5)
    for row in range(B):  # the same number of rows, all of them this one: the shortest does not loop over blocks
        np.testing.assert_array_equal(run(q, np.full(B, row))[3], together[row])


def test_what_is_written_is_found_and_padding_is_not_written():
    _, pool, table = filled(2)
    table[0, 10:] = 0  # a row's pages end: what comes after is put into nobody's
    pool, table = np.concatenate([pool[1:], pool[:1]]), np.where(table == 0, POOL, table) - 1
    new = np.random.default_rng(3).normal(size=(B, PAGE + 3, 2, H)).astype(np.float32)
    real = np.array([PAGE + 3, 5, 0, 1])
    segments = (np.arange(PAGE + 3) < real[:, None]).astype(np.int32)
    lengths = np.array([10 * PAGE - 2, 131, 300, 17], np.int32)
    mask = Mask(offset=jnp.asarray(lengths), query_segments=jnp.asarray(segments), pages=jnp.asarray(table))
    expected = pool.copy()
    for row in range(B):
        for t in range(real[row]):
            page, slot = divmod(lengths[row] + t, PAGE)
            if table[row, page] < POOL - 1:
                expected[table[row, page], :, slot] = new[row, t]
    written = jax.jit(kv.write)(jnp.asarray(pool), jnp.asarray(new), mask)
    np.testing.assert_array_equal(written[:-1], expected[:-1])

    entry = np.zeros((B, 2, 310, H), np.float32)
    contiguous = dataclasses.replace(mask, pages=None)
    expected = entry.copy()
    for row in range(B):
        count = min(real[row], 310 - lengths[row])
        expected[row, :, lengths[row] : lengths[row] + count] = new[row, :count].swapaxes(0, 1)
    np.testing.assert_array_equal(jax.jit(kv.write)(jnp.asarray(entry), jnp.asarray(new), contiguous), expected)
