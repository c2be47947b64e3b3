"""Laws of the adapters: against the equations, trained alone, and the same on any mesh."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from jax.sharding import NamedSharding

from gptjax import optim
from gptjax.distributed import sharding
from gptjax.distributed.parameters import flat, parameter_info
from gptjax.distributed.sharding import DEFAULT_RULES, MeshConfig, ShardingRules
from gptjax.kernels.quantised import QuantisedArray
from gptjax.nn import (
    DoRA,
    LayerOverrides,
    LoRA,
    MixtureOfExperts,
    MultiHeadLatentAttention,
    RecurrentConfig,
    Transformer,
    TransformerConfig,
    count,
)
from gptjax.objectives import NextToken
from gptjax.train import state as train_state
from gptjax.train.step import make_step
from gptjax.types import Batch, UserError

CONFIG = TransformerConfig(vocab=64, layers=2, width=16, heads=4, kv_heads=2)
ALL = ("q", "k", "v", "o", "gate", "up", "down")
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab, (8, 16), np.int32)
EPS = float(np.finfo(np.float32).eps)


def initial(lora: LoRA, params, info):
    """New adapters, in one program."""
    return jax.jit(functools.partial(lora.init, info=info))(jax.random.key(1), params)


def make(lora: LoRA, config: TransformerConfig = CONFIG, b: float = 0.0):
    """Parameters and adapters to them, the adapters' B normal with this deviation."""
    params = jax.jit(Transformer(config).init)(jax.random.key(0), TOKENS[:1])["params"]
    adapters = initial(lora, params, parameter_info(Transformer(config)))
    rng = np.random.default_rng(2)

    def draw(path, x):
        return x + np.float32(b * rng.normal(size=x.shape)) if path[-1].key == "b" else np.asarray(x)

    return params, jax.tree_util.tree_map_with_path(draw, adapters)


@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_new_adapters_change_nothing(kind):
    pattern = TransformerConfig(64, 3, 16, 4, pattern=(LayerOverrides(window=4), LayerOverrides()))
    for config in (CONFIG, pattern):
        lora = kind(rank=2, match=ALL)
        params, adapters = make(lora, config)
        merged = jax.jit(lora.merge)(params, adapters)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2 * EPS), merged, params)
    a = adapters["blocks"]["0"]["attention"]["q"]["a"]
    assert np.all(np.abs(a) <= 16**-0.5)
    assert a.std() > 0.4 * 16**-0.5


def test_layers_get_adapters_of_their_own():
    _, adapters = make(LoRA(match=("attention/q", "attention/v")))
    a = adapters["blocks"]["attention"]["q"]["a"]
    assert a.shape == (2, 16, 8)
    assert not np.allclose(a[0], a[1])
    assert jax.tree.map(jnp.shape, adapters) == {
        "blocks": {"attention": {"q": {"a": (2, 16, 8), "b": (2, 8, 4, 4)}, "v": {"a": (2, 16, 8), "b": (2, 8, 2, 4)}}}
    }


@pytest.mark.parametrize(("stabilised", "scale"), [(False, 4 / 2), (True, 4 / 2**0.5)])
def test_merging_is_the_path_beside(stabilised, scale):
    """x W + scale (x A) B."""
    lora = LoRA(rank=2, alpha=4, match=ALL, rank_stabilised=stabilised)
    params, adapters = make(lora, b=0.3)
    merged = jax.jit(lora.merge)(params, adapters)
    for part in ("attention", "mlp"):
        for name, w in params["blocks"][part].items():
            inputs = 2 if name == "o" else 1
            size = int(np.prod(w.shape[1 : 1 + inputs])), int(np.prod(w.shape[1 + inputs :]))
            adapter = adapters["blocks"][part][name]
            new = merged["blocks"][part][name]
            x = np.random.default_rng(3).normal(size=(5, size[0]))
            for layer in range(CONFIG.layers):
                W, new_W = (np.float64(w[layer]).reshape(size) for w in (w, new))
                A = np.float64(adapter["a"][layer]).reshape(size[0], 2)
                B = np.float64(adapter["b"][layer]).reshape(2, size[1])
                np.testing.assert_allclose(x @ new_W, x @ W + scale * (x @ A) @ B, atol=100 * EPS)
    np.testing.assert_array_equal(merged["embedding"], params["embedding"])


