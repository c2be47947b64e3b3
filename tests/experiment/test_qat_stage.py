"""A stage of quantisation-aware training: what is trained, validated and evaluated is the quantised model."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drawn import drawn, placed
from tiny_experiment import EXPERIMENT, PRETRAIN, params

from gptjax import load, optim
from gptjax.cli.main import main
from gptjax.cli.options import override
from gptjax.config import from_json, to_json
from gptjax.distributed import sharding
from gptjax.distributed.parameters import flat, parameter_info
from gptjax.distributed.sharding import DEFAULT_RULES
from gptjax.inference.quantise import quantise_params
from gptjax.kernels.quantised import QuantisedArray
from gptjax.monitor.metrics import read as read_metrics
from gptjax.nn import EncoderConfig, LoRA, MixtureOfExperts
from gptjax.objectives import MaskedTokens, NextToken
from gptjax.train.program import program
from gptjax.train.stage import QAT
from gptjax.types import Batch, UserError

CONFIG = EXPERIMENT.model
QUANTISATION = QAT(bits=4, group=8)
STAGE = dataclasses.replace(PRETRAIN, optimizer=optim.AdamW(learning_rate=3e-2), quantisation=QUANTISATION)
TRAINED = dataclasses.replace(EXPERIMENT, stages={"pretrain": STAGE})


def floats(params):
    """Quantised parameters as arrays."""
    return jax.tree.map(jnp.asarray, params, is_leaf=lambda x: isinstance(x, QuantisedArray))


@pytest.mark.parametrize("qat", [QAT(), QAT(bits=4, group=8), QAT(bits=8, embeddings=False)], ids=str)
def test_the_rounded_weights_are_the_quantised_ones_bit_for_bit(qat):
    """On a mesh too, where inputs that share a scale, of 16, are on several devices; experts as well."""
    mixture = MixtureOfExperts(experts=4, top_k=2)
    config = dataclasses.replace(CONFIG, mlp=mixture, tie_embeddings=False)
    model = config.build(DEFAULT_RULES)
    params, info = drawn(model), parameter_info(model)
    wanted = floats(quantise_params(config, params, qat.bits, qat.group, qat.embeddings))
    changed = {name for name, w in flat(wanted).items() if np.any(w != flat(params)[name])}
    assert ("embedding" in changed) == ("head" in changed) == qat.embeddings
    assert {"blocks/attention/o", "blocks/mlp/down"} <= changed
    rounded = jax.jit(functools.partial(qat.rounded, info=info))
    jax.tree.map(np.testing.assert_array_equal, rounded(params), wanted)
    with sharding.use(EXPERIMENT.mesh.make()):
        before = placed(model, params, jax.ShapeDtypeStruct((8, 4), jnp.int32))
        compiled = rounded.lower(before).compile()
        after = compiled(before)
        assert "all-gather" not in (compiled.as_text() or "")  # maxima are sent, no weights
        jax.tree.map(np.testing.assert_array_equal, after, wanted)
        assert jax.tree.map(lambda x: x.sharding, after) == jax.tree.map(lambda x: x.sharding, before)


@dataclasses.dataclass(frozen=True)
class Descent(optim.AdamW):
    """Gradient descent with a learning rate of 1."""

    def build(self, steps, info, width_multiplier=1.0):
        return optax.sgd(1.0)


def test_a_step_has_the_gradient_at_the_rounded_weights_on_any_mesh():
    """It changes the floats by what a step of the float model at those weights changes."""
    tokens, targets = np.random.default_rng(0).integers(0, CONFIG.vocab, (2, 8, 16), np.int32)
    ones = np.ones((8, 16), np.int32)
    batch = Batch(tokens, targets, ones.astype(np.float32), ones, np.cumsum(ones, 1) - 1)
    stage = dataclasses.replace(STAGE, optimizer=Descent(), accumulate=2, ema=None)
    params, model = drawn(CONFIG.build()), CONFIG.build(DEFAULT_RULES)

    def step(stage, params):
        functions = program(stage, model)
        before = jax.device_get(params)
        state = functions.create_state(jax.tree.map(jnp.array, params))
        state, metrics = functions.step(state, sharding.global_array(batch, DEFAULT_RULES))
        change = jax.tree.map(lambda after, before: np.asarray(after) - before, state.params, before)
        return change, float(metrics["loss"][0])

    rounded = QUANTISATION.rounded(params, parameter_info(model))
    wanted, loss = step(dataclasses.replace(stage, quantisation=None), rounded)
    alone = step(stage, params)
    with sharding.use(EXPERIMENT.mesh.make()):
        sharded = step(stage, placed(model, params, jax.ShapeDtypeStruct((8, 16), jnp.int32)))
    for change, found in (alone, sharded):
        assert found == pytest.approx(loss, rel=1e-6)
        # Sums of some hundred products in float32, and the rounding of numbers below 1.
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6), change, wanted)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qat")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTJAX_CACHE", str(folder / "cache"))
        TRAINED.run(folder / "run")
    return folder


def test_a_stage_is_validated_and_evaluated_as_its_quantised_model(folder):
    lm = load(folder / "run")
    jax.tree.map(np.testing.assert_array_equal, lm.params, params(folder / "run", "pretrain"))  # floats
    small = lm.quantised(bits=4, group=8)
    as_floats = dataclasses.replace(small, params=floats(small.params))
    assert np.any(np.asarray(as_floats.params["blocks"]["mlp"]["up"]) != lm.params["blocks"]["mlp"]["up"])
    losses = [line["validation_loss"] for line in read_metrics(folder / "run") if "validation_loss" in line]
    validation = STAGE.data.evaluation(lm.tokenizer, "validation", folder / "cache" / "tokens", sequences=8)
    assert isinstance(validation, Iterable)
    batches = [*validation]

    def loss(model):
        measure = jax.jit(functools.partial(NextToken(), CONFIG.build().apply))
        metrics = [measure(model.params, batch) for batch in batches]
        total, weight = (sum(float(m["loss"][i]) for m in metrics) for i in (0, 1))
        return total / weight

    assert losses[-1] == pytest.approx(loss(as_floats), rel=1e-6)
    assert abs(losses[-1] - loss(lm)) > 1e-5 * losses[-1]
    # The quantised model rounds the inputs of its products too, each by at most 1/254 of the largest.
    assert losses[-1] == pytest.approx(loss(small), rel=1 / 254)
    (stored,) = json.loads((folder / "run" / "report" / "pretrain.json").read_text())["results"]
    assert stored["values"]["bits_per_byte"] == pytest.approx(
        STAGE.evaluations[0](as_floats).values["bits_per_byte"], rel=1e-6
    )


def test_a_stage_is_resumed_to_the_same_bits(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("GPTJAX_CACHE", str(folder / "cache"))
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    shutil.rmtree(run / "checkpoints" / "pretrain" / "4")
    TRAINED.run(run)
    jax.tree.map(np.testing.assert_array_equal, params(run, "pretrain"), params(folder / "run", "pretrain"))


def test_the_model_is_quantised_as_it_was_trained(folder, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("ab cd. " * 20)
    run, options = str(folder / "run"), ["--text", str(text), "--to", "gptjax"]
    for wrong in (["--bits", "8"], ["--group", "16"], ["--method", "gptq"]):
        assert main(["quantize", run, str(tmp_path / "other"), *options, *wrong]) == 2
        assert f"{wrong[0][2:]}: got {wrong[1]}, must be" in capsys.readouterr().err
    assert main(["quantize", run, str(tmp_path / "small"), *options]) == 0
    lm = load(run)
    lm.save(tmp_path / "floats")
    for same in (lm, load(tmp_path / "floats")):
        jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "small").params, same.quantised().params)
        others: tuple[dict, ...] = {"bits": 8}, {"group": 16}, {"embeddings": False}
        for other in others:
            with pytest.raises(UserError, match=r"got (8|16|False), must be (4|8|True), as the weights were trained"):
                same.quantised(**other)


def test_the_option_is_chosen_and_saved():
    chosen = override(TRAINED, ["--pretrain.quantisation", "QAT", "--pretrain.quantisation.bits", "8"], "run", "")
    assert chosen.stages["pretrain"].quantisation == QAT(bits=8)
    assert from_json(json.loads(json.dumps(to_json(chosen.stages["pretrain"].quantisation)))) == QAT(bits=8)


def test_what_cannot_be_trained_is_refused():
    mistakes: tuple[dict, ...] = {"bits": 3}, {"group": 7}
    for wrong in mistakes:
        with pytest.raises(UserError, match=rf"^quantisation\.{next(iter(wrong))}: got "):
            QAT(**wrong)
    with pytest.raises(UserError, match=r"^quantisation: got QAT, must be None with an adapter"):
        dataclasses.replace(STAGE, adapter=LoRA())
    encoder = EncoderConfig(vocab=16, layers=1, width=16, heads=2)
    masked = dataclasses.replace(STAGE, objective=MaskedTokens(mask_token=1, vocab=16))
    with pytest.raises(UserError, match=r"^quantisation: got QAT, must be None: only decoders"):
        masked.check(encoder)
    odd = dataclasses.replace(CONFIG, width=20, heads=4, hidden=27)
    with pytest.raises(UserError, match="group: got 27, must be even for 4 bits"):
        program(dataclasses.replace(STAGE, quantisation=QAT()), odd.build()).deployed(drawn(odd.build()))
