"""A folder without a tokenizer: a model of ids, until one is given."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.cli import main
from gptjax.data import Bytes
from gptjax.data.tokenizers import MissingTokenizer
from gptjax.interop.huggingface import save_hf
from gptjax.models.language_model import LanguageModel
from gptjax.models.loading import init_from_pretrained, load
from gptjax.nn import TransformerConfig
from gptjax.types import UserError

TOKENIZER = Bytes().build(iter(()))
CONFIG = TransformerConfig(vocab=264, layers=2, width=16, heads=2)
IDS = np.asarray([[1, 2, 3, 200]])


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    params = jax.jit(CONFIG.build().init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    return LanguageModel(CONFIG, params, TOKENIZER, context=64)


@pytest.fixture(scope="module")
def folder(lm, tmp_path_factory):
    path = tmp_path_factory.mktemp("none") / "model"
    save_hf(path, lm.config, lm.params)
    assert not list(path.glob("tokenizer*"))
    return path


def test_ids_go_in_and_out(lm, folder, tmp_path):
    bare = load(folder)
    assert isinstance(bare.tokenizer, MissingTokenizer)
    bare.save(tmp_path / "ours")
    bare.save_hf(tmp_path / "hf")
    for model in (bare, load(tmp_path / "ours"), load(tmp_path / "hf")):
        np.testing.assert_array_equal(model.logits(IDS), lm.logits(IDS))
        np.testing.assert_array_equal(model.logprobs(list(IDS[0])), lm.logprobs(list(IDS[0])))


@pytest.mark.parametrize(
    "asks",
    [
        lambda lm, path: lm.generate("hello"),
        lambda lm, path: list(lm.stream("hello")),
        lambda lm, path: lm.logprobs("hello"),
        lambda lm, path: lm.embed("hello"),
        lambda lm, path: lm.save_gguf(path / "x.gguf"),
        lambda lm, path: lm.tokenizer.decode([1]),
    ],
)
def test_text_needs_a_tokenizer(asks, folder, tmp_path):
    with pytest.raises(UserError, match=r"^tokenizer: the model has none; give one: gptjax.load\(path, tokenizer="):
        asks(load(folder), tmp_path)


def test_another_tokenizer_is_given(lm, folder, tmp_path, capsys):
    TOKENIZER.save(tmp_path / "tokenizer")
    (want,) = lm.generate("hello", 8, temperature=0)
    for given in (TOKENIZER, tmp_path / "tokenizer", str(tmp_path / "tokenizer")):
        assert load(folder, tokenizer=given).generate("hello", 8, temperature=0) == [want]
    load(folder).save(tmp_path / "ours")
    assert load(tmp_path / "ours", tokenizer=TOKENIZER).generate("hello", 8, temperature=0) == [want]
    arguments = ["convert", str(folder), str(tmp_path / "whole"), "--tokenizer", str(tmp_path / "tokenizer")]
    assert main.main(arguments) == 0
    assert load(tmp_path / "whole").generate("hello", 8, temperature=0) == [want]
    large = dataclasses.replace(TOKENIZER, specials={**TOKENIZER.specials, "<x>": 999})
    with pytest.raises(UserError, match=r"^tokenizer: got one of 1000 ids, must be at most 264"):
        load(folder, tokenizer=large)
    params = init_from_pretrained(folder, load(folder).config.build(), TOKENIZER)
    jax.tree.map(np.testing.assert_array_equal, params, lm.params)
