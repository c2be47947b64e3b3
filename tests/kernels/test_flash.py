"""Flash attention over segments, interpreted, against the reference; on a GPU, compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gptjax.kernels import target
from gptjax.kernels.attention import Mask, attention, flash
from gptjax.kernels.attention.reference import reference
from gptjax.kernels.attention.spec import Options
from gptjax.plan.arithmetic import silent_kernels

B, T, N, K, H = 2, 384, 4, 2, 16


def segments(kind):
    """int32 [B, T]: documents of `kind` tokens on average, then padding; or "again", numbers that return."""
    begins = np.random.default_rng(0).random((B, T)) < 1 / (60 if kind == "again" else kind)
    numbers = 1 + np.cumsum(begins, axis=1)
    if kind == "again":
        return jnp.asarray(numbers % 3, jnp.int32)
    numbers[:, T - T // 5 :] = 0
    return jnp.asarray(numbers, jnp.int32)


def inputs(dtype=jnp.float32, size=H):
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, (B, T, n, size), dtype) for key, n in zip(keys, (N, K, K, N), strict=True)]


def values_and_gradients(f, mask, arrays):
    *qkv, g = arrays
    y, pull = jax.vjp(lambda q, k, v: f(q, k, v, mask), *qkv)
    return dict(zip(("y", "q", "k", "v"), (y, *pull(g)), strict=True))


compiled = jax.jit(values_and_gradients, static_argnums=0)


def ours(q, k, v, mask):
    return flash.attention(q, k, v, mask, Options())


def named(q, k, v, mask):
    return attention(q, k, v, mask, implementation="flash")


def assert_equal(mask, f, arrays, rtol):
    expected = values_and_gradients(reference, mask, [x.astype(jnp.float32) for x in arrays])
    for name, x in compiled(f, mask, arrays).items():
        error = jnp.abs(x.astype(jnp.float32) - expected[name]).max() / jnp.abs(expected[name]).max()
        assert error < rtol, name


CASES = [
    (1000, True, None),
    (100, True, None),
    (100, False, None),
    (100, True, 60),
    (8, True, None),
    ("again", True, None),
]


@pytest.mark.sampled
@pytest.mark.parametrize(("kind", "causal", "window"), CASES)
def test_flash_is_the_reference(kind, causal, window):
    """Grouped queries, documents longer than a row, of several blocks and of a fraction of one, in any order."""
    numbers = segments(kind)
    mask = Mask(causal, window, None, numbers, numbers)
    assert_equal(mask, ours, inputs(), 1e-5)  # sums of up to 384 products of float32


def test_plans_count_its_products():
    """Two forward, seven backward, of half the scores of each head."""
    numbers = jnp.ones((B, T), jnp.int32)
    mask = Mask(query_segments=numbers, key_segments=numbers)
    f = lambda *qkv: flash.attention(*qkv, mask, Options()).sum()  # noqa: E731
    *qkv, _ = inputs()
    for run, products in ((f, 2), (jax.grad(f, argnums=(0, 1, 2)), 9)):
        assert silent_kernels(jax.make_jaxpr(run)(*qkv).jaxpr, "gpu") == products * 2 * B * N * H * T * T / 2


def test_blocks_of_one_segment_are_not_compared_and_hidden_ones_not_visited():
    """`_bounds`: four blocks of queries, eight of keys. The second half of the row is another document."""
    numbers = jnp.repeat(jnp.array([[1, 2]]), 128, axis=1)
    bounds = flash._bounds(flash.Seen(True, None), numbers, numbers, 64, 32)[0].tolist()
    assert bounds == [[0, 2, 2, 2], [0, 0, 2, 4], [4, 6, 6, 6], [4, 4, 6, 8]]
    by_keys = flash._bounds(flash.Seen(True, None), numbers, numbers, 64, 32, by_keys=True)[0].tolist()
    assert by_keys == [[0, 1, 2, 2]] * 2 + [[1, 2, 2, 2]] * 2 + [[2, 3, 4, 4]] * 2 + [[3, 4, 4, 4]] * 2


def test_on_a_mesh_each_device_takes_its_rows_and_heads():
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), (AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    numbers, arrays = segments(100), inputs()
    with jax.set_mesh(mesh):
        rows, heads = (NamedSharding(mesh, PartitionSpec("data", None, *more)) for more in ((), ("tensor",)))
        arrays, numbers = [jax.device_put(x, heads) for x in arrays], jax.device_put(numbers, rows)
        actual = jax.device_get(compiled(ours, Mask(query_segments=numbers, key_segments=numbers), arrays))
    numbers = segments(100)
    expected = values_and_gradients(reference, Mask(query_segments=numbers, key_segments=numbers), inputs())
    for name, x in actual.items():
        np.testing.assert_allclose(x, expected[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_it_is_chosen_for_segments_on_gpus_alone(monkeypatch):
    numbers = segments(100)
    mask, (q, k, v, _) = Mask(query_segments=numbers, key_segments=numbers), inputs(jnp.bfloat16)
    trace = lambda mask: str(jax.make_jaxpr(lambda q, k, v: attention(q, k, v, mask))(q, k, v))  # noqa: E731
    assert "pallas_call" not in trace(mask)
    monkeypatch.setattr(target, "backend", lambda: "gpu")
    assert "attention_forward" in trace(mask)
    assert flash.unsupported_reason(q, k, v, Mask(), Options()) is not None
    assert "multiples of 128" in (flash.unsupported_reason(q[:, :100], k, v, mask, Options()) or "")


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason=f"needs a GPU; jax runs on {jax.default_backend()}")
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(("kind", "causal", "window"), CASES)
def test_flash_is_the_reference_on_a_gpu(kind, causal, window, size):
    numbers = segments(kind)
    # bfloat16 has 8 bits; probabilities, their products and the result are rounded to it
    assert_equal(Mask(causal, window, None, numbers, numbers), named, inputs(jnp.bfloat16, size), 2**-6)
