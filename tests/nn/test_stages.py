"""A stack in stages computes what it computes in one piece, and stages send each other parts of a batch and no more."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
from drawn import drawn, placed

from gptjax.data.tokenizers.bytes import Bytes
from gptjax.distributed import sharding
from gptjax.distributed.parameters import parameter_info
from gptjax.distributed.sharding import DEFAULT_RULES, MeshConfig
from gptjax.inference.generate import generate
from gptjax.inference.sampling import Sampling
from gptjax.nn import (
    LayerOverrides,
    MixtureOfExperts,
    MultiHeadAttention,
    ScaledStream,
    Softmax,
    TransformerConfig,
    ValueEmbedding,
    ValueResidual,
)
from gptjax.nn.pipeline import Schedule
from gptjax.objectives import NextToken
from gptjax.optim import AdamW, Muon
from gptjax.plan import hlo
from gptjax.plan.arithmetic import product_flops
from gptjax.plan.collectives import collectives
from gptjax.train import state as train_state
from gptjax.train.step import make_step
from gptjax.types import Batch, UserError

B, T, D = 8, 16, 32
BASE = TransformerConfig(vocab=48, layers=4, width=D, heads=4, kv_heads=2, hidden=64)
SHORT = dataclasses.replace(BASE, layers=2)
"""A layer in each of two stages."""
MODELS = {
    "plain": BASE,
    "more parts, computed again": dataclasses.replace(SHORT, microbatches=4, remat="nothing_saveable"),
    "value embeddings": dataclasses.replace(SHORT, attention=MultiHeadAttention(values=ValueEmbedding(48))),
    "rounds of two between others": dataclasses.replace(
        BASE, layers=6, leading_layers=(LayerOverrides(),), pattern=(LayerOverrides(window=5), LayerOverrides())
    ),
    "value residuals": dataclasses.replace(SHORT, attention=MultiHeadAttention(values=ValueResidual())),
    "experts": dataclasses.replace(SHORT, hidden=32, mlp=MixtureOfExperts(experts=4, router=Softmax(load_balance=0.0))),
    "two chunks that read the first layer": dataclasses.replace(
        BASE,
        pipeline_chunks=2,
        microbatches=4,
        remat="nothing_saveable",
        residual=ScaledStream(),
        attention=MultiHeadAttention(values=ValueResidual()),
    ),
}
MESHES = {
    "4 stages": MeshConfig(pipeline=4, data=2),
    "2 stages, fsdp, tensor": MeshConfig(pipeline=2, fsdp=2, tensor=2),
    "2 stages, context": MeshConfig(pipeline=2, context=2, data=2),
    "2 stages, experts": MeshConfig(pipeline=2, expert=2, data=2),
}


def batch() -> Batch:
    random = np.random.default_rng(0)
    tokens = random.integers(0, 48, (B, T + 1), np.int32)
    segments = np.repeat(np.array([[1, 2, 0]], np.int32), [6, 7, 3], axis=1).repeat(B, 0)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in (6, 7, 3)])[None].repeat(B, 0)
    return Batch(tokens[:, :-1], tokens[:, 1:], (segments > 0).astype("f4"), segments, positions)


def program(config: TransformerConfig, rules=DEFAULT_RULES, optimizer=AdamW(learning_rate=1e-2), accumulate=1):
    """The first state and the step."""
    model = config.build(rules)
    update = optimizer.build(10, parameter_info(model))

    def create(tokens) -> train_state.State:
        params = model.init(jax.random.key(0), tokens)["params"]
        return train_state.create(params, update, jax.random.key(1))

    return jax.jit(create), make_step(NextToken(), model.apply, update, accumulate)


def gradients(config: TransformerConfig, params, rows: Batch):
    def loss(params):
        total, weight = NextToken()(config.build(DEFAULT_RULES).apply, params, rows)["loss"]
        return total / weight

    return jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(loss))(params))


@functools.cache
def expected(name: str):
    params = drawn(MODELS[name].build(), deviation=0.02)
    return params, gradients(MODELS[name], params, batch())


CASES = [("plain", mesh) for mesh in ("4 stages", "2 stages, context")] + [
    ("more parts, computed again", "2 stages, fsdp, tensor"),
    ("value residuals", "2 stages, fsdp, tensor"),
    ("value embeddings", "2 stages, context"),
    ("experts", "2 stages, experts"),
    ("two chunks that read the first layer", "2 stages, fsdp, tensor"),
    # Rounds, leading and trailing layers are those of the loads below.
    pytest.param("rounds of two between others", "2 stages, fsdp, tensor", marks=pytest.mark.slow),
]


@pytest.mark.sampled
@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_stages_change_nothing(name, mesh):
    """Loss and every gradient, to float32's rounding in 4 layers of sums over 64 numbers."""
    params, values = expected(name)
    with sharding.use(MESHES[mesh].make()):
        rows = sharding.global_array(batch(), DEFAULT_RULES)
        params = placed(MODELS[name].build(DEFAULT_RULES), params, rows.tokens)
        stacked = params["blocks"]["0" if "rounds" in name else "attention"]
        assert {leaf.sharding.spec[0] for leaf in jax.tree.leaves(stacked)} == {"pipeline"}
        actual = gradients(MODELS[name], params, rows)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-6), actual, values)


