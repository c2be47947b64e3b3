"""Laws of the transformer, for every position encoding and kind of block."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import apply, drawn, placed

from gptjax.distributed import sharding
from gptjax.distributed.parameters import flat, parameter_info
from gptjax.distributed.sharding import DEFAULT_RULES, MeshConfig, ShardingRules
from gptjax.nn import (
    GELU,
    LSTM,
    MLP,
    ALiBi,
    Attention,
    ClampedSwiGLU,
    Encoder,
    EncoderConfig,
    GeGLU,
    LayerNorm,
    LayerOverrides,
    MixtureOfExperts,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    NoResidual,
    Parallel,
    Positions,
    ReLU,
    ReLUSquared,
    Residual,
    RMSNorm,
    RoPE,
    Sigmoid,
    SwiGLU,
    Transformer,
    TransformerConfig,
    ValueEmbedding,
    ValueResidual,
    YaRN,
    count,
    make_cache,
    positions,
    unstack,
)
from gptjax.nn.remat import POLICIES
from gptjax.types import UserError

BASE = TransformerConfig(vocab=32, layers=2, width=16, heads=4, kv_heads=2)
TOKENS = jax.random.randint(jax.random.key(7), (4, 12), 0, 32)
# Logits are of size 1 and pass through 2 layers of sums of 16 to 48 float32 products.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


for name in positions.__all__:  # a class is among the subclasses once it is imported
    getattr(positions, name)


def every(base: type) -> list[type]:
    return [base, *(s for c in base.__subclasses__() for s in every(c))]


def make(kind: type):
    """An encoding with its defaults; one that has a `length` gets room for the tests."""
    return kind(length=16) if "length" in {f.name for f in dataclasses.fields(kind)} else kind()


CONFIGS = {kind.__name__: dataclasses.replace(BASE, positions=make(kind)) for kind in every(Positions)}
CONFIGS["activations"] = dataclasses.replace(  # each in a layer of its own: they act on one token
    BASE,
    layers=6,
    pattern=tuple(LayerOverrides(mlp=kind()) for kind in (GELU, ReLU, ReLUSquared, SwiGLU, ClampedSwiGLU, GeGLU)),
)
CONFIGS |= {
    kind.__name__: dataclasses.replace(BASE, mlp=kind())
    for kind in every(MLP)
    if kind is not MLP and kind.__module__ != MLP.__module__
}
CONFIGS |= {
    kind.__name__: dataclasses.replace(BASE, residual=kind())
    for kind in every(Residual)
    if kind not in (Residual, NoResidual)
}
CONFIGS |= {  # of others: python -m pytest -p their_module tests/nn/test_transformer.py
    kind.__name__: dataclasses.replace(BASE, attention=kind())
    for kind in every(Attention)
    if not kind.__module__.startswith("gptjax.")
}
CONFIGS["rope"] = dataclasses.replace(
    BASE, head_size=8, positions=RoPE(fraction=0.5, interleaved=True, scaling=YaRN(factor=4.0, original_length=8))
)
CONFIGS["attention"] = dataclasses.replace(
    BASE, attention=MultiHeadAttention(window=5, qk_norm=RMSNorm(), softcap=3.0, sinks=True, scale=0.4, bias=True)
)
CONFIGS["pattern"] = dataclasses.replace(
    BASE,
    layers=6,
    leading_layers=(LayerOverrides(mlp=GELU(), hidden=8),),
    pattern=(LayerOverrides(window=3), LayerOverrides(positions=Positions(), attention=MultiHeadAttention(kv_heads=4))),
    embedding_scale=4.0,
    embedding_norm=RMSNorm(scale=False),
    norm=RMSNorm(plus_one=True),
    logit_softcap=2.0,
)
CONFIGS["cohere"] = dataclasses.replace(
    BASE,
    norm=LayerNorm(bias=False),
    attention=MultiHeadAttention(qk_norm=LayerNorm(per_head=True)),
    residual=Parallel(shared=True),
    pattern=(LayerOverrides(window=3), LayerOverrides(positions=Positions())),
)
CONFIGS["values"] = dataclasses.replace(
    BASE, pattern=(LayerOverrides(), LayerOverrides(attention=MultiHeadAttention(values=ValueEmbedding(vocab=32))))
)
CONFIGS["value residual"] = dataclasses.replace(BASE, layers=3, attention=MultiHeadAttention(values=ValueResidual(0.3)))
CONFIGS["deepseek"] = dataclasses.replace(
    BASE,
    attention=MultiHeadLatentAttention(q_rank=12, kv_rank=8, rope_size=4, value_size=6),
    leading_layers=(LayerOverrides(mlp=SwiGLU(), hidden=8),),
    mlp=MixtureOfExperts(experts=4, shared=1, router=Sigmoid(groups=2)),
)
CONFIGS["gpt2"] = dataclasses.replace(
    CONFIGS["LearnedPositions"], kv_heads=None, norm=LayerNorm(), mlp=GELU(), bias=True, tie_embeddings=False
)


@pytest.fixture(params=CONFIGS, scope="module")
def model(request):
    model = Transformer(CONFIGS[request.param])
    return model, drawn(model)


def test_changing_a_token_leaves_what_came_before(model):
    model, params = model
    logits, changed = (np.asarray(apply(model, params, x)[0]) for x in (TOKENS, TOKENS.at[:, 6].add(1) % 32))
    np.testing.assert_array_equal(logits[:, :6], changed[:, :6])
    assert (np.abs(logits[:, 6:] - changed[:, 6:]).max(-1) > 1e-5).all()


def test_cached_decoding_equals_the_full_forward(model):
    """In one go and in pieces, every row in pieces of its own: what is padding at a piece's end is as if it were not
    there. With parameters that are unstacked, and in layers that differ with stacked ones too."""
    model, params = model
    logits, _ = apply(model, params, TOKENS)
    layers, stacked = unstack(model.config, params), len(model.config.pattern) > 1
    cache, starts, pieces = make_cache(model.config, 4, 14), np.zeros(4, int), [[] for _ in range(4)]
    for lengths in ((5, 3, 1, 6), (1, 1, 0, 1), (1, 1, 1, 1), (5, 4, 6, 2), (0, 3, 4, 2)):
        T = 1 if max(lengths) == 1 else 6
        tokens, segments = np.full((4, T), 31, np.int32), np.zeros((4, T), np.int32)
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            tokens[row, :length], segments[row, :length] = TOKENS[row, start : start + length], 1
        out, cache = apply(model, params if stacked and T > 1 else layers, tokens, None, segments, cache)
        for row, length in enumerate(lengths):
            pieces[row].append(np.asarray(out)[row, :length])
        starts += lengths
        np.testing.assert_array_equal(cache.length, starts)
    np.testing.assert_allclose(np.stack([np.concatenate(row) for row in pieces]), logits, **CLOSE)


def test_packed_equals_unpacked(model):
    """Two documents in one row read as each alone."""
    model, params = model
    packed = jnp.concatenate([TOKENS[:1, :7], TOKENS[1:2, :5]], 1)
    segments = jnp.array([[1] * 7 + [2] * 5])
    positions = jnp.concatenate([jnp.arange(7), jnp.arange(5)])[None]
    together, _ = apply(model, params, packed, positions, segments)
    alone, _ = apply(model, params, TOKENS)  # what follows does not change it, as the first law holds
    alone = np.asarray(alone)
    np.testing.assert_allclose(together[0], np.concatenate([alone[0, :7], alone[1, :5]]), **CLOSE)


def acts_on_one_token(config: TransformerConfig) -> bool:
    """True if it is BASE with other activations or another residual arrangement, of which a cache holds nothing."""
    pattern = tuple(dataclasses.replace(layer, mlp=None) for layer in config.pattern)
    plain = dataclasses.replace(config, layers=BASE.layers, residual=BASE.residual, pattern=pattern[:1])
    return config != BASE == plain and len(set(pattern)) == 1


def test_a_mesh_changes_nothing(model):
    """At once, and in two halves from a cache."""
    model, params = model
    config = dataclasses.replace(model.config, kv_heads=4 if model.config.kv_heads is None else 2)
    expected, _ = apply(model, params, TOKENS)
    with sharding.use(MeshConfig(data=2, fsdp=2, tensor=2).make()):
        sharded = Transformer(config, DEFAULT_RULES)
        tokens = sharding.global_array(np.asarray(TOKENS), DEFAULT_RULES)
        params = placed(sharded, params, tokens)
        q = params["blocks"].get("0", params["blocks"])["attention"]["q"]
        assert q.sharding.spec == jax.P(None, "fsdp", "tensor", None)
        places = sharding.global_array(np.tile(np.arange(12, dtype=np.int32), (4, 1)), DEFAULT_RULES)
        logits, _ = apply(sharded, params, tokens, places, jnp.ones_like(tokens))
        np.testing.assert_allclose(logits, expected, **CLOSE)
        if acts_on_one_token(model.config):
            return
        cache = make_cache(config, 4, 12, DEFAULT_RULES)
        first, cache = apply(sharded, params, tokens[:, :6], cache=cache)
        second, _ = apply(sharded, params, tokens[:, 6:], cache=cache)
    np.testing.assert_allclose(np.concatenate([first, second], 1), expected, **CLOSE)


def test_a_prefix_is_seen_from_before():
    """Within it every token sees every other, as in an encoder; what follows is as ever, also from a cache."""
    model = Transformer(dataclasses.replace(BASE, pattern=(LayerOverrides(window=7), LayerOverrides())))
    params = drawn(model)
    prefix = jnp.broadcast_to(jnp.arange(12) < 5, TOKENS.shape)
    logits, _ = apply(model, params, TOKENS, prefix=prefix)
    inside, _ = apply(model, params, TOKENS.at[:, 4].add(1) % 32, prefix=prefix)
    after, _ = apply(model, params, TOKENS.at[:, 5].add(1) % 32, prefix=prefix)
    assert (jnp.abs(logits - inside).max(-1) > 1e-4).all()
    np.testing.assert_array_equal(logits[:, :5], after[:, :5])

    fields = {field.name: getattr(model.config, field.name) for field in dataclasses.fields(model.config)}
    encoded, _ = apply(Encoder(EncoderConfig(**fields)), params, TOKENS[:, :5])
    np.testing.assert_allclose(logits[:, :5], encoded, **CLOSE)

    layers, cache, pieces = unstack(model.config, params), make_cache(model.config, 4, 14), []
    for start, stop in ((0, 7), (7, 8), (8, 12)):
        given = {"prefix": prefix[:, start:stop]} if start == 0 else {}
        piece, cache = apply(model, layers, TOKENS[:, start:stop], cache=cache, **given)
        pieces.append(piece)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), logits, **CLOSE)


def test_layers_and_rows_differ_at_initialisation():
    params = jax.jit(Transformer(BASE).init)(jax.random.key(0), TOKENS)["params"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params["blocks"]):
        if "scale" not in str(path[-1]):
            assert not np.allclose(leaf[0], leaf[1]), path
    np.testing.assert_allclose(params["embedding"].std(), 0.02, rtol=0.2)
    np.testing.assert_allclose(params["blocks"]["mlp"]["down"].std(), 0.02 / 2, rtol=0.2)


def test_what_writes_to_the_stream_begins_the_smaller_the_deeper_the_model():
    """With 0.02 / sqrt(2 L), whatever it is; all other matrices with 0.02. The deviation of the 512 numbers or more of
    each is found to 1 / sqrt(2 x 512) = 3 %, of which 0.15 is five times."""
    latent = MultiHeadLatentAttention(kv_rank=16, rope_size=8, value_size=16)
    moe = LayerOverrides(attention=latent, mlp=MixtureOfExperts(experts=2, shared=1))
    config = dataclasses.replace(BASE, layers=8, pattern=(LayerOverrides(), moe), cross_attention=MultiHeadAttention())
    params = jax.jit(Transformer(config).init)(jax.random.key(0), TOKENS, encoder_output=jnp.ones((4, 3, 16)))["params"]
    outputs = set()
    info = flat(parameter_info(Transformer(config), TOKENS, encoder_output=jnp.ones((4, 3, 16)))["blocks"])
    for path, leaf in flat(params["blocks"]).items():
        if info[path].is_matrix:
            writes = info[path].split(leaf.shape)[2] == (16,) and path.endswith(("/o", "down"))
            outputs |= {path} if writes else set()
            np.testing.assert_allclose(leaf.std(), 0.02 / 4 if writes else 0.02, rtol=0.15, err_msg=path)
    names = {f"{i}/{name}" for i in (0, 1) for name in ("attention/o", "cross_attention/o", "mlp/down")}
    assert outputs == names | {"1/mlp/shared_down"}


def test_remat_and_bfloat16():
    """Recomputation changes no bit; bfloat16 has 8 bits of mantissa, so logits agree to about 1 %."""
    params = drawn(Transformer(BASE), deviation=0.02)

    def gradient(**changes):
        model = Transformer(dataclasses.replace(BASE, **changes))
        loss = lambda p: jnp.sum(jnp.square(model.apply({"params": p}, TOKENS)[0].astype(jnp.float32)))  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    expected = gradient()
    for policy in POLICIES:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient(remat=policy), expected
        )
    rounded = gradient(dtype="bfloat16")
    for a, b in zip(jax.tree.leaves(rounded), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.float32
        assert jnp.linalg.norm(a - b) < 0.05 * jnp.linalg.norm(b)


def test_dropout_needs_a_key_and_keeps_the_mean():
    config = dataclasses.replace(BASE, dropout=0.5)
    model = Transformer(config)
    params = drawn(model)
    run = jax.jit(lambda key: model.apply({"params": params}, TOKENS, rngs={"dropout": key})[0])
    plain, _ = apply(model, params, TOKENS)
    np.testing.assert_array_equal(plain, apply(Transformer(BASE), params, TOKENS)[0])
    assert not np.allclose(run(jax.random.key(1)), run(jax.random.key(2)))
    np.testing.assert_array_equal(run(jax.random.key(1)), run(jax.random.key(1)))


@pytest.mark.parametrize("field", ["dropout", "layer_drop"])
def test_nothing_is_dropped_in_decoding(field):
    """Whoever asks for it there, with a cache or layers one by one, is told so."""
    model = Transformer(dataclasses.replace(BASE, **{field: 0.5}))
    stacked = drawn(model)
    for params, cache in ((unstack(model.config, stacked), None), (stacked, make_cache(model.config, 4, 12))):
        with pytest.raises(UserError, match='rngs: got a key "dropout"'):
            model.apply({"params": params}, TOKENS, cache=cache, rngs={"dropout": jax.random.key(1)})


@pytest.mark.parametrize(
    "pattern", [(LayerOverrides(),), (LayerOverrides(), LayerOverrides(window=3))], ids=["alike", "pattern"]
)
def test_layer_drop_leaves_out_whole_blocks(pattern):
    """At random, so that over many keys each of the 2^L stacks that are left comes up, the whole one and the empty one
    among them; in evaluation nothing is left out. A stack of 3 is missed by 100 keys once in 10^5 times."""
    config = dataclasses.replace(BASE, layers=3, layer_drop=0.5, pattern=pattern)
    model, whole = Transformer(config), Transformer(dataclasses.replace(config, layer_drop=0.0))
    tokens = TOKENS[:1, :4]
    params = drawn(model)
    expected, _ = apply(whole, params, tokens)
    np.testing.assert_array_equal(apply(model, params, tokens)[0], expected)

    def only(kept: tuple[int, ...]):
        """Output without the other blocks: a block whose output is zero equals a dropped one."""
        blocks = jax.tree.map(jnp.copy, unstack(config, params)["blocks"])
        for block, keep in zip(blocks.values(), kept, strict=True):
            block["attention"]["o"] *= keep
            block["mlp"]["down"] *= keep
        return apply(whole, {**params, "blocks": blocks}, tokens)[0]

    stacks = [only(kept) for kept in itertools.product((0, 1), repeat=3)]
    run = jax.vmap(lambda key: model.apply({"params": params}, tokens, rngs={"dropout": key})[0])
    found = jax.jit(run)(jax.random.split(jax.random.key(1), 100))
    apart = jnp.abs(found[:, None] - jnp.stack(stacks)).max((2, 3, 4))
    np.testing.assert_array_less(apart.min(1), 2e-5 * jnp.abs(found).max())
    assert set(apart.argmin(1).tolist()) == set(range(8))


def test_flops_count_the_matrices():
    params = drawn(Transformer(BASE))
    matrices = sum(p.size for p in jax.tree.leaves(params) if p.ndim > 2) + params["embedding"].size
    assert BASE.flops(0) == 6 * matrices
    assert BASE.flops(10) - BASE.flops(0) == 12 * 2 * 16 * 10
    assert count(params) == sum(p.size for p in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"heads": 5}, "model.heads: got 5"),
        ({"kv_heads": 3}, "model.kv_heads: got 3"),
        ({"layers": 0}, "model.layers: got 0"),
        ({"dropout": 1.0}, "model.dropout: got 1.0"),
        ({"remat": "everything"}, "model.remat: got 'everything'"),
        ({"dtype": "float8"}, "model.dtype: got 'float8'"),
        ({"head_size": 3}, "model.head_size: got 3"),
        ({"cross_attention": MultiHeadLatentAttention()}, "model.cross_attention: got MultiHeadLatentAttention"),
        ({"cross_attention": LSTM()}, "model.cross_attention: got LSTM"),
        (
            {
                "positions": ALiBi(),
                "pattern": (LayerOverrides(attention=MultiHeadAttention(heads=2)), LayerOverrides()),
            },
            "model.attention.heads: got 2 for a layer, must be model.heads 4 with ALiBi",
        ),
    ],
)
def test_a_bad_field_is_named(changes, field):
    with pytest.raises(UserError, match=field):
        dataclasses.replace(BASE, **changes)


def test_mesh_that_does_not_fit():
    sizes = MeshConfig(data=-1, tensor=2).sizes(8)
    assert {axis: size for axis, size in sizes.items() if size > 1} == {"data": 4, "tensor": 2}
    for mesh in (MeshConfig(data=3), MeshConfig(data=-1, fsdp=3), MeshConfig(data=-1, fsdp=-1), MeshConfig(data=0)):
        with pytest.raises(UserError, match="mesh"):
            mesh.sizes(8)
    assert ShardingRules()("batch") is None
