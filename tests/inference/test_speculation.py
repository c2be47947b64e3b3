"""Speculation changes no text: only the number of passes that it takes."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from test_engine import CONFIGS, CONTEXT, PAGE, QUICK, TOKENIZER, cases, engine, params_of, requests, same, write

from gptjax.cli.serve import Writing
from gptjax.inference.engine import DraftModel, Heads, NGram, Request, programs
from gptjax.inference.sampling import Sampling
from gptjax.models.language_model import LanguageModel
from gptjax.models.loading import load
from gptjax.nn import LearnedPositions
from gptjax.objectives import MultiToken
from gptjax.train import state as train_state
from gptjax.train.step import make_step
from gptjax.types import Batch, UserError

SMALL = dataclasses.replace(CONFIGS["rope"], layers=1)
NAMES = "rope", "window", "latent", "experts", "alibi", "bfloat16", "hybrid", "heads"


def drafts(name):
    """Guesses from the text, of the model itself and, for one model as for all, of others; of a model's own heads."""
    if name == "heads":
        return {"heads": Heads(3)}
    other, cell, itself = (DraftModel(c.build(), params_of(c), 3) for c in (SMALL, CONFIGS["lstm"], CONFIGS[name]))
    return {"n-gram": NGram(4), "itself": itself} | ({"other": other, "recurrent": cell} if name == "rope" else {})


def long_requests():
    """Requests of all settings and constraints, and one whose text repeats itself."""
    asked = [dataclasses.replace(request, stop_token_ids=()) for request in requests(10, seed=8)]
    return [*asked, Request(tuple(b"one two three " * 5), 40, Sampling(temperature=0), stop_token_ids=())]


@pytest.mark.sampled
@pytest.mark.parametrize("name", cases(NAMES, (*QUICK, "heads")))
def test_texts_are_those_without_speculation(name):
    """To the token; log-probabilities to roundings of another program. (A router, or bfloat16, may round to another
    choice: those are compared up to the first difference.)"""
    config, asked = CONFIGS[name], long_requests()
    plain = engine(config)
    expected, exact = write(plain, asked), name not in ("experts", "bfloat16")
    assert plain.passes == plain.written
    atol = 1e-4 if config.dtype == "float32" else 0.3
    for kind, draft in drafts(name).items():
        on = engine(config, draft=draft)
        equal = 0
        for one, other in zip(expected, write(on, asked), strict=True):
            a, b = ([token.id for token in text.tokens] for text in (one, other))
            equal += a == b
            n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            logprobs = ([token.logprob for token in text.tokens[:n]] for text in (one, other))
            np.testing.assert_allclose(*logprobs, atol=atol)
            assert one.finish == other.finish or not exact
        assert equal == len(asked) if exact else equal > len(asked) // 2
        if kind == "itself":
            assert on.written > 1.5 * on.passes, "most guesses are right, but for limits, penalties, constraints"


