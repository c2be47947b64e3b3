"""Laws of differentially private training: clipped gradients, noise, Poisson samples, the promise, and runs."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import signal
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from gptjax import data, objectives, optim
from gptjax.data.mix import poisson
from gptjax.distributed import sharding
from gptjax.distributed.sharding import DEFAULT_RULES, MeshConfig
from gptjax.experiment.experiment import Experiment
from gptjax.experiment.run_folder import seed_of
from gptjax.monitor.metrics import MetricsLogger
from gptjax.nn import LoRA, MultiHeadAttention, Transformer, TransformerConfig
from gptjax.nn.moe import MixtureOfExperts
from gptjax.nn.router import Sigmoid
from gptjax.train.divergence import Skip
from gptjax.train.loop import train
from gptjax.train.privacy import DifferentialPrivacy, Mechanism, least_noise
from gptjax.train.program import program
from gptjax.train.stage import Stage
from gptjax.train.state import create, random_key
from gptjax.train.step import divide, make_step
from gptjax.types import Batch, UserError

CONFIG = TransformerConfig(vocab=32, layers=1, width=8, heads=2)
MODEL = Transformer(CONFIG)
TOKENIZER = data.TrainCharacters().build(iter(["abcdefgh"]))


@dataclasses.dataclass(frozen=True)
class Letters:
    """A source of documents of random letters."""

    count: int = 60

    def documents(self, split: str) -> Iterator[str]:
        rng = np.random.default_rng(split == "train")
        yield from ("".join(rng.choice(list("abcdefgh"), 12)) for _ in range(self.count if split == "train" else 8))

    def fingerprint(self) -> str:
        return repr(self)


STAGE = Stage(
    data=data.Pretrain(Letters(), length=16, batch=32, packing=data.NoPacking()),
    objective=objectives.NextToken(),
    optimizer=optim.AdamW(learning_rate=1e-2, schedule=optim.Constant()),
    steps=6,
    evaluate_every=2,
    save_every=3,
    eval_sequences=8,
    accumulate=2,
    prompts=("a",),
    privacy=DifferentialPrivacy(epsilon=4.0, delta=1e-3),
)


def batch(rows: int, empty: int) -> Batch:
    """Random sequences, the last ones of padding."""
    rng = np.random.default_rng(rows)
    tokens, real = rng.integers(32, size=(rows, 9)), (np.arange(rows) < rows - empty)[:, None]
    weights = (rng.random((rows, 8)) < 0.7) * real
    positions = np.broadcast_to(np.arange(8), (rows, 8))
    fields = tokens[:, :-1], tokens[:, 1:], weights.astype(np.float32), np.int32(real * np.ones((1, 8))), positions
    return Batch(*(jnp.asarray(field, jnp.float32 if i == 2 else jnp.int32) for i, field in enumerate(fields)))


@pytest.mark.sampled
@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_gradient_is_that_of_sequences_clipped_one_by_one(accumulate):
    """With a clipping norm that some exceed; without noise, a step of SGD shows the gradient."""
    sequences, clip, expected = batch(8, empty=3), 1.5, 3.5
    params = jax.jit(MODEL.init)(jax.random.key(0), sequences.tokens)["params"]
    loss = objectives.NextToken()

    def mean(params, row):
        total, weight = loss(MODEL.apply, params, jax.tree.map(lambda x: x[row][None], sequences))["loss"]
        return total / weight

    grads = [*map(functools.partial(jax.jit(jax.grad(mean)), params), range(5))]
    norms = [optax.tree.norm(g) for g in grads]
    assert min(norms) < clip < max(norms), norms
    clipped = [jax.tree.map(lambda g, n=n: g * min(1, clip / n), g) for g, n in zip(grads, norms, strict=True)]
    wanted = jax.tree.map(lambda *g: sum(g) / expected, *clipped)

    mechanism = Mechanism(expected / 100, 0.0, clip, 100, 1.0, 1e-5)
    state = create(params, optax.sgd(1.0), jax.random.key(1), False, None)
    step = make_step(loss, MODEL.apply, optax.sgd(1.0), accumulate, mechanism=mechanism)
    after, metrics = step(jax.tree.map(jnp.copy, state), sequences)
    moved = jax.tree.map(lambda a, b: a - b, params, after.params)
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)  # sums of a few numbers below 1, in float32
    assert tuple(map(float, metrics["clipped"])) == (sum(n > clip for n in norms), 5)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("adapter", "mesh"),
    [(None, MeshConfig(data=2, fsdp=2, tensor=2)), (LoRA(rank=2), MeshConfig(fsdp=2, context=2, tensor=2))],
    ids=["whole", "LoRA, sharded sequences"],
)
def test_the_gradient_is_the_same_on_a_mesh(adapter, mesh):
    """Noise included, with parameters sharded over the axes of the batch and over others."""
    stage = dataclasses.replace(STAGE, adapter=adapter, data=dataclasses.replace(STAGE.data, length=8, batch=8))
    mechanism = Mechanism(0.1, 0.7, 0.5, 100, 1.0, 1e-5)
    sequences, found = batch(8, empty=2), []
    for devices in (None, mesh.make()):
        with sharding.use(devices):
            functions = program(stage, Transformer(CONFIG, DEFAULT_RULES), 3, mechanism=mechanism)
            frozen = () if adapter is None else (jax.jit(functions.init_params)(),)
            state = jax.jit(functions.init_state)(*frozen)
            state, metrics = functions.step(state, sharding.global_array(sequences, DEFAULT_RULES), *frozen)
            found.append((jax.device_get((state.params, state.opt_state)), divide(metrics)))
    (one, losses), (other, others) = found
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert losses == pytest.approx(others, rel=1e-5)


def test_noise_is_normal_of_the_right_size_and_new_at_each_step():
    mechanism = Mechanism(0.1, 1.5, 2.0, 400, 1.0, 1e-5)
    zeros = {"a": jnp.zeros((300, 100)), "b": jnp.zeros(20_000)}
    noise = mechanism.noisy(zeros, random_key(1))
    values = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(noise)]) * mechanism.expected / (1.5 * 2.0)
    assert stats.kstest(values, "norm").pvalue > 1e-3
    others = mechanism.noisy(zeros, random_key(1 + 2**40))["b"]  # high bits of a seed count
    assert abs(np.corrcoef(noise["b"], others)[0, 1]) < 0.03
    assert abs(np.corrcoef(noise["b"], np.ravel(noise["a"])[:20_000])[0, 1]) < 0.03


def test_samples_are_independent_functions_of_seed_and_step():
    """Every sequence comes with the rate, and pairs with its square; any shard of a step sees the same sample."""
    n, rate, size, steps = 40, 0.2, 24, 3_000
    order = poisson(n, rate, size, seed=5)
    source, index = order(np.arange(steps * size))
    drawn = np.zeros((steps, n))
    for step, which, found in zip(np.arange(steps).repeat(size), source, index, strict=True):
        if which == 0:
            drawn[step, found] += 1
    assert drawn.max() == 1
    deviation = math.sqrt(rate * (1 - rate) / steps)
    assert np.abs(drawn.mean(0) - rate).max() < 4.5 * deviation
    together = (drawn.T @ drawn / steps)[np.triu_indices(n, 1)]
    assert np.abs(together - rate**2).max() < 5.5 * rate * math.sqrt((1 - rate**2) / steps)
    part = np.arange(7 * size + 6, 9 * size)
    for whole, again in zip((source, index), order(part), strict=True):
        np.testing.assert_array_equal(whole[part], again)
    assert (poisson(n, rate, size, seed=6)(part)[1] != index[part]).any()
    _, full = poisson(n, 1.0, size, seed=0)(np.arange(size))
    assert len(set(full)) == size  # no room for more, and nothing comes twice


def test_the_noise_keeps_the_promise_and_is_little_more_than_needed():
    """One step on all sequences is the Gaussian mechanism, whose delta is known (Balle and Wang 2018,
    arXiv:1805.06530); samples need less noise; and the recipe of TensorFlow Privacy's tutorial, 60 epochs of MNIST with
    noise 1.1, which Renyi accounting gives epsilon 3.0 at most."""
    for epsilon, delta in ((4.0, 1e-6), (0.5, 1e-3)):
        z = least_noise(1.0, 1, epsilon, delta)

        def exact(z, epsilon=epsilon):
            a, b = 1 / (2 * z), epsilon * z
            return stats.norm.cdf(a - b) - math.exp(epsilon) * stats.norm.cdf(-a - b)

        assert exact(z) <= delta < exact(0.98 * z)
    assert least_noise(0.5, 1, 0.5, 1e-3) < z
    assert 0.9 < least_noise(256 / 60_000, 60 * 60_000 // 256, 3.0, 1e-5) < 1.1


def test_a_batch_has_room_for_what_is_drawn():
    privacy = DifferentialPrivacy(epsilon=4.0, delta=1e-5)
    rate = privacy.rate(10_000, 64, 1_000)
    overflow = 1_000 * stats.binom.sf(64, 10_000, rate)
    assert overflow * (1 + math.exp(4.0)) == pytest.approx(1e-6, rel=1e-3)
    assert 20 < 10_000 * rate < 40
    assert privacy.rate(50, 64, 1_000) == 1.0
    with pytest.raises(UserError, match=r"^privacy\.delta: got 1e-05, must be less than 1 / 100,000"):
        privacy.rate(100_000, 64, 10)


def run(folder: Path, stage: Stage, seed: int, interrupt: int | None = None):
    """Trained parameters."""
    calls = itertools.count(1)

    def sample(*_) -> str:
        if next(calls) == interrupt:
            signal.raise_signal(signal.SIGINT)
        return ""

    with MetricsLogger(folder) as records:
        return train(
            *(stage, "s", MODEL, TOKENIZER, folder / "checkpoints", records),
            **{"cache": folder.parent, "seed": seed, "sample": sample},
        )


@pytest.mark.alone
def test_a_private_stage_resumes_to_the_same_bits_and_keeps_its_promise(tmp_path, capsys):
    whole = run(tmp_path / "whole", STAGE, seed=2**40)
    said = " ".join(capsys.readouterr().out.split())
    assert "epsilon 4, delta 0.001 for each of 60 sequences: a step has about" in said
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", STAGE, seed=2**40, interrupt=2)
    again = run(tmp_path / "stopped", STAGE, seed=2**40)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), whole, again))
    for changed in ({"steps": 8}, {"privacy": None}):
        with pytest.raises(UserError, match=r"^s\.privacy: the steps of the checkpoint .* another promise"):
            run(tmp_path / "stopped", dataclasses.replace(STAGE, **changed), seed=2**40)


@pytest.mark.alone
def test_the_seed_of_a_private_stage_is_secret_and_stays_with_the_run(tmp_path):
    public = dataclasses.replace(STAGE, privacy=None)
    assert seed_of("s", public, tmp_path, 3) == 3
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    seed = seed_of("s", STAGE, tmp_path / "a", 3)
    assert seed == seed_of("s", STAGE, tmp_path / "a", 3) != seed_of("s", STAGE, tmp_path / "b", 3)
    assert (tmp_path / "a" / "secret_seed").stat().st_mode & 0o077 == 0
    stage = dataclasses.replace(STAGE, prompts=())
    experiment = Experiment(stages={"s": stage}, tokenizer=data.TrainCharacters(), model=CONFIG)
    assert experiment.run(tmp_path / "run") == 0
    content, secret = json.loads((tmp_path / "run" / "config.json").read_text()), tmp_path / "run" / "secret_seed"
    assert secret.read_text().strip() not in json.dumps(content)
    secret.unlink()
    assert experiment.run(tmp_path / "run") == 0  # no step is left
    longer = dataclasses.replace(experiment, stages={"s": dataclasses.replace(stage, steps=8)})
    with pytest.raises(UserError, match="secret_seed: is missing or damaged, and s cannot be resumed without it"):
        longer.run(tmp_path / "run", accept_changes=True)
    assert not secret.exists()


def test_what_the_promise_does_not_hold_with_is_refused(tmp_path):
    mixture = data.Mix((Letters(), Letters(61)), (1.0, 1.0))
    for change, message in (
        ({"steps": None, "epochs": 2.0}, r"^epochs: got 2\.0, must be None with privacy"),
        ({"divergence": Skip()}, r"^divergence: got Skip, must be Stop with privacy"),
        ({"objective": objectives.KTO()}, r"^objective: got KTO, must be one without a common term"),
        ({"privacy": DifferentialPrivacy(delta=0.1)}, r"^privacy\.delta: got 0\.1, must be less than 1 / 60"),
        (
            {"data": dataclasses.replace(STAGE.data, source=mixture)},
            r"^s\.data\.source: got a mixture, must be a single",
        ),
    ):
        with pytest.raises(UserError, match=message):
            run(tmp_path, dataclasses.replace(STAGE, **change), seed=0)
    for wrong in ({"epsilon": 0.0}, {"clip": math.inf}, {"delta": 1.0}):
        with pytest.raises(UserError, match=rf"^privacy\.{next(iter(wrong))}: got "):
            DifferentialPrivacy(**wrong)
    balanced = dataclasses.replace(
        CONFIG, mlp=MixtureOfExperts(experts=4, top_k=2, router=Sigmoid()), attention=MultiHeadAttention()
    )
    mechanism = Mechanism(0.1, 1.0, 1.0, 100, 1.0, 1e-5)
    model, rows = Transformer(balanced), batch(4, 0)
    params = jax.jit(model.init)(jax.random.key(0), rows.tokens)["params"]
    step = make_step(objectives.NextToken(), model.apply, optax.sgd(1.0), mechanism=mechanism)
    with pytest.raises(UserError, match=r"^privacy: got DifferentialPrivacy, must be None with a model that updates"):
        step(create(params, optax.sgd(1.0), jax.random.key(0), False, None), rows)
