"""Attention over rows that a mesh cuts equals the plain form and sends what it says; models train on such rows."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn, placed

from gptjax.distributed import sharding
from gptjax.distributed.sharding import DEFAULT_RULES, MeshConfig
from gptjax.kernels.attention import Mask, attention, zigzag
from gptjax.nn import (
    ALiBi,
    LayerOverrides,
    MixtureOfExperts,
    MultiHeadLatentAttention,
    TransformerConfig,
)
from gptjax.nn.remat import rematerialised
from gptjax.objectives import NextToken
from gptjax.plan import hlo
from gptjax.plan.arithmetic import product_flops
from gptjax.plan.collectives import collectives
from gptjax.types import Batch, UserError

MESHES = {"context 4": MeshConfig(data=2, context=4), "context 2, tensor 2": MeshConfig(data=2, context=2, tensor=2)}
B, T, N, K, H = 2, 32, 4, 2, 8
SEGMENTS = np.repeat(np.array([[1, 2, 3, 0]], np.int32), [10, 5, 13, 4], axis=1).repeat(B, 0)
MASKS = {
    "causal": Mask(),
    "all": Mask(causal=False),
    "window": Mask(window=7),
    "window, both ways": Mask(causal=False, window=11),
    "segments": Mask(query_segments=SEGMENTS, key_segments=SEGMENTS),
    "prefix": Mask(prefix=np.arange(T)[None].repeat(B, 0) < 13),
    "window, prefix": Mask(window=11, prefix=np.arange(T)[None].repeat(B, 0) < 21),
}
OPTIONS = {"none": {}, "softcap": {"softcap": 2.0, "scale": 0.7}, "sinks": {"sinks": np.array([0.3, -1, 2, 0.5], "f4")}}


def value_and_gradients(form: str | None, mask: Mask, options, arrays, weights):
    sinks = {"sinks": options["sinks"]} if "sinks" in options else {}
    rest = {name: value for name, value in options.items() if name != "sinks"}

    def value(arrays, sinks):
        y = attention(*arrays, mask, **sinks, **rest, implementation=form)
        return jnp.sum(y * weights), y

    (_, y), gradients = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))(arrays, sinks)
    return jax.tree.map(np.asarray, (y, gradients))


def inputs(length: int = T):
    """Queries, keys and values, and weights of what is put out."""
    random = np.random.default_rng(0)
    arrays = tuple(random.normal(size=(B, length, heads, H)).astype("f4") for heads in (N, K, K))
    return arrays, random.normal(size=(B, length, N, H)).astype("f4")


@functools.cache
def plain(mask: str, options: str):
    return value_and_gradients("plain", MASKS[mask], OPTIONS[options], *inputs())


def assert_equals(expected, form, mesh, mask, options, length=T):
    """Values, and gradients with respect to queries, keys, values and sinks."""
    arrays, weights = inputs(length)
    with sharding.use(MESHES[mesh].make()):
        place = lambda x, *axes: jax.device_put(x, jax.NamedSharding(jax.sharding.get_mesh(), DEFAULT_RULES(*axes)))  # noqa: E731
        rows = jax.tree.map(lambda x: place(x, "batch", "sequence"), mask)
        placed = tuple(place(x, "batch", "sequence", "heads", None) for x in (*arrays, weights))
        actual = value_and_gradients(form, rows, options, placed[:3], placed[3])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), actual, expected)


@pytest.mark.sampled
@pytest.mark.parametrize("form", ["ring", "gathered", "ulysses"])
@pytest.mark.parametrize(
    ("mesh", "mask", "options"),
    [
        *(("context 4", mask, "none") for mask in MASKS),
        ("context 4", "causal", "softcap"),
        ("context 2, tensor 2", "segments", "none"),
        ("context 2, tensor 2", "all", "sinks"),
    ],
)
def test_it_equals_the_plain_form(form, mesh, mask, options):
    assert_equals(plain(mask, options), form, mesh, MASKS[mask], OPTIONS[options])


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("mesh", "mask", "options"),
    [
        ("context 4", Mask(), "softcap"),  # blocks of one piece of a row, and none beside them
        ("context 2, tensor 2", "segments", "sinks"),
        ("context 2, tensor 2", Mask(window=300), "none"),
        ("context 2, tensor 2", Mask(causal=False), "none"),
    ],
)
def test_splash_equals_the_plain_form(mesh, mask, options):
    """Interpreted, on rows of its smallest blocks: two a device, or four."""
    if mask == "segments":
        segments = np.repeat(SEGMENTS, 1024 // T, axis=1)
        mask = Mask(query_segments=segments, key_segments=segments)
    expected = value_and_gradients("plain", mask, OPTIONS[options], *inputs(1024))
    assert_equals(expected, "splash", mesh, mask, OPTIONS[options], 1024)


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_rows_are_dealt_evenly(n):
    """A device gets two pieces that see as much as any other's, each from where it lies, and gives them back."""
    pieces = zigzag.zigzag_order(n)
    assert sorted(pieces.flat) == list(range(2 * n))
    assert len(set(pieces.sum(1))) == 1
    with sharding.use(MeshConfig(context=n).make(jax.devices()[:n])):
        place = jax.NamedSharding(jax.sharding.get_mesh(), DEFAULT_RULES(None, "sequence"))
        row = jax.device_put(np.arange(4 * n).reshape(1, -1), place)
        on_each = functools.partial(jax.shard_map, in_specs=place.spec, out_specs=place.spec)
        dealt = jax.jit(on_each(functools.partial(zigzag.zigzag_split, axes=("context",))))(row)
        back = jax.jit(on_each(functools.partial(zigzag.zigzag_merge, axes=("context",))))(dealt)
    assert np.asarray(dealt).reshape(n, 2, 2).tolist() == np.arange(4 * n).reshape(-1, 2)[pieces].tolist()
    np.testing.assert_array_equal(back, row)


