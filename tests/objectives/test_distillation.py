"""Divergences from a teacher equal their equations and trl's, are 0 where both models agree, and have the same gradient
however a step is split."""

import ast
import dataclasses
import importlib.util
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.distributed import sharding
from gptjax.distributed.sharding import DEFAULT_RULES, MeshConfig
from gptjax.nn import Transformer, TransformerConfig
from gptjax.objectives import Distillation, OnPolicyDistillation
from gptjax.protocols import Pretrained
from gptjax.types import Batch, Episodes, FrozenModel, UserError

B, T, V = 8, 4, 32
TEACHER = Pretrained("somewhere")
STUDENT = TransformerConfig(vocab=V, layers=1, width=16, heads=2)
LARGER = TransformerConfig(vocab=V, layers=1, width=32, heads=4)


def logits(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (B, T, V)).astype(np.float32)


def batch() -> Batch:
    rng = np.random.default_rng(2)
    tokens, targets = rng.integers(0, V, (2, B, T), np.int32)
    weights = (rng.random((B, T)) < np.linspace(0.2, 1, B)[:, None]).astype(np.float32)
    return Batch(tokens, targets, weights, np.ones((B, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (B, 1)))


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_divergences_are_trls(beta):
    torch = pytest.importorskip("torch")
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("needs the files of trl: pip install 'gptjax[torch]'")
    # trl 1.16, read and not imported: its trainer needs much that this function does not
    tree = ast.parse((Path(spec.origin).parent / "experimental/gkd/gkd_trainer.py").read_text())
    found = [x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef) and x.name == "generalized_jsd_loss"]
    found[0].decorator_list = []
    names = {"torch": torch, "F": torch.nn.functional}
    exec(compile(ast.Module(found, []), "gkd_trainer", "exec"), names)
    student, teacher = map(logits, (0, 1))
    labels = np.where(batch().weights > 0, batch().targets, -100)
    given = map(torch.tensor, (student, teacher, labels))
    expected = names["generalized_jsd_loss"](*given, beta=beta, temperature=1.5)
    of = Distillation(TEACHER, beta=beta, temperature=1.5).divergence(jnp.asarray(teacher), jnp.asarray(student))
    np.testing.assert_allclose(np.average(of, weights=batch().weights), float(expected), rtol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("top_k", [None, 5])
def test_divergences_are_their_equations(beta, top_k):
    def probabilities(x):
        p = np.exp(x.astype(np.float64) / 2)
        return p / p.sum(-1, keepdims=True)

    p, q = probabilities(logits(1)), probabilities(logits(0))
    if top_k is not None:
        order = np.argsort(-p, -1)
        p, q = (np.take_along_axis(x, order, -1) for x in (p, q))
        p, q = (np.concatenate([x[..., :top_k], x[..., top_k:].sum(-1, keepdims=True)], -1) for x in (p, q))

    def kl(a, b):
        return (a * np.log(a / b)).sum(-1)

    m = beta * p + (1 - beta) * q
    expected = {0.0: kl(p, q), 1.0: kl(q, p)}.get(beta, beta * kl(p, m) + (1 - beta) * kl(q, m))
    objective = Distillation(TEACHER, beta=beta, temperature=2.0, top_k=top_k)
    np.testing.assert_allclose(objective.divergence(logits(1), logits(0)), expected, rtol=2e-5, atol=1e-6)
    same = jax.value_and_grad(lambda x: jnp.sum(objective.divergence(jnp.zeros(V), x)))(jnp.zeros(V))
    assert all(np.abs(x).max() < 1e-6 for x in same), "equal logits, of which none is among the k largest alone"


def gradient(objective, rules=sharding.ShardingRules()):
    model, teacher = Transformer(STUDENT, rules), Transformer(LARGER, rules)

    def loss(params, batch, frozen):
        metrics = objective(model.apply, params, batch, None, frozen)
        return metrics["loss"][0], metrics

    return jax.jit(jax.grad(loss, has_aux=True)), model, teacher


def initialised(rows: Batch, *models):
    """Parameters of each model."""
    return [jax.jit(m.init)(jax.random.key(i), rows.tokens)["params"] for i, m in enumerate(models)]


@pytest.mark.alone
def test_a_step_in_parts_or_on_a_mesh_has_the_same_gradient():
    """Sums over rows: of 1, 2 and 4 uneven parts. In chunks, with a vocabulary that the mesh shards."""
    objective = Distillation(TEACHER, beta=0.5, top_k=4, cross_entropy_weight=0.5)
    of, model, teacher = gradient(objective)
    params, theirs = initialised(batch(), model, teacher)
    whole, metrics = of(params, batch(), FrozenModel(theirs, teacher))
    assert float(metrics["divergence"][0] / metrics["divergence"][1]) > 0
    of = gradient(dataclasses.replace(objective, chunk=5))[0]
    for cuts in ([2], [2, 4, 6]):
        edges = [0, *cuts, B]
        parts = [jax.tree.map(lambda x: x[i:j], batch()) for i, j in itertools.pairwise(edges)]  # noqa: B023
        found = [of(params, part, FrozenModel(theirs, teacher))[0] for part in parts]
        summed = jax.tree.map(lambda *x: sum(x), *found)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), summed, whole)
    with sharding.use(MeshConfig(fsdp=2, context=2, tensor=2).make()):
        of, model, teacher = gradient(dataclasses.replace(objective, chunk=5), DEFAULT_RULES)
        given = sharding.global_array(batch(), DEFAULT_RULES)
        places = (jax.jit(m.init)(jax.random.key(0), given.tokens)["params"] for m in (model, teacher))
        params, theirs = (
            jax.device_put(jax.device_get(x), jax.tree.map(lambda leaf: leaf.sharding, place))
            for x, place in zip((params, theirs), places, strict=True)
        )
        found, _ = of(params, given, FrozenModel(theirs, teacher))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), found, whole)