@pytest.mark.sampled
@pytest.mark.parametrize("kind", ["n-gram", "other", "heads"])
def test_a_text_has_the_bits_that_it_has_alone(kind):
    """Guesses come at other places of a pass when a text is read again: that changes no bit either."""
    name = "heads" if kind == "heads" else "rope"
    config, draft, asked = CONFIGS[name], drafts(name)[kind], long_requests()
    alone = []
    for request in asked:
        alone += write(engine(config, draft=draft), [request])
    together, busy = (engine(config, draft=draft, pages=pages) for pages in (None, CONTEXT // PAGE + 3))
    for on in (together, together, busy):
        for one, other in zip(alone, write(on, asked), strict=True):
            same(one, other)
    assert busy.preempted > 0
    assert together.pages.hits > 0


def test_guesses_from_the_text_save_passes():
    asked = Request(tuple(b"abcdefgh" * 8), 48, Sampling(temperature=0), stop_token_ids=())
    on = engine(draft=NGram(4))
    write(on, [dataclasses.replace(asked, bias={i: -100.0 for i in range(256) if i not in b"ab"})])
    assert on.passes < on.written / 2


@pytest.mark.alone
def test_trained_heads_save_passes():
    """Letters in turn: each head knows its own, and a guess for another place never counts."""
    config, ids = dataclasses.replace(CONFIGS["heads"], layers=1), np.frombuffer(b"abcdefgh" * 9, np.uint8)
    tokens = np.stack([ids[i : i + 64] for i in range(8)]).astype(np.int32)
    ones = np.ones_like(tokens)
    targets = np.stack([ids[i + 1 : i + 65] for i in range(8)]).astype(np.int32)
    batch = Batch(tokens, targets, ones.astype(np.float32), ones, np.cumsum(ones, 1, dtype=np.int32) - 1)
    model, optimizer = config.build(), optax.adam(1e-2)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    state = train_state.create(params, optimizer, jax.random.key(1))
    step = make_step(MultiToken(), model.apply, optimizer)
    for _ in range(100):
        state, _ = step(state, batch)
    for sampling in (Sampling(temperature=0), Sampling(0.5)):
        asked = [Request(tuple(b"abcdefghabc"), 48, sampling, stop_token_ids=())]
        (plain,) = write(engine(config, state.params), asked)
        assert plain.text.startswith("defghabc" * 4)
        for guesses in (1, 3):
            on = engine(config, state.params, draft=Heads(guesses))
            (text,) = write(on, asked)
            assert text.text == plain.text
            assert on.passes <= 48 / (1 + guesses) + 3


def test_a_saved_model_is_served_with_its_heads(tmp_path):
    lm = LanguageModel(CONFIGS["heads"], params_of(CONFIGS["heads"]), TOKENIZER, context=CONTEXT)
    lm.save(tmp_path / "model")
    asked = Request(tuple(b"Once upon a time"), 20, Sampling(temperature=0), stop_token_ids=())
    (expected,) = write(engine(CONFIGS["heads"]), [asked])
    on = Writing(rows=4, page=PAGE, draft="heads").engine(load(tmp_path / "model"), tmp_path, {})
    text = on.submit(asked)
    assert text.wait(60)
    on.close()
    assert text.text == expected.text
    assert lm.draft() == Heads(3)
    assert lm.draft(guesses=2) == Heads(2)


def test_nothing_is_compiled_while_it_runs():
    on = engine(draft=drafts("rope")["other"])
    on.warm_up()
    names = "admit", "prefill", "score", "decode"
    before = [getattr(programs, name)._cache_size() for name in names]
    asked = long_requests()
    write(on, asked + [dataclasses.replace(request, prompt_logprobs=True) for request in asked])
    assert [getattr(programs, name)._cache_size() for name in names] == before


def test_drafts_that_do_not_fit_are_refused():
    params = params_of(SMALL)
    short = dataclasses.replace(SMALL, vocab=100)
    with pytest.raises(UserError, match=r"^draft: got a model of 100 tokens, must have the tokenizer's 261"):
        engine(draft=DraftModel(short.build(), params))
    few = dataclasses.replace(SMALL, positions=LearnedPositions(64))
    with pytest.raises(UserError, match=r"^draft: got a model of 64 positions, must have at least 128"):
        engine(draft=DraftModel(few.build(), params))
    with pytest.raises(UserError, match=r"^draft: got heads with a TransformerConfig, must be with a MultiTokenConfig"):
        engine(draft=Heads(1))
    with pytest.raises(UserError, match=r"^guesses: got 4, must be at most 3, the number of extra heads"):
        engine(CONFIGS["heads"], draft=Heads(4))
    lm = LanguageModel(SMALL, params, TOKENIZER)
    other = LanguageModel(SMALL, params, TOKENIZER.with_specials(["<|new|>"]))
    assert lm.draft(lm, 2).tokens == 2
    with pytest.raises(UserError, match=r"^draft: got a model with another tokenizer"):
        lm.draft(other)
    with pytest.raises(UserError, match=r"^tokens: got 0, must be at least 1"):
        NGram(0)