def program(form: str, length: int, mask: Mask = Mask(), gradient: bool = True):
    """Compiled for four devices in a ring, a row of so many tokens."""
    with sharding.use(MeshConfig(context=4).make(jax.devices()[:4])):
        place = jax.NamedSharding(jax.sharding.get_mesh(), DEFAULT_RULES("batch", "sequence", "heads", None))
        q, k = (jax.ShapeDtypeStruct((1, length, heads, H), jnp.float32, sharding=place) for heads in (N, K))

        def run(*arrays):
            y, back = jax.vjp(lambda *arrays: attention(*arrays, mask, implementation=form), *arrays)
            return (y, back(y)) if gradient else y

        return jax.jit(run).lower(q, k, k).compile()


def sent(compiled) -> dict[str, float]:
    """Bytes that a device sends, by kind of collective."""
    total: dict[str, float] = {}
    for one in collectives(hlo.Program.parse(compiled.as_text())):
        total[one.kind] = total.get(one.kind, 0) + one.sent
    return {kind: size for kind, size in total.items() if size}


def test_what_is_sent():
    """A block of K or V has `block` bytes, and there are four devices. Queries and what they get have `queries`."""
    block, queries = 64 // 4 * K * H * 4, 64 // 4 * N * H * 4
    dealt = 2 * queries + 2 * block
    assert sent(program("ring", 64, gradient=False)) == {"collective-permute": dealt + 3 * 2 * block}
    backwards = 3 * 4 * block + 2 * block
    assert sent(program("ring", 64)) == {"collective-permute": 2 * dealt + 3 * 2 * block + backwards}
    whole = program("ring", 64, Mask(causal=False))
    assert sent(whole) == {"collective-permute": 3 * 2 * block + backwards}, "nothing to balance"
    near = program("ring", 64, Mask(window=16), gradient=False)
    assert sent(near) == {"collective-permute": 2 * block}, "a window of one block reaches the next one alone"
    assert sent(program("gathered", 64, gradient=False)) == {"all-gather": 3 * 2 * block}
    assert sent(program("gathered", 64)) == {"all-gather": 3 * 2 * block, "reduce-scatter": 3 * 2 * block}
    # A device has a key head of its own, of a quarter of a sequence, and sends three quarters of it and of the rest.
    assert sent(program("ulysses", 64, gradient=False)) == {"all-to-all": 3 / 4 * 4 * queries}
    assert sent(program("ulysses", 64)) == {"all-to-all": 3 / 4 * 8 * queries}
    block, queries = 8 * block, 8 * queries
    expected = {"all-gather": 3 * 2 * block, "reduce-scatter": 3 * 2 * block, "collective-permute": 4 * queries}
    assert sent(program("splash", 512)) == expected


