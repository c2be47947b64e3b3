"""Laws of the heads for tokens further ahead, and of their objective."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from drawn import apply, drawn, placed

from gptjax.distributed import sharding
from gptjax.distributed.sharding import DEFAULT_RULES, MeshConfig
from gptjax.nn import MultiTokenConfig, Transformer, TransformerConfig, make_cache
from gptjax.objectives import MultiToken, NextToken
from gptjax.train import state as train_state
from gptjax.train.step import make_step
from gptjax.types import Batch

SIZES = {"vocab": 32, "layers": 2, "width": 16, "heads": 4, "tie_embeddings": False}
CONFIG = MultiTokenConfig(**SIZES, ahead=2)
TOKENS = jax.random.randint(jax.random.key(7), (4, 12), 0, 32)
# Logits are of size 1 and pass through 3 layers of sums of 16 to 48 float32 products.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def test_without_its_heads_it_is_the_transformer():
    model = CONFIG.build()
    params = drawn(model)
    plain, _ = apply(Transformer(TransformerConfig(**SIZES)), params, TOKENS)
    logits, _ = apply(model, params, TOKENS)
    np.testing.assert_array_equal(logits, plain)
    cache = make_cache(CONFIG, 4, 12)
    cached, _ = apply(model, CONFIG.unstack(params), TOKENS, None, None, cache)
    np.testing.assert_allclose(cached, plain, **CLOSE)


def test_a_mesh_changes_nothing():
    model = CONFIG.build()
    run = jax.jit(lambda model, p, t: model.apply({"params": p}, t, mutable=["ahead"])[1]["ahead"], static_argnums=0)
    params = drawn(model)
    expected = run(model, params, TOKENS)
    with sharding.use(MeshConfig(fsdp=2, context=2, tensor=2).make()):
        tokens = sharding.global_array(np.asarray(TOKENS), DEFAULT_RULES)
        sharded = CONFIG.build(DEFAULT_RULES)
        heads = run(sharded, placed(sharded, params, tokens), tokens)
    for name in ("0", "1"):
        np.testing.assert_allclose(heads[name], expected[name], **CLOSE)


def test_heads_are_asked_for_the_right_tokens():
    """Heads that know the tokens two and three further on have no loss; across documents nothing is asked."""
    tokens = np.asarray(TOKENS)
    targets = np.roll(tokens, -1, 1)
    segments = np.array([[1] * 7 + [2] * 5] * 4, np.int32)
    weights = (np.arange(12) % 7 != 6) & (np.arange(12) != 11)

    def apply(variables, tokens, positions, segments, mutable):
        assert mutable == ["losses", "deferred_logits", "ahead"]
        heads = {str(k): 50 * jax.nn.one_hot(np.roll(tokens, -2 - k, 1), 32) for k in range(2)}
        return (jnp.zeros((4, 12, 32)), None), {"ahead": heads}

    batch = Batch(tokens, targets, np.tile(weights, (4, 1)).astype(np.float32), segments, segments)
    metrics = MultiToken()(apply, {}, batch)
    plain = NextToken()(lambda *args, mutable: ((jnp.zeros((4, 12, 32)), None), {}), {}, batch)
    np.testing.assert_allclose(metrics["loss"][0], plain["loss"][0], rtol=1e-6)
    assert metrics["loss"][1] == 4 * 10
    assert [int(metrics[f"ahead_{k}"][1]) for k in (1, 2)] == [4 * 8, 4 * 6]
    assert metrics["ahead_1"][0] < 1e-6
    assert metrics["ahead_2"][0] < 1e-6


def test_all_heads_learn():
    rows = (np.arange(8, dtype=np.int32)[:, None] * 3 + np.arange(17, dtype=np.int32) ** 2) % 32
    tokens, targets = rows[:, :-1], rows[:, 1:]
    ones = np.ones_like(tokens)
    batch = Batch(tokens, targets, ones.astype(np.float32), ones, np.cumsum(ones, 1, dtype=np.int32) - 1)
    model = CONFIG.build()
    optimizer = optax.adam(1e-2)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    state = train_state.create(params, optimizer, jax.random.key(1))
    step = make_step(MultiToken(), model.apply, optimizer)
    for _ in range(150):
        state, metrics = step(state, batch)
    for name in ("cross_entropy", "ahead_1", "ahead_2"):
        assert metrics[name][0] / metrics[name][1] < 0.5, name


def test_flops_count_the_heads():
    params = drawn(CONFIG.build())
    blocks = sum(p.size for p in jax.tree.leaves(params["blocks"]) if p.ndim > 2)
    heads = sum(p.size for i in range(2) for p in jax.tree.leaves(params[f"ahead_{i}"]) if p.ndim > 1)
    assert CONFIG.flops(0) == 6 * (blocks + heads + 3 * params["head"].size)
    in_chunks = dataclasses.replace(CONFIG, layers=4, pipeline_chunks=4)  # which the heads cannot be divided into
    assert in_chunks.flops(8) == dataclasses.replace(in_chunks, pipeline_chunks=1).flops(8)
    assert len(in_chunks.init_ahead_cache(1, 8)) == CONFIG.ahead
