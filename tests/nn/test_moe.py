"""Mixture of experts: however dispatched, it is the plain sum over experts; and routers do as their papers say."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import optim
from gptjax.distributed import sharding
from gptjax.distributed.parameters import parameter_info
from gptjax.distributed.sharding import DEFAULT_RULES, MeshConfig, ShardingRules
from gptjax.kernels import experts as kernel
from gptjax.nn import GELU, ClampedSwiGLU, MixtureOfExperts, Router, Sigmoid, Softmax, SwiGLU
from gptjax.train import state as train_state
from gptjax.train.step import make_step
from gptjax.types import UserError

D, F = 16, 24
X = jax.random.normal(jax.random.key(0), (4, 16, D))
# float32 sums of at most 3 x 24 products of numbers of size 1, through three layers
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that a few rows make many blocks, of both sizes."""
    monkeypatch.setattr(kernel, "BLOCKS", (16, 4))


def parameters(part: MixtureOfExperts, bias: bool = False):
    """Everything of size 1 or so: the router too, so that experts are used unequally and gates differ."""
    shapes = jax.eval_shape(lambda: part.init(jax.random.key(1), X, F, bias))["params"]
    random, scales = np.random.default_rng(2), {"router_balance": 0.0}
    draw = lambda name, shape: jnp.asarray(scales.get(name, 0.3) * random.normal(size=shape), jnp.float32)  # noqa: E731
    return {name: draw(name, leaf.shape) for name, leaf in shapes.items()}


@functools.partial(jax.jit, static_argnums=(0, 3))
def run(part: MixtureOfExperts, params, x=X, rules: ShardingRules = ShardingRules()):
    bias = any(name.endswith("down_bias") for name in params)
    return part.module(rules).apply({"params": params}, x, F, bias, rngs={"dropout": jax.random.key(0)})


@functools.partial(jax.jit, static_argnums=0)
def reference(part: MixtureOfExperts, params, x=X):
    """sum_e g_e expert_e(x), every expert on every token."""
    logits = x @ params["router_logits"] + params.get("router_bias", 0.0)
    scores = part.router.scores(logits)
    kth = jnp.sort(scores, -1)[..., -part.top_k, None]
    gates = jnp.where(scores >= kth, scores, 0)
    if part.router.renormalise:
        gates = gates / gates.sum(-1, keepdims=True)

    def dense(params, x):
        names = ("gate", "up") if part.gated else ("up",)
        h = part.expert.inner(*(x @ params[name] + params.get(f"{name}_bias", 0.0) for name in names))
        return h @ params["down"] + params.get("down_bias", 0.0)

    def own(e):
        return {name: leaf[e] for name, leaf in params.items() if not name.startswith(("router_", "shared_"))}

    y = sum(part.router.scale * gates[..., e, None] * dense(own(e), x) for e in range(part.experts))
    if part.shared:
        y = y + dense({k.removeprefix("shared_"): v for k, v in params.items() if k.startswith("shared_")}, x)
    return y


def value_and_gradient(f, *args):
    """f's value, and the gradient of some scalar of it."""

    def loss(*args):
        y = f(*args)
        return jnp.sum(jnp.sin(y)), y

    (_, y), gradient = jax.jit(jax.value_and_grad(loss, tuple(range(len(args))), has_aux=True))(*args)
    return y, gradient


def assert_close(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), jax.device_get(got), jax.device_get(expected))


PARTS = {
    "mixtral": (MixtureOfExperts(), False),
    "olmoe": (MixtureOfExperts(router=Softmax(renormalise=False, scale=2.0), top_k=3), False),
    "gpt-oss": (MixtureOfExperts(expert=ClampedSwiGLU(limit=0.5), router=Softmax(bias=True)), True),
    "deepseek": (MixtureOfExperts(router=Sigmoid(scale=2.5), shared=2), False),
    "dense experts": (MixtureOfExperts(experts=4, top_k=1, expert=GELU()), True),
}
HOW = {"blocks": {}, "tiled": {"implementation": "tiled"}, "capacity": {"capacity": 8.0}}


@pytest.fixture(params=PARTS, scope="module")
def part_and_sum(request):
    """A part, whether it has biases, and the sum over its experts with its gradient."""
    part, bias = PARTS[request.param]
    return part, bias, value_and_gradient(functools.partial(reference, part), parameters(part, bias), X)


