"""Laws of the encoder-decoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import apply, drawn, placed

from gptjax.data.tokenizers import Bytes
from gptjax.distributed import sharding
from gptjax.distributed.sharding import DEFAULT_RULES, MeshConfig
from gptjax.inference.sampling import Sampling
from gptjax.inference.sequence_to_sequence import generate_targets
from gptjax.nn import (
    EncoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    GeGLU,
    LayerNorm,
    MultiHeadAttention,
    PostNorm,
    ReLU,
    RMSNorm,
    Sinusoidal,
    T5Bias,
    TransformerConfig,
    encoder_decoder,
)
from gptjax.types import UserError

SIZES = {"vocab": 32, "layers": 2, "width": 16, "heads": 4}
VASWANI = SIZES | {
    "positions": Sinusoidal(),
    "norm": LayerNorm(),
    "mlp": ReLU(),
    "residual": PostNorm(),
    "bias": True,
    "embedding_scale": 4.0,
}
ORIGINAL = EncoderDecoderConfig(
    EncoderConfig(**VASWANI),
    TransformerConfig(**VASWANI, cross_attention=MultiHeadAttention(kv_heads=2), tie_embeddings=False),
)
ROTARY = EncoderDecoderConfig(
    EncoderConfig(**SIZES),
    TransformerConfig(**SIZES | {"layers": 3}, cross_attention=MultiHeadAttention(qk_norm=RMSNorm())),
)
TOKENIZER = Bytes().build(iter(()))
SOURCE = jax.random.randint(jax.random.key(6), (4, 9), 0, 32)
TOKENS = jax.random.randint(jax.random.key(7), (4, 8), 0, 32)
# Logits are of size 1 and pass through 4 layers of sums of 16 to 64 float32 products.
CLOSE = {"rtol": 5e-5, "atol": 5e-5}


@pytest.fixture(params=[ORIGINAL, ROTARY], ids=["original", "rotary"], scope="module")
def model(request):
    model = EncoderDecoder(request.param)
    return model, drawn(model, TOKENS, deviation=0.08)


def test_the_target_is_causal_and_the_source_is_not(model):
    model, params = model
    logits, _ = apply(model, params, TOKENS, source=SOURCE)
    changed, _ = apply(model, params, TOKENS.at[:, 4].add(1) % 32, source=SOURCE)
    np.testing.assert_array_equal(logits[:, :4], changed[:, :4])
    assert (jnp.abs(logits[:, 4:] - changed[:, 4:]).max(-1) > 1e-5).all()
    for place in (0, 8):
        changed, _ = apply(model, params, TOKENS, source=SOURCE.at[:, place].add(1) % 32)
        assert (np.abs(logits - changed).max(-1) > 1e-5).all()


@pytest.mark.sampled
def test_cached_decoding_equals_the_full_forward(model):
    """With sources of different lengths, in pieces, without the source being read again."""
    model, params = model
    real = (jnp.arange(9) < jnp.array([9, 5, 1, 7])[:, None]).astype(jnp.int32)
    expected, _ = apply(model, params, TOKENS, source=SOURCE, source_segments=real)
    layers = model.config.unstack(params)
    cache = jax.jit(encoder_decoder.encode, static_argnums=(0, 3))(model, layers, SOURCE, 10, segments=real)
    nowhere = {**layers, "encoder": None}
    pieces = []
    for start, size in ((0, 1), (1, 4), (5, 3)):
        logits, cache = apply(model, nowhere, TOKENS[:, start : start + size], cache=cache)
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), expected, **CLOSE)
    for row, length in enumerate((9, 5, 1, 7)):  # padding is as if it were not there
        alone, _ = apply(model, params, TOKENS[row : row + 1], source=SOURCE[row : row + 1, :length])
        np.testing.assert_allclose(expected[row], alone[0], **CLOSE)


def test_packed_pairs_equal_single_ones(model):
    model, params = model
    tokens = jnp.concatenate([TOKENS[:1, :5], TOKENS[1:2, :3]], 1)
    source = jnp.concatenate([SOURCE[:1, :3], SOURCE[1:2, :6]], 1)
    places = lambda *sizes: jnp.concatenate([jnp.arange(n) for n in sizes])[None]  # noqa: E731
    which = lambda *sizes: jnp.repeat(jnp.arange(1, 3), jnp.array(sizes))[None]  # noqa: E731
    given = {"source": source, "source_positions": places(3, 6), "source_segments": which(3, 6)}
    together, _ = apply(model, params, tokens, places(5, 3), which(5, 3), **given)
    first, _ = apply(model, params, TOKENS[:1, :5], source=SOURCE[:1, :3])
    second, _ = apply(model, params, TOKENS[1:2, :3], source=SOURCE[1:2, :6])
    np.testing.assert_allclose(together, jnp.concatenate([first, second], 1), **CLOSE)


def test_a_mesh_changes_nothing(model):
    model, params = model
    expected, _ = apply(model, params, TOKENS, source=SOURCE)
    with sharding.use(MeshConfig(data=2, fsdp=2, tensor=2).make()):
        sharded = EncoderDecoder(model.config, DEFAULT_RULES)
        tokens, source = (sharding.global_array(np.asarray(x), DEFAULT_RULES) for x in (TOKENS, SOURCE))
        params = placed(sharded, params, tokens)
        logits, _ = apply(sharded, params, tokens, source=source)
        cache = jax.jit(encoder_decoder.encode, static_argnums=(0, 3))(sharded, params, source, 8)
        cached, _ = apply(sharded, params, tokens, cache=cache)
    np.testing.assert_allclose(logits, expected, **CLOSE)
    np.testing.assert_allclose(cached, expected, **CLOSE)


@pytest.mark.sampled
def test_greedy_responses_are_those_of_the_full_forward(model):
    model, params = model
    sources = [SOURCE[row, :length].tolist() for row, length in enumerate((9, 5, 2))]
    got = generate_targets(
        model,
        params,
        TOKENIZER,
        sources,
        decoder_start_token_id=0,
        stop_token_ids=(),
        max_tokens=6,
        sampling=Sampling(temperature=0),
    )
    got = [list(completion.ids) for completion in got]
    for source, ids in zip(sources, got, strict=True):
        # Causal: the logits before what is not written yet are what they will be.
        logits, _ = apply(model, params, jnp.array([[0, *ids]]), source=jnp.array([source]))
        assert ids == jnp.argmax(logits[0, :-1], -1).tolist()
    (alone,) = generate_targets(model, params, TOKENIZER, sources[1:2], 0, (), 6, Sampling(temperature=0))
    assert list(alone.ids) == got[1]
    end = got[0][2]
    stopped = generate_targets(
        model,
        params,
        TOKENIZER,
        sources,
        decoder_start_token_id=0,
        stop_token_ids=(end,),
        max_tokens=6,
        sampling=Sampling(temperature=0),
    )
    for completion, ids in zip(stopped, got, strict=True):
        assert list(completion.ids) == (ids[: ids.index(end) + 1] if end in ids else ids)
        assert completion.finish == ("stop" if end in ids else "length")


def test_bad_fields_are_named():
    with pytest.raises(UserError, match=r"model\.decoder\.cross_attention: got none"):
        EncoderDecoderConfig(EncoderConfig(**SIZES), TransformerConfig(**SIZES))
    with pytest.raises(UserError, match=r"model\.decoder\.vocab: got 33"):
        dataclasses.replace(ROTARY, decoder=dataclasses.replace(ROTARY.decoder, vocab=33))
    model = EncoderDecoder(ROTARY)
    params = drawn(model, TOKENS)
    with pytest.raises(UserError, match="source: got none"):
        model.apply({"params": params}, TOKENS)


def test_cross_attention_and_both_stacks_count():
    """6 FLOPs for each weight of a matrix product."""
    params = drawn(EncoderDecoder(ROTARY), TOKENS)
    matrices = sum(p.size for p in jax.tree.leaves(params) if p.ndim > 2) + params["embedding"].size
    assert ROTARY.flops(0) == 6 * matrices


@pytest.mark.torch
@pytest.mark.filterwarnings("default")  # theirs are not ours to mend
@pytest.mark.parametrize("gated", [False, True], ids=["t5", "t5-1.1"])
def test_t5_is_that_of_transformers(gated):
    torch = pytest.importorskip("torch", reason="compares with PyTorch: pip install -e '.[torch]'")
    transformers = pytest.importorskip("transformers", reason="compares with transformers: pip install -e '.[torch]'")
    attention = MultiHeadAttention(scale=1.0)
    common = SIZES | {
        "hidden": 24,
        "head_size": 6,
        "positions": T5Bias(buckets=8, max_distance=16),
        "norm": RMSNorm(eps=1e-6),
        "mlp": GeGLU() if gated else ReLU(),
        "attention": attention,
    }
    head = {"tie_embeddings": False} if gated else {"logit_scale": 16**-0.5}
    config = EncoderDecoderConfig(
        EncoderConfig(**common), TransformerConfig(**common, cross_attention=attention, **head)
    )
    theirs = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=32,
            d_model=16,
            d_kv=6,
            d_ff=24,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=16,
            feed_forward_proj="gated-gelu" if gated else "relu",
            tie_word_embeddings=not gated,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    ).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim > 1 else 0.1) + (p.ndim == 1))
    real = np.arange(9) < np.array([9, 5, 1, 7])[:, None]
    source, mask = torch.tensor(np.asarray(SOURCE)).long(), torch.tensor(real).long()
    with torch.inference_mode():
        tokens = torch.tensor(np.asarray(TOKENS)).long()
        expected = theirs(input_ids=source, attention_mask=mask, decoder_input_ids=tokens).logits.numpy()
        written = theirs.generate(input_ids=source, attention_mask=mask, max_new_tokens=12, do_sample=False).tolist()
    params = from_t5({name: p.numpy() for name, p in theirs.state_dict().items()}, config)
    model = EncoderDecoder(config)
    assert jax.tree.structure(params) == jax.tree.structure(
        jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    )
    logits, _ = apply(model, params, TOKENS, source=SOURCE, source_segments=jnp.asarray(real, jnp.int32))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    sources = [row[keep].tolist() for row, keep in zip(np.asarray(SOURCE), real, strict=True)]
    ours = generate_targets(
        model,
        params,
        TOKENIZER,
        sources,
        decoder_start_token_id=0,
        stop_token_ids=(1,),
        max_tokens=12,
        sampling=Sampling(temperature=0),
    )
    assert [list(x.ids) for x in ours] == [row[1 : row.index(1) + 1] if 1 in row else row[1:] for row in written]


def from_t5(theirs: dict, config: EncoderDecoderConfig) -> dict:
    """The parameters of a T5ForConditionalGeneration, under our names."""

    def layer(half: str, i: int, c: TransformerConfig) -> dict:
        at = f"{half}.block.{i}.layer"

        def attention(name: str) -> dict:
            heads = {w: theirs[f"{name}.{w}.weight"].T.reshape(c.width, c.heads, c.H) for w in "qkv"}
            return heads | {"o": theirs[f"{name}.o.weight"].T.reshape(c.heads, c.H, c.width)}

        last = 1 if c.cross_attention is None else 2
        dense = f"{at}.{last}.DenseReluDense"
        names = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if c.mlp.gated else {"up": "wi", "down": "wo"}
        return {
            "attention": attention(f"{at}.0.SelfAttention"),
            **({} if c.cross_attention is None else {"cross_attention": attention(f"{at}.1.EncDecAttention")}),
            "mlp": {ours: theirs[f"{dense}.{name}.weight"].T for ours, name in names.items()},
            **{f"norm_{n + 1}": {"scale": theirs[f"{at}.{n}.layer_norm.weight"]} for n in range(last + 1)},
        }

    def stack(half: str, c: TransformerConfig) -> dict:
        layers = [layer(half, i, c) for i in range(c.layers)]
        table = theirs[f"{half}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        return {
            "blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *layers),
            "relative": {"table": table},
            "norm": {"scale": theirs[f"{half}.final_layer_norm.weight"]},
        }

    decoder = stack("decoder", config.decoder)
    if not config.decoder.tie_embeddings:
        decoder["head"] = theirs["lm_head.weight"].T
    return {"embedding": theirs["shared.weight"], "encoder": stack("encoder", config.encoder), "decoder": decoder}