def test_scores_are_computed_once_less_where_attention_is_kept():
    def flops(policy):
        with sharding.use(MeshConfig(context=4).make(jax.devices()[:4])):
            place = jax.NamedSharding(jax.sharding.get_mesh(), DEFAULT_RULES("batch", "sequence", "heads", None))
            q, k = (jax.ShapeDtypeStruct((4, 512, heads, H), jnp.float32, sharding=place) for heads in (N, K))
            attend = rematerialised(functools.partial(attention, mask=Mask(), implementation="ring"), policy)
            loss = lambda *arrays: jnp.square(attend(*arrays)).sum()  # noqa: E731
            compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k).compile()
        return product_flops(hlo.Program.parse(compiled.as_text()))

    assert flops("attention_saveable") == flops(None) < flops("nothing_saveable")


def test_scores_are_never_whole():
    """Memory grows as the rows do, not as their square."""
    short, long = (program("ring", length).memory_analysis().temp_size_in_bytes for length in (2_048, 8_192))
    assert long < 5 * short


BASE = TransformerConfig(vocab=48, layers=2, width=32, heads=4, kv_heads=2, hidden=64)
MODELS = {
    "ring": BASE,
    "windows": dataclasses.replace(BASE, pattern=(LayerOverrides(window=9), LayerOverrides())),
    "ALiBi": dataclasses.replace(BASE, positions=ALiBi()),
    "experts": dataclasses.replace(BASE, hidden=32, mlp=MixtureOfExperts(experts=4, top_k=2)),
    "latent": dataclasses.replace(BASE, attention=MultiHeadLatentAttention(kv_rank=16, rope_size=8, value_size=8)),
}


@pytest.mark.sampled
@pytest.mark.parametrize(
    "name",
    # Windows and biases are those of the products above.
    ["ring", "experts", "latent", *(pytest.param(name, marks=pytest.mark.slow) for name in ("windows", "ALiBi"))],
)
def test_a_model_trains_as_on_one_device(name):
    """Loss and every gradient, to float32's rounding in 2 layers of sums over 64 numbers."""
    random = np.random.default_rng(1)
    tokens = random.integers(0, 48, (B, T + 1), np.int32)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in (10, 5, 13, 4)])[None].repeat(B, 0)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], (SEGMENTS > 0).astype("f4"), SEGMENTS, positions)
    params = drawn(MODELS[name].build(), deviation=0.02)

    def gradients(model, params, batch):
        def loss(params):
            total, weight = NextToken()(model.apply, params, batch)["loss"]
            return total / weight

        return jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(loss))(params))

    expected = gradients(MODELS[name].build(), params, batch)
    with sharding.use(MeshConfig(fsdp=2, context=2, tensor=2).make()):
        model = MODELS[name].build(DEFAULT_RULES)
        rows = sharding.global_array(batch, DEFAULT_RULES)
        actual = gradients(model, placed(model, params, rows.tokens), rows)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-6), actual, expected)


def test_dropped_probabilities_are_those_of_one_device():
    """By all-to-all alone, whose kernels are those for whole sequences."""
    options = {"dropout": 0.4, "key": jax.random.key(5)}
    expected = value_and_gradients("plain", Mask(), options, *inputs())
    assert_equals(expected, None, "context 2, tensor 2", Mask(), options)


def test_what_it_cannot_do_is_refused():
    with sharding.use(MeshConfig(context=8).make()):
        q = jax.device_put(
            np.zeros((1, 8, 2, 4), "f4"), jax.NamedSharding(jax.sharding.get_mesh(), jax.P(None, "context"))
        )
        bias = np.zeros((2, 8, 8), "f4")
        with pytest.raises(UserError, match="'ring', which cannot do this: it has no bias"):
            attention(q, q, q, Mask(), bias=bias, implementation="ring")
        with pytest.raises(UserError, match="'plain', which cannot do this: it needs sequences that are not sharded"):
            attention(q, q, q, Mask(), implementation="plain")
        with pytest.raises(UserError, match=r"mesh.context: ring has .*; gathered has .*; ulysses needs .* 8"):
            attention(q, q, q, Mask(), dropout=0.1, key=jax.random.key(0))