@pytest.mark.sampled
@pytest.mark.parametrize("how", HOW)
def test_it_is_the_sum_over_experts(part_and_sum, how):
    part, bias, expected = part_and_sum
    got = value_and_gradient(functools.partial(run, dataclasses.replace(part, **HOW[how])), parameters(part, bias), X)
    assert_close(got, expected)


RULES = {
    "standard": DEFAULT_RULES,
    "experts on tensor": dataclasses.replace(DEFAULT_RULES, experts="tensor"),
    "experts on fsdp": dataclasses.replace(DEFAULT_RULES, experts="fsdp"),
    "experts on two": ShardingRules(batch=("data", "fsdp"), experts=("fsdp", "tensor")),
}
OTHER_RULES = [rules for rules in RULES if rules != "standard"]


def with_excess(part, params, x, rules=ShardingRules()):
    """Output and gradient, and the excess load of the experts."""

    def loss(params, x):
        apply = functools.partial(part.module(rules).apply, mutable=["updates"], rngs={"dropout": jax.random.key(0)})
        y, found = apply({"params": params}, x, F, True)
        return jnp.sum(jnp.sin(y)), (y, found["updates"]["router_balance"].excess)

    (_, (y, excess)), gradient = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)
    return (y, gradient), excess


@functools.cache
def alone(how):
    """A part, its parameters, and what it computes on one device."""
    part = MixtureOfExperts(router=Sigmoid(groups=4, top_groups=2, load_balance=0.1), shared=1, **HOW[how])
    params = parameters(part, bias=True)
    return part, params, *with_excess(part, params, X)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("rules", "how"),
    [("standard", how) for how in HOW]
    + [(rules, "blocks") for rules in OTHER_RULES]
    + [pytest.param(rules, how, marks=pytest.mark.slow) for rules in OTHER_RULES for how in HOW if how != "blocks"],
)
def test_a_mesh_changes_nothing(rules, how):
    part, params, expected, loads = alone(how)
    rules = RULES[rules]
    with sharding.use(MeshConfig(data=2, fsdp=2, tensor=2).make()):
        x = sharding.global_array(X, rules)
        layer = part.module(rules)
        shapes = jax.eval_shape(lambda: layer.init(jax.random.key(1), x, F, True))["params"]
        mesh = jax.sharding.get_mesh()
        place = lambda p, s: jax.device_put(p, jax.NamedSharding(mesh, s.sharding.spec))  # noqa: E731
        params = jax.tree.map(place, params, shapes)
        assert jax.P(params["up"].sharding.spec[0]) == rules("experts")
        got, found = with_excess(part, params, x, rules)
        np.testing.assert_array_equal(found, loads)
    assert np.any(loads)
    assert_close(got, expected)


@pytest.mark.parametrize("implementation", ["blocks", "ragged", "tiled"])
@pytest.mark.parametrize("sizes", [[5, 0, 19, 8], [0, 0, 36, 0], [3, 2, 1, 0], [0, 0, 0, 0]])
def test_grouped_products(sizes, implementation):
    """Groups with no rows, some rows and many rows, and rows outside all groups."""
    random = np.random.default_rng(0)
    x, w = random.normal(size=(40, 6)).astype("f4"), random.normal(size=(4, 6, 7)).astype("f4")
    got = grouped(implementation)(x, w, jnp.array(sizes))

    rows = np.concatenate([np.repeat(np.eye(4), sizes, axis=0), np.zeros((40 - sum(sizes), 4))])
    y = np.einsum("re,rd,edf->rf", rows, x, w)
    expected = np.einsum("re,rf,edf->rd", rows, np.cos(y), w), np.einsum("re,rd,rf->edf", rows, x, np.cos(y))
    assert_close(got, (y, expected))


@functools.cache
def grouped(implementation):
    """One program for all sizes: the product, and the gradient of the sum of its sine."""
    dot = functools.partial(kernel.grouped_dot, implementation=implementation)
    return jax.jit(lambda x, w, sizes: value_and_gradient(lambda x, w: dot(x, w, sizes), x, w))


