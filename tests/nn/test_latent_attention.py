"""Multi-head latent attention: its equation, and that decoding over latents is the same thing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import apply

from gptjax.nn import Mask, MultiHeadLatentAttention, RMSNorm, RoPE
from gptjax.types import UserError

B, T, D = 2, 7, 10
N, H, R, P, V = 3, 4, 6, 2, 5
X = jax.random.normal(jax.random.key(0), (B, T, D))
POSITIONS = jnp.broadcast_to(jnp.arange(T), (B, T))
PART = MultiHeadLatentAttention(heads=N, head_size=H, kv_rank=R, rope_size=P, value_size=V, positions=RoPE(), bias=True)
PARTS = {
    "plain": PART,
    "query latent": dataclasses.replace(PART, q_rank=8, norm=RMSNorm(eps=1e-3)),
    "window and scale": dataclasses.replace(PART, window=3, scale=0.9, bias=False),
}
# float32 sums of some tens of products, three in a row
CLOSE = {"rtol": 3e-5, "atol": 3e-5}


@pytest.fixture(params=PARTS, scope="module")
def layer(request):
    layer = PARTS[request.param]
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), X, POSITIONS))["params"]
    random = np.random.default_rng(1)
    return layer, {name: np.float32(random.normal(size=leaf.shape) * 0.5) for name, leaf in shapes.items()}


def equation(part: MultiHeadLatentAttention, params, x) -> np.ndarray:
    """One row [T, D] in float64: every head's keys and values written out."""
    w = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}

    def norm(name, c):
        return c / np.sqrt((c**2).mean(-1, keepdims=True) + part.norm.eps) * w[f"{name}_scale"]

    def project(name, x):
        return x @ w[name] + w.get(f"{name}_bias", 0.0)

    def turn(pairs):
        """[T, 2], by one radian a position."""
        angle = np.arange(len(pairs))
        a, b = pairs.T
        return np.stack([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    x = np.asarray(x, np.float64)
    c, r = norm("kv_norm", project("kv_latent", x)), turn(project("k_rope", x))
    q_of = x if part.q_rank is None else norm("q_norm", project("q_latent", x))
    distance = np.arange(T)[:, None] - np.arange(T)
    visible = (distance >= 0) & (distance < (part.window or T))
    heads = []
    for n in range(N):
        q = q_of @ w["q"][:, n]
        q = np.concatenate([q[:, :H], turn(q[:, H:])], -1)
        k = np.concatenate([c @ w["k"][:, n], r], -1)
        scores = np.where(visible, q @ k.T * (part.scale or (H + P) ** -0.5), -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(p / p.sum(-1, keepdims=True) @ c @ w["v"][:, n])
    return np.einsum("NTV,NVD->TD", np.stack(heads), w["o"]) + w.get("o_bias", 0.0)


def test_it_is_the_papers(layer):
    layer, params = layer
    y, _ = apply(layer, params, X, POSITIONS)
    for b in range(B):
        np.testing.assert_allclose(y[b], equation(layer, params, X[b]), **CLOSE)


def test_decoding_over_latents_is_the_same(layer):
    """In pieces, from a cache of nothing but latents and one key for all heads."""
    layer, params = layer
    expected, _ = apply(layer, params, X, POSITIONS)
    cache = layer.init_cache(B, T + 2, D)
    assert cache.size == B * (T + 2) * (R + P)
    pieces, start = [], 0
    for size in (3, 1, 1, 2):
        part = slice(start, start + size)
        y, cache = apply(layer, params, X[:, part], POSITIONS[:, part], Mask(offset=start), cache)
        pieces.append(y)
        start += size
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), expected, **CLOSE)


def test_it_can_read_another_sequence():
    """Cross-attention: keys and values of the source, which has no positions to turn."""
    layer = PART
    source = jax.random.normal(jax.random.key(3), (B, 4, D))
    params = jax.jit(layer.init)(jax.random.key(0), X, POSITIONS, encoder_output=source)["params"]
    params = jax.tree.map(lambda p: p * 30, params)
    y, _ = apply(layer, params, X, POSITIONS, Mask(causal=False), encoder_output=source)
    turned, _ = apply(layer, params, X, POSITIONS[:, ::-1], Mask(causal=False), encoder_output=source[:, ::-1])
    assert y.shape == X.shape
    np.testing.assert_allclose(y, turned, rtol=1e-4, atol=1e-4)


def test_products_count_the_matrices(layer):
    layer, params = layer
    matrices = sum(p.size for name, p in params.items() if not name.endswith(("bias", "scale")))
    assert layer.matmul_params(D, 0) == matrices
    seen = min(5, layer.window or 5)
    assert layer.matmul_params(D, 5) - layer.matmul_params(D, 0) == seen * N * (H + P + V)


def test_a_bad_field_is_named():
    for field, value in {"kv_rank": 0, "rope_size": 3, "q_rank": 0}.items():
        with pytest.raises(UserError, match=f"model.attention.{field}: got {value}"):
            MultiHeadLatentAttention(**{field: value})


@pytest.mark.torch
@pytest.mark.parametrize("q_rank", [None, 12])
def test_it_is_what_transformers_computes(q_rank):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as m

    N, H, R, P, V, D = 4, 6, 8, 4, 5, 16
    sizes = {"qk_nope_head_dim": H, "qk_rope_head_dim": P, "v_head_dim": V, "kv_lora_rank": R, "q_lora_rank": q_rank}
    config = m.DeepseekV3Config(hidden_size=D, num_attention_heads=N, num_key_value_heads=N, **sizes)
    config._attn_implementation = "eager"
    theirs = m.DeepseekV3Attention(config, 0).eval()
    generator = torch.Generator().manual_seed(0)
    for tensor in theirs.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
    w = {name: tensor.numpy().T for name, tensor in theirs.state_dict().items()}  # [in, out]

    q = w["q_proj.weight" if q_rank is None else "q_b_proj.weight"].reshape(-1, N, H + P)
    kv = w["kv_b_proj.weight"].reshape(R, N, H + V)
    params = {
        "q": q,
        "kv_latent": w["kv_a_proj_with_mqa.weight"][:, :R],
        "k_rope": w["kv_a_proj_with_mqa.weight"][:, R:],
        "kv_norm_scale": w["kv_a_layernorm.weight"],
        "k": kv[..., :H],
        "v": kv[..., H:],
        "o": w["o_proj.weight"].reshape(N, V, D),
    }
    if q_rank is not None:
        params |= {"q_latent": w["q_a_proj.weight"], "q_norm_scale": w["q_a_layernorm.weight"]}

    x = jax.random.normal(jax.random.key(0), (B, T, D))
    angles = torch.arange(T)[:, None] * 10_000.0 ** (-torch.arange(0, P, 2) / P)
    angles = torch.cat([angles, angles], -1)[None]
    mask = torch.full((T, T), -1e30).triu(1)[None, None]
    with torch.no_grad():
        expected, *_ = theirs(torch.from_numpy(np.array(x)), (angles.cos(), angles.sin()), mask)
    part = MultiHeadLatentAttention(
        heads=N, head_size=H, q_rank=q_rank, kv_rank=R, rope_size=P, value_size=V, positions=RoPE(interleaved=True)
    )
    y, _ = part.apply({"params": params}, x, POSITIONS)
    np.testing.assert_allclose(y, expected.numpy(), rtol=1e-4, atol=1e-5 * np.abs(expected.numpy()).max())
