"""Every optimizer trains every architecture, and somebody's own parts as it trains ours."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import ARCHITECTURES, BASE

from gptjax.distributed.parameters import flat, nested, parameter_info
from gptjax.kernels.linear import linear
from gptjax.nn import GELU, MLP, LoRA, MuP
from gptjax.optim import Adafactor, AdamW, Constant, Lion, Muon

OPTIMIZERS = [
    kind(learning_rate=0.1, schedule=Constant(), weight_decay=0.5, **more)
    for kind, more in ((AdamW, {}), (Lion, {}), (Muon, {"iterations": 2}), (Adafactor, {"factor_from": 8}))
]


def sides(name: str, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """[I, O] of a hidden matrix of one layer, by the last word of its name. None: it is none."""
    last = name.split("/")[-1].split("_")[-1]
    inputs = {"o": 2} | dict.fromkeys(
        ["q", "k", "v", "up", "gate", "down", "latent", "rope", "dense", "input", "recurrent"], 1
    )
    if last not in inputs or name.endswith("/values_gate"):  # the gate of a value embedding, from a few channels
        return None
    shape = shape[-2:] if "/mlp/" in name else shape  # experts are matrices of their own
    return math.prod(shape[: inputs[last]]), math.prod(shape[inputs[last] :])


def decays(name: str) -> bool:
    words = ("scale", "bias", "embedding", "positions", "balance")
    return not any(part in words or part.endswith(tuple(f"_{word}" for word in words)) for part in name.split("/"))


def direction(optimizer, name: str, p: np.ndarray, g: np.ndarray) -> np.ndarray:
    """The first direction of an optimizer for one parameter of one layer."""
    if isinstance(optimizer, Lion):
        return np.sign(g)
    if isinstance(optimizer, Adafactor):
        *_, second, first = np.argsort(p.shape, kind="stable") if p.ndim > 1 else (None, None)
        if first is not None and p.shape[second] >= optimizer.factor_from:
            row, column = np.mean(g**2, first, keepdims=True), np.mean(g**2, second, keepdims=True)
            d = g / np.sqrt(row / np.mean(row, second, keepdims=True) * column)
        else:
            d = np.sign(g)
        return d / max(1, np.sqrt(np.mean(d**2))) * max(np.sqrt(np.mean(p**2)), 1e-3)
    if isinstance(optimizer, Muon) and (size := sides(name, p.shape)):
        u, s, v = np.linalg.svd(g.reshape(-1, *size), full_matrices=False)
        s /= np.linalg.norm(s, axis=-1, keepdims=True)
        for _ in range(optimizer.iterations):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        return 0.2 * math.sqrt(max(size)) * ((u * s[:, None]) @ v).reshape(p.shape)
    return g / (np.abs(g) + optimizer.eps)


@pytest.mark.sampled
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_step_is_the_equation_layer_by_layer(name):
    info = parameter_info(ARCHITECTURES[name].build())
    rng = np.random.default_rng(0)
    params, gradient = (
        jax.tree.map(lambda i: rng.normal(0, scale, i.shape).astype(np.float32), info)  # noqa: B023
        for scale in (0.3, 1.0)
    )

    @jax.jit
    def updates(gradient, params):
        built = [optimizer.build(10, info) for optimizer in OPTIMIZERS]
        return [one.update(gradient, one.init(params), params)[0] for one in built]

    norm = math.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(gradient)))
    for optimizer, got in zip(OPTIMIZERS, map(flat, updates(gradient, params)), strict=True):
        for path, p, g in zip(flat(params), flat(params).values(), flat(gradient).values(), strict=True):
            p, g = np.float64(p), np.float64(g) / norm  # which is longer than 1
            stacked = "blocks/" in path and not any(end in path for end in ("leading_", "trailing_"))
            layers = zip(p, g, strict=True) if stacked else [(p, g)]
            d = np.stack([direction(optimizer, path, *layer) for layer in layers]).reshape(p.shape)
            expected = -0.1 * (d + 0.5 * decays(path) * p)
            message = f"{type(optimizer).__name__} {path}"
            np.testing.assert_allclose(got[path], expected, rtol=2e-4, atol=2e-5, err_msg=message)


@dataclasses.dataclass(frozen=True)
class Own(MLP):
    """Our `GELU`, with other names for its parameters."""

    def __call__(self, param, x, hidden, bias=False, output_scale=1.0):
        width, rules = x.shape[-1], param.rules
        w = param("w_in", (width, hidden), ("embed", "ffn"))
        y = jax.nn.gelu(linear(x, w, rules("batch", "sequence", "ffn")))
        init = jax.nn.initializers.normal(0.02 * output_scale)
        return linear(y, param("proj", (hidden, width), ("ffn", "embed"), init), rules("batch", "sequence", None))


def test_a_part_of_ones_own_is_treated_like_ours():
    """Initialised, trained and adapted to the same bits, whatever its parameters are called."""
    ours = dataclasses.replace(BASE, mlp=GELU(), parametrisation=MuP(base_width=4))
    theirs = dataclasses.replace(ours, mlp=Own())

    def renamed(tree):
        names = {"blocks/mlp/w_in": "blocks/mlp/up", "blocks/mlp/proj": "blocks/mlp/down"}
        return nested({names.get(name, name): leaf for name, leaf in flat(tree).items()})

    def everything(config, match):
        model = config.build()
        info = parameter_info(model)
        params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
        built = [optimizer.build(10, info, config.width_multiplier) for optimizer in OPTIMIZERS]
        moves = jax.jit(lambda p: [one.update(p, one.init(p), p)[0] for one in built])(params)
        adapters = LoRA(match=match).init(jax.random.key(1), params, info)
        return [params, *moves], [flat(adapters)[f"blocks/mlp/{match[0]}/{side}"] for side in "ab"]

    trees, adapter = everything(theirs, ("w_in",))
    expected, expected_adapter = everything(ours, ("up",))
    jax.tree.map(np.testing.assert_array_equal, list(map(renamed, trees)), expected)
    jax.tree.map(np.testing.assert_array_equal, adapter, expected_adapter)