@pytest.mark.sampled
@pytest.mark.parametrize("capacity", [None, 0.6])
@pytest.mark.parametrize("rules", [None, "standard", "experts on tensor"])
def test_padding_is_no_token(rules, capacity):
    """In sequences, and in sequences of nothing else: outputs, losses, loads and gradients are of the tokens alone."""
    capacity = capacity if rules is None else capacity and 8.0  # on a mesh it is a share of a device's own tokens
    router = Softmax(load_balance=0.1, z_loss=0.1, balance_bias=True)
    part = MixtureOfExperts(experts=4, router=router, shared=1, capacity=capacity)
    params, mask = parameters(part), jnp.arange(16) < jnp.array([16, 9, 0, 0])[:, None]
    tokens = X.reshape(1, 64, D)[:, np.flatnonzero(mask)]

    def figures(params, x, mask, rules=ShardingRules()):
        """Everything that a step reads of a call, and the gradient of all of it."""

        def loss(params, x):
            apply = functools.partial(part.module(rules).apply, mutable=["losses", "updates"])
            y, found = apply({"params": params}, x, F, mask=mask, rngs={"dropout": jax.random.key(0)})
            y = y if mask is None else jnp.where(mask[..., None], y, 0)
            return jnp.sum(jnp.sin(y)) + sum(found["losses"].values()), (y, found)

        (_, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, x)
        return gradient, found

    gradient, (y, found) = figures(params, tokens, None)
    with contextlib.nullcontext() if rules is None else sharding.use(MeshConfig(data=2, fsdp=2, tensor=2).make()):
        x, real = sharding.global_array((np.asarray(X), np.asarray(mask)), DEFAULT_RULES) if rules else (X, mask)
        padded = figures(params, x, real, RULES.get(rules, ShardingRules()))
    assert_close(padded[0], gradient)
    assert_close(np.asarray(padded[1][0]).reshape(64, D)[np.flatnonzero(mask)], y[0])
    assert_close(padded[1][1], found)


def test_over_capacity_the_last_choices_are_dropped():
    """All 64 tokens choose expert 0 first and 1 second; each computes 20, and a token is left with what was."""
    part = MixtureOfExperts(experts=4, router=Softmax(bias=True), capacity=20 * 4 / 128)
    params = parameters(part) | {"router_bias": jnp.array([90.0, 60.0, 0, 0])}
    y = run(part, params).reshape(64, D)
    assert_close(y[:20], reference(part, params).reshape(64, D)[:20])
    np.testing.assert_array_equal(y[20:], 0)
    # Second choices of the first tokens come after first choices of the last: 64 of expert 0 leave none for them.
    half = jnp.where(jnp.arange(64)[:, None] < 32, jnp.eye(1, D, 0), jnp.eye(1, D, 1))
    logits = jnp.zeros((D, 4)).at[0].set(jnp.array([9.0, 8, 0, 0])).at[1].set(jnp.array([8.0, 9, 0, 0]))
    params |= {"router_logits": logits, "router_bias": jnp.zeros(4)}
    y = run(dataclasses.replace(part, capacity=1.0), params, half[None])
    only_first = dataclasses.replace(part, top_k=1, router=Softmax(bias=True, renormalise=False))
    chosen = jax.nn.softmax(jnp.array([9.0, 8]))[0] / jax.nn.softmax(jnp.array([9.0, 8, 0, 0]))[0]
    assert_close(y, chosen * run(dataclasses.replace(only_first, capacity=None), params, half[None]))


@pytest.mark.parametrize("capacity", [None, 4])
def test_rows_are_masked_only_where_some_are_dropped(capacity):
    """A mask is another pass over all rows."""
    order = kernel.dispatch(jnp.array([0, 2, 1, 2, 0, 2]), 3, capacity)
    there_and_back = jax.grad(lambda x: order.unpermute(order.permute(x)).sum())
    assert ("FILL_OR_DROP" in str(jax.make_jaxpr(there_and_back)(jnp.ones((6, 2))))) == (capacity is not None)


def test_experts_that_no_token_goes_to_are_not_read():
    part = MixtureOfExperts(router=Softmax(bias=True))
    params = parameters(part) | {"router_bias": jnp.where(jnp.arange(8) < 2, 90.0, 0)}
    spoilt = {name: leaf.at[2:].set(jnp.nan) if leaf.ndim == 3 else leaf for name, leaf in params.items()}
    np.testing.assert_array_equal(run(part, spoilt, X[:1, :1]), run(part, params, X[:1, :1]))


