"""muP: what a model computes stays of one size as it gets wider, and the standard parametrisation's does not."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import apply, drawn

from experiments import __main__ as launcher
from gptjax.distributed.parameters import ParamInfo, flat, nested, parameter_info
from gptjax.experiment import coordinates as module
from gptjax.experiment.coordinates import check, coordinates, resize, width_exponents
from gptjax.nn import (
    GRU,
    EncoderConfig,
    LayerOverrides,
    MixtureOfExperts,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    MultiTokenConfig,
    MuP,
    PreNorm,
    RecurrentConfig,
    SwiGLU,
    Transform,
    Transformer,
    TransformerConfig,
    ValueEmbedding,
    activations,
)
from gptjax.optim import Adafactor, AdamW, Constant, Lion, Muon
from gptjax.types import UserError

CONFIG = TransformerConfig(vocab=64, layers=2, width=32, heads=2)
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 8), np.int32)
WIDTHS = (32, 128)


def measure(config: TransformerConfig) -> dict[str, np.ndarray]:
    sizes = coordinates(config, AdamW(learning_rate=2e-3), WIDTHS, steps=2, batch=2, length=16)
    return {name: width_exponents(WIDTHS, of) for name, of in sizes.items()}


@pytest.mark.alone
def test_coordinates_are_flat_with_mup_and_grow_without():
    """Chance is about 1/sqrt(width) of a size: 0.18 at width 32, which bends a line over a factor of 4 by 0.13."""
    mup, standard = measure(dataclasses.replace(CONFIG, parametrisation=MuP(base_width=32))), measure(CONFIG)
    for name in ("layer_1", "layer_1/attention", "layer_1/mlp", "logits"):
        assert np.all(np.abs(mup[name][1:]) < 0.25), f"{name} moves with width to the powers {mup[name]}"
        if name != "logits":
            assert abs(mup[name][0]) < 0.13, f"{name} begins with width to the power {mup[name][0]}"
    for name in ("layer_1/attention", "layer_1/mlp"):
        assert np.all(standard[name] > 0.6), f"{name} moves with width to the powers {standard[name]}"
    assert standard["logits"][0] > 0.4


def test_the_base_is_the_standard_model():
    mup = dataclasses.replace(CONFIG, parametrisation=MuP(base_width=32))
    params = jax.jit(Transformer(CONFIG).init)(jax.random.key(0), TOKENS)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(Transformer(mup).init)(jax.random.key(0), TOKENS), params)
    logits, _ = apply(Transformer(CONFIG), params["params"], TOKENS)
    np.testing.assert_array_equal(apply(Transformer(mup), params["params"], TOKENS)[0], logits)


def test_mup_is_its_table():
    wide = TransformerConfig(64, 2, 128, 2, tie_embeddings=False, parametrisation=MuP(base_width=32, base_head_size=16))
    plain = TransformerConfig(64, 2, 128, 2, tie_embeddings=False)
    params, standard = (
        jax.jit(Transformer(config).init)(jax.random.key(0), TOKENS)["params"] for config in (wide, plain)
    )
    for name, scale in (("blocks", 1 / 2), ("embedding", 1), ("head", 1)):
        matrices = [jax.tree.leaves(tree[name]) for tree in (params, standard)]
        for x, y in zip(*matrices, strict=True):
            np.testing.assert_allclose(x, y if np.all(y == 1) else scale * y, rtol=1e-6)
    assert wide.block().attention.scale == 16**0.5 / 64
    logits, _ = apply(Transformer(wide), params, TOKENS)
    same = dataclasses.replace(
        plain, attention=dataclasses.replace(plain.attention, scale=16**0.5 / 64), logit_scale=0.25
    )
    np.testing.assert_allclose(logits, apply(Transformer(same), params, TOKENS)[0], rtol=1e-6)


LATENT = MultiHeadLatentAttention(kv_rank=8, q_rank=8, rope_size=4, value_size=8)
EVERY = {
    "lstm": RecurrentConfig(64, 2, 32),
    "gru": RecurrentConfig(64, 2, 32, attention=GRU(), mlp=SwiGLU(), residual=PreNorm()),
    "latent": dataclasses.replace(CONFIG, attention=LATENT, mlp=MixtureOfExperts(experts=2)),
    "values": dataclasses.replace(CONFIG, attention=MultiHeadAttention(values=ValueEmbedding(64))),
    "ahead": MultiTokenConfig(64, 1, 32, 2, ahead=1),
    "bert": EncoderConfig(64, 1, 32, 2, transform=Transform()),
}
FIXED = ("values_gate", "router_logits")
"""Matrices in blocks that are not hidden ones: they read, or write, what does not grow."""


@pytest.mark.sampled
@pytest.mark.parametrize("name", EVERY)
def test_every_hidden_matrix_is_scaled(name):
    """In a model 4 times as wide as the base, each hidden matrix of the blocks is initialised with half the deviation,
    or with that of its fan-in, and has a quarter of the learning rate; no other parameter does."""
    plain = EVERY[name]
    wide = dataclasses.replace(plain, parametrisation=MuP(base_width=8))
    params, standard = (
        flat(jax.device_get(jax.jit(config.build().init)(jax.random.key(0), TOKENS)["params"]))
        for config in (wide, plain)
    )
    optimizer = Lion(learning_rate=1.0, schedule=Constant(), weight_decay=0.0, clip=None).build(
        1, parameter_info(wide.build()), wide.width_multiplier
    )
    params = nested(params)
    moves = jax.jit(lambda p: optimizer.update(jax.tree.map(jnp.ones_like, p), optimizer.init(p), p)[0])(params)
    params = flat(params)
    for path, move in flat(jax.device_get(moves)).items():
        last = path.split("/")[-1]
        vector = last.endswith(("scale", "bias")) or not path.startswith(("blocks/", "ahead_0/", "transform/"))
        hidden = not vector and last not in FIXED and not last.endswith("embedding")
        ratio = 0.5 if hidden and last not in ("input", "recurrent") else 1
        np.testing.assert_allclose(params[path], ratio * standard[path], rtol=1e-6, err_msg=path)
        np.testing.assert_array_equal(np.unique(np.abs(move)), [0.25 if hidden else 1], err_msg=path)


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["lstm", "gru", "latent", "values"])
def test_at_its_base_every_model_is_the_standard_one(name):
    plain = EVERY[name]
    base = dataclasses.replace(plain, parametrisation=MuP(base_width=32, base_head_size=plain.H))
    params = jax.jit(plain.build().init)(jax.random.key(0), TOKENS)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(base.build().init)(jax.random.key(0), TOKENS), params)
    logits, _ = apply(plain.build(), params["params"], TOKENS)
    np.testing.assert_array_equal(apply(base.build(), params["params"], TOKENS)[0], logits)


@pytest.mark.parametrize(("kind", "scale"), [(AdamW, 1 / 4), (Lion, 1 / 4), (Muon, 1 / 2), (Adafactor, 1 / 2)])
def test_learning_rates_of_hidden_matrices_fall_with_width(kind, scale):
    """And those of the rest do not, nor does weight decay."""
    info = {
        "blocks": {
            "mlp": {"up": ParamInfo((8, 8), ("embed", "ffn"), "matrix", decays=True).stack(2)},
            "norm_1": {"scale": ParamInfo((8,), (None,)).stack(2)},
        },
        "head": ParamInfo((8, 4), ("embed", "vocab"), "head"),
    }
    params = jax.tree.map(lambda i: jnp.ones(i.shape), info)
    gradients = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), params)

    def update(width_exponents: float, weight_decay: float = 0.0):
        optimizer = kind(learning_rate=1.0, schedule=Constant(), weight_decay=weight_decay, clip=None)
        optimizer = optimizer.build(1, info, width_exponents)
        return jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])(gradients, params)

    base, wide, decayed = update(1), update(4), update(4, 0.5)
    np.testing.assert_allclose(wide["blocks"]["mlp"]["up"], scale * base["blocks"]["mlp"]["up"], rtol=1e-6)
    np.testing.assert_array_equal(wide["head"], base["head"])
    np.testing.assert_array_equal(wide["blocks"]["norm_1"]["scale"], base["blocks"]["norm_1"]["scale"])
    np.testing.assert_allclose(decayed["blocks"]["mlp"]["up"], wide["blocks"]["mlp"]["up"] - 0.5, rtol=1e-5, atol=1e-6)


def test_activations_are_those_of_the_model():
    config = dataclasses.replace(CONFIG, layers=3, pattern=(LayerOverrides(window=4), LayerOverrides()))
    model = Transformer(config)
    params = drawn(model)
    found = jax.jit(lambda p: activations(model, p, TOKENS))(params)
    np.testing.assert_allclose(found["logits"], apply(model, params, TOKENS)[0], rtol=1e-5, atol=1e-6)
    for i in range(3):
        before = found["positions" if i == 0 else f"layer_{i - 1}"]
        after = before + found[f"layer_{i}/attention"] + found[f"layer_{i}/mlp"]
        np.testing.assert_allclose(found[f"layer_{i}"], after, rtol=1e-5, atol=1e-6)


def test_other_widths():
    config = resize(TransformerConfig(64, 2, 48, 6, kv_heads=3, hidden=96), 32)
    assert (config.width, config.heads, config.K, config.H, config.F) == (32, 4, 2, 8, 64)
    with pytest.raises(UserError, match=r"width: got 40, must be a multiple of 16"):
        resize(TransformerConfig(64, 2, 48, 6, kv_heads=3), 40)


def test_check_draws_and_tells(tmp_path, monkeypatch):
    """With sizes that grow with the width in the standard parametrisation alone."""
    names = ("positions", "layer_0", "layer_0/attention", "layer_0/mlp", "logits")

    def sizes(config, optimizer, widths, steps):
        power = 0 if isinstance(config.parametrisation, MuP) else 1
        return {name: np.array([[float(width**power)] * (steps + 1) for width in widths]) for name in names}

    monkeypatch.setattr(module, "coordinates", sizes)
    table = check(CONFIG, AdamW(learning_rate=1e-3), tmp_path / "check.png", widths=(16, 32), steps=2)
    assert (tmp_path / "check.png").read_bytes().startswith(b"\x89PNG")
    lines = [line.split() for line in table.splitlines()[3:-1]]
    assert [name for name, *_ in lines] == ["layer_0", "layer_0/attention", "layer_0/mlp", "logits", "positions"]
    assert all([power.lstrip("-") for power in powers] == ["1.00", "0.00"] * 2 for _, *powers in lines)


TINY = """
from gptjax.data import Bytes, Pretrain, Text
from gptjax.experiment.experiment import Experiment, Stage
from gptjax.nn import RecurrentConfig
from gptjax.objectives import NextToken
from gptjax.optim import AdamW

stage = Stage(Pretrain(Text("nowhere.txt"), length=8, batch=2), NextToken(), AdamW(), steps=1)
experiment = Experiment(RecurrentConfig(vocab=260, layers=1, width=8), Bytes(), {"pretrain": stage})
"""


def test_the_command_prints_the_table_and_needs_no_data(tmp_path, capsys, monkeypatch):
    """For a model without an MLP too."""
    assert module._widths(RecurrentConfig(vocab=260, layers=1, width=8)) == (64, 128, 256, 512)
    monkeypatch.setattr(module, "_widths", lambda config: (8, 16))
    (tmp_path / "tiny.py").write_text(TINY)
    out = tmp_path / "run"
    command = [
        str(tmp_path / "tiny.py"),
        "--coordinates",
        "--out",
        str(out),
        "--pretrain.optimizer.learning_rate",
        "0.01",
    ]
    assert launcher.main(command) == 0
    table = capsys.readouterr().out
    assert table.startswith("exponent of the width in the size of activations (8, 16):")
    assert "layer_0/attention" in table
    assert table.endswith(f"plot: {tmp_path / 'run-coordinates.png'}\n")
    assert (tmp_path / "run-coordinates.png").read_bytes().startswith(b"\x89PNG")
    assert not out.exists()
