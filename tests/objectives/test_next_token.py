"""The next-token loss and its cross entropy, against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.distributed.sharding import MeshConfig, use
from gptjax.kernels.cross_entropy import cross_entropy
from gptjax.objectives import NextToken
from gptjax.types import Batch, UserError

B, T, V = 4, 6, 16


def reference(logits, targets):
    """nll, logsumexp and the softmax, in float64."""
    x = np.asarray(logits, np.float64)
    top = x.max(-1, keepdims=True)
    logsumexp = np.log(np.exp(x - top).sum(-1)) + top[..., 0]
    return (
        logsumexp - np.take_along_axis(x, targets[..., None], -1)[..., 0],
        logsumexp,
        np.exp(x - logsumexp[..., None]),
    )


def draw(scale: float = 3.0, dtype="float32"):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(0, scale, (B, T, V)), dtype), rng.integers(0, V, (B, T), np.int32)


@pytest.mark.parametrize(("scale", "dtype"), [(3.0, "float32"), (1e4, "float32"), (3.0, "bfloat16")])
def test_cross_entropy_and_its_gradient(scale, dtype):
    logits, targets = draw(scale, dtype)
    nll, logsumexp, softmax = reference(logits, targets)
    got = jax.jit(cross_entropy)(logits, targets)
    assert [x.dtype for x in got] == ["float32", "float32"]
    np.testing.assert_allclose(got[0], nll, rtol=1e-6, atol=1e-6 * scale)
    np.testing.assert_allclose(got[1], logsumexp, rtol=1e-6, atol=1e-6 * scale)

    weights = np.random.default_rng(1).random((2, B, T)).astype(np.float32)

    def weighted(logits):
        return sum(jnp.sum(w * x) for w, x in zip(weights, cross_entropy(logits, targets), strict=True))

    gradient = jax.jit(jax.grad(weighted))(logits)
    assert gradient.dtype == dtype
    expected = weights.sum(0)[..., None] * softmax - weights[0][..., None] * np.eye(V)[targets]
    # at 1e4 the float32 logsumexp is off by up to 1e4 * 2**-24, and softmax by as much
    tolerance = 2**-8 if dtype == "bfloat16" else 1e-6 * max(1, scale / 3)
    np.testing.assert_allclose(np.asarray(gradient, np.float64), expected, atol=tolerance)


def test_sharded_vocabulary():
    logits, targets = draw()
    both = jax.value_and_grad(lambda logits, targets: jnp.sum(cross_entropy(logits, targets)[0]))
    alone = jax.device_get(jax.jit(both)(logits, targets))
    mesh = MeshConfig(fsdp=2, context=2, tensor=2).make()
    spec = PartitionSpec(("data", "fsdp"), None, "tensor")
    with use(mesh):
        logits = jax.device_put(logits, NamedSharding(mesh, spec))
        targets = jax.device_put(targets, NamedSharding(mesh, PartitionSpec(*spec[:2])))
        value, gradient = jax.jit(both)(logits, targets)
    assert gradient.sharding.spec == spec
    np.testing.assert_allclose(value, alone[0], rtol=1e-6)
    np.testing.assert_allclose(gradient, alone[1], atol=1e-6)


def batch_of(targets, weights) -> Batch:
    tokens = np.roll(targets, 1, axis=1)
    return Batch(tokens, targets, weights, np.ones((B, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (B, 1)))


def apply(variables, tokens, positions, segments, mutable, rngs=None):
    """A model of one table: what it was given can be seen in its logits."""
    assert rngs is None or set(rngs) == {"dropout"}
    seen = jnp.asarray(tokens + positions + segments - 1) % V
    noise = 0 if rngs is None else jax.random.normal(rngs["dropout"], (B, T, V))
    return (variables["params"]["table"][seen] + noise, None), {}


def test_loss_is_the_weighted_sum_and_its_weight():
    logits, targets = draw()
    weights = np.random.default_rng(2).integers(0, 2, (B, T)).astype(np.float32)
    batch, params = batch_of(targets, weights), {"table": logits.reshape(-1, V)[:V]}
    nll, logsumexp, softmax = reference(apply({"params": params}, batch.tokens, batch.positions, 1, [])[0][0], targets)

    def loss(params):
        metrics = NextToken(z_loss=0.1)(apply, params, batch, None)
        return metrics["loss"][0], metrics

    (_, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert float(metrics["loss"][1]) == float(metrics["cross_entropy"][1]) == weights.sum()
    np.testing.assert_allclose(metrics["cross_entropy"][0], (weights * nll).sum(), rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"][0], (weights * (nll + 0.1 * logsumexp**2)).sum(), rtol=1e-6)

    d_logits = weights[..., None] * ((1 + 0.2 * logsumexp)[..., None] * softmax - np.eye(V)[targets])
    expected = np.zeros((V, V))
    np.add.at(expected, (batch.tokens + batch.positions) % V, d_logits)
    np.testing.assert_allclose(gradient["table"], expected, atol=1e-5)


def test_a_key_means_dropout():
    logits, targets = draw()
    batch, params = batch_of(targets, np.ones((B, T), np.float32)), {"table": logits.reshape(-1, V)[:V]}
    plain, one, same, other = (
        float(NextToken()(apply, params, batch, key)["loss"][0])
        for key in (None, jax.random.key(0), jax.random.key(0), jax.random.key(1))
    )
    assert one == same
    assert len({plain, one, other}) == 3


def test_z_loss_is_not_negative():
    with pytest.raises(UserError, match=r"^objective\.z_loss: got -1"):
        NextToken(z_loss=-1)


def test_what_parts_add_is_in_the_loss_and_has_its_own_name():
    logits, targets = draw()
    batch, params = batch_of(targets, np.full((B, T), 0.5, np.float32)), {"table": logits.reshape(-1, V)[:V]}

    def adding(variables, *args, **kwargs):
        return apply(variables, *args, **kwargs)[0], {"losses": {"blocks": {"balance": jnp.float32(0.25)}}}

    plain, added = (NextToken()(f, params, batch) for f in (apply, adding))
    weight = B * T * 0.5
    assert [float(x) for x in added["balance"]] == [0.25 * weight, weight]
    np.testing.assert_allclose(added["loss"][0] - plain["loss"][0], 0.25 * weight, rtol=1e-5)
    np.testing.assert_allclose(added["cross_entropy"][0], plain["cross_entropy"][0])
