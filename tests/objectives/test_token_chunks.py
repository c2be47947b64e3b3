"""Deferred logits have the values and gradients of whole ones, on meshes too, and never exist as a whole."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.distributed import sharding
from gptjax.distributed.sharding import DEFAULT_RULES, MeshConfig, ShardingRules
from gptjax.kernels.cross_entropy import DeferredLogits, cross_entropy, entropy
from gptjax.nn import Transformer, TransformerConfig
from gptjax.objectives import NextToken
from gptjax.objectives.parts import per_token, weighted_sums
from gptjax.types import Batch

B, T, D, V = 8, 6, 16, 32


def draw(dtype: str, **fields) -> tuple[DeferredLogits, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    hidden, unembedding, bias = (jnp.asarray(rng.normal(size=s), dtype) for s in ((B, T, D), (D, V), (V,)))
    deferred = DeferredLogits(hidden, unembedding, bias if fields.pop("bias", False) else None, **fields)
    return deferred, rng.integers(0, V, (B, T), np.int32), rng.random((B, T), np.float32)


def of_tokens(logits, targets):
    nll, logsumexp = cross_entropy(logits, targets)
    return nll + 0.1 * logsumexp**2, entropy(logits, logsumexp)


def summed(deferred, targets, weights, chunk, trained=("hidden", "unembedding", "bias")):
    """Sums, and the gradient of twice the first, to some arrays of `deferred`."""

    def loss(of):
        sums = weighted_sums(of_tokens, dataclasses.replace(deferred, **of), weights, targets, chunk=chunk)
        return 2 * sums[0], sums

    of = {name: x for name in trained if (x := getattr(deferred, name)) is not None}
    (_, sums), gradient = jax.value_and_grad(loss, has_aux=True)(of)
    return sums, gradient


def by_token(deferred, targets, weights, chunk):
    """Values, and the gradient of a function of all of them."""

    def loss(deferred):
        nll, entropies = values = per_token(of_tokens, deferred, targets, chunk=chunk)
        return jnp.sum(jnp.square(jnp.sum(weights * nll, -1))) + jnp.sum(weights * entropies), values

    (_, values), gradient = jax.value_and_grad(loss, has_aux=True)(deferred)
    return values, gradient


@pytest.mark.parametrize("computed", [summed, by_token])
@pytest.mark.parametrize(
    ("dtype", "fields"), [("float32", {}), ("float32", {"scale": 0.5, "softcap": 3.0, "bias": True}), ("bfloat16", {})]
)
def test_chunks_equal_the_whole(computed, dtype, fields):
    given = draw(dtype, **fields)
    whole, chunked = (jax.jit(functools.partial(computed, chunk=chunk))(*given) for chunk in (B * T, 7))
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(chunked), strict=True):
        assert one.dtype == other.dtype
        one, other = (np.asarray(x, np.float64) for x in (one, other))
        # float32: sums in another order. bfloat16: a gradient is rounded once here, and for each product there.
        bound = 2e-6 if dtype == "float32" else 2.0**-7
        np.testing.assert_allclose(other, one, rtol=bound, atol=bound * np.abs(one).max())


def test_no_gradient_is_computed_of_what_is_not_trained():
    """The gradient of a frozen unembedding would be a third of the head's FLOPs."""
    deferred, targets, weights = draw("float32")
    both, hidden = (
        jax.jit(functools.partial(summed, chunk=8, trained=trained)).lower(deferred, targets, weights).compile()
        for trained in (("hidden", "unembedding"), ("hidden",))
    )
    flops = [compiled.cost_analysis()["flops"] for compiled in (both, hidden)]
    assert flops[0] - flops[1] > 2 * 8 * D * V * 0.9  # of one chunk: a loop's body is counted once


CONFIG = TransformerConfig(vocab=V, layers=1, width=D, heads=2, logit_softcap=5.0)


def batch() -> Batch:
    rng = np.random.default_rng(1)
    tokens, targets = rng.integers(0, V, (2, B, T), np.int32)
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    return Batch(tokens, targets, rng.random((B, T), np.float32), np.ones((B, T), np.int32), positions)


def trained(chunk: int | None, rules: ShardingRules = ShardingRules(), tied: bool = False):
    """Compiled gradient of a model's loss, (params, batch) -> (loss, gradient), and the model."""
    model = Transformer(dataclasses.replace(CONFIG, tie_embeddings=tied), rules)

    def loss(params, batch):
        return NextToken(z_loss=1e-2, chunk=chunk)(model.apply, params, batch)["loss"][0]

    return jax.jit(jax.value_and_grad(loss)), model


def test_a_compiled_loss_has_no_array_of_all_logits():
    tokens = batch()
    for chunk, found in ((None, True), (T, False)):
        gradient, model = trained(chunk)
        params = jax.eval_shape(model.init, jax.random.key(0), tokens.tokens)["params"]
        text = gradient.lower(params, tokens).compile().as_text()
        sizes = {np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"\w\[([\d,]+)\]", text)}
        assert (B * T * V in sizes) == found


@pytest.mark.parametrize(
    ("mesh", "tied"), [({"data": 2, "fsdp": 2, "tensor": 2}, False), ({"fsdp": 4, "context": 2}, True)]
)
def test_a_mesh_changes_nothing(mesh, tied):
    gradient, model = trained(None, tied=tied)
    params = jax.jit(model.init)(jax.random.key(0), batch().tokens)["params"]
    expected = gradient(params, batch())
    made = MeshConfig(**{"data": 1} | mesh).make()
    with sharding.use(made):
        gradient, model = trained(4, DEFAULT_RULES, tied)
        given = sharding.global_array(batch(), DEFAULT_RULES)
        own = jax.jit(model.init)(jax.random.key(0), given.tokens)["params"]
        params = jax.device_put(jax.device_get(params), jax.tree.map(lambda x: x.sharding, own))
        got = gradient(params, given)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5 * np.abs(one).max())