def test_a_student_like_its_teacher_has_nothing_to_learn_and_others_learn_from_their_own_replies():
    given = batch()
    zeros, groups = np.zeros((B, T), np.float32), np.where(np.arange(B) < 6, np.arange(B) // 2, -1).astype(np.int32)
    fields = {field.name: getattr(given, field.name) for field in dataclasses.fields(Batch)}
    rows = np.ones(B, np.float32)
    episodes = Episodes(
        **fields,
        logprobs=zeros,
        versions=zeros.astype(np.int32),
        rewards=rows,
        groups=groups,
        finished=rows,
        temperature=rows,
    )
    of, model, teacher = gradient(OnPolicyDistillation(TEACHER))
    params, theirs = initialised(given, model, teacher)
    same, metrics = of(params, episodes, FrozenModel(params, model))
    assert max(np.abs(x).max() for x in jax.tree.leaves(same)) < 1e-5
    assert abs(float(metrics["loss"][0])) < 1e-5
    assert float(metrics["loss"][1]) == given.weights[:6].sum(), "replies that do not count have no weight"
    _, metrics = of(params, episodes, FrozenModel(theirs, teacher))
    plain = jax.tree.map(lambda x: x[:6], given)
    expected = Distillation(TEACHER, beta=1.0)(model.apply, params, plain, None, FrozenModel(theirs, teacher))
    np.testing.assert_allclose(metrics["loss"][0], expected["loss"][0], rtol=1e-5)


def test_a_teacher_with_other_ids_is_refused():
    other = Transformer(dataclasses.replace(STUDENT, vocab=V + 1))
    of, model, _ = gradient(Distillation(TEACHER))
    params, theirs = initialised(batch(), model, other)
    with pytest.raises(
        UserError, match=r"^objective\.teacher: got a model of 33 token ids, must have the student's 32"
    ):
        of(params, batch(), FrozenModel(theirs, other))
