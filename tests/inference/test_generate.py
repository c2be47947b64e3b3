"""Cached generation writes what repeated full forward passes write, whatever the batch, the padding and the chunks."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.data.tokenizers import Tokenizer
from gptjax.data.tokenizers.bytes import Bytes
from gptjax.inference import generate as g
from gptjax.inference.generate import generate, round_up, stream
from gptjax.inference.sampling import Sampling, SamplingRows
from gptjax.inference.text import TextStream
from gptjax.nn import LearnedPositions, Positions, RoPE, Transformer, TransformerConfig
from gptjax.types import UserError

TOKENIZER = Bytes().build(iter(()))
PROMPTS = [[5], list(b"hello there"), list(b"Once upon a time")]
GREEDY = Sampling(temperature=0)


@functools.cache
def model_and_params(positions: Positions = RoPE()):
    config = TransformerConfig(vocab=272, layers=2, width=16, heads=2, kv_heads=1, positions=positions)
    model = Transformer(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    numpy = np.random.default_rng(0)  # large weights: greedy choices are clear ones
    params = jax.tree.map(lambda x: jnp.asarray(numpy.normal(0, 0.3, x.shape), jnp.float32), shapes)
    return model, params


def write(prompts, positions: Positions = RoPE(), **options):
    return generate(*model_and_params(positions), TOKENIZER, prompts, **{"max_tokens": 12, **options})


@functools.cache
def full_forward(positions: Positions):
    model, params = model_and_params(positions)
    return jax.jit(lambda tokens: jax.nn.log_softmax(model.apply({"params": params}, tokens)[0]))


def slow_greedy(prompt, steps: int, positions: Positions):
    """Full passes over everything so far; what follows a token can't change it, so one padded shape will do."""
    ids, logprobs = list(prompt), []
    for _ in range(steps):
        rows = full_forward(positions)(jnp.asarray([ids + [0] * (40 - len(ids))]))[0, len(ids) - 1, : TOKENIZER.vocab]
        ids.append(int(rows.argmax()))
        logprobs.append(float(rows.max()))
        if ids[-1] in TOKENIZER.specials.values():
            break
    return ids[len(prompt) :], logprobs


@pytest.mark.parametrize("positions", [RoPE(), LearnedPositions(40)], ids=str)
def test_greedy_equals_repeated_full_forward_passes(positions):
    """And fills the positions there are, when nothing else is said."""
    asked = None if positions.max_positions else 12
    for prompt, got in zip(PROMPTS, write(PROMPTS, positions, max_tokens=asked, sampling=GREEDY), strict=True):
        ids, logprobs = slow_greedy(prompt, asked or 40 - len(prompt), positions)
        assert list(got.ids) == ids
        np.testing.assert_allclose(got.logprobs, logprobs, atol=1e-4)
        assert got.finish == ("stop" if ids[-1] in TOKENIZER.specials.values() else "length")


def test_a_row_does_not_depend_on_its_neighbours_its_batch_or_how_it_is_cut():
    settings = Sampling(temperature=0.9, top_k=50, repetition_penalty=1.2)
    together = write(PROMPTS, sampling=settings, samples=2, seed=7)
    alone = write(PROMPTS[1:2], sampling=settings, samples=2, seed=8)
    assert [c.ids for c in alone] == [c.ids for c in together[2:4]]
    in_parts = write(PROMPTS, sampling=settings, samples=2, seed=7, batch=2)
    assert [c.ids for c in in_parts] == [c.ids for c in together]
    by_chunks = write(PROMPTS, sampling=settings, samples=2, seed=7, max_tokens=16, stop=["never there"])
    assert [c.ids[: len(t.ids)] for c, t in zip(by_chunks, together, strict=True)] == [c.ids for c in together]
    assert len({c.ids for c in together}) == 6, "samples and prompts differ"
    assert [c.ids for c in write(PROMPTS[1:2], sampling=settings, samples=2, seed=9)] != [c.ids for c in alone]


def test_streaming_gives_the_same_text_in_pieces(monkeypatch):
    (whole,) = write([PROMPTS[1]], sampling=GREEDY, max_tokens=16)
    paces = itertools.cycle([1, 3, 2])
    monkeypatch.setattr(g, "_Pace", lambda: lambda: next(paces))
    pieces = stream(*model_and_params(), TOKENIZER, PROMPTS[1], max_tokens=16, sampling=GREEDY)
    text, completion = "", None
    while completion is None:
        try:
            text += next(pieces)
        except StopIteration as end:
            completion = end.value
    assert text == whole.text
    assert completion.ids == whole.ids


