"""Position encodings against their published formulas, written out in numpy, and against transformers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.distributed import sharding
from gptjax.distributed.sharding import DEFAULT_RULES, MeshConfig
from gptjax.nn import (
    ALiBi,
    LayerOverrides,
    LearnedPositions,
    LinearScaling,
    Llama3Scaling,
    LongRoPE,
    Mask,
    NTKScaling,
    Positions,
    RoPE,
    Scaling,
    Sinusoidal,
    T5Bias,
    TransformerConfig,
    YaRN,
)
from gptjax.nn.positions import scaling
from gptjax.types import UserError

SCALINGS = {
    "none": Scaling(),
    "linear": LinearScaling(4.0),
    "NTK": NTKScaling(4.0),
    "YaRN": YaRN(16.0, 256),
    "YaRN as in DeepSeek-V3": YaRN(40.0, 4_096, mscale=1.0, mscale_all_dim=0.7),
    "YaRN as in gpt-oss": YaRN(32.0, 4_096, truncate=False, attention_factor=1.2),
    "YaRN at one pair": YaRN(4.0, 16, beta_fast=2.0, beta_slow=1.9, truncate=False),
    "Llama 3": Llama3Scaling(),
    "LongRoPE": LongRoPE(
        tuple(np.linspace(1, 2, 16)), tuple(np.linspace(1, 60, 16)), original_length=4_096, factor=32.0
    ),
    "LongRoPE, short": LongRoPE(
        tuple(np.linspace(1, 2, 16)), tuple(np.linspace(1, 60, 16)), original_length=4_096, factor=32.0, length=4_096
    ),
}
ROPES = {
    "half-split": RoPE(),
    "interleaved": RoPE(interleaved=True),
    "partial": RoPE(fraction=0.25),
    "clockwise": RoPE(clockwise=True),
    "all": RoPE(theta=500.0, scaling=YaRN(8.0, 16), fraction=0.5, interleaved=True),
}


def bias(positions: Positions, distance, heads: int = 4, causal: bool = True):
    """The biases [N, T, S] and the parameters behind them."""
    params = positions.init(jax.random.key(0), distance, heads, causal, method="bias")
    return positions.apply(params, distance, heads, causal, method="bias"), params.get("params")


def test_sinusoidal_is_the_papers():
    """PE(pos, 2i) = sin(pos / 10000^(2i/d)), PE(pos, 2i+1) = cos(pos / 10000^(2i/d)), section 3.5."""
    d, positions = 12, np.array([[0, 1, 2, 50, 1000]])
    added = Sinusoidal()(None, jnp.zeros((1, 5, d)), jnp.asarray(positions))
    for t, pos in enumerate(positions[0]):
        for i in range(d // 2):
            angle = pos / 10000 ** (2 * i / d)
            # the angle itself is float32: 1000 rad has 6e-5 of rounding
            np.testing.assert_allclose(added[0, t, 2 * i], np.sin(angle), atol=1e-4)
            np.testing.assert_allclose(added[0, t, 2 * i + 1], np.cos(angle), atol=1e-4)


def test_learned_positions_are_a_table():
    x = jnp.ones((1, 3, 4))
    table = LearnedPositions(8)
    params = table.init(jax.random.key(0), x, jnp.array([[5, 0, 7]]))
    y = table.apply(params, x, jnp.array([[5, 0, 7]]))
    np.testing.assert_allclose(y, 1 + params["params"]["table"][jnp.array([[5, 0, 7]])])
    later = LearnedPositions(5, offset=3).apply(params, x, jnp.array([[2, 0, 4]]))
    np.testing.assert_allclose(later, 1 + params["params"]["table"][jnp.array([[5, 3, 7]])])


RELATIVE = ROPES | {"ALiBi": ALiBi(), "T5": T5Bias(), "T5, small": T5Bias(buckets=8, max_distance=6)}


@pytest.mark.parametrize("name", RELATIVE)
@pytest.mark.parametrize("causal", [True, False])
def test_scores_depend_on_distance_alone(name, causal):
    """Shift all positions and slots: the scores stay. Move a key alone: they change."""
    encoding, T = RELATIVE[name], 9
    q, k = jax.random.normal(jax.random.key(1), (2, 1, T, 4, 16))

    def scores(shift: int, keys: int = 0):
        places = shift + jnp.arange(T)[None]
        y = jnp.einsum("BTNH,BSNH->NTS", encoding.rotate(q, places), encoding.rotate(k, places - keys))
        distance = Mask(offset=shift, causal=causal).distance(T, shift + T)[:, shift:]
        added, _ = bias(encoding, distance + keys, causal=causal)
        return y if added is None else y + added

    for shift in (1, 17, 300):
        # Angles of some hundreds of radians have 3e-5 of rounding in float32.
        np.testing.assert_allclose(scores(shift), scores(0), rtol=1e-4, atol=3e-4)
    assert jnp.abs(scores(0, keys=1) - scores(0)).max() > 1e-3


@pytest.mark.parametrize("name", ROPES)
def test_rope_is_rotation_by_position(name):
    """A pair as a complex number times exp(i pos f), arXiv:2104.09864 equation 13; what is not turned stays."""
    rope = ROPES[name]
    x = jax.random.normal(jax.random.key(0), (1, 6, 2, 16))
    positions = jnp.array([[0, 1, 2, 3, 10, 100]])
    size = {"partial": 4, "all": 8}.get(name, 16)
    first, second = (
        (np.s_[0:size:2], np.s_[1:size:2]) if rope.interleaved else (np.s_[: size // 2], np.s_[size // 2 : size])
    )
    y = np.asarray(rope.rotate(x, positions))
    pair = np.asarray(x[..., first], np.complex128) + 1j * np.asarray(x[..., second])
    frequency = rope.theta ** (-2 * np.arange(size // 2) / size)
    if name == "all":  # pair 0 makes more than one turn in 16 tokens, the others fewer
        frequency /= [1, 8, 8, 8]
        pair *= 0.1 * math.log(8) + 1
    if name == "clockwise":
        frequency *= -1
    expected = pair * np.exp(1j * np.asarray(positions)[0, :, None, None] * frequency)
    np.testing.assert_allclose(y[..., first] + 1j * y[..., second], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(y[..., size:], x[..., size:])


def test_scaled_frequencies_are_the_published_ones():
    R, theta = 32, 10_000.0
    plain = np.array([theta ** (-2 * i / R) for i in range(R // 2)])
    get = {name: s.frequencies(theta, R) for name, s in SCALINGS.items()}
    np.testing.assert_allclose(get["none"], plain)
    np.testing.assert_allclose(get["linear"], plain / 4)
    # the lowest frequency is divided by the factor, the highest not, and their ratios are equal: arXiv:2309.00071, 3.1
    np.testing.assert_allclose(get["NTK"], plain * 4 ** (-np.arange(16) / 15))
    # arXiv:2309.00071, section 3.2, with the authors' program for the ramp between turns of 32 and 1
    low, high = (R * math.log(256 / (2 * math.pi * turns)) / (2 * math.log(theta)) for turns in (32, 1))
    for i, f in enumerate(get["YaRN"]):
        ramp = min(max((i - math.floor(low)) / (math.ceil(high) - math.floor(low)), 0), 1)
        assert f == pytest.approx((1 - ramp) * plain[i] + ramp * plain[i] / 16)
    assert SCALINGS["YaRN"].amplitude ** 2 == pytest.approx((0.1 * math.log(16) + 1) ** 2)
    # the program of Llama 3.1, case by case
    for f, p in zip(get["Llama 3"], plain, strict=True):
        wavelength = 2 * math.pi / p
        if wavelength < 8192 / 4:
            expected = p
        elif wavelength > 8192 / 1:
            expected = p / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected = (1 - smooth) * p / 8 + smooth * p
        assert f == pytest.approx(expected)
    # arXiv:2402.13753 and Phi-3
    np.testing.assert_allclose(get["LongRoPE"], plain / np.linspace(1, 60, 16))
    np.testing.assert_allclose(get["LongRoPE, short"], plain / np.linspace(1, 2, 16))
    assert SCALINGS["LongRoPE"].amplitude == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))


def theirs(s: Scaling) -> dict:
    """A scaling as `rope_parameters` of a transformers configuration."""
    match s:
        case LinearScaling():
            return {"rope_type": "linear", "factor": s.factor}
        case YaRN():
            extra = {} if s.mscale is None else {"mscale": s.mscale, "mscale_all_dim": s.mscale_all_dim}
            return extra | {
                "rope_type": "yarn",
                "factor": s.factor,
                "original_max_position_embeddings": s.original_length,
                "beta_fast": s.beta_fast,
                "beta_slow": s.beta_slow,
                "attention_factor": s.attention_factor,
                "truncate": s.truncate,
            }
        case Llama3Scaling():
            return {
                "rope_type": "llama3",
                "factor": s.factor,
                "low_freq_factor": s.low,
                "high_freq_factor": s.high,
                "original_max_position_embeddings": s.original_length,
            }
        case LongRoPE():
            return {
                "rope_type": "longrope",
                "factor": s.factor,
                "short_factor": list(s.short),
                "long_factor": list(s.long),
                "original_max_position_embeddings": s.original_length,
            }
    return {"rope_type": "dynamic", "factor": 1.0}  # whose base changes by the length over the configured one


@pytest.mark.torch
@pytest.mark.filterwarnings("default")  # theirs are not ours to mend
@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_scalings_are_those_of_transformers(name, fraction):
    pytest.importorskip("torch", reason="compares with PyTorch: pip install -e '.[torch]'")
    transformers = pytest.importorskip("transformers", reason="compares with transformers: pip install -e '.[torch]'")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    ours = SCALINGS[name]
    length = {"LongRoPE": 131_072, "NTK": 4 * 64}.get(name, 64)
    parameters = theirs(ours) | {"rope_theta": 10_000.0, "partial_rotary_factor": fraction}
    size = int(32 / fraction)
    config = transformers.LlamaConfig(
        hidden_size=size, num_attention_heads=1, head_dim=size, max_position_embeddings=64, rope_parameters=parameters
    )
    expected, amplitude = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len=length)
    # Theirs is a float32 power: its exponent, times ln(10,000), has 6e-7 of rounding; the ramps double that.
    np.testing.assert_allclose(ours.frequencies(10_000.0, 32), expected.numpy(), rtol=2e-6)
    assert ours.amplitude == pytest.approx(amplitude)


@pytest.mark.torch
@pytest.mark.filterwarnings("default")
def test_partial_rope_is_that_of_transformers():
    torch = pytest.importorskip("torch", reason="compares with PyTorch: pip install -e '.[torch]'")
    pytest.importorskip("transformers", reason="compares with transformers: pip install -e '.[torch]'")
    from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as interleaved_rotary_pos_emb

    x = jax.random.normal(jax.random.key(0), (2, 7, 3, 16))
    places = jnp.arange(7)[None] + jnp.array([[0], [20]])
    angle = np.asarray(places, np.float32)[..., None] * Scaling().frequencies(10_000.0, 4).astype(np.float32)
    cos, sin = (torch.tensor(f(np.concatenate([angle, angle], -1))) for f in (np.cos, np.sin))
    q = torch.tensor(np.asarray(x)).transpose(1, 2)
    expected, _ = apply_rotary_pos_emb(q, q, cos, sin)
    np.testing.assert_allclose(RoPE(fraction=0.25).rotate(x, places), expected.transpose(1, 2), rtol=1e-5, atol=1e-5)
    cos, sin = (torch.tensor(f(angle)) for f in (np.cos, np.sin))
    expected = interleaved_rotary_pos_emb(torch.tensor(np.asarray(x[..., :4])), sin, cos)
    y = RoPE(fraction=0.25, interleaved=True).rotate(x, places)
    np.testing.assert_allclose(y[..., :4], expected, rtol=1e-5, atol=1e-5)


def test_yarn_multiplies_scores_by_the_square_of_its_amplitude():
    x = jax.random.normal(jax.random.key(0), (1, 1, 1, 16))
    turned = RoPE(scaling=YaRN(40.0, 4_096)).rotate(x, jnp.array([[3]]))
    np.testing.assert_allclose(jnp.sum(turned**2) / jnp.sum(x**2), scaling.mscale(40.0) ** 2, rtol=1e-5)


@pytest.mark.parametrize("heads", [1, 3, 4, 8, 12, 16, 40])
def test_alibi_is_the_papers(heads):
    """-m (t - s), section 3: for 8 heads m = 1/2, 1/4, ... 1/256; for 16 the same with the means between; else those of
    the power of 2 below and every other of those of the power above, as in its program."""

    def slopes(n: int) -> list[float]:
        if n & (n - 1) == 0:
            start = 2 ** (-(2 ** -(math.log2(n) - 3)))
            return [start * start**i for i in range(n)]
        below = 2 ** math.floor(math.log2(n))
        return slopes(below) + slopes(2 * below)[::2][: n - below]

    if heads == 8:
        np.testing.assert_allclose(slopes(8), [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256])
    distance = np.arange(5)[:, None] - np.arange(5)
    added, params = bias(ALiBi(), jnp.asarray(distance), heads)
    assert params is None
    np.testing.assert_allclose(added, -np.array(slopes(heads))[:, None, None] * abs(distance), rtol=1e-6)


def test_t5_bias_is_the_papers():
    """A table of 32 buckets: the first half one a distance, the rest in steps of 8^(1/16) up to 128; both ways, half of
    the buckets are for each side."""
    distance = np.array([[0, 1, 15, 16, 17, 18, 20, 21, 127, 128, 1000]])
    expected = np.array([[0, 1, 15, 16, 16, 16, 17, 18, 31, 31, 31]])
    np.testing.assert_array_equal(T5Bias().bucket(distance), expected)
    np.testing.assert_array_equal(
        T5Bias().bucket(np.array([0, 3, -3, 8, 11, 12, -12, 127, -127]), causal=False), [0, 3, 19, 8, 8, 9, 25, 15, 31]
    )
    added, params = bias(T5Bias(), jnp.asarray(distance))
    assert params["table"].shape == (32, 4)
    np.testing.assert_allclose(added, np.asarray(params["table"])[expected].transpose(2, 0, 1))


@pytest.mark.torch
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (8, 20), (64, 512)])
def test_t5_bias_is_that_of_transformers(causal, buckets, furthest):
    torch = pytest.importorskip("torch", reason="compares with PyTorch: pip install -e '.[torch]'")
    transformers = pytest.importorskip("transformers", reason="compares with transformers: pip install -e '.[torch]'")
    from transformers.models.t5.modeling_t5 import T5Attention

    sizes = {"relative_attention_num_buckets": buckets, "relative_attention_max_distance": furthest}
    config = transformers.T5Config(d_model=16, d_kv=4, num_heads=4, is_decoder=causal, **sizes)
    attention = T5Attention(config, has_relative_attention_bias=True)
    T = 600
    added, params = bias(T5Bias(buckets, furthest), Mask().distance(T, T), causal=causal)
    with torch.no_grad():
        attention.relative_attention_bias.weight.copy_(torch.tensor(np.asarray(params["table"])))
        expected = attention.compute_bias(T, T)[0].numpy()
    np.testing.assert_array_equal(added, expected)


@pytest.mark.parametrize("encoding", [ALiBi(), T5Bias()])
def test_biases_and_their_gradient_are_sharded_by_heads(encoding):
    distance = Mask().distance(6, 6)
    layer = encoding.module(DEFAULT_RULES, method="bias")
    expected, params = bias(encoding, distance)
    weights = jax.random.normal(jax.random.key(1), (4, 6, 6))
    loss = lambda layer, p: jnp.sum(layer.apply({"params": p} if p else {}, distance, 4) * weights)  # noqa: E731
    gradient = jax.grad(lambda p: loss(encoding.module(method="bias"), p))(params) if params else None
    with sharding.use(MeshConfig(data=2, fsdp=2, tensor=2).make()):
        place = jax.NamedSharding(jax.sharding.get_mesh(), DEFAULT_RULES(None, "heads"))
        params = jax.device_put(params, place) if params else None
        added = layer.apply({"params": params} if params else {}, distance, 4)
        assert added.sharding.spec == jax.P("tensor", None, None)
        np.testing.assert_array_equal(added, expected)
        if params:
            sharded = jax.jit(jax.grad(lambda p: loss(layer, p)))(params)
            np.testing.assert_allclose(sharded["table"], gradient["table"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: RoPE(fraction=0.0), "positions.fraction: got 0.0"),
        (lambda: RoPE(theta=1.0), "positions.theta: got 1.0"),
        (lambda: RoPE(fraction=0.2).check(16), r"positions.fraction: got 0.2, which rotates 3 of 16"),
        (lambda: RoPE(fraction=0.1).check(8), r"which rotates 0 of 8"),
        (lambda: RoPE(scaling=LongRoPE((1.0,), (1.0,), 8, 2.0)).check(8), "positions.scaling.short: got 1 numbers"),
        (lambda: RoPE(scaling=NTKScaling(2.0)).check(2), "got NTKScaling"),
        (lambda: LinearScaling(0.5), "positions.scaling.factor: got 0.5"),
        (lambda: YaRN(2.0, 8, beta_fast=1.0), "positions.scaling.beta_slow: got 1.0"),
        (lambda: Llama3Scaling(low=5.0), "positions.scaling.low: got 5.0"),
        (lambda: T5Bias(buckets=31), "positions.buckets: got 31"),
        (lambda: T5Bias(max_distance=16), "positions.max_distance: got 16"),
        (
            lambda: TransformerConfig(8, 2, 16, 4, pattern=(LayerOverrides(positions=ALiBi()),)),
            r"model.pattern: got ALiBi\(\)",
        ),
    ],
)
def test_a_bad_field_is_named(make, field):
    with pytest.raises(UserError, match=field):
        make()
