"""Attention against its equation, written out in numpy."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from gptjax.kernels.attention import attention
from gptjax.kernels.attention.reference import reference
from gptjax.nn import Mask, MultiHeadAttention

# float32 sums of some tens of products
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def paper_attention(q, k, v, visible):
    """softmax(Q K^T / sqrt(d_k)) V, one head, float64 ("Attention Is All You Need", equation 1)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    return softmax(np.where(visible, q @ k.T / np.sqrt(q.shape[-1]), -np.inf)) @ v


def test_multi_head_attention_is_the_papers():
    """MultiHead(Q, K, V) = Concat(head_1, ..., head_h) W^O, causal as in its decoder."""
    layer = MultiHeadAttention(heads=3, head_size=4)
    x = jax.random.normal(jax.random.key(0), (2, 7, 10))
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    params = layer.init(jax.random.key(1), x, positions, Mask())["params"]
    params = jax.tree.map(lambda p: p * 20, params)  # far from uniform attention
    y, _ = layer.apply({"params": params}, x, positions, Mask())
    w = {name: np.asarray(p, np.float64) for name, p in params.items()}
    for b in range(2):
        row = np.asarray(x[b], np.float64)
        heads = [
            paper_attention(*(row @ w[name][:, n] for name in "qkv"), visible=np.tri(7, dtype=bool)) for n in range(3)
        ]
        expected = np.concatenate(heads, -1) @ w["o"].reshape(12, 10)
        np.testing.assert_allclose(y[b], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("offset", [0, 5])
def test_grouped_queries_offset_and_segments(kv_heads, offset):
    keys = jax.random.split(jax.random.key(0), 4)
    T, S, N, H = 6, 6 + offset, 4, 8
    q = jax.random.normal(keys[0], (2, T, N, H))
    k, v = (jax.random.normal(key, (2, S, kv_heads, H)) for key in keys[1:3])
    key_segments = jnp.sort(jax.random.randint(keys[3], (2, S), 1, 4), axis=1)
    mask = Mask(offset=offset, query_segments=key_segments[:, offset:], key_segments=key_segments)
    y = attention(q, k, v, mask)
    for b in range(2):
        segments = np.asarray(key_segments[b])
        visible = (np.arange(offset, S)[:, None] >= np.arange(S)) & (segments[offset:, None] == segments)
        for n in range(N):
            m = n // (N // kv_heads)
            np.testing.assert_allclose(
                y[b, :, n], paper_attention(q[b, :, n], k[b, :, m], v[b, :, m], visible), **CLOSE
            )


SEGMENTS = jnp.array([[1, 1, 2, 2, 2], [1, 2, 2, 3, 3]])
MASKS = {
    "causal": Mask(),
    "segments": Mask(query_segments=SEGMENTS, key_segments=SEGMENTS),
    "window": Mask(window=2),
    "both ways": Mask(causal=False, window=3),
    "prefix": Mask(prefix=jnp.arange(5) < jnp.array([[2], [3]]), query_segments=SEGMENTS, key_segments=SEGMENTS),
}
OPTIONS = {"plain": {}, "scale": {"scale": 0.7}, "softcap": {"softcap": 1.5}, "bias": {}, "sinks": {}, "all": {}}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("option", OPTIONS)
def test_attention_and_its_gradient_are_the_references(mask, option):
    """Grouped queries, values of another size than keys, every mask and every option."""
    keys = jax.random.split(jax.random.key(0), 6)
    inputs = {
        "q": jax.random.normal(keys[0], (2, 5, 4, 8)),
        "k": jax.random.normal(keys[1], (2, 5, 2, 8)),
        "v": jax.random.normal(keys[2], (2, 5, 2, 6)),
    }
    if option in ("bias", "all"):
        inputs["bias"] = jax.random.normal(keys[4], (4, 5, 5))
    if option in ("sinks", "all"):
        inputs["sinks"] = jax.random.normal(keys[5], (4,))
    options = {"scale": 0.7, "softcap": 1.5} if option == "all" else OPTIONS[option]
    g = jax.random.normal(keys[3], (2, 5, 4, 6))
    y, back = jax.vjp(lambda inputs: attention(**inputs, mask=MASKS[mask], **options), inputs)
    expected, expected_back = jax.vjp(lambda inputs: reference(**inputs, mask=MASKS[mask], **options), inputs)
    np.testing.assert_allclose(y, expected, **CLOSE)
    gradients, expected_gradients = back(g)[0], expected_back(g)[0]
    for name in inputs:
        np.testing.assert_allclose(gradients[name], expected_gradients[name], **CLOSE, err_msg=name)


def test_masks_are_what_they_say():
    t, s = np.arange(5)[:, None], np.arange(5)
    seen = {name: np.broadcast_to(mask.visible(5, 5), (2, 1, 5, 5))[:, 0] for name, mask in MASKS.items()}
    same = np.asarray(SEGMENTS)[:, :, None] == np.asarray(SEGMENTS)[:, None]
    in_prefix = s < np.array([2, 3])[:, None, None]
    np.testing.assert_array_equal(seen["window"][0], (s <= t) & (s > t - 2))
    np.testing.assert_array_equal(seen["both ways"][0], abs(s - t) < 3)
    np.testing.assert_array_equal(seen["prefix"], ((s <= t) | in_prefix) & same)
    np.testing.assert_array_equal(Mask(window=2, offset=3).visible(2, 5)[0, 0], seen["window"][0][3:])


def test_dropped_probabilities_in_attention_and_its_gradient():
    """The same key drops the same ones, so finite differences apply; the mean over many keys is undropped attention."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, 5, 2, 4)) for key in keys)
    f = lambda q, k, v: jnp.sum(jnp.sin(attention(q, k, v, Mask(), dropout=0.3, key=keys[0])))  # noqa: E731
    jax.test_util.check_grads(f, (q, k, v), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)
    many = jax.vmap(lambda key: attention(q, k, v, Mask(), dropout=0.3, key=key))(jax.random.split(keys[1], 2000))
    # The standard error of a mean of 2000 terms of size 1 is 0.02.
    np.testing.assert_allclose(many.mean(0), attention(q, k, v, Mask()), atol=0.08)
