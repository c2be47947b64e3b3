"""Laws of the encoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import apply, drawn, placed

from gptjax.distributed import sharding
from gptjax.distributed.sharding import DEFAULT_RULES, MeshConfig
from gptjax.nn import (
    GELU,
    Encoder,
    EncoderConfig,
    LayerNorm,
    LearnedPositions,
    PostNorm,
    Transform,
    make_cache,
)
from gptjax.types import UserError

PLAIN = EncoderConfig(vocab=32, layers=2, width=16, heads=4)
BERT = dataclasses.replace(
    PLAIN,
    positions=LearnedPositions(16),
    norm=LayerNorm(eps=1e-12),
    mlp=GELU(approximate=False),
    residual=PostNorm(),
    bias=True,
    embedding_norm=LayerNorm(eps=1e-12),
    token_types=2,
    transform=Transform(),
)
TOKENS = jax.random.randint(jax.random.key(7), (4, 12), 0, 32)
# Logits are of size 1 and pass through 2 layers of sums of 16 to 64 float32 products.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture(params=[PLAIN, BERT], ids=["plain", "bert"], scope="module")
def model(request):
    model = Encoder(request.param)
    return model, drawn(model, deviation=0.1)


def test_every_token_sees_every_other(model):
    model, params = model
    logits, _ = apply(model, params, TOKENS)
    for place in (0, 6, 11):
        changed, _ = apply(model, params, TOKENS.at[:, place].add(1) % 32)
        assert (jnp.abs(logits - changed).max(-1) > 1e-5).all()


def test_padding_and_neighbours_change_nothing(model):
    """Two texts in one row, with padding after, read as each alone."""
    model, params = model
    packed = jnp.concatenate([TOKENS[:1, :7], TOKENS[1:2, :3], TOKENS[2:3, :2]], 1)
    segments = jnp.array([[1] * 7 + [2] * 3 + [0] * 2])
    positions = jnp.concatenate([jnp.arange(7), jnp.arange(3), jnp.arange(2)])[None]
    together, _ = apply(model, params, packed, positions, segments)
    first, _ = apply(model, params, TOKENS[:1, :7])
    second, _ = apply(model, params, TOKENS[1:2, :3])
    np.testing.assert_allclose(together[:, :10], jnp.concatenate([first, second], 1), **CLOSE)


def test_a_mesh_changes_nothing(model):
    model, params = model
    expected, _ = apply(model, params, TOKENS)
    with sharding.use(MeshConfig(data=2, fsdp=2, tensor=2).make()):
        sharded = Encoder(model.config, DEFAULT_RULES)
        tokens = sharding.global_array(np.asarray(TOKENS), DEFAULT_RULES)
        params = placed(sharded, params, tokens)
        logits, _ = apply(sharded, params, tokens)
    np.testing.assert_allclose(logits, expected, **CLOSE)


def test_an_encoder_has_no_cache():
    with pytest.raises(UserError, match="model: got EncoderConfig"):
        make_cache(BERT, 1, 4)


@pytest.mark.torch
@pytest.mark.filterwarnings("default")  # theirs are not ours to mend
def test_bert_is_that_of_transformers():
    torch = pytest.importorskip("torch", reason="compares with PyTorch: pip install -e '.[torch]'")
    transformers = pytest.importorskip("transformers", reason="compares with transformers: pip install -e '.[torch]'")
    c = BERT
    theirs = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=c.vocab,
            hidden_size=c.width,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            intermediate_size=c.F,
            max_position_embeddings=16,
        )
    ).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    types = (np.arange(12) > 6).astype(np.int32)[None].repeat(4, 0)
    real = np.arange(12) < np.array([12, 9, 12, 5])[:, None]
    with torch.inference_mode():
        expected = theirs(
            input_ids=torch.tensor(np.asarray(TOKENS)).long(),
            token_type_ids=torch.tensor(types).long(),
            attention_mask=torch.tensor(real).long(),
        ).logits.numpy()
    params = from_bert({name: p.numpy() for name, p in theirs.state_dict().items()}, c)
    model = Encoder(c)
    assert jax.tree.structure(params) == jax.tree.structure(
        jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    )
    logits, _ = apply(model, params, TOKENS, None, jnp.asarray(real, jnp.int32), token_types=types)
    np.testing.assert_allclose(logits[real], expected[real], rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def from_bert(theirs: dict, c: EncoderConfig) -> dict:
    """The parameters of a BertForMaskedLM, under our names."""

    def norm(name: str) -> dict:
        return {"scale": theirs[f"{name}.weight"], "bias": theirs[f"{name}.bias"]}

    def layer(i: int) -> dict:
        at = f"bert.encoder.layer.{i}"
        heads = {}
        for ours, name in (("q", "query"), ("k", "key"), ("v", "value")):
            heads[ours] = theirs[f"{at}.attention.self.{name}.weight"].T.reshape(c.width, c.heads, c.H)
            heads[f"{ours}_bias"] = theirs[f"{at}.attention.self.{name}.bias"].reshape(c.heads, c.H)
        out = f"{at}.attention.output.dense"
        heads |= {"o": theirs[f"{out}.weight"].T.reshape(c.heads, c.H, c.width), "o_bias": theirs[f"{out}.bias"]}
        up, down = f"{at}.intermediate.dense", f"{at}.output.dense"
        mlp = {"up": theirs[f"{up}.weight"].T, "up_bias": theirs[f"{up}.bias"]}
        mlp |= {"down": theirs[f"{down}.weight"].T, "down_bias": theirs[f"{down}.bias"]}
        norms = {"norm_1": norm(f"{at}.attention.output.LayerNorm"), "norm_2": norm(f"{at}.output.LayerNorm")}
        return {"attention": heads, "mlp": mlp, **norms}

    table, head = "bert.embeddings", "cls.predictions"
    after = norm(f"{head}.transform.LayerNorm")
    return {
        "embedding": theirs[f"{table}.word_embeddings.weight"],
        "type_embedding": theirs[f"{table}.token_type_embeddings.weight"],
        "positions": {"table": theirs[f"{table}.position_embeddings.weight"]},
        "embedding_norm": norm(f"{table}.LayerNorm"),
        "blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *map(layer, range(c.layers))),
        "transform": {
            "dense": theirs[f"{head}.transform.dense.weight"].T,
            "dense_bias": theirs[f"{head}.transform.dense.bias"],
            **{f"norm_{name}": leaf for name, leaf in after.items()},
        },
        "head_bias": theirs[f"{head}.bias"],
    }