@pytest.mark.parametrize(("stages", "microbatches", "chunks"), [(4, 4, 1), (4, 8, 2), (3, 5, 2), (2, 1, 3), (3, 4, 1)])
def test_what_a_stage_computes_has_just_arrived(stages, microbatches, chunks):
    """Every microbatch passes all pieces of the stack, each a tick after the one before."""
    schedule = Schedule(stages, microbatches, chunks)
    passed: dict[int, list[tuple[int, int]]] = {number: [] for number in range(microbatches)}
    for tick in range(schedule.ticks):
        for stage in range(stages):
            chunk, number, valid = map(int, schedule.work(np.int32(tick), np.int32(stage)))
            if valid:
                passed[number].append((tick, chunk * stages + stage))
    for visits in passed.values():
        first, _ = visits[0]
        assert visits == [(first + piece, piece) for piece in range(stages * chunks)]
    if microbatches % stages == 0:
        assert schedule.ticks == chunks * microbatches + stages - 1
        assert np.isclose(schedule.idle, (stages - 1) / schedule.ticks)
    assert max(visits[-1][0] for visits in passed.values()) == schedule.ticks - 1


@pytest.mark.alone
def test_chunks_compute_what_stages_compute():
    """Pieces that some stages store and others compute have the same dropout: loss bit for bit, gradients to
    rounding."""
    config = dataclasses.replace(BASE, microbatches=4, dropout=0.2, layer_drop=0.1)
    params = drawn(config.build(), deviation=0.02)

    def found(chunks: int):
        model = dataclasses.replace(config, pipeline_chunks=chunks).build(DEFAULT_RULES)

        def loss(params):
            total, weight = NextToken()(model.apply, params, rows, jax.random.key(5))["loss"]
            return total / weight

        return jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(loss))(placed(model, params, rows.tokens)))

    with sharding.use(MeshConfig(pipeline=2).make(jax.devices()[:2])):
        rows = sharding.global_array(batch(), DEFAULT_RULES)
        (loss, chunks), (expected, whole) = found(2), found(1)
    assert loss == expected
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-8), chunks, whole)


@pytest.mark.alone
def test_stages_begin_with_the_same_parameters():
    """In rounds, with layers before and after them, as on one device."""
    config = MODELS["rounds of two between others"]
    alone = program(config)[0](batch().tokens).params
    with sharding.use(MESHES["2 stages, fsdp, tensor"].make()):
        staged = program(config)[0](sharding.global_array(batch(), DEFAULT_RULES).tokens).params
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), staged, alone)