def test_losses_are_the_papers():
    """alpha E sum_e f_e P_e, 1 x alpha for equal use, and beta mean(logsumexp^2), in float64."""
    part = MixtureOfExperts(top_k=1, router=Softmax(load_balance=0.1, z_loss=0.01))
    params = parameters(part)
    _, sown = part.apply({"params": params}, X, F, mutable=["losses"])
    logits = np.asarray(X, np.float64).reshape(-1, D) @ np.asarray(params["router_logits"], np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    f = np.bincount(logits.argmax(-1), minlength=8) / len(logits)
    np.testing.assert_allclose(sown["losses"]["router_load_balance"], 0.1 * 8 * (f * p.mean(0)).sum(), rtol=1e-5)
    z = np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(sown["losses"]["router_z_loss"], 0.01 * (z**2).mean(), rtol=1e-5)
    params["router_logits"] *= 0
    _, sown = part.apply({"params": params}, X, F, mutable=["losses"])
    np.testing.assert_allclose(sown["losses"]["router_load_balance"], 0.1, rtol=1e-6)


def test_tokens_go_to_the_best_groups_only():
    router = Sigmoid(groups=4, top_groups=2, scale=2.5)
    params = {"logits": jax.random.normal(jax.random.key(3), (D, 16)), "balance": jnp.zeros(16)}
    ids, gates = router.apply({"params": params}, X, 16, 6)
    np.testing.assert_allclose(gates.sum(-1), 2.5, rtol=1e-6)
    scores = np.asarray(jax.nn.sigmoid(X @ params["logits"])).reshape(*X.shape[:2], 4, 4)
    best = np.argsort(np.sort(scores, -1)[..., -2:].sum(-1), -1)[..., -2:]
    kept = np.take_along_axis(scores, best[..., None], -2)
    expected = np.sort(kept.reshape(*X.shape[:2], 8), -1)[..., ::-1][..., :6]
    chosen = np.take_along_axis(scores.reshape(*X.shape[:2], 16), np.asarray(ids), -1)
    np.testing.assert_allclose(chosen, expected, rtol=1e-5)


def test_the_balance_bias_evens_out_the_loads():
    """It enters the choice and not the weights, moves by its rate a step, and by the load of all microbatches alone."""
    part = MixtureOfExperts(router=Sigmoid(balance_rate=0.01))
    params = parameters(part)
    x = X + 1.0  # the same direction in every token: experts that like it get them all

    @jax.jit
    def loads(params):
        ids, _ = part.router.apply({"params": router(params)}, x, 8, 2)
        return jnp.bincount(ids.reshape(-1), length=8)

    def router(params):
        return {k.removeprefix("router_"): v for k, v in params.items() if k.startswith("router_")}

    def objective(apply, params, x, key):
        return {"loss": (1e6 * jnp.sum(apply({"params": params}, x, F) ** 2), jnp.ones(()))}

    optimizer = optim.AdamW(learning_rate=1e-9, weight_decay=0.0).build(200, parameter_info(part, X, hidden=F))

    def trained(accumulate: int, steps: int):
        step = make_step(objective, part.apply, optimizer, accumulate)
        state = train_state.create(jax.tree.map(jnp.copy, params), optimizer, jax.random.key(0))
        for _ in range(steps):
            state, _ = step(state, x)
        return state.params

    before = loads(params)
    assert before.max() > 2 * 16
    for accumulate in (1, 4):
        np.testing.assert_array_equal(
            trained(accumulate, 1)["router_balance"], -jnp.float32(0.01) * jnp.sign(before - 16)
        )
    assert loads(trained(1, 100)).max() <= 16 + 4
    biased = {"logits": params["router_logits"], "balance": jnp.full(8, 5.0)}
    _, gates = Sigmoid().apply({"params": biased}, x, 8, 2)
    _, plain = Sigmoid().apply({"params": router(params)}, x, 8, 2)
    np.testing.assert_array_equal(gates, plain)


@pytest.mark.parametrize(
    ("part", "changes", "field"),
    [
        (MixtureOfExperts(), {"top_k": 9}, "mlp.top_k: got 9"),
        (MixtureOfExperts(), {"capacity": 0.0}, "mlp.capacity: got 0.0"),
        (MixtureOfExperts(), {"shared": -1}, "mlp.shared: got -1"),
        (MixtureOfExperts(), {"router": Sigmoid(balance_rate=-1.0)}, "mlp.router.balance_rate: got -1.0"),
        (MixtureOfExperts(), {"router": Softmax(groups=3)}, "mlp.router.groups: got 3"),
        (MixtureOfExperts(), {"router": Softmax(groups=2, top_groups=3)}, "mlp.router.top_groups: got 3"),
        (MixtureOfExperts(), {"router": Softmax(groups=8)}, "mlp.top_k: got 2"),
    ],
)
def test_a_bad_field_is_named(part, changes, field):
    with pytest.raises(UserError, match=field):
        dataclasses.replace(part, **changes)


def deepseek():
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as m

    sizes = {"hidden_size": D, "moe_intermediate_size": F, "n_routed_experts": 8, "num_experts_per_tok": 3}
    groups = {"n_group": 4, "topk_group": 2, "n_shared_experts": 2, "routed_scaling_factor": 1.5}
    router = Sigmoid(groups=4, top_groups=2, scale=1.5)
    return m.DeepseekV3MoE(m.DeepseekV3Config(**sizes, **groups)), router, SwiGLU(), 2


def mixtral():
    from transformers.models.mixtral import modeling_mixtral as m

    sizes = {"hidden_size": D, "intermediate_size": F, "num_local_experts": 8, "num_experts_per_tok": 3}
    return m.MixtralSparseMoeBlock(m.MixtralConfig(**sizes)), Softmax(), SwiGLU(), 0


def qwen3():
    from transformers.models.qwen3_moe import modeling_qwen3_moe as m

    sizes = {"hidden_size": D, "moe_intermediate_size": F, "num_experts": 8, "num_experts_per_tok": 3}
    config = m.Qwen3MoeConfig(**sizes, norm_topk_prob=False)
    return m.Qwen3MoeSparseMoeBlock(config), Softmax(renormalise=False), SwiGLU(), 0


def gpt_oss():
    from transformers.models.gpt_oss import modeling_gpt_oss as m

    sizes = {"hidden_size": D, "intermediate_size": F, "num_local_experts": 8, "num_experts_per_tok": 3}
    return m.GptOssMLP(m.GptOssConfig(**sizes)), Softmax(bias=True), ClampedSwiGLU(), 0


@pytest.mark.torch
@pytest.mark.parametrize("family", [deepseek, mixtral, qwen3, gpt_oss])
def test_it_is_what_transformers_computes(family):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    theirs, router, expert, shared = family()
    generator = torch.Generator().manual_seed(0)
    for tensor in theirs.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * (1.0 if family is gpt_oss else 0.5))
    w = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    gate = "router" if family is gpt_oss else "gate"
    params = {"router_logits": w[f"{gate}.weight"].T}
    if family is gpt_oss:  # gate and up alternate, and matrices are ours
        both, bias = w["experts.gate_up_proj"], w["experts.gate_up_proj_bias"]
        params |= {"gate": both[..., ::2], "up": both[..., 1::2], "gate_bias": bias[:, ::2], "up_bias": bias[:, 1::2]}
        params |= {"down": w["experts.down_proj"], "down_bias": w["experts.down_proj_bias"]}
        params |= {"router_bias": w["router.bias"]}
    else:
        both = w["experts.gate_up_proj"].swapaxes(1, 2)
        params |= {"gate": both[..., :F], "up": both[..., F:], "down": w["experts.down_proj"].swapaxes(1, 2)}
    if family is deepseek:
        params["router_balance"] = w["gate.e_score_correction_bias"]
        params |= {f"shared_{name}": w[f"shared_experts.{name}_proj.weight"].T for name in ("gate", "up", "down")}
    with torch.no_grad():
        expected = theirs(torch.from_numpy(np.array(X)))
    expected = (expected[0] if family is gpt_oss else expected).numpy()
    part = MixtureOfExperts(experts=8, top_k=3, expert=expert, router=router, shared=shared)
    # relative to the largest: sums of 24 products of sums of 16, in float32
    np.testing.assert_allclose(run(part, params), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_a_router_is_a_subclass():
    with pytest.raises(NotImplementedError):
        Router().scores(jnp.zeros(3))