LATENT = MultiHeadLatentAttention(q_rank=8, kv_rank=8, rope_size=4, value_size=8)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("lora", "config"),
    [
        (LoRA(rank=2), CONFIG),
        (DoRA(rank=2), TransformerConfig(64, 1, 16, 2, attention=LATENT)),
        (DoRA(rank=2, bits=4, group=8), TransformerConfig(64, 1, 16, 2, mlp=MixtureOfExperts(4, shared=1))),
        (LoRA(rank=2, bits=4, group=8), RecurrentConfig(64, 1, 16)),
    ],
    ids=["heads", "latent", "experts", "recurrent"],
)
def test_attached_adapters_are_the_merged_model(lora, config):
    """Loss and gradient, for every matrix of a model. Sums of n products have a rounding error of about sqrt(n) EPS."""
    model = config.build()
    info = parameter_info(model)
    params = jax.jit(functools.partial(lora.freeze, info=info))(drawn(model, TOKENS[:1]))
    normal = np.random.default_rng(1).normal
    adapters = jax.tree.map(lambda x: x + np.float32(0.1 * normal(size=x.shape)), initial(lora, params, info))

    def loss(adapters, join):
        logits = model.apply({"params": join(params, adapters)}, TOKENS)[0]
        return jnp.mean(jnp.square(jax.nn.log_softmax(logits)[..., 0]))

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    (got, grads), (want, expected) = gradient(adapters, lora.attach), gradient(adapters, lora.merge)
    assert got == pytest.approx(want, rel=100 * EPS)
    largest = max(float(np.abs(g).max()) for g in jax.tree.leaves(expected))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=100 * EPS * largest)
    jax.tree.map(close, grads, expected)


def test_a_step_costs_two_thirds_of_training_the_matrices():
    """No gradient of a frozen matrix is computed, by the compiler's count, and no memory is taken for it: parameters,
    gradients and two moments are four copies of a matrix."""
    config = TransformerConfig(vocab=64, layers=2, width=256, heads=4)
    (flops, _), (low_rank, _) = costs(config)
    assert low_rank < 0.7 * flops
    (_, memory), (_, low_rank) = costs(dataclasses.replace(config, layers=13, remat="nothing_saveable"))
    assert low_rank < 0.4 * memory


def costs(config: TransformerConfig) -> list[tuple[float, int]]:
    """FLOPs and peak memory of a step of all parameters, and of adapters of rank 4."""
    model, ones, found = Transformer(config), jnp.ones_like(TOKENS), []
    info, lora = parameter_info(model), LoRA(rank=4)
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    adapters = jax.eval_shape(functools.partial(lora.init, info=info), jax.random.key(0), params)
    batch = Batch(TOKENS, TOKENS, ones.astype(jnp.float32), ones, ones)
    whole = NextToken(), params, info
    for objective, trained, of, *frozen in (whole, (lora.objective(NextToken()), adapters, lora.info(info), params)):
        optimizer = OPTIMIZER.build(1, of)
        state = jax.eval_shape(
            functools.partial(train_state.create, optimizer=optimizer, key=jax.random.key(0)), trained
        )
        step = make_step(objective, model.apply, optimizer).lower(state, batch, *frozen).compile()
        memory = step.memory_analysis()
        peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        found.append((step.cost_analysis()["flops"], peak))
    return found


def test_a_quantised_base_takes_an_eighth_of_the_memory():
    """Matrices of 4 bits with a scale of float32 per 64 inputs; embeddings and norms as they were."""
    model, lora = Transformer(TransformerConfig(64, 2, 64, 2, hidden=128)), LoRA(bits=4)
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    frozen = jax.eval_shape(functools.partial(lora.freeze, info=parameter_info(model)), params)
    names = [name for name, x in flat(frozen).items() if isinstance(x, QuantisedArray)]
    assert sorted(names) == sorted(name for name, i in flat(parameter_info(model)).items() if i.is_matrix)

    def size(tree):
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    assert size([flat(frozen)[name] for name in names]) == size([flat(params)[name] for name in names]) * (4 + 0.5) / 32


@pytest.mark.slow
def test_a_quantised_base_is_alike_on_a_mesh():
    lora = LoRA(rank=2, match=ALL, bits=4, group=8)
    _, losses = train(lora, steps=2)
    with sharding.use(MeshConfig(data=2, fsdp=2, tensor=2).make()):
        _, same = train(lora, DEFAULT_RULES, steps=2)
    np.testing.assert_allclose(same, losses, rtol=1e-5)


def test_dora_is_magnitude_times_direction():
    """Equation 5, and the gradient of section 4.3, which takes the norm for a constant."""
    dora = DoRA(rank=2, alpha=4, match=("o", "q"))
    params, adapters = make(dora, b=0.3)
    w, adapter = params["blocks"]["attention"]["o"], adapters["blocks"]["attention"]["o"]
    adapter["magnitude"] = adapter["magnitude"] * 1.5
    v = np.reshape(w, (2, 16, 16)) + 2 * np.reshape(adapter["a"], (2, 16, 2)) @ adapter["b"]
    norm = np.linalg.norm(v, axis=1, keepdims=True)
    magnitude = 1.5 * np.linalg.norm(np.reshape(w, (2, 16, 16)), axis=1, keepdims=True)

    def merged(adapter):
        tree = {"blocks": {"attention": {**adapters["blocks"]["attention"], "o": adapter}}}
        return jnp.reshape(dora.merge(params, tree)["blocks"]["attention"]["o"], (2, 16, 16))

    np.testing.assert_allclose(merged(adapter), magnitude * v / norm, rtol=1e-5, atol=1e-6)
    grad = np.random.default_rng(4).normal(size=(2, 16, 16)).astype(np.float32)
    _, pull = jax.vjp(merged, adapter)
    got = pull(jnp.asarray(grad))[0]
    np.testing.assert_allclose(got["magnitude"], np.sum(grad * v / norm, 1), rtol=1e-5, atol=1e-5)
    b = 2 * np.reshape(adapter["a"], (2, 16, 2)).swapaxes(1, 2) @ (magnitude / norm * grad)
    np.testing.assert_allclose(got["b"], b, rtol=1e-4, atol=1e-5)


