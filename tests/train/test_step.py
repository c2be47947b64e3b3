"""Laws of the training step: accumulation, sharding and averaging change where and when things are computed, not what.

Compiling takes most of the time, so the tests share three programs: the plain step, the accumulated, the sharded.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gptjax import optim
from gptjax.data import Pretrain, Text
from gptjax.distributed import sharding
from gptjax.distributed.parameters import parameter_info
from gptjax.distributed.sharding import DEFAULT_RULES, MeshConfig, ShardingRules
from gptjax.nn import Transformer, TransformerConfig
from gptjax.objectives import NextToken
from gptjax.train import program as programs
from gptjax.train import state as train_state
from gptjax.train.stage import Stage
from gptjax.train.state import State
from gptjax.train.step import make_step
from gptjax.types import Batch

CONFIG = TransformerConfig(vocab=64, layers=2, width=16, heads=4, kv_heads=2)
B, T = 8, 16
RATE, EPS, DECAY = 1e-2, 1e-3, 0.75
OPTIMIZER = optim.AdamW(learning_rate=RATE, schedule=optim.Constant(), weight_decay=0.0, eps=EPS, clip=1.0).build(
    1, parameter_info(Transformer(CONFIG))
)
MESH = MeshConfig(data=2, fsdp=2, tensor=2)

SUM_ERROR = (B * T) ** 0.5 * float(np.finfo(np.float32).eps)
"""Adding up n numbers in another order changes the sum by about sqrt(n) rounding errors (Higham and Mary 2019)."""
STEP_ERROR = RATE / EPS * SUM_ERROR
"""Error of a step. If a gradient is pure rounding error, Adam's m / sqrt(v) may have either sign. A large eps bounds
the slope of that quotient by 1 / eps, and with it the effect of an error in a gradient of (clipped) length 1."""


def random_batch(seed: int = 0) -> Batch:
    """Two documents a row and padding; some rows have many targets that count and some few, of unequal weights."""
    rng = np.random.default_rng(seed)
    ends = rng.integers(2, T + 1, (B, 1))
    places = np.arange(T)[None]
    segments = np.where(places < ends // 2, 1, np.where(places < ends, 2, 0)).astype(np.int32)
    positions = np.where(segments == 2, places - ends // 2, places * (segments == 1)).astype(np.int32)
    weights = (rng.uniform(0, 2, (B, T)) * (segments > 0)).astype(np.float32)
    tokens, targets = rng.integers(0, CONFIG.vocab, (2, B, T), np.int32)
    return Batch(tokens, targets, weights, segments, positions)


def make_state(rules: ShardingRules = ShardingRules()) -> State:
    """The same numbers on any mesh."""
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
    shapes = jax.eval_shape(Transformer(CONFIG, rules).init, jax.random.key(0), tokens)["params"]
    rng = np.random.default_rng(1)

    def place(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        mesh, value = jax.sharding.get_mesh(), rng.normal(0, 0.5, leaf.shape).astype(np.float32)
        return jax.device_put(value, None if mesh.empty else NamedSharding(mesh, leaf.sharding.spec))

    params = jax.tree.map(place, shapes)
    return create(params)


@jax.jit
def create(params) -> State:
    return train_state.create(params, OPTIMIZER, jax.random.key(1), average=True)


@functools.cache
def program(accumulate: int = 1, rules: ShardingRules = ShardingRules()):
    return make_step(NextToken(z_loss=1e-3), Transformer(CONFIG, rules).apply, OPTIMIZER, accumulate, ema=DECAY)


def run(step, batches, rules: ShardingRules = ShardingRules()):
    """The state after these batches, and the metrics of each step, all on the host."""
    state, history = make_state(rules), []
    for batch in batches:
        state, metrics = step(state, sharding.global_array(batch, rules))
        history.append(jax.device_get(metrics))
    return host(state), history


def host(state: State) -> State:
    return jax.device_get(State(state.step, state.params, state.opt_state, jax.random.key_data(state.key), state.ema))


def assert_near(a, b, tolerance: float):
    there = dict(jax.tree_util.tree_leaves_with_path(b))
    for path, x in jax.tree_util.tree_leaves_with_path(a):
        error = np.max(np.abs(x - there[path]))
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error} > {tolerance}"


def assert_metrics_near(a, b, tolerance: float):
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_allclose(other[name], one[name], rtol=tolerance, err_msg=name)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """Also where the parts have very different numbers of counted tokens."""
    batch = random_batch()
    counted = batch.weights.reshape(-1, 4, T).sum((0, 2))
    assert counted.max() > 1.5 * counted.min()
    whole, history = run(program(), [batch])
    parted, parted_history = run(program(accumulate=4), [batch])
    assert_metrics_near(history, parted_history, SUM_ERROR)
    assert_near(whole.opt_state[1].mu, parted.opt_state[1].mu, 0.1 * SUM_ERROR)  # (1 - b1) x the clipped gradient
    assert_near(whole.params, parted.params, STEP_ERROR)


def test_an_evaluation_is_split_like_the_step():
    """The same metrics, from temporaries that shrink with the number of microbatches."""
    params, batch, metrics, temporaries = make_state().params, random_batch(), [], []
    for accumulate in (1, 4):
        data = Pretrain(Text("unread"), length=T, batch=B)
        stage = Stage(data, NextToken(z_loss=1e-3), optim.AdamW(learning_rate=RATE), steps=1, accumulate=accumulate)
        evaluate = programs.program(stage, Transformer(CONFIG)).evaluate.lower(params, batch).compile()
        metrics.append(jax.device_get(evaluate(params, batch)))
        temporaries.append(evaluate.memory_analysis().temp_size_in_bytes)
    assert_metrics_near(metrics[:1], metrics[1:], SUM_ERROR)
    assert temporaries[1] < 0.5 * temporaries[0]


def test_a_mesh_changes_nothing():
    batches = [random_batch(seed) for seed in range(5)]
    alone, history = run(program(), batches)
    with sharding.use(MESH.make()):
        sharded, sharded_history = run(program(2, DEFAULT_RULES), batches, DEFAULT_RULES)
    assert_metrics_near(history, sharded_history, len(batches) * SUM_ERROR)
    assert_near(alone.params, sharded.params, len(batches) * STEP_ERROR)
    assert_near(alone.ema, sharded.ema, len(batches) * STEP_ERROR)
    before = jax.device_get(make_state().params)
    moved = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), before, alone.params)
    assert min(jax.tree.leaves(moved)) > 10 * len(batches) * STEP_ERROR


def test_parameters_and_moments_stay_shared_out_as_declared():
    with sharding.use(MESH.make()):
        state, _ = program(2, DEFAULT_RULES)(
            make_state(DEFAULT_RULES), sharding.global_array(random_batch(), DEFAULT_RULES)
        )
        for tree in (state.params, state.ema, state.opt_state[1].mu, state.opt_state[1].nu):
            up = tree["blocks"]["mlp"]["up"]  # [L, D, F]
            assert up.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
            assert up.addressable_shards[0].data.size == up.size // 4


def test_average_follows_its_formula():
    step, state = program(), make_state()
    expected = jax.device_get(state.ema)
    for seed in range(3):
        state, _ = step(state, random_batch(seed))
        expected = jax.tree.map(lambda a, p: DECAY * a + (1 - DECAY) * np.asarray(p), expected, state.params)
    assert_near(expected, jax.device_get(state.ema), 3 * 2 * float(np.finfo(np.float32).eps))  # numbers below 1
    assert np.abs(state.params["embedding"] - state.ema["embedding"]).max() > RATE / 10


def test_the_state_passed_in_is_donated():
    state = make_state()
    after, _ = program()(state, random_batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert int(after.step) == 1


@pytest.mark.sampled
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_batch_where_nothing_counts_changes_nothing(accumulate):
    batch = random_batch()
    nothing = Batch(batch.tokens, batch.targets, np.zeros_like(batch.weights), batch.segments, batch.positions)
    before = host(make_state())
    after, history = run(program(accumulate), [nothing])
    assert_near(before.params, after.params, 0.0)
    assert history[0]["loss"] == (0.0, 0.0)
    assert history[0]["gradient_norm"] == (0.0, 1.0)


def test_randomness_depends_on_the_key_the_step_and_the_part_alone():
    def objective(apply, params, batch, key):
        return {"loss": (params * jax.random.uniform(key), jnp.ones(()))}  # the gradient is the random number

    def drawn(seed: int, step: int, accumulate: int = 1) -> float:
        state = State(jnp.int32(step), jnp.zeros(()), optax.sgd(1.0).init(jnp.zeros(())), jax.random.key(seed))
        after, _ = make_step(objective, None, optax.sgd(1.0), accumulate)(state, random_batch())
        return -float(after.params)

    assert drawn(0, 0) == drawn(0, 0)
    assert len({drawn(0, 0), drawn(0, 1), drawn(1, 0), drawn(0, 0, accumulate=2)}) == 4


def test_one_batch_can_be_learned_by_heart():
    text = np.random.default_rng(0).integers(0, CONFIG.vocab, (B, T + 1), np.int32)
    text[:, 0] = np.arange(B)  # the rows begin differently, so that nothing is left to chance
    ones = np.ones((B, T), np.int32)
    batch = Batch(text[:, :-1], text[:, 1:], ones.astype(np.float32), ones, ones * np.arange(T, dtype=np.int32))
    _, history = run(program(), [batch] * 300)
    total, weight = history[-1]["cross_entropy"]
    assert total / weight < 0.05


@pytest.mark.alone
def test_compile_time_does_not_grow_with_depth():
    """By the size of the program, which the compiler's time depends on."""

    def size(layers: int) -> int:
        model = Transformer(TransformerConfig(vocab=64, layers=layers, width=16, heads=4, dropout=0.1))
        shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((B, T), jnp.int32))["params"]
        state = jax.eval_shape(lambda params: train_state.create(params, OPTIMIZER, jax.random.key(1), True), shapes)
        step = make_step(NextToken(), model.apply, OPTIMIZER, accumulate=2, ema=DECAY)
        return len(step.lower(state, random_batch()).as_text())

    assert size(48) <= 1.3 * size(4)
