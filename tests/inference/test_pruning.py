"""Pruning takes the smallest weights, and training on leaves the zeros alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gptjax
from gptjax.cli.main import main
from gptjax.data.tokenizers.bytes import Bytes
from gptjax.distributed.parameters import flat, parameter_info
from gptjax.inference.pruning import prune_params, zeros
from gptjax.nn import MixtureOfExperts, TransformerConfig
from gptjax.optim import AdamW, Constant, KeepZeros, Muon
from gptjax.types import UserError

TOKENIZER = Bytes().build(iter(()))
CONFIG = TransformerConfig(vocab=TOKENIZER.vocab, layers=2, width=16, heads=2, hidden=32)
MIXTURE = dataclasses.replace(CONFIG, mlp=MixtureOfExperts(experts=2, top_k=1))


def params_of(config):
    return jax.jit(config.build().init)(jax.random.key(0), jnp.zeros((1, 1), int))["params"]


def matrices(config):
    return {name: info for name, info in flat(parameter_info(config.build())).items() if info.is_matrix}


@pytest.mark.parametrize("config", [CONFIG, MIXTURE], ids=["dense", "experts"])
def test_the_largest_weights_stay(config):
    params = params_of(config)
    half, patterned = prune_params(config, params, 0.5), prune_params(config, params, pattern=(2, 4))
    assert zeros(config, half) == zeros(config, patterned) == 0.5
    infos = matrices(config)
    for name, w in flat(params).items():
        if name not in infos:
            assert flat(half)[name] is w
            continue
        batch = infos[name].split(w.shape)[0]
        for index in np.ndindex(batch):
            before, after = np.asarray(w)[index], flat(half)[name][index]
            assert np.abs(before[after == 0]).max() <= np.abs(after[after != 0]).min()
            np.testing.assert_array_equal(after[after != 0], before[after != 0])
        rows = np.asarray(w).reshape(*batch, infos[name].fan[0], -1).swapaxes(-1, -2)
        kept = flat(patterned)[name].reshape(*batch, infos[name].fan[0], -1).swapaxes(-1, -2)
        groups, left = (np.sort(np.abs(x.reshape(-1, 4)), axis=1) for x in (rows, kept))
        np.testing.assert_array_equal(left, groups * np.asarray([0, 0, 1, 1], groups.dtype))


@pytest.mark.parametrize("optimizer", [AdamW(1e-2, Constant()), Muon(1e-2, Constant())], ids=["adamw", "muon"])
def test_zeros_stay_while_the_rest_learns(optimizer):
    params = jax.tree.map(jnp.asarray, prune_params(CONFIG, params_of(CONFIG), pattern=(2, 4)))
    update = KeepZeros(optimizer).build(10, parameter_info(CONFIG.build()))
    tokens = jnp.arange(24).reshape(1, -1)

    def loss(params):
        logits = CONFIG.build().apply({"params": params}, tokens[:, :-1])[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @jax.jit
    def step(params, state):
        updates, state = update.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    before, state, first = flat(params), update.init(params), loss(params)
    for _ in range(5):
        params, state = step(params, state)
    assert loss(params) < 0.9 * first
    for name in matrices(CONFIG):
        was, is_now = np.asarray(before[name]) == 0, np.asarray(flat(params)[name]) == 0
        np.testing.assert_array_equal(was, is_now)


def test_the_command_writes_and_reports(tmp_path, capsys):
    gptjax.LanguageModel(CONFIG, params_of(CONFIG), TOKENIZER, context=32).save(tmp_path / "whole")
    (tmp_path / "text").write_text("A text to measure on. " * 8)
    path, out, text = (str(tmp_path / name) for name in ("whole", "small", "text"))
    assert main(["prune", path, out, "--pattern", "2:4", "--text", text]) == 0
    report = (tmp_path / "small" / "pruning.md").read_text()
    assert report in capsys.readouterr().out
    assert "| pruned | 50.0% |" in report
    small = gptjax.load(tmp_path / "small")
    assert zeros(small.config, small.params) == 0.5
    for options, message in (
        (["--pattern", "2"], "pattern: got 2, must be n:m"),
        (["--pattern", "4:4"], "pattern: got 4:4, must be n:m with 0 < n < m"),
        ([], "fraction: got a fraction and a pattern, or neither"),
        (["--fraction", "1.5"], "fraction: got 1.5, must be at least 0"),
    ):
        assert main(["prune", path, str(tmp_path / "other"), *options]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match=r"^pattern: got 2:5 for the 16 inputs of .*, which 5 must divide"):
        prune_params(CONFIG, params_of(CONFIG), pattern=(2, 5))