OPTIMIZER = optim.AdamW(learning_rate=3e-2, schedule=optim.Constant(), eps=1e-3)


def train(lora: LoRA, rules: ShardingRules = ShardingRules(), steps: int = 3):
    """The state after a few steps on one batch, the frozen parameters, the losses."""
    model = Transformer(CONFIG, rules)
    start, new = jax.device_get(make(lora))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.asarray(TOKENS)))["params"]

    def place(x, shape):
        mesh = jax.sharding.get_mesh()
        return jax.device_put(x, None if mesh.empty else NamedSharding(mesh, shape.sharding.spec))

    params = jax.tree.map(place, start, shapes)
    info = parameter_info(model)
    params = jax.jit(functools.partial(lora.freeze, info=info))(params)
    adapters = jax.tree.map(
        place, new, jax.eval_shape(functools.partial(lora.init, info=info), jax.random.key(1), params)
    )
    optimizer = OPTIMIZER.build(steps, lora.info(info))
    state = jax.jit(lambda adapters: train_state.create(adapters, optimizer, jax.random.key(2)))(adapters)
    step = make_step(lora.objective(NextToken()), model.apply, optimizer, accumulate=2)
    ones = np.ones_like(TOKENS)
    batch = Batch(TOKENS, np.roll(TOKENS, -1, 1), ones.astype(np.float32), ones, np.cumsum(ones, 1, np.int32) - 1)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, sharding.global_array(batch, rules), params)
        total, weight = jax.device_get(metrics["loss"])
        losses.append(total / weight)
    if lora.bits is None:
        assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(start), strict=True))
    return state, losses


@pytest.mark.alone
def test_adapters_alone_are_trained_and_alike_on_a_mesh():
    dora = DoRA(rank=2, match=ALL)  # its program holds LoRA's
    state, losses = train(dora)
    _, adapters = make(dora)
    assert losses == sorted(losses, reverse=True)
    assert losses[2] < losses[0] - 1e-3
    assert count(state.opt_state) <= 2 * count(adapters) + 2, "no optimizer state for what is frozen"
    assert jax.tree.all(jax.tree.map(lambda a, b: not np.allclose(a, b), state.params, adapters))
    with sharding.use(MeshConfig(data=2, fsdp=2, tensor=2).make()):
        spread, same = train(dora, DEFAULT_RULES)
    q, down = (spread.params["blocks"][part][name] for part, name in (("attention", "q"), ("mlp", "down")))
    assert q["a"].sharding.spec == jax.P(None, "fsdp", None)
    assert q["b"].sharding.spec == jax.P(None, None, "tensor", None)
    assert q["magnitude"].sharding.spec == jax.P(None, "tensor", None)
    assert down["a"].sharding.spec == jax.P(None, "tensor", None)
    np.testing.assert_allclose(same, losses, rtol=1e-5)


@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_a_base_in_half_precision_is_rounded_once(kind):
    lora = kind(rank=2, match=ALL)
    params, adapters = make(lora, b=0.3)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    merged = lora.merge(half, adapters)
    exact = lora.merge(jax.tree.map(lambda x: x.astype(jnp.float32), half), adapters)
    jax.tree.map(np.testing.assert_array_equal, merged, jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact))


def test_what_is_not_there_is_refused():
    info = parameter_info(Transformer(CONFIG))
    with pytest.raises(UserError, match=r"lora.match: got 'attention/z', .*must be of attention/k, attention/o"):
        LoRA(match=("q", "attention/z")).info(info)
    with pytest.raises(UserError, match=r"lora.match: got 'embedding'"):
        LoRA(match=("embedding",)).info(info)
    params, adapters = make(LoRA())
    with pytest.raises(UserError, match=r"adapters: got layers, must be of blocks, embedding, norm"):
        LoRA().merge(params, {"layers": adapters["blocks"]})
    with pytest.raises(UserError, match=r"lora.rank: got 0"):
        LoRA(rank=0)
    with pytest.raises(UserError, match=r"lora.bits: got 3, must be 8, 4 or None"):
        LoRA(bits=3)
    with pytest.raises(UserError, match=r"lora.group: got 7, must be even"):
        LoRA(bits=4, group=7)
