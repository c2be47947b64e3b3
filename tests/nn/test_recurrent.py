"""Laws of recurrent layers, and of language models made of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drawn import apply, drawn, placed

from gptjax.distributed import sharding
from gptjax.distributed.sharding import DEFAULT_RULES, MeshConfig
from gptjax.nn import (
    GRU,
    LSTM,
    Encoder,
    EncoderConfig,
    LayerOverrides,
    Mask,
    Recurrent,
    RecurrentConfig,
    Transformer,
    TransformerConfig,
    make_cache,
)
from gptjax.objectives import NextToken
from gptjax.train import state as train_state
from gptjax.train.step import make_step
from gptjax.types import Batch, UserError

CONFIGS = {
    "lstm": RecurrentConfig(vocab=32, layers=2, width=16),
    "gru": RecurrentConfig(vocab=32, layers=2, width=16, attention=GRU()),
    "hybrid": TransformerConfig(
        vocab=32, layers=2, width=16, heads=2, pattern=(LayerOverrides(), LayerOverrides(attention=LSTM()))
    ),
}
TOKENS = jax.random.randint(jax.random.key(7), (4, 12), 0, 32)
# Logits are of size 1, and states pass through 12 steps of sums of 16 float32 products.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture(params=CONFIGS, scope="module")
def model(request):
    model = Transformer(CONFIGS[request.param])
    return model, drawn(model, deviation=0.4)


def test_it_is_causal_and_remembers(model):
    model, params = model
    logits, _ = apply(model, params, TOKENS)
    changed, _ = apply(model, params, TOKENS.at[:, 4].add(1) % 32)
    np.testing.assert_array_equal(logits[:, :4], changed[:, :4])
    assert (jnp.abs(logits[:, 4:] - changed[:, 4:]).max(-1) > 1e-6).all()


def test_cached_decoding_equals_the_full_forward(model):
    """In one go and in pieces, every row in pieces of its own: what is padding at a piece's end is
    as if it were not there."""
    model, params = model
    logits, _ = apply(model, params, TOKENS)
    layers = model.config.unstack(params)
    cache, starts, pieces = make_cache(model.config, 4, 14), np.zeros(4, int), [[] for _ in range(4)]
    for lengths in ((5, 3, 1, 6), (1, 1, 0, 1), (1, 1, 1, 1), (5, 4, 6, 2), (0, 3, 4, 2)):
        T = 1 if max(lengths) == 1 else 6
        tokens, segments = np.full((4, T), 31, np.int32), np.zeros((4, T), np.int32)
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            tokens[row, :length], segments[row, :length] = TOKENS[row, start : start + length], 1
        out, cache = apply(model, layers, tokens, None, segments, cache)
        for row, length in enumerate(lengths):
            pieces[row].append(np.asarray(out)[row, :length])
        starts += lengths
        np.testing.assert_array_equal(cache.length, starts)
    np.testing.assert_allclose(np.stack([np.concatenate(row) for row in pieces]), logits, **CLOSE)


def test_packed_equals_unpacked(model):
    model, params = model
    packed = jnp.concatenate([TOKENS[:1, :7], TOKENS[1:2, :5]], 1)
    positions = jnp.concatenate([jnp.arange(7), jnp.arange(5)])[None]
    together, _ = apply(model, params, packed, positions, jnp.array([[1] * 7 + [2] * 5]))
    alone = np.asarray(apply(model, params, TOKENS)[0])  # what follows does not change it, as the first law holds
    np.testing.assert_allclose(together[0], np.concatenate([alone[0, :7], alone[1, :5]]), **CLOSE)


def test_a_mesh_changes_nothing(model):
    model, params = model
    expected, _ = apply(model, params, TOKENS)
    with sharding.use(MeshConfig(data=2, fsdp=2, tensor=2).make()):
        sharded = Transformer(model.config, DEFAULT_RULES)
        tokens = sharding.global_array(np.asarray(TOKENS), DEFAULT_RULES)
        params = placed(sharded, params, tokens)
        logits, _ = apply(sharded, params, tokens, None, jnp.ones_like(tokens))
        first, cache = apply(sharded, params, tokens[:, :6], cache=make_cache(model.config, 4, 12, DEFAULT_RULES))
        second, _ = apply(sharded, params, tokens[:, 6:], cache=cache)
        gradient = jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(sharded.apply({"params": p}, tokens)[0]))))(params)
        assert jax.tree.map(lambda g: g.sharding.spec, gradient) == jax.tree.map(lambda p: p.sharding.spec, params)
    np.testing.assert_allclose(logits, expected, **CLOSE)
    np.testing.assert_allclose(np.concatenate([first, second], 1), expected, **CLOSE)


def test_next_token_training_works_unchanged():
    model = Transformer(dataclasses.replace(CONFIGS["lstm"], width=48))
    rows = (np.arange(8, dtype=np.int32)[:, None] * 3 + np.arange(17, dtype=np.int32) ** 2) % 32
    tokens, targets = rows[:, :-1], rows[:, 1:]
    ones = np.ones_like(tokens)
    batch = Batch(tokens, targets, ones.astype(np.float32), ones, np.cumsum(ones, 1, dtype=np.int32) - 1)
    optimizer = optax.adam(2e-2)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    state = train_state.create(params, optimizer, jax.random.key(1))
    step = make_step(NextToken(), model.apply, optimizer)
    for _ in range(150):
        state, metrics = step(state, batch)
    assert metrics["loss"][0] / metrics["loss"][1] < 0.3


def test_flops_count_the_matrices():
    config = CONFIGS["gru"]
    params = drawn(Transformer(config))
    matrices = sum(p.size for p in jax.tree.leaves(params["blocks"]) if p.ndim > 3) + params["embedding"].size
    assert config.flops(0) == config.flops(100) == 6 * matrices


@pytest.mark.torch
@pytest.mark.filterwarnings("default")  # theirs are not ours to mend
@pytest.mark.parametrize("cell", [LSTM(), GRU()], ids=["lstm", "gru"])
def test_a_cell_is_that_of_torch(cell: Recurrent):
    torch = pytest.importorskip("torch", reason="compares with PyTorch: pip install -e '.[torch]'")
    theirs = getattr(torch.nn, type(cell).__name__)(10, 10, batch_first=True)
    x = np.random.default_rng(0).normal(size=(3, 7, 10)).astype(np.float32)
    with torch.inference_mode():
        expected = theirs(torch.tensor(x))[0].numpy()
    found = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    gates = cell.gates
    params = {
        "input": found["weight_ih_l0"].reshape(gates, 10, 10).transpose(2, 0, 1),
        "input_bias": found["bias_ih_l0"].reshape(gates, 10),
        "recurrent": found["weight_hh_l0"].reshape(gates, 10, 10).transpose(2, 0, 1),
        "recurrent_bias": found["bias_hh_l0"].reshape(gates, 10),
    }
    y, _ = cell.apply({"params": params}, x, None)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", [Mask(causal=False), Mask(prefix=jnp.ones((4, 12), bool))], ids=["both", "prefix"])
def test_what_comes_later_is_not_seen_and_so_refused(mask):
    x, positions = jnp.ones((4, 12, 16)), jnp.zeros((4, 12), jnp.int32)
    with pytest.raises(UserError, match=r"model\.attention: got LSTM, which is causal"):
        LSTM().init(jax.random.key(0), x, positions, mask)


def test_an_encoder_is_refused():
    encoder = Encoder(EncoderConfig(vocab=32, layers=1, width=16, heads=1, attention=GRU()))
    with pytest.raises(UserError, match=r"model\.attention: got GRU, which is causal"):
        encoder.init(jax.random.key(0), TOKENS)


def test_rows_that_a_mesh_cuts_are_refused():
    with sharding.use(MeshConfig(data=4, context=2).make()):
        tokens = sharding.global_array(np.asarray(TOKENS), DEFAULT_RULES)
        model = Transformer(RecurrentConfig(vocab=16, layers=1, width=8), DEFAULT_RULES)
        with pytest.raises(UserError, match=r"mesh\.context: shards sequences, must be 1"):
            model.init(jax.random.key(0), tokens)
