"""Every part alone, in a Linen module and in NNX, computes the same."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax.distributed import sharding
from gptjax.distributed.sharding import DEFAULT_RULES, MeshConfig
from gptjax.nn import (
    GRU,
    LSTM,
    LayerNorm,
    LearnedPositions,
    MixtureOfExperts,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    NormedPooler,
    Part,
    Pooler,
    RMSNorm,
    RoPE,
    Sinusoidal,
    Softmax,
    SwiGLU,
    Transform,
    ValueEmbedding,
    ValueResidual,
)

X = jax.random.normal(jax.random.key(0), (2, 5, 16))
POSITIONS = jnp.broadcast_to(jnp.arange(5), (2, 5))
TOKENS = jnp.arange(10).reshape(2, 5)
VALUES = jax.random.normal(jax.random.key(1), (2, 5, 2, 4))
PARTS = {
    RMSNorm(): (X,),
    LayerNorm(): (X,),
    SwiGLU(): (X, 32),
    MixtureOfExperts(experts=4): (X, 8),
    Softmax(): (X, 4, 2),
    MultiHeadAttention(heads=4, head_size=4, positions=RoPE()): (X, POSITIONS),
    MultiHeadLatentAttention(heads=2, head_size=4, kv_rank=8, rope_size=4, value_size=4): (X, POSITIONS),
    LSTM(): (X, POSITIONS),
    GRU(): (X,),
    LearnedPositions(8): (X, POSITIONS),
    Sinusoidal(): (X, POSITIONS),
    ValueEmbedding(vocab=10): (VALUES, X, TOKENS),
    ValueResidual(): (VALUES, X, TOKENS, VALUES + 1),
    Transform(): (X, RMSNorm()),
    Pooler(): (X,),
    NormedPooler(bias=True): (X,),
}


class Own(nn.Module):
    """A Linen module of somebody's own with a part in it."""

    part: Part

    @nn.compact
    def __call__(self, *args):
        return self.part.module(name="part")(*args)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: type(part).__name__)
def test_a_part_is_used_as_a_flax_module(part):
    args = PARTS[part]
    params = part.init(jax.random.key(2), *args)
    expected = part.apply(params, *args)

    nested = {"params": {"part": params["params"]}} if params else {}
    assert jax.tree.map(jnp.shape, Own(part).init(jax.random.key(2), *args)) == jax.tree.map(jnp.shape, nested)
    jax.tree.map(np.testing.assert_array_equal, Own(part).apply(nested, *args), expected)

    module = nnx.bridge.ToNNX(part.module(), rngs=nnx.Rngs(0)).lazy_init(*args)
    own = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    assert own.keys() == params.get("params", {}).keys()
    jax.tree.map(np.testing.assert_array_equal, module(*args), part.apply({"params": own}, *args))


def test_options_of_a_module():
    part, x = SwiGLU(), jnp.ones((4, 5, 16), jnp.bfloat16)
    with sharding.use(MeshConfig(data=2, fsdp=2, tensor=2).make()):
        module = part.module(DEFAULT_RULES, "bfloat16")
        params = jax.jit(module.init, static_argnums=2)(jax.random.key(0), x, 32)["params"]
        assert params["up"].dtype == jnp.float32
        assert params["up"].sharding.spec == DEFAULT_RULES("embed", "ffn")
        assert jax.eval_shape(lambda: module.apply({"params": params}, x, 32)).dtype == jnp.bfloat16


def test_a_norm_per_head_is_one_norm_for_each():
    draw = np.random.default_rng(0)
    x, scale, bias = (draw.normal(size=shape).astype("f") for shape in ((2, 3, 4, 8), (4, 8), (4, 8)))
    together = LayerNorm(per_head=True).apply({"params": {"scale": scale, "bias": bias}}, x)
    for head in range(4):
        own = LayerNorm().apply({"params": {"scale": scale[head], "bias": bias[head]}}, x[:, :, head])
        np.testing.assert_array_equal(together[:, :, head], own)
