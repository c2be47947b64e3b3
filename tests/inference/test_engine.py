"""The engine writes what each request would get alone, to the bit, whatever else it does."""

import dataclasses
import functools
import random
import re
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.data.tokenizers.bytes import Bytes
from gptjax.inference.constraints import Compiler, Constraint, JsonSchema, Regex
from gptjax.inference.engine import Busy, Engine, Heads, NGram, Request, programs
from gptjax.inference.generate import generate
from gptjax.inference.sampling import Sampling
from gptjax.nn import (
    GRU,
    ALiBi,
    LayerOverrides,
    LearnedPositions,
    MixtureOfExperts,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    MultiTokenConfig,
    RecurrentConfig,
    RMSNorm,
    RoPE,
    T5Bias,
    TransformerConfig,
    unstack,
)
from gptjax.types import UserError

TOKENIZER = Bytes().build(iter(()))
SIZES = {"vocab": 280, "layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "hidden": 32}
BASE = TransformerConfig(**SIZES, positions=RoPE())
CONFIGS = {
    "rope": BASE,
    "learned": dataclasses.replace(BASE, positions=LearnedPositions(200)),
    "alibi": dataclasses.replace(BASE, positions=ALiBi()),
    "t5": dataclasses.replace(BASE, positions=T5Bias()),
    "window": dataclasses.replace(BASE, pattern=(LayerOverrides(window=20), LayerOverrides())),
    "latent": dataclasses.replace(BASE, attention=MultiHeadLatentAttention(kv_rank=8, rope_size=4, value_size=4)),
    "sinks": dataclasses.replace(BASE, attention=MultiHeadAttention(sinks=True, softcap=5.0, qk_norm=RMSNorm())),
    "experts": dataclasses.replace(BASE, mlp=MixtureOfExperts(experts=4, top_k=2, shared=1)),
    "bfloat16": dataclasses.replace(BASE, dtype="bfloat16"),
    "lstm": RecurrentConfig(vocab=280, layers=2, width=16),
    "hybrid": dataclasses.replace(BASE, pattern=(LayerOverrides(), LayerOverrides(attention=GRU()))),
    "heads": MultiTokenConfig(**SIZES, positions=RoPE(), ahead=3),
}
CONTEXT, PAGE, GREEDY = 128, 16, Sampling(temperature=0)
SETTINGS = (
    GREEDY,
    Sampling(0.9, top_k=50),
    Sampling(1.1, top_p=0.9, repetition_penalty=1.2),
    Sampling(0.8, min_p=0.02, frequency_penalty=0.5, presence_penalty=0.2),
)


@functools.cache
def params_of(config: TransformerConfig):
    shapes = jax.eval_shape(config.build().init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    numpy = np.random.default_rng(0)  # large weights: greedy choices are clear ones
    return jax.tree.map(lambda x: jnp.asarray(numpy.normal(0, 0.3, x.shape), jnp.float32), shapes)


def engine(config: TransformerConfig = BASE, params=None, **options) -> Engine:
    params = params_of(config) if params is None else params
    options = {"rows": 4, "context": CONTEXT, "page": PAGE, **options}
    with mock.patch.object(programs, "CHUNK", PAGE // 2):
        return Engine(config.build(), params, TOKENIZER, **options)


@functools.cache
def constraints() -> list[Constraint | None]:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    compiler = Compiler(TOKENIZER, TOKENIZER.vocab)
    return [None, compiler.compile(JsonSchema(schema)), None, None, compiler.compile(Regex("[a-z]{3,9}( [0-9]+)*"))]


def requests(count: int, seed: int = 0) -> list[Request]:
    """Requests of all lengths and settings; some have beginnings in common, some a constraint."""
    draw = random.Random(seed)
    common = [draw.randrange(256) for _ in range(40)]
    made = []
    for i in range(count):
        own = [draw.randrange(256) for _ in range(draw.choice([1, 5, 16, 17, 33, 60]))]
        prompt = tuple(common[: draw.choice([0, 16, 40])] + own)
        bias = {draw.randrange(256): 5.0} if i % 3 == 0 else {}
        options = {"bias": bias, "alternatives": i % 3, "constraint": constraints()[i % 5]}
        max_tokens = draw.randint(1, 25)
        least = min(max_tokens, i % 7)
        made.append(Request(prompt, max_tokens, SETTINGS[i % len(SETTINGS)], seed=i, min_tokens=least, **options))
    return made


def write(on: Engine, asked: list[Request]):
    made = [on.submit(request) for request in asked]
    on.run()
    on.pages.check()
    assert on.pages.free == on.pages.count, "all pages are free when nobody is there"
    return made


def same(a, b) -> None:
    assert (a.text, a.finish, a.tokens) == (b.text, b.finish, b.tokens)


QUICK = "rope", "latent", "experts", "hybrid"


def cases(names, quick=QUICK):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", cases(CONFIGS))
def test_a_text_has_the_bits_that_it_has_alone(name):
    """First and last row, alone and in company, cold and from pages of others, with pages taken away."""
    config, asked = CONFIGS[name], requests(12)
    alone = []
    for request in asked:
        alone += write(engine(config), [request])
    together, busy = engine(config), engine(config, pages=CONTEXT // PAGE + 3)
    for one, other in zip(alone, write(together, asked), strict=True):
        same(one, other)
    hits = together.pages.hits
    for one, other in zip(alone, write(together, asked[::-1])[::-1], strict=True):
        same(one, other)
        assert other.reused == len(other.request.prompt) - 1
    assert together.pages.hits > hits
    for one, other in zip(alone, write(busy, asked), strict=True):
        same(one, other)
    assert busy.preempted > 0, "there were too few pages"
    assert len({text.text for text in alone}) > 8


@pytest.mark.parametrize("name", cases(["rope", "window", "latent", "alibi", "lstm", "hybrid"], quick=["rope"]))
def test_its_texts_and_log_probabilities_are_those_of_generate(name):
    """Logits are sums of some 100 products in float32, in another order."""
    config, asked = CONFIGS[name], [dataclasses.replace(r, bias={}, constraint=None, min_tokens=0) for r in requests(4)]
    for text in write(engine(config), asked):
        r = text.request
        (done,) = generate(
            config.build(), params_of(config), TOKENIZER, [r.prompt], r.max_tokens, r.sampling, seed=r.seed
        )
        assert (text.text, text.finish) == (done.text, done.finish)
        assert tuple(token.id for token in text.tokens) == done.ids
        np.testing.assert_allclose([token.logprob for token in text.tokens], done.logprobs, atol=1e-4)


@pytest.mark.parametrize("name", cases(["rope", "window", "latent", "experts", "bfloat16", "lstm", "hybrid"]))
def test_its_log_probabilities_are_those_of_training(name):
    """The trainer reads the whole text at once. Its logits are sums of some 100 products, in another order: eps of the
    type, times the square root of 100, of the size of logits and log-probabilities. Half of the texts want those after
    the temperature."""
    config, asked = CONFIGS[name], [dataclasses.replace(r, stop_token_ids=()) for r in requests(4, seed=7)]
    asked[2:] = [dataclasses.replace(r, tempered=True) for r in asked[2:]]
    assert asked[2].sampling.temperature not in (0, 1)
    forward = jax.jit(lambda ids: config.build().apply({"params": params_of(config)}, ids)[0].astype(jnp.float32))
    for text in write(engine(config), asked):
        prompt, ids = text.request.prompt, [token.id for token in text.tokens]
        tokens = np.zeros((1, CONTEXT), np.int32)  # what comes after a token changes nothing before it
        tokens[0, : len(prompt) + len(ids)] = [*prompt, *ids]
        logits = forward(tokens)[0, len(prompt) - 1 :][: len(ids)]
        logits /= text.request.sampling.temperature if text.request.tempered else 1
        logprobs = jax.nn.log_softmax(logits)
        expected = np.take_along_axis(logprobs, np.asarray(ids)[:, None], 1)[:, 0]
        largest = max(float(jnp.abs(logits).max()), float(jnp.abs(logprobs).max()))
        atol = 10 * float(jnp.finfo(config.dtype).eps) * largest
        np.testing.assert_allclose([token.logprob for token in text.tokens], expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", cases(["rope", "window", "experts", "bfloat16", "lstm", "hybrid"], quick=["rope"]))
def test_log_probabilities_of_a_prompt_are_those_of_training(name):
    """To the tolerance above, alone and beside others, cold and after the same prompt, with pages taken away."""
    config = CONFIGS[name]
    forward = jax.jit(lambda ids: config.build().apply({"params": params_of(config)}, ids)[0].astype(jnp.float32))
    asked = [dataclasses.replace(r, prompt_logprobs=True, alternatives=3) for r in requests(6, seed=4)]
    asked[1] = dataclasses.replace(asked[1], max_tokens=0, min_tokens=0)
    asked += [Request((5,), 0, prompt_logprobs=True), Request((5, 6), 0, prompt_logprobs=True), *requests(3)]
    on, small = engine(config), engine(config, pages=CONTEXT // PAGE + 3)
    made = write(on, asked)
    for again in (write(on, asked), write(small, asked), write(engine(config, rows=4), asked[::-1])[::-1]):
        for one, other in zip(made, again, strict=True):
            same(one, other)
            assert repr(one.prompt) == repr(other.prompt)  # NaN is not itself
    for text in made[:8]:
        prompt = text.request.prompt
        assert [token.id for token in text.prompt] == list(prompt)
        assert np.isnan(text.prompt[0].logprob)
        assert text.finish in ("length", "stop")
        tokens = np.zeros((1, CONTEXT), np.int32)
        tokens[0, : len(prompt)] = prompt
        logits = forward(tokens)[0, : len(prompt) - 1]
        logprobs = np.asarray(jax.nn.log_softmax(logits))
        largest = max(float(jnp.abs(logits).max(initial=0)), float(np.abs(logprobs).max(initial=0)))
        atol = 10 * float(jnp.finfo(config.dtype).eps) * largest
        expected = logprobs[range(len(prompt) - 1), prompt[1:]]
        np.testing.assert_allclose([token.logprob for token in text.prompt[1:]], expected, rtol=0, atol=atol)
        for token, row in zip(text.prompt[1:], logprobs, strict=True):
            likely = [value for _, value in token.alternatives]
            assert len(likely) == text.request.alternatives
            np.testing.assert_allclose(likely, np.sort(row[: TOKENIZER.vocab])[::-1][: len(likely)], rtol=0, atol=atol)
    assert not made[-1].prompt


@pytest.mark.sampled
@pytest.mark.parametrize(("name", "draft"), [("rope", None), ("hybrid", None), ("heads", Heads(2))])
def test_nothing_is_compiled_while_it_runs(name, draft):
    on = engine(CONFIGS[name], draft=draft)
    on.warm_up()
    names = "admit", "prefill", "copy", "score", "decode"
    before = [getattr(programs, name)._cache_size() for name in names]
    asked = requests(12, seed=5)
    write(on, asked + asked + [dataclasses.replace(request, prompt_logprobs=True) for request in asked])
    assert [getattr(programs, name)._cache_size() for name in names] == before


POOLS = [  # of the quick half, any two values stand together in one case
    pytest.param(name, page, rows, draft, marks=[pytest.mark.slow] * ((i + j + k) % 2))
    for i, (name, page) in enumerate((("rope", 16), ("latent", 16), ("latent", 64), ("lstm", 16)))
    for j, rows in enumerate((1, 4))
    for k, draft in enumerate((None, NGram(3)))
]


@pytest.mark.sampled
@pytest.mark.parametrize(("name", "page", "rows", "draft"), POOLS)
def test_no_program_copies_the_pool(name, page, rows, draft):
    """A copy would cost more than all else: a pool has the size of all texts together."""
    config, pages = CONFIGS[name], 77
    model, params, table = config.build(), unstack(config, params_of(config)), np.zeros((rows, 8), np.int32)
    models = programs.Models(model, params, draft)
    state = programs.idle(models, rows, pages, page, TOKENIZER.vocab, CONTEXT)
    limit, replayed = np.zeros(rows, np.int32), np.zeros((rows, programs.STEPS * 4), np.int32)
    held = np.zeros((rows, 9), np.uint32), np.zeros(rows, bool)
    none = np.zeros(programs.CHUNKS, np.int32)
    chunks = programs.Chunks(
        np.zeros((len(none), programs.CHUNK), np.int32), none, np.zeros((len(none), 8), np.int32), none
    )
    calls = (
        programs.decode.lower(models, state, table, limit, replayed, *held, np.int32(1)),
        programs.prefill.lower(models, state, chunks),
    )
    for call in calls:
        text = call.compile().as_text()
        assert f"f32[{pages}," in text
        copies = [line for line in text.splitlines() if re.search(rf"f32\[{pages},\S* (copy|transpose)\(", line)]
        assert not copies, copies[0]


def test_new_parameters_leave_nothing_of_the_old_ones():
    """Texts in progress keep their tokens, and go on as a fresh engine does with prompt and tokens; prompts that the
    old parameters have read are read anew."""
    new, greedy = jax.tree.map(lambda x: x[..., ::-1], params_of(BASE)), Sampling(temperature=0)
    asked = [dataclasses.replace(r, max_tokens=25, sampling=greedy, **PLAIN) for r in requests(6)]
    on, fresh = engine(), engine(params=new)
    made = [on.submit(request) for request in asked]
    while len(made[0].tokens) < 8:
        on.run_round()
    on.update(new)
    written = [len(text.tokens) for text in made]
    on.run()
    assert min(written) == 0 < max(written) < 25, "some waited, some were in progress"
    for text, request in zip(made, asked, strict=True):
        ids = tuple(token.id for token in text.tokens)
        before = ids[: next(n for n in range(26) if _continues(fresh, request, ids, n))]
        assert len(before) <= programs.STEPS * 2 + max(written), "what was under way still counts"
        assert len(ids) == 25
    for one, other in zip(write(on, asked), write(fresh, asked), strict=True):
        same(one, other)


PLAIN = {"bias": {}, "constraint": None, "min_tokens": 0, "stop_token_ids": (), "alternatives": 0}


def _continues(on: Engine, request: Request, ids: tuple[int, ...], n: int) -> bool:
    """True if the engine writes the tokens from `n` on after the prompt and those before."""
    if n == len(ids):
        return True
    (text,) = write(on, [dataclasses.replace(request, prompt=request.prompt + ids[:n], max_tokens=len(ids) - n)])
    return tuple(token.id for token in text.tokens) == ids[n:]


def test_choices_differ_and_the_first_is_that_of_one():
    prompt = tuple(b"Once upon a time there was a model ")
    asked = [Request(prompt, 12, Sampling(1.5), seed=3, choice=i) for i in range(4)]
    made = write(on := engine(), asked)
    assert len({text.text for text in made}) == 4
    same(made[0], *write(engine(), asked[:1]))
    assert on.pages.hits == 3 * (len(prompt) - 1), "the prompt is read once"


def test_a_cancelled_text_leaves_nothing_behind():
    """Wherever it is: waiting, in its prompt, in its text."""
    asked = requests(8, seed=2)
    expected = write(engine(), asked)
    for rounds in (0, 1, 2, 3, 5, 9, 14):
        on = engine()
        made = [on.submit(request) for request in asked]
        for _ in range(rounds):
            on.run_round()
        for text in made[::2]:
            on.cancel(text)
        on.run()
        on.pages.check()
        assert on.pages.free == on.pages.count
        for text, whole in zip(made, expected, strict=True):
            if text.finish == "cancelled":
                assert whole.text.startswith(text.text)
            else:
                same(text, whole)
        for text, whole in zip(write(on, asked), expected, strict=True):
            same(text, whole)


def test_a_thread_writes_and_pieces_are_the_text():
    on = engine()
    on.start()
    try:
        asked = requests(6, seed=3)
        made = [on.submit(request) for request in asked]
        assert ["".join(text) for text in made] == [text.text for text in made]
        expected = write(engine(), asked)
        for text, whole in zip(made, expected, strict=True):
            assert text.wait(0)
            same(text, whole)
    finally:
        on.close()
    assert threading.active_count() < 50


def test_a_program_may_end_while_it_writes():
    writing = (
        "import test_engine as t; on = t.engine(); on.start(); "
        "next(iter(on.submit(t.Request((65,), 120, stop_token_ids=()))))"
    )
    ended = subprocess.run([sys.executable, "-c", writing], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2_000:]


def test_clients_are_served_fairly():
    """One that floods the queue at most doubles the wait of another."""
    on = engine(rows=1)
    flood = [on.submit(Request((i,), 8, GREEDY, client="flood", stop_token_ids=())) for i in range(20)]
    one = on.submit(Request((99,), 8, GREEDY, client="one", stop_token_ids=()))
    urgent = on.submit(Request((98,), 8, GREEDY, client="flood", priority=1, stop_token_ids=()))
    while one.finish is None:
        on.run_round()
    assert urgent.finish is not None
    assert sum(text.finish is not None for text in flood) <= 2
    on.run()


def test_a_client_shares_pages_with_itself_alone():
    prompt = tuple(range(100))
    on = engine()
    for client, reused in (("a", 0), ("b", 0), ("a", 99), ("b", 99)):
        (text,) = write(on, [Request(prompt, 2, GREEDY, client=client)])
        assert text.reused == reused


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": ()}, "prompt"),
        ({"prompt": (280,)}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"max_tokens": CONTEXT}, "max_tokens"),
        ({"seed": -1}, "seed"),
        ({"alternatives": 21}, "alternatives"),
        ({"stop": ("",)}, "stop"),
        ({"bias": {1: float("inf")}}, "bias"),
    ],
)
def test_bad_requests_name_the_field(fields, field):
    with pytest.raises(UserError, match=f"^{field}: got .*, must "):
        engine().submit(Request(**{"prompt": (1,), "max_tokens": 4, **fields}))


def test_what_it_cannot_do_is_refused():
    for option, value, limit in (("pages", 7, "least 8"), ("page", 20, "most 8"), ("context", 0, "least 1")):
        with pytest.raises(UserError, match=f"^{option}: got {value}, must be at {limit}"):
            engine(**{option: value})
    with pytest.raises(UserError, match=r"^context: got none"):
        engine(context=None)
    on = engine(queue=1)
    on.submit(Request((1,), 2))
    with pytest.raises(Busy, match=r"^requests: got 1 that wait"):
        on.submit(Request((1,), 2))
    on.run()
