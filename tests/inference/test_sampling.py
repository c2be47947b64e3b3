"""The filters equal their definitions written out in numpy, and draws follow the distribution they leave."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.inference.sampling import Sampling, SamplingRows, Seen, argmax, sample
from gptjax.types import UserError

V = 300
SETTINGS = [
    Sampling(),
    Sampling(top_k=5),
    Sampling(top_k=10_000, temperature=0.9),
    Sampling(top_p=0.5),
    Sampling(min_p=0.2),
    Sampling(repetition_penalty=1.7, top_k=40),
    Sampling(frequency_penalty=0.7, presence_penalty=-0.5),
    Sampling(0.8, 30, top_p=0.8, min_p=0.05, repetition_penalty=1.3, frequency_penalty=0.2, presence_penalty=0.3),
]
DRAW = jax.jit(sample)


def draw(logits, keys, settings: Sampling | list[Sampling], seen: Seen | None = None, function=DRAW):
    """Draws with the same settings for all rows, or with those of each."""
    rows, size = logits.shape
    seen = Seen(jnp.zeros((rows, size), bool), jnp.zeros((rows, size), jnp.int32)) if seen is None else seen
    settings = settings if isinstance(settings, list) else [settings] * rows
    return np.asarray(function(logits, keys, SamplingRows.of(settings), seen))


def distribution(logits: np.ndarray, s: Sampling, prompt: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Probabilities [V] by the textbook: every filter in turn, over a full sort."""
    x = logits.astype(np.float64)
    x = np.where(prompt | (counts > 0), np.where(x < 0, x * s.repetition_penalty, x / s.repetition_penalty), x)
    x = (x - s.frequency_penalty * counts - s.presence_penalty * (counts > 0)) / s.temperature
    order = np.argsort(-x)
    if s.top_k is not None:
        x[order[s.top_k :]] = -np.inf
    p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    if s.top_p is not None:
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= s.top_p]] = 0
    if s.min_p is not None:
        p[p < s.min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_follow_the_filtered_distribution(settings):
    logits = np.random.default_rng(0).normal(size=V).astype(np.float32) * 2
    prompt, counts = np.random.default_rng(1).random(V) < 0.2, np.random.default_rng(2).poisson(0.3, V).astype(np.int32)
    want = distribution(logits, settings, prompt, counts)
    n = 5_000
    rows = jnp.broadcast_to(logits, (n, V)), jax.random.split(jax.random.key(0), n)
    got = draw(*rows, settings, Seen(jnp.broadcast_to(prompt, (n, V)), jnp.broadcast_to(counts, (n, V))))
    counts = np.bincount(got, minlength=V)
    assert counts[want == 0].sum() == 0
    common = want * n >= 5  # the rare ones are pooled: chi-square wants about five in each cell
    expected = np.append(want[common], want[~common].sum()) * n
    observed = np.append(counts[common], counts[~common].sum())
    keep = expected > 0
    chi2 = ((observed - expected)[keep] ** 2 / expected[keep]).sum()
    freedom = max(keep.sum() - 1, 1)
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom)  # five standard deviations


def test_the_nucleus_is_exact_at_its_edge_and_never_empty():
    logits = jnp.log(jnp.asarray([[0.5, 0.25, 0.125, 0.125]]))
    keys = jax.random.split(jax.random.key(0), 200)
    for top_p, survivors in [(1e-6, {0}), (0.5, {0}), (0.51, {0, 1}), (0.75, {0, 1}), (0.76, {0, 1, 2, 3})]:
        drawn = draw(jnp.repeat(logits, 200, 0), keys, Sampling(top_p=top_p))
        assert set(drawn.tolist()) == survivors, top_p


def test_greedy_takes_the_first_largest_and_needs_no_randomness():
    logits = jnp.asarray([[0.0, 3.0, 3.0], [-1.0, -2.0, -3.0]])
    keys = jax.random.split(jax.random.key(0))
    assert draw(logits, keys, Sampling(temperature=0)).tolist() == [1, 0]
    assert argmax(jnp.full((1, 4), jnp.nan)).item() < 4
    penalised = Sampling(temperature=0, repetition_penalty=4.0)
    seen = Seen(jnp.asarray([[False, True, True], [True, False, False]]), jnp.zeros((2, 3), jnp.int32))
    assert draw(logits, keys, penalised, seen).tolist() == [1, 1]


def test_a_row_does_not_depend_on_its_neighbours_and_their_settings():
    """And any mixture of settings is the same program."""
    settings = [*SETTINGS, Sampling(temperature=0), Sampling(top_k=1)]
    logits = jax.random.normal(jax.random.key(0), (len(settings), V))
    keys = jax.random.split(jax.random.key(1), len(settings))
    counts = jax.random.randint(jax.random.key(2), logits.shape, 0, 3)
    seen = Seen(counts == 2, counts)
    together = draw(logits, keys, settings, seen)
    before = DRAW._cache_size()
    for i, setting in enumerate(settings):
        neutral = draw(logits, keys, [setting] * len(settings), seen)
        assert neutral[i] == together[i], setting
    assert DRAW._cache_size() == before


def test_top_k_takes_the_first_of_equal_ones():
    logits = jnp.asarray([[1.0, 2.0, 1.0, 2.0, 1.0, -jnp.inf]])
    logits, keys = jnp.repeat(logits, 200, 0), jax.random.split(jax.random.key(0), 200)
    for k, survivors in ((1, {1}), (2, {1, 3}), (3, {0, 1, 3}), (4, {0, 1, 2, 3}), (6, {0, 1, 2, 3, 4})):
        assert set(draw(logits, keys, Sampling(temperature=3.0, top_k=k)).tolist()) == survivors


def test_tokens_of_no_probability_are_never_drawn():
    logits = jnp.full((400, 257), -jnp.inf).at[:, 200].set(0.0).at[:, 131].set(-1.0)
    drawn = draw(logits, jax.random.split(jax.random.key(0), 400), Sampling())
    assert set(drawn.tolist()) == {131, 200}


@pytest.mark.sampled
@pytest.mark.parametrize("compile", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_filters_and_temperatures_at_their_edges_are_greedy(compile):
    """The most likely token has a weight of exactly 1, however the quotient by the temperature is rounded."""
    keys, function = jax.random.split(jax.random.key(5), 64), compile(sample)
    edges = [Sampling(temperature=t, min_p=1.0) for t in (0.1, 0.3, 0.7, 1.3)]
    edges += [Sampling(temperature=t) for t in (1e-6, 1e-8, 1e-10, 1e-20, 1e-38, 1e-45, 1e-300)]
    edges += [Sampling(temperature=1e-9, top_p=0.9, top_k=3), Sampling(temperature=0.7, top_p=1e-9)]
    for seed in range(5):
        logits = np.random.default_rng(seed).normal(size=40).astype(np.float32) * 4
        logits[seed] = np.inf if seed == 4 else logits[seed]
        for settings in edges:
            drawn = draw(jnp.broadcast_to(logits, (64, 40)), keys, settings, function=function)
            np.testing.assert_array_equal(drawn, logits.argmax(), err_msg=str(settings))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("top_k", 0),
        ("top_k", 1.5),
        ("top_p", 0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0),
        ("frequency_penalty", float("inf")),
    ],
)
def test_bad_settings_name_the_field(field, value):
    with pytest.raises(UserError, match=rf"^{field}: got {value}, must be "):
        Sampling(**{field: value})
