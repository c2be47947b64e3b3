"""Ragged paged attention, jax's kernel for TPUs, interpreted: it equals the reference on the keys that pages hold, and
a row has the same bits in any company."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

from gptjax.data.tokenizers.bytes import Bytes
from gptjax.inference.engine import Engine, Request
from gptjax.kernels.attention import Mask, attention, ragged
from gptjax.kernels.attention.reference import reference
from gptjax.kernels.attention.spec import PairedPages
from gptjax.nn import ALiBi, MultiHeadAttention, Transformer, TransformerConfig, make_cache
from gptjax.nn import cache as kv
from gptjax.types import UserError

B, PAGE, PAGES = 4, 16, 5
LENGTHS = np.array([0, 31, 70, 15], np.int32)
"""Tokens before the queries: none, up to borders of pages and of blocks, and in the last page."""
CASES = {
    "one query": (1, 4, 2, 128, {}, {}),
    "heads side by side, and of zeros": (1, 6, 6, 64, {}, {}),
    "heads with zeros": (1, 3, 3, 48, {}, {}),
    "several queries": (4, 8, 4, 64, {}, {}),
    "window": (4, 8, 4, 64, {"window": 20}, {}),
    "softcap": (1, 4, 1, 16, {}, {"softcap": 2.0, "scale": 0.7}),
}
"""Queries of a row, query heads, key heads, their size, mask and options."""


@dataclasses.dataclass
class Block:
    """A block of pages that the kernel has read. jax's interpreter has no reshaped references, of which the kernel
    takes strided parts, so that it gets their values."""

    value: jax.Array

    @property
    def shape(self):
        return self.value.shape

    @property
    def dtype(self):
        return self.value.dtype

    def __getitem__(self, index):
        return self.value[index]

    def reshape(self, *shape):
        return Block(self.value.reshape(*shape))

    def bitcast(self, dtype):
        """As a TPU has it: numbers of 16 bits in adjacent rows are one of 32."""
        rows = self.value.reshape(-1, 2, self.shape[-1]).swapaxes(1, 2)
        return jax.lax.bitcast_convert_type(rows, dtype)


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels for TPUs are interpreted. What was not written is NaN."""
    wait = kernel.MultiPageAsyncCopyDescriptor.wait
    monkeypatch.setattr(kernel.MultiPageAsyncCopyDescriptor, "wait", lambda self: Block(wait(self)[...]))
    monkeypatch.setattr(ragged, "BLOCK", 2 * PAGE)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        yield


def filled(heads: int, size: int, dtype: str) -> Any:
    """Keys and values of each row [B, S, K, H], and shuffled pages with the same ones; the rest is noise."""
    random = np.random.default_rng(0)
    k, v = random.normal(size=(2, B, PAGE * PAGES, heads, size)).astype(np.float32)
    table = random.permutation(B * PAGES + 3)[: B * PAGES].reshape(B, PAGES).astype(np.int32)
    empty = PairedPages.empty(B * PAGES + 4, PAGE, heads, size, dtype)
    noise = jnp.asarray(100 * random.normal(size=empty.pairs.shape), dtype)
    k, v = (jnp.asarray(x, dtype) for x in (k, v))
    mask = Mask(offset=jnp.zeros(B, jnp.int32), pages=jnp.asarray(table))
    return k, v, kv.write_pairs(PairedPages(noise, heads), k, v, mask), table


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_it_equals_the_reference_whatever_the_company(name, dtype, interpreted):
    T, N, K, H, fields, options = CASES[name]
    k, v, pages, table = filled(K, H, dtype)
    q = jnp.asarray(np.random.default_rng(2).normal(size=(B, T, N, H)), dtype)
    start = jnp.asarray(LENGTHS)
    mask = Mask(offset=start, **fields)

    @jax.jit
    def run(rows, real):
        own = dataclasses.replace(mask, offset=start[rows], pages=jnp.asarray(table)[rows], query_segments=real)
        return attention(q[rows], pages, pages, own, **options)

    every, real = np.arange(B), np.ones((B, T), np.int32)
    idle = np.where(every[:, None] == 2, real, 0)
    together = np.asarray(run(every, real), np.float32)
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    exact = reference(q, k, v, mask, **options)
    # Weights and values are rounded once more than in the reference.
    np.testing.assert_allclose(together, exact, atol=8 * float(jnp.finfo(dtype).eps), rtol=0)
    for rows, reads in ((np.full(B, 2), real), (every, idle)):
        np.testing.assert_array_equal(np.asarray(run(rows, reads), np.float32)[2], together[2])


CONFIG = TransformerConfig(vocab=64, layers=1, width=64, heads=8, kv_heads=1, head_size=16, dtype="bfloat16")


@pytest.mark.slow
def test_an_engine_writes_the_same_texts_alone(interpreted, monkeypatch):
    """To the bit, and those of attention without the kernel, up to rounding."""
    monkeypatch.setattr(ragged, "unsupported_pages", lambda *case: None)
    tokenizer = Bytes().build(iter(()))
    params = Transformer(CONFIG).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    prompts = [tuple(range(1, 1 + length)) for length in (3, 19, 26)]
    requests = [Request(prompt, max_tokens=3, stop_token_ids=(), seed=5) for prompt in prompts]

    def write(implementation: str | None, groups: list[list[Request]]) -> list[list[Any]]:
        config = dataclasses.replace(CONFIG, attention=MultiHeadAttention(implementation=implementation))
        engine = Engine(Transformer(config), params, tokenizer, rows=3, context=40, page=8)
        assert engine.attention == (implementation or "ragged")
        texts = []
        for group in groups:
            texts += [engine.submit(request) for request in group]
            engine.run()
            engine.pages.forget()
        return [[(token.id, token.logprob) for token in text.tokens] for text in texts]

    together = write(None, [requests])
    assert together == write(None, [[request] for request in requests])
    for text, other in zip(together, write("paged", [requests]), strict=True):
        assert text[0][1] == pytest.approx(other[0][1], abs=0.03)


def test_pages_are_the_kernels_where_it_serves(monkeypatch):
    def layouts(**fields) -> list[bool]:
        config = dataclasses.replace(CONFIG, **fields)
        return [isinstance(entry, PairedPages) for entry in make_cache(config, 3, 8, paged=True).layers]

    named = MultiHeadAttention(implementation="ragged")
    with pytest.raises(UserError, match="got 'ragged', which cannot do this: it needs a TPU, got cpu"):
        layouts(attention=named)
    assert layouts() == [False]
    monkeypatch.setattr(ragged.target, "backend", lambda: "tpu")
    assert layouts() == layouts(attention=named) == [True]
    assert layouts(attention=MultiHeadAttention(implementation="paged")) == [False]
    refused = {
        "no bias and no sinks": {"positions": ALiBi()},
        "in bfloat16, got float32": {"dtype": "float32"},
        "in bfloat16, got int8": {"cache_dtype": "int8"},
        "at most 128, got 256": {"head_size": 256},
    }
    for reason, fields in refused.items():
        assert layouts(**fields) == [False]
        with pytest.raises(UserError, match=reason):
            layouts(attention=named, **fields)
    assert layouts(attention=MultiHeadAttention(sinks=True)) == [False]
