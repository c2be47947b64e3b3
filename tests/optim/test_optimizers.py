"""Schedules, optimizers and decay masks: against their equations, and sharded against unsharded."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.distributed.parameters import ParamInfo, flat, nested, parameter_info
from gptjax.distributed.sharding import DEFAULT_RULES, MeshConfig, ShardingRules, use
from gptjax.nn import LayerNorm, LearnedPositions, Transformer, TransformerConfig
from gptjax.optim import (
    Adafactor,
    AdamW,
    Constant,
    Cosine,
    Linear,
    Lion,
    Muon,
    NorMuon,
    Optimizer,
    Schedule,
    WarmupStableDecay,
)
from gptjax.types import UserError

MODEL = TransformerConfig(
    vocab=16, layers=2, width=8, heads=4, kv_heads=2, hidden=16, positions=LearnedPositions(8), tie_embeddings=False
)  # fmt: skip


def shapes(rules: ShardingRules = ShardingRules(), **changes):
    """The shapes and shardings of a real parameter tree."""
    model = Transformer(dataclasses.replace(MODEL, **changes), rules)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((4, 8), jnp.int32)))["params"]


def declared(tree):
    """Information on a tree of no model: vectors do not decay, all else does."""
    return jax.tree.map(lambda x: ParamInfo(x.shape, (None,) * x.ndim, decays=x.ndim > 1), tree)


INFO = parameter_info(Transformer(MODEL))


def fill(shapes, seed: int, scale: float = 0.1):
    """The same numbers for the same seed, wherever they lie."""
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    values = [rng.normal(0, scale, leaf.shape).astype(np.float32) for leaf in leaves]
    if jax.sharding.get_mesh().empty:
        return tree.unflatten(jnp.asarray(x) for x in values)
    shardings = [jax.NamedSharding(jax.sharding.get_mesh(), leaf.sharding.spec) for leaf in leaves]
    return tree.unflatten(jax.device_put(values, shardings))


def run(optimizer: Optimizer, info, params, gradients, steps: int = 10):
    """The parameters after one step for each of the gradients."""
    transformation = optimizer.build(steps, info)
    state = jax.jit(transformation.init)(params)

    @jax.jit
    def step(params, state, gradient):
        updates, state = transformation.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for gradient in gradients:
        params, state = step(params, state, gradient)
    return params


@pytest.mark.parametrize(
    ("schedule", "after"),
    [
        (Constant(10), lambda x: 1.0),
        (Linear(10, final_fraction=0.2), lambda x: 1 - 0.8 * x),
        (Cosine(10, final_fraction=0.1), lambda x: 0.1 + 0.9 * (1 + math.cos(math.pi * x)) / 2),
        (Cosine(0, final_fraction=0.0), lambda x: (1 + math.cos(math.pi * x)) / 2),
        # 110 steps in all, the last 22 of them fall; x counts the 100 after the warmup
        (WarmupStableDecay(10, final_fraction=0.5, decay=0.2), lambda x: 1 - 0.5 * max(0, x - 0.78) / 0.22),
        (WarmupStableDecay(10, decay=1.0), lambda x: 1 - x),
    ],
    ids=lambda value: str(value) if isinstance(value, Schedule) else "",
)
def test_schedule_is_its_formula(schedule, after):
    rate = AdamW(learning_rate=0.02, schedule=schedule).learning_rate_schedule(schedule.warmup + 100)
    for step in range(schedule.warmup):
        np.testing.assert_allclose(rate(step), 0.02 * (step + 1) / (schedule.warmup + 1), rtol=1e-5)
    for step in (0, 1, 50, 77, 79, 90, 99, 100, 1000):
        expected = 0.02 * after(min(step, 100) / 100)
        np.testing.assert_allclose(rate(schedule.warmup + step), expected, rtol=1e-4, atol=1e-8)
    assert rate(schedule.warmup + 99) > 0, "no step is wasted"


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Cosine(-1), "optimizer.schedule.warmup: got -1"),
        (lambda: Linear(final_fraction=1.5), "optimizer.schedule.final_fraction: got 1.5"),
        (lambda: WarmupStableDecay(decay=0.0), "optimizer.schedule.decay: got 0.0"),
        (lambda: AdamW(schedule=Cosine(101)).build(100, INFO), "optimizer.schedule.warmup: got 101, .*100 steps"),
        (lambda: AdamW(learning_rate=0.0), "optimizer.learning_rate: got 0.0"),
        (lambda: Lion(weight_decay=-0.1), "optimizer.weight_decay: got -0.1"),
        (lambda: Adafactor(clip=0.0), "optimizer.clip: got 0.0"),
        (lambda: AdamW(b2=1.0), "optimizer.b2: got 1.0"),
        (lambda: Muon(momentum=math.nan), "optimizer.momentum: got nan"),
        (lambda: Muon(iterations=0), "optimizer.iterations: got 0"),
        (lambda: NorMuon(neuron_decay=1.0), "optimizer.neuron_decay: got 1.0"),
    ],
)
def test_bad_settings_are_named(make, field):
    with pytest.raises(UserError, match=f"^{field}"):
        make()


def test_only_matrices_decay():
    info = parameter_info(Transformer(dataclasses.replace(MODEL, bias=True, norm=LayerNorm())))

    def decayed(optimizer: Optimizer) -> set[str]:
        return {name for name, decays in flat(optimizer.decays(info)).items() if decays}

    attention = {f"blocks/attention/{name}" for name in "qkvo"}
    mlp = {f"blocks/mlp/{name}" for name in ("up", "gate", "down")}
    assert decayed(AdamW()) == attention | mlp | {"head"}
    assert decayed(AdamW(decay_embeddings=True)) == attention | mlp | {"head", "embedding", "positions/table"}


def test_adamw_is_its_equation():
    optimizer = AdamW(
        learning_rate=0.01, schedule=Linear(warmup=1), weight_decay=0.1, clip=1.0, b1=0.9, b2=0.95, eps=1e-3
    )
    tree = {"w": jax.ShapeDtypeStruct((4, 3), jnp.float32), "bias": jax.ShapeDtypeStruct((3,), jnp.float32)}
    start, gradients = fill(tree, 0), [fill(tree, 1, scale=3.0), fill(tree, 2, scale=0.01)]
    got = run(optimizer, declared(tree), start, gradients, steps=5)

    norms = [math.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(g))) for g in gradients]
    assert norms[0] > 1 > norms[1], "one gradient is clipped, one is not"
    for name, decay in {"w": 0.1, "bias": 0.0}.items():
        p, m, v = np.asarray(start[name], np.float64), 0.0, 0.0
        for t, (gradient, norm, rate) in enumerate(zip(gradients, norms, (0.005, 0.01), strict=True), start=1):
            g = np.asarray(gradient[name], np.float64) * min(1, 1 / norm)
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
            p = p - rate * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-3) + decay * p)
        np.testing.assert_allclose(got[name], p, rtol=1e-5)


def test_cautious_decay_shrinks_what_shrinks_anyway():
    """Elements that the direction moves towards zero decay, the others do not; vectors never do."""
    w, d = np.float32([[1, 1], [-1, -1], [2, 0]]), np.float32([[0.5, -0.5], [-0.5, 0.5], [0, 1]])
    tree, gradient = {"w": w, "bias": np.ones(2, np.float32)}, {"w": d, "bias": np.ones(2, np.float32)}
    descent = Descent(learning_rate=0.1, schedule=Constant(), weight_decay=0.3, clip=None, cautious_decay=True)
    got = run(descent, declared(tree), tree, [gradient])
    decayed = np.float32([[1, 0], [1, 0], [0, 0]])
    np.testing.assert_allclose(got["w"], w - 0.1 * (d + 0.3 * w * decayed), rtol=1e-6)
    np.testing.assert_allclose(got["bias"], [0.9, 0.9], rtol=1e-6)


@dataclasses.dataclass(frozen=True)
class Descent(Optimizer):
    """A new optimizer: all that is needed to add one."""

    def update_transform(self, info) -> optax.GradientTransformation:
        return optax.identity()


@pytest.mark.parametrize(("norm", "clip", "expected"), [(5, 2.0, 2), (1, 2.0, 1), (5, None, 5), (0, 2.0, 0)])
def test_gradients_are_clipped_by_global_norm(norm, clip, expected):
    gradient = {"a": jnp.array([0.6, 0.0]) * norm, "b": jnp.array([[0.8]]) * norm}
    zeros = jax.tree.map(jnp.zeros_like, gradient)
    descent = Descent(learning_rate=1.0, schedule=Constant(), weight_decay=0.0, clip=clip)
    params = run(descent, declared(zeros), zeros, [gradient])
    np.testing.assert_allclose(params["a"], [-0.6 * expected, 0], rtol=1e-6)
    np.testing.assert_allclose(params["b"], [[-0.8 * expected]], rtol=1e-6)


def test_muon_orthogonalises_the_matrices_of_each_layer():
    """With U S V' the decomposition of a layer's matrix, heads merged, the update is 0.2 sqrt(longer side) U p(S) V',
    where p is five rounds of the quintic that pushes singular values towards 1. The rest is Adam's."""
    optimizer = Muon(learning_rate=1.0, schedule=Constant(), weight_decay=0.0)
    gradient = fill(shapes(), 0)
    zeros = jax.tree.map(jnp.zeros_like, gradient)
    update = jax.tree.map(np.asarray, run(optimizer, INFO, zeros, [gradient]))

    D, F = MODEL.width, 16
    sides = {"q": (D, 8), "k": (D, 4), "v": (D, 4), "o": (8, D), "up": (D, F), "gate": (D, F), "down": (F, D)}
    for name, (inputs, outputs) in sides.items():
        part = "attention" if name in "qkvo" else "mlp"
        matrices = np.asarray(gradient["blocks"][part][name], np.float64).reshape(2, inputs, outputs)
        for layer, matrix in enumerate(matrices):
            u, s, v = np.linalg.svd(matrix, full_matrices=False)
            s /= np.linalg.norm(s)
            for _ in range(5):
                s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
            expected = -0.2 * math.sqrt(max(inputs, outputs)) * (u * s) @ v
            got = update["blocks"][part][name][layer].reshape(inputs, outputs)
            np.testing.assert_allclose(got, expected, atol=1e-4, err_msg=name)
    adam = run(AdamW(learning_rate=1.0, schedule=Constant(), weight_decay=0.0), INFO, zeros, [gradient])
    for name in ("embedding", "head", "norm", "positions"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), update[name], adam[name])


