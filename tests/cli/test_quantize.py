"""The command line: `gptjax quantize`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import gptjax
from gptjax.cli.main import main
from gptjax.data.tokenizers.bytes import Bytes
from gptjax.inference.quantise import is_quantised
from gptjax.nn import TransformerConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = Bytes().build(iter(()))
    config = TransformerConfig(vocab=tokenizer.vocab, layers=1, width=32, heads=2, hidden=64)
    params = jax.jit(config.build().init)(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    folder = tmp_path_factory.mktemp("models")
    gptjax.LanguageModel(config, params, tokenizer, context=32).save(folder / "float")
    (folder / "text").write_text("A text to measure and to calibrate on. " * 8)
    return folder


def test_a_model_is_written_and_reported(folder, capsys):
    text = str(folder / "text")
    options = ["--bits", "4", "--method", "gptq", "--calibration", text, "--text", text, "--to", "gptjax"]
    assert main(["quantize", str(folder / "float"), str(folder / "small"), *options]) == 0
    report = (folder / "small" / "quantization.md").read_text()
    assert report in capsys.readouterr().out
    assert "4 bits, a scale per 32 inputs, method gptq" in report  # 128 and 64 do not divide the width
    assert "| quantised |" in report
    assert "blocks/mlp/down [0]" in report
    assert is_quantised(gptjax.load(folder / "small").params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--calibration", "x"], "calibration: got x"),
        (["--method", "gptq"], "calibration: got none"),
        (["--text", "nowhere", "--to", "gptjax"], "path: got nowhere, which does not exist"),
    ],
)
def test_mistakes_are_named(folder, capsys, options, message):
    assert main(["quantize", str(folder / "float"), str(folder / "other"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "other").exists()