@pytest.mark.sampled
@pytest.mark.parametrize("chunks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_every_layer_reports_the_load_of_the_whole_batch(chunks):
    """Layers of a stage and those around them, in microbatches, with data, experts and stages sharded."""
    router = Softmax(load_balance=0.0, balance_bias=True)
    config = dataclasses.replace(
        MODELS["rounds of two between others"],
        layers=2 + 4 * chunks,
        hidden=32,
        mlp=MixtureOfExperts(experts=4, router=router),
        microbatches=2,
        pipeline_chunks=chunks,
    )

    def excess(params, rows: Batch):
        inputs = rows.tokens, rows.positions, rows.segments
        _, found = jax.jit(functools.partial(config.build(DEFAULT_RULES).apply, mutable=["updates"]))(
            {"params": params}, *inputs
        )
        return jax.tree.map(np.asarray, found["updates"])

    params = drawn(config.build(), deviation=0.02)
    alone = excess(params, batch())
    shapes = {name: update["mlp"]["router_balance"].excess.shape for name, update in alone["blocks"].items()}
    assert shapes == {"0": (2 * chunks, 4), "1": (2 * chunks, 4), "leading_0": (4,), "trailing_0": (4,)}
    with sharding.use(MESHES["2 stages, experts"].make()):
        rows = sharding.global_array(batch(), DEFAULT_RULES)
        staged = excess(placed(config.build(DEFAULT_RULES), params, rows.tokens), rows)
    jax.tree.map(np.testing.assert_array_equal, staged, alone)


@pytest.mark.sampled
@pytest.mark.parametrize("optimizer", [AdamW(learning_rate=1e-2, clip=1.0), Muon(learning_rate=1e-2)])
def test_steps_change_nothing(optimizer):
    def two(rows: Batch) -> list[float]:
        create, step = program(SHORT, optimizer=optimizer)
        state, losses = create(rows.tokens), []
        for _ in range(3):
            state, metrics = step(state, rows)
            losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
        return losses

    alone = two(batch())
    with sharding.use(MeshConfig(pipeline=2, fsdp=2, tensor=2).make()):
        np.testing.assert_allclose(two(sharding.global_array(batch(), DEFAULT_RULES)), alone, rtol=2e-5)


@pytest.mark.alone
def test_a_balance_is_that_of_parts_as_in_accumulation():
    """A loss that is not a sum over tokens is computed per microbatch."""
    mlp = MixtureOfExperts(experts=4, router=Softmax(load_balance=0.5))
    config = dataclasses.replace(SHORT, hidden=32, mlp=mlp, microbatches=4)
    create, step = program(config, accumulate=4)
    whole = jax.tree.map(lambda x: np.concatenate([x[:, :8], x[:, 8:]]), batch())  # every part counts as many tokens
    whole = dataclasses.replace(whole, weights=np.ones_like(whole.weights), segments=np.ones_like(whole.segments))
    _, metrics = step(create(whole.tokens), whole)
    with sharding.use(MeshConfig(pipeline=2, data=2, tensor=2).make()):
        rows = sharding.global_array(whole, DEFAULT_RULES)
        create, step = program(config)
        _, staged = step(create(rows.tokens), rows)
    for name in metrics:
        one, other = (np.asarray(m[name][0] / m[name][1]) for m in (metrics, staged))
        np.testing.assert_allclose(one, other, rtol=1e-4, err_msg=name)


def test_dropout_differs_between_parts():
    config = dataclasses.replace(BASE, dropout=0.5, layer_drop=0.1)
    same = dataclasses.replace(batch(), **{n: np.repeat(getattr(batch(), n)[:1], B, 0) for n in ("tokens", "targets")})
    with sharding.use(MeshConfig(pipeline=4, data=2).make()):
        rows = sharding.global_array(same, DEFAULT_RULES)
        model = config.build(DEFAULT_RULES)
        params = placed(model, drawn(config.build()), rows.tokens)
        apply = jax.jit(lambda key: model.apply({"params": params}, rows.tokens, rngs={"dropout": key})[0])
        logits = np.asarray(apply(jax.random.key(5)))
    assert len(np.unique(logits[:, -1].round(4), axis=0)) == B


@pytest.mark.parametrize("chunks", [1, 2])
def test_what_stages_send_and_compute(chunks):
    """In each of V M + S - 1 ticks a part of the activations, backwards of their gradients; before and after them,
    shares of the batch, and chunks of the parameters for the stages that compute them. The gradients of what is beside
    the layers are summed. In each tick, a chunk of the layers is computed."""
    parts, stages = 4, 4
    config = dataclasses.replace(BASE, layers=4 * chunks, microbatches=parts, pipeline_chunks=chunks)
    ticks = Schedule(stages, parts, chunks).ticks
    assert ticks == {1: 7, 2: 11}[chunks]
    with sharding.use(MeshConfig(pipeline=stages).make(jax.devices()[:stages])):
        rows = sharding.global_array(batch(), DEFAULT_RULES)
        create, _ = program(config)
        params = create(rows.tokens).params
        loss = lambda params: NextToken()(config.build(DEFAULT_RULES).apply, params, rows)["loss"][0]  # noqa: E731
        compiled = hlo.Program.parse(jax.jit(jax.grad(loss)).lower(params).compile().as_text())
    found = collectives(compiled)
    head = 6 * config.vocab * config.width
    layer = (config.flops(T) - head) // config.layers
    assert product_flops(compiled) == B // stages * T * head + ticks * B // parts * T * layer
    part = B // parts * T * D * 4
    hops = [one for one in found if one.kind == "collective-permute"]
    stored = jax.tree.leaves(params["blocks"]) if chunks > 1 else []
    assert sum(one.times for one in hops) == 2 * ticks + 2 * chunks * len(stored)
    moved = sum(leaf.nbytes for leaf in stored) // stages
    assert sum(one.operand * one.times for one in hops) == 2 * ticks * part + 2 * moved
    whole = B * T * D * 4  # shares to all, what the last stage made to its shares, and their gradients
    assert sum(one.operand * one.times for one in found if one.kind == "all-to-all") == 4 * whole
    assert not [one for one in found if one.kind in ("all-gather", "reduce-scatter")]
    beside = 4 * (2 * params["embedding"].size + params["norm"]["scale"].size)  # the embedding is the head too
    assert sum(one.operand * one.times for one in found if one.kind == "all-reduce") <= beside + 64


@pytest.mark.parametrize(("chunks", "remat"), [(1, "nothing_saveable"), (2, "nothing_saveable"), (2, "mlp_up")])
def test_what_ticks_save(chunks, remat):
    """Every layer's input, and what is named, once; never parameters, of which a tick reads a chunk."""
    config = dataclasses.replace(BASE, microbatches=4, pipeline_chunks=chunks, remat=remat, dtype="bfloat16")
    ticks = Schedule(2, 4, chunks).ticks
    with sharding.use(MeshConfig(pipeline=2).make(jax.devices()[:2])):
        rows = sharding.global_array(batch(), DEFAULT_RULES)
        model = config.build(DEFAULT_RULES)
        params = placed(model, drawn(config.build()), rows.tokens)
        loss = lambda params: NextToken()(model.apply, params, rows)["loss"][0]  # noqa: E731
        traced = jax.make_jaxpr(jax.grad(loss))(params)
    (saved,) = [scan.outvars for scan in scans(traced.jaxpr, ticks) if not scan.params["reverse"]]
    arrays = sorted(one.aval.shape for one in saved if one.aval.ndim > 1 and one.aval.shape[0] == ticks)
    layer = ticks, 2 // chunks, B // 4, T
    assert arrays == [(*layer, D)] + ([(*layer, 64)] if remat == "mlp_up" else [])


def scans(jaxpr, length: int):
    """Loops of this length, also within other operations."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan" and equation.params["length"] == length:
            yield equation
        for param in list(equation.params.values()):
            inner = getattr(param, "jaxpr", param)
            if hasattr(inner, "eqns"):
                yield from scans(inner, length)


def test_text_is_written_on_stages():
    config = dataclasses.replace(BASE, vocab=300)
    write = functools.partial(
        generate,
        tokenizer=Bytes().build(iter(())),
        prompts=[[1, 2, 3], [4, 5]],
        max_tokens=8,
        sampling=Sampling(temperature=0),
    )
    params = drawn(config.build())
    expected = [one.ids for one in write(config.build(), params)]
    with jax.set_mesh(MeshConfig(pipeline=2, data=2, tensor=2).make()):
        tokens = sharding.global_array(np.zeros((4, 4), np.int32), DEFAULT_RULES)
        params = placed(config.build(DEFAULT_RULES), params, tokens)
    assert [one.ids for one in write(config.build(DEFAULT_RULES), params)] == expected


def test_microbatches_and_chunks_that_do_not_fit_are_refused():
    config = dataclasses.replace(BASE, microbatches=3)
    with sharding.use(MeshConfig(pipeline=4, data=2).make()):
        rows = sharding.global_array(batch(), DEFAULT_RULES)
        create, step = program(config)
        state = create(rows.tokens)
        with pytest.raises(UserError, match="microbatches: got 3, must divide the 4 sequences"):
            step(state, rows)
        _, step = program(dataclasses.replace(BASE, pipeline_chunks=2))
        with pytest.raises(UserError, match="pipeline_chunks: got 2, must divide 1, the layers' repeats per stage"):
            step(state, rows)
    assert ("layers", "model.layers / model.pipeline_chunks", 2) in dataclasses.replace(BASE, pipeline_chunks=2).axes
    with pytest.raises(UserError, match="pipeline_chunks: got 3, must be at least 1 and divide 4"):
        dataclasses.replace(BASE, pipeline_chunks=3)