def test_normuon_evens_out_the_neurons_of_muon():
    """Two steps: Muon's update over the root of the moving mean square of each output, and 0.2 of it per matrix."""
    names = ("blocks/attention/k", "blocks/attention/o", "blocks/mlp/down", "norm/scale")
    tree, info = (nested({name: flat(tree)[name] for name in names}) for tree in (shapes(), INFO))
    gradients = [fill(tree, 0), fill(tree, 1)]
    options = {"learning_rate": 1.0, "schedule": Constant(), "weight_decay": 0.0}

    def updates(optimizer):
        transform = optimizer.build(2, info)
        state, found = transform.init(gradients[0]), []
        for gradient in gradients:
            update, state = jax.jit(transform.update)(gradient, state, gradient)
            found.append({name: np.asarray(leaf, np.float64) for name, leaf in flat(update).items()})
        return found

    muon, normuon = updates(Muon(**options)), updates(NorMuon(**options, neuron_decay=0.9))
    inputs = {"blocks/attention/k": (1,), "blocks/attention/o": (1, 2), "blocks/mlp/down": (1,)}
    for name, axes in inputs.items():
        v = 0.0
        for u, got in zip(muon, normuon, strict=True):
            v = 0.9 * v + 0.1 * np.square(u[name]).mean(axes, keepdims=True)
            even = u[name] / np.sqrt(v)
            for layer in range(2):
                expected = 0.2 * even[layer] / np.sqrt(np.square(even[layer]).mean())
                np.testing.assert_allclose(got[name][layer], expected, rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(muon[1]["norm/scale"], normuon[1]["norm/scale"])


def test_adafactor_treats_stacked_layers_as_parameters_of_their_own():
    """As deep a stack as there is, and two of different depths."""
    single = {"up": ParamInfo((4, 5), ("embed", "ffn"), "matrix"), "scale": ParamInfo((4,), (None,))}
    stacks = {"encoder": 2, "decoder": 3}
    info = {name: jax.tree.map(lambda i: i.stack(depth), single) for name, depth in stacks.items()}  # noqa: B023
    tree = jax.tree.map(lambda i: jax.ShapeDtypeStruct(i.shape, jnp.float32), info)
    optimizer = Adafactor(schedule=Constant(), factor_from=4, clip=None)
    start, gradients = fill(tree, 0), [fill(tree, 1), fill(tree, 2)]
    got = run(optimizer, info, start, gradients)
    for name, depth in stacks.items():
        for layer in range(depth):
            trees = start[name], [gradient[name] for gradient in gradients], got[name]
            own, own_gradients, expected = jax.tree.map(lambda x: x[layer], trees)  # noqa: B023
            alone = run(optimizer, single, own, own_gradients)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), alone, expected)


@pytest.mark.parametrize(
    "optimizer",
    [
        AdamW(learning_rate=0.1),
        Lion(learning_rate=0.1),
        Adafactor(learning_rate=0.1, factor_from=4),
        Muon(learning_rate=0.1),
        NorMuon(learning_rate=0.1, cautious_decay=True),
    ],
    ids=lambda optimizer: type(optimizer).__name__,
)  # fmt: skip
def test_sharded_is_unsharded(optimizer):
    """Two steps, the second with a gradient short enough not to be clipped, on data 2 x fsdp 2 x tensor 2."""

    def two_steps(rules):
        # one of each kind of parameter: to compile less
        names = ("embedding", "blocks/attention/q", "blocks/attention/o", "blocks/mlp/up", "blocks/norm_1/scale")
        tree, info = (nested({name: flat(tree)[name] for name in names}) for tree in (shapes(rules), INFO))
        return jax.device_get(run(optimizer, info, fill(tree, 0), [fill(tree, 1), fill(tree, 2, scale=1e-3)]))

    alone = two_steps(ShardingRules())
    with use(MeshConfig(data=2, fsdp=2, tensor=2).make()):
        sharded = two_steps(DEFAULT_RULES)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), alone, sharded)
