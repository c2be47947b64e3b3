"""Adapters beside one model: each request's text is that of the model with its adapter merged."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_engine import CONFIGS, TOKENIZER, cases, engine, params_of, requests, same, write

from gptjax.distributed.parameters import parameter_info
from gptjax.inference.engine import Engine, NGram
from gptjax.nn import DoRA, LoRA
from gptjax.types import UserError


def adapters_of(config):
    """Two adapters, of different ranks and matrices, whose factors change the text."""
    info, params, made = parameter_info(config.build()), params_of(config), {}
    for seed, (name, lora) in enumerate(
        {
            "a": LoRA(4, match=("attention/q", "attention/o")),
            "b": LoRA(2, alpha=4, match=("q", "mlp/up", "mlp/down"), rank_stabilised=True),
        }.items()
    ):
        leaves, tree = jax.tree.flatten(lora.init(jax.random.key(0), params, info))
        numpy = np.random.default_rng(seed)
        drawn = [jnp.asarray(numpy.normal(0, 0.2, leaf.shape), jnp.float32) for leaf in leaves]
        made[name] = lora, jax.tree.unflatten(tree, drawn)
    return made


def mixed():
    names = (None, "a", "b")
    return [dataclasses.replace(request, adapter=names[i % 3]) for i, request in enumerate(requests(9, seed=6))]


@pytest.mark.parametrize("name", cases(["rope", "window"]))
@pytest.mark.parametrize("draft", [None, NGram(3)], ids=["plain", "draft"])
def test_a_text_is_that_of_the_merged_model(name, draft):
    """Log-probabilities to roundings, as the products come in another order."""
    config = CONFIGS[name]
    adapters, asked = adapters_of(config), mixed()
    on = engine(config, adapters=adapters, draft=draft)
    made = write(on, asked)
    merged = {None: params_of(config)} | {n: lora.merge(params_of(config), x) for n, (lora, x) in adapters.items()}
    texts = set()
    for text in made:
        request = dataclasses.replace(text.request, adapter=None)
        alone = Engine(config.build(), merged[text.request.adapter], TOKENIZER, rows=4, context=128, page=16)
        (expected,) = write(alone, [request])
        assert [token.id for token in text.tokens] == [token.id for token in expected.tokens]
        logprobs = [[token.logprob for token in one.tokens] for one in (text, expected)]
        np.testing.assert_allclose(*logprobs, atol=2e-4)
        texts.add(text.text)
    for request, text in zip(asked, made, strict=True):
        same(text, *write(engine(config, adapters=adapters, draft=draft), [request]))
    assert len(texts) > 6


def test_adapters_share_no_pages():
    on, prompt = engine(adapters=adapters_of(CONFIGS["rope"])), tuple(range(100))
    for adapter, reused in ((None, 0), ("a", 0), ("b", 0), ("a", 99), (None, 99)):
        request = dataclasses.replace(requests(1)[0], prompt=prompt, max_tokens=2, min_tokens=0, adapter=adapter)
        (text,) = write(on, [request])
        assert text.reused == reused


def test_adapters_that_do_not_fit_are_refused():
    config = CONFIGS["rope"]
    lora, tree = adapters_of(config)["a"]
    with pytest.raises(UserError, match=r"^adapters: got DoRA in x, must be LoRA"):
        engine(adapters={"x": (DoRA(4), tree)})
    with pytest.raises(UserError, match=r"^adapters: got blocks/other in x, must be of this model"):
        engine(adapters={"x": (lora, {"blocks": {"other": tree["blocks"]["attention"]["q"]}})})
    with pytest.raises(UserError, match=r"^adapter: got c, must be one of a"):
        engine(adapters={"a": (lora, tree)}).submit(dataclasses.replace(requests(1)[0], adapter="c"))