def test_a_stop_string_is_cut_off_and_never_shown():
    (whole,) = write([PROMPTS[1]], sampling=GREEDY, max_tokens=16)
    at = len(whole.text) // 2
    stop = whole.text[at : at + 3]
    at = whole.text.index(stop)
    (cut,) = write([PROMPTS[1]], sampling=GREEDY, max_tokens=16, stop=[stop, "never there"])
    assert (cut.text, cut.finish) == (whole.text[:at], "stop")
    assert whole.ids[: len(cut.ids)] == cut.ids
    assert stop in TOKENIZER.decode(cut.ids)
    assert stop not in TOKENIZER.decode(cut.ids[:-1])
    pieces = list(stream(*model_and_params(), TOKENIZER, PROMPTS[1], max_tokens=16, sampling=GREEDY, stop=[stop]))
    assert "".join(pieces) == cut.text


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_text_is_safe_to_show_whatever_the_chunks(size):
    def read(ids: bytes | list[int], stop=(), tokenizer: Tokenizer = TOKENIZER):
        row, shown = TextStream(tokenizer, 100, stop), []
        for chunk in itertools.batched(ids, size) if hasattr(itertools, "batched") else _batched(ids, size):
            row.extend(chunk, [0.0] * len(chunk))
            assert row.safe.startswith("".join(shown))
            shown.append(row.safe[len("".join(shown)) :])
        return row, shown

    row, shown = read("naïve 日本 🙂".encode())
    assert "".join(shown) == row.text == "naïve 日本 🙂"
    assert read("日".encode()[:2])[0].text == ""
    assert read(b"a\xffb")[0].text == "a�b"
    row, shown = read(b"one tw two three", ["two", "wo t"])
    assert (row.text, "".join(shown), len(row.ids)) == ("one tw ", "one tw ", 10)
    row, shown = read(b"xabcd", ["abcd", "bc"])  # "bc" is complete first
    assert (row.text, row.finish, len(row.ids)) == ("xa", "stop", 4)
    row, shown = read(b"almost ab", ["abc"])
    assert "".join(shown) == "almost "
    end = TOKENIZER.specials["<|end|>"]
    row, _ = read([*b"hi", end, *b"more"])
    assert (row.text, row.ids, row.finish) == ("hi", [*b"hi", end], "stop")
    row, _ = read(b"x" * 200)
    assert (len(row.ids), row.finish) == (100, "length")


def _batched(items, size):
    return (tuple(items[i : i + size]) for i in range(0, len(items), size))


def test_learned_positions_bound_the_text():
    with pytest.raises(
        UserError, match=r"^max_tokens: got 21 after a prompt of 20 tokens, must be at most 20: .* 40 pos"
    ):
        write([list(range(20))], LearnedPositions(40), max_tokens=21)
    with pytest.raises(UserError, match=r"^max_tokens: got 1 after a prompt of 50 tokens, must be at most 0"):
        write([list(range(50))], LearnedPositions(40), max_tokens=None)


@pytest.mark.parametrize(
    ("prompts", "options", "field"),
    [
        ([[]], {}, "prompt"),
        ([[272]], {}, "prompt"),
        ([[1]], {"max_tokens": 0}, "max_tokens"),
        ([[1]], {"samples": 0}, "samples"),
        ([[1]], {"stop": "text"}, "stop"),
        ([[1]], {"stop": [""]}, "stop"),
    ],
)
def test_bad_input_names_the_field(prompts, options, field):
    with pytest.raises(UserError, match=f"^{field}: got .*, must "):
        write(prompts, **options)


def test_programs_are_few_and_padded_vocabulary_is_never_drawn():
    model, params = model_and_params()
    padding_likely = {**params, "embedding": params["embedding"].at[TOKENIZER.vocab :].mul(100)}
    before = g.decode._cache_size()
    cases = (1, Sampling(0.5)), (32, Sampling(2.0, min_p=0.01)), (9, Sampling(5.0, top_k=3)), (5, GREEDY)
    for length, settings in cases:
        (text,) = generate(model, padding_likely, TOKENIZER, [list(range(length))], 16, settings)
        assert max(text.ids) < TOKENIZER.vocab
    assert g.decode._cache_size() - before <= 1


def test_sizes_are_few_and_at_most_half_too_large():
    sizes = {n: round_up(n) for n in range(1, 5_000)}
    assert all(n <= size <= max(32, n * 1.5) for n, size in sizes.items())
    assert sorted(set(sizes.values()))[:6] == [32, 48, 64, 96, 128, 192]
    assert len(set(sizes.values())) < 20


def test_states_are_donated():
    model, params = model_and_params()
    tokens, lengths = np.zeros((1, 32), np.int32), np.asarray([3], np.int32)
    state = g.prefill(model, params, tokens, lengths, np.zeros(1, np.uint32), 1, 48, 8, TOKENIZER.vocab)
    g.decode(model, params, state, 2, np.zeros(1, bool), np.zeros(5, np.int32), SamplingRows.of([GREEDY]))
    assert all(x.is_deleted() for x in jax.tree.leaves(state.cache.layers))
