"""Each kind of parallelism has the losses of one device, and sends what its definition says.

The compiled step is read, so that an accidental replication or gathering of something is a failing test. Sizes are in
bytes of one device's operand. XLA's CPU backend has no reduce-scatter for gradients: they are all-reduced here.
Sharded sequences (`context`) are in kernels/test_sharded_sequences.py, stages in nn/test_stages.py.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools

import jax
import numpy as np
import pytest
from optax.tree_utils import tree_get

from gptjax.distributed import sharding
from gptjax.distributed.parameters import flat, parameter_info
from gptjax.distributed.sharding import DEFAULT_RULES, MeshConfig
from gptjax.nn import MixtureOfExperts, Softmax, TransformerConfig
from gptjax.objectives import NextToken
from gptjax.optim import AdamW, Muon, Optimizer
from gptjax.plan import hlo
from gptjax.plan.collectives import Collective, collectives
from gptjax.train import state as train_state
from gptjax.train.step import make_step
from gptjax.types import Batch, UserError

B, T, D, V, L = 8, 16, 64, 96, 2
DENSE = TransformerConfig(vocab=V, layers=L, width=D, heads=4, hidden=128, tie_embeddings=False)
EXPERTS = dataclasses.replace(DENSE, hidden=64, mlp=MixtureOfExperts(experts=8, router=Softmax(load_balance=0.0)))
ADAM = AdamW(learning_rate=1e-2, clip=1.0)
ROWS = B * T * D * 4
"""Bytes of the activations of a batch."""
SCALARS = 128
"""Bytes that the norm of the gradient and the metrics may take."""


def batch() -> Batch:
    tokens = np.random.default_rng(0).integers(0, V, (B, T + 1), np.int32)
    ones, positions = np.ones((B, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (B, 1))
    return Batch(tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), ones, positions)


class Program:
    """The first state, the compiled step, and what one sees of both, on a mesh."""

    def __init__(self, config: TransformerConfig, mesh: MeshConfig | None, optimizer: Optimizer, devices: int):
        self.mesh = mesh and mesh.make(jax.devices()[:devices])
        with self.on_mesh():
            model = config.build(DEFAULT_RULES)
            optimizer = optimizer.build(10, parameter_info(model))
            self.batch = sharding.global_array(batch(), DEFAULT_RULES) if mesh else batch()

            def create() -> train_state.State:
                params = model.init(jax.random.key(0), self.batch.tokens)["params"]
                return train_state.create(params, optimizer, jax.random.key(1))

            self.create = jax.jit(create)
            state = jax.eval_shape(self.create)
            self.params = jax.tree.leaves(state.params)
            self.step = make_step(NextToken(), model.apply, optimizer).lower(state, self.batch).compile()

    def on_mesh(self) -> contextlib.AbstractContextManager:
        return sharding.use(self.mesh) if self.mesh else contextlib.nullcontext()

    def run(self) -> tuple[list[tuple[float, float]], dict[str, np.ndarray]]:
        """Loss and norm of the gradient in three steps, and the gradient of every parameter in the first: what Adam's
        first moment then is in proportion to."""
        seen, first = [], {}
        with self.on_mesh():
            state = self.create()
            for _ in range(3):
                state, metrics = self.step(state, self.batch)
                seen.append(tuple(float(metrics[name][0] / metrics[name][1]) for name in ("loss", "gradient_norm")))
                first = first or {name: np.asarray(x) for name, x in flat(tree_get(state.opt_state, "mu")).items()}
        return seen, first

    def found(self) -> list[Collective]:
        return collectives(hlo.Program.parse(self.step.as_text()))

    def operands(self) -> dict[tuple[str, int], int]:
        """(kind, devices in a group) -> bytes of all operands."""
        total: collections.Counter[tuple[str, int]] = collections.Counter()
        for one in self.found():
            total[one.kind, one.group] += one.operand * one.times
        return {key: size for key, size in total.items() if key[1] > 1}

    def bytes(self, axis: str | None) -> int:
        """Bytes of the parameters sharded over this mesh axis. None: of the replicated ones."""
        names = lambda leaf: {name for names in leaf.sharding.spec if names for name in np.atleast_1d(names)}  # noqa: E731
        return sum(4 * leaf.size for leaf in self.params if (axis in names(leaf) if axis else not names(leaf)))


programs = functools.cache(Program)


def program(config: TransformerConfig, mesh: MeshConfig | None, optimizer: Optimizer = ADAM, devices: int = 8):
    """A program, compiled once for all the laws that it obeys. No mesh: on one device."""
    return programs(config, mesh, optimizer, devices)


@functools.cache
def alone(config: TransformerConfig) -> tuple[list[tuple[float, float]], dict[str, np.ndarray]]:
    return program(config, None).run()


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("config", "mesh"),
    [
        (DENSE, MeshConfig(data=2, fsdp=2, tensor=2)),
        (DENSE, MeshConfig(data=1, fsdp=2, context=2, tensor=2)),
        (DENSE, MeshConfig(data=1, pipeline=2, fsdp=2, context=2)),
        (EXPERTS, MeshConfig(data=1, expert=2, fsdp=2, tensor=2)),
        # Axes that are above with others.
        pytest.param(DENSE, MeshConfig(data=2, fsdp=4), marks=pytest.mark.slow),
        pytest.param(DENSE, MeshConfig(data=8), marks=pytest.mark.slow),
        pytest.param(DENSE, MeshConfig(data=1, fsdp=8), marks=pytest.mark.slow),
        pytest.param(DENSE, MeshConfig(data=2, tensor=4), marks=pytest.mark.slow),
        pytest.param(EXPERTS, MeshConfig(data=2, expert=4), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_steps_are_those_of_one_device(config, mesh):
    """A gradient is the last of some 2 L + 2 sums, each of the one before, that devices add up in another order: it may
    be off by so many times the square root of B T D roundings of float32."""
    seen, gradients = program(config, mesh).run()
    expected, one = alone(config)
    np.testing.assert_allclose(seen, expected, rtol=5e-5)
    assert gradients.keys() == one.keys()
    for name, x in one.items():
        atol = (2 * L + 2) * np.sqrt(B * T * D) * np.finfo(np.float32).eps / 2 * np.abs(x).max()
        np.testing.assert_allclose(gradients[name], x, rtol=0, atol=atol, err_msg=name)


def test_data_parallel_adds_up_gradients():
    """One all-reduce of every parameter's gradient, and nothing else."""
    made = program(DENSE, MeshConfig(data=8))
    found = made.operands()
    assert set(found) == {("all-reduce", 8)}
    assert 0 <= found["all-reduce", 8] - made.bytes(None) <= SCALARS


@pytest.mark.parametrize("mesh", [MeshConfig(data=1, fsdp=8), MeshConfig(data=2, fsdp=4)], ids=["fsdp", "hybrid"])
def test_fsdp_gathers_parameters_and_never_activations(mesh):
    """The parts of the blocks' parameters are gathered forwards and backwards, those of embedding and head once, among
    the devices that share them out. Gradients are added up among those, and over copies of the model each device's part
    alone; but for the embedding's, which a lookup gives whole."""
    made = program(DENSE, mesh)
    found, shared, whole = made.operands(), made.bytes("fsdp"), made.bytes(None)
    copies, table = 8 // mesh.fsdp, 4 * V * D
    assert found.pop(("all-gather", mesh.fsdp)) == (2 * shared - 2 * table) // mesh.fsdp
    if copies > 1:
        shared, whole = shared - table, whole + table
        assert found.pop(("all-reduce", copies)) == shared // mesh.fsdp
        assert 0 <= found.pop(("all-reduce", 8)) - whole <= SCALARS
        whole = 0
    assert 0 <= found.pop(("all-reduce", mesh.fsdp)) - shared - whole <= SCALARS
    assert not found


def test_tensor_parallel_adds_up_activations():
    """After the embedding, attention and MLP forwards; backwards, before the head, and before attention and MLP, where
    what comes through q, k and v, and through gate and up, is added up by itself on a CPU. Of the logits, a maximum and
    a sum for each token. Parameters are not sent, their gradients to the other copy of the model alone."""
    made = program(DENSE, MeshConfig(data=2, tensor=4))
    found, whole, cut = made.operands(), made.bytes(None), made.bytes("tensor")
    rows, tokens = ROWS // 2, B // 2 * T * 4
    times = (1 + 2 * L) + 1 + (3 + 2) * L
    assert 0 <= found.pop(("all-reduce", 4)) - times * rows - 3 * tokens <= SCALARS
    assert 0 <= found.pop(("all-reduce", 2)) - whole - cut // 4 <= SCALARS
    assert not found


RING = 10
"""Arrays of a device's size that go with a ring beside those that go around: the gradients of keys and values, home,
and what is dealt before and given back after, queries, keys, values and outputs, twice."""


def assert_passed_on(sent: int, rounds: int, n: int, own: int, tokens: int) -> None:
    """In a ring of n, keys and values go around forwards, and again backwards with their gradients; and what says of
    which document the tokens are."""
    assert 0 <= sent - rounds * (6 * (n - 1) + RING) * own <= rounds * n * 8 * tokens


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=1, fsdp=2, context=4),
        pytest.param(MeshConfig(data=2, context=4), marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=1, context=8), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_context_parallel_passes_keys_on_and_never_gathers_rows(mesh):
    """Parameters are as without it; their gradients are added up over the ring too."""
    made = program(DENSE, mesh)
    found, shared, whole = made.operands(), made.bytes("fsdp"), made.bytes(None)
    table, others = 4 * V * D if shared else 0, 8 // mesh.context
    assert_passed_on(found.pop(("collective-permute", 2)), L, mesh.context, ROWS // 8, B * T // 8)
    if shared:
        assert found.pop(("all-gather", 2)) == (2 * shared - 2 * table) // 2
    assert 0 <= found.pop(("all-reduce", mesh.context)) - (shared - table) // 2 - table - whole <= SCALARS
    if others > 1:
        assert 0 <= found.pop(("all-reduce", others)) - shared - whole <= SCALARS
    assert not found


@pytest.mark.alone
def test_context_with_fsdp_and_tensor_parallel_sends_what_all_do():
    made = program(DENSE, MeshConfig(data=1, fsdp=2, context=2, tensor=2))
    found, shared, whole = made.operands(), made.bytes("fsdp"), made.bytes(None)
    table, rows, tokens = 4 * V * D, ROWS // 4, B // 4 * T * 4
    assert found.pop(("all-gather", 2)) == (2 * (shared - 2 * table) + 3 * table) // 4
    gradients = (shared - table) // 2 + (shared - table) // 4 + table + 2 * whole  # of fsdp, then of the ring
    times = (1 + 2 * L) + 1 + (3 + 2) * L
    assert 0 <= found.pop(("all-reduce", 2)) - gradients - times * rows - 3 * tokens <= 3 * SCALARS
    assert found.pop(("collective-permute", 2)) <= L * ((6 + RING) * ROWS // 8 + 2 * 8 * tokens)
    assert not found


@pytest.mark.alone
@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=1, pipeline=2, fsdp=2, context=2),
        pytest.param(MeshConfig(data=4, pipeline=2), marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=2, pipeline=2, tensor=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_stages_beside_others_gather_what_fsdp_does_and_no_activations(mesh):
    """As the stages do alone (nn/test_stages.py), and as the others do, with a stage's layers and a part's rows: shares
    of the batch change places before and after, parts go on from stage to stage, parameters are gathered once forwards
    and once backwards, not in each tick."""
    parts = stages = 2
    ticks, copies = parts + stages - 1, mesh.data * mesh.fsdp * mesh.context
    made = program(DENSE, mesh)
    found, shared = made.operands(), made.bytes("fsdp")
    table, rows = 4 * V * D, ROWS // copies
    ids, blocks = 3 * 4 * B * T // copies, shared - 2 * table if shared else 0
    gathered = 2 * blocks // (stages * mesh.fsdp) + (2 * table // mesh.fsdp if shared else 0)
    assert 0 <= sum(found.pop(key) for key in [*found] if key[0] == "all-gather") - gathered <= ids
    assert found.pop(("all-to-all", stages)) == 4 * rows
    passed = found.pop(("collective-permute", 2)) - 2 * ticks * rows // parts
    if mesh.context > 1:
        assert_passed_on(passed, ticks * L // stages, mesh.context, rows // parts, B * T // copies // parts)
    else:
        assert passed == 0
    assert {kind for kind, _ in found} == {"all-reduce"}


def test_fsdp_with_tensor_parallel_sends_what_both_do():
    """Each sends its own collectives, for the shards of parameters and activations that the other leaves a device."""
    made = program(DENSE, MeshConfig(data=2, fsdp=2, tensor=2))
    found, shared, whole = made.operands(), made.bytes("fsdp"), made.bytes(None)
    table, rows, tokens = 4 * V * D, ROWS // 4, B // 4 * T * 4
    assert found.pop(("all-gather", 2)) == (2 * (shared - 2 * table) + 3 * table) // 4  # once more for the logits
    gradients = (shared - table) // 2 + (shared - table) // 4  # among those that share, then over the copies
    times = (1 + 2 * L) + 1 + (3 + 2) * L
    assert 0 <= found.pop(("all-reduce", 2)) - gradients - times * rows - 3 * tokens <= 2 * SCALARS
    assert 0 <= found.pop(("all-reduce", 4)) - table // 2 - whole <= SCALARS
    assert not found


@pytest.mark.parametrize("capacity", [None, pytest.param(1.25, marks=pytest.mark.slow)])
def test_expert_parallel_sends_tokens_and_never_experts(capacity):
    """The devices that share out the experts get one another's tokens, with the choices of the router, and return their
    part of the sum; backwards likewise. Experts' gradients go to the copies of the experts alone."""
    config = dataclasses.replace(EXPERTS, mlp=dataclasses.replace(EXPERTS.mlp, capacity=capacity))
    made = program(config, MeshConfig(data=2, expert=4))
    found, whole, cut = made.operands(), made.bytes(None), made.bytes("expert")
    own, tokens, choices = ROWS // 8, ROWS // 2, 2 * 4 * B // 8 * T  # of a device, of those that gather, top_k numbers
    assert found.pop(("all-gather", 4)) == L * (2 * own + 2 * choices)
    assert found.pop(("reduce-scatter", 4)) == L * tokens
    assert 0 <= found.pop(("all-reduce", 4)) - L * (tokens + 4 * choices) <= SCALARS
    assert found.pop(("all-reduce", 2)) == cut // 4
    assert 0 <= found.pop(("all-reduce", 8)) - whole <= SCALARS
    assert not found


@pytest.mark.alone
def test_experts_with_fsdp_and_tensor_parallel():
    """Experts' matrices are gathered once, as the backward pass keeps what it needs of them, and their gradients are
    reduce-scattered; the rest as without."""
    made = program(EXPERTS, MeshConfig(data=1, expert=2, fsdp=2, tensor=2))
    found, whole = made.operands(), made.bytes(None)
    experts, shared = made.bytes("expert"), made.bytes("fsdp")
    table, router = 4 * V * D, 4 * L * D * 8
    dense = shared - experts - 2 * table - router  # attention
    own, choices = ROWS // 4, 2 * 4 * B // 4 * T
    gathered = 2 * dense // 4 + 3 * table // 4 + experts // 8 + router // 2 + L * (2 * own + 2 * choices)
    assert found.pop(("all-gather", 2)) == gathered
    assert found.pop(("reduce-scatter", 2)) == experts // 4 + L * 2 * own
    gradients = (dense + table) * 3 // 4 + router // 2
    times = (1 + L) + 1 + (3 + 2) * L  # the experts' sums are scattered forwards
    assert 0 <= found.pop(("all-reduce", 2)) - gradients - times * own - 3 * B // 4 * T * 4 <= 2 * SCALARS
    assert (
        0
        <= found.pop(("all-reduce", 4)) - table // 2 - whole - router // 2 - L * (2 * own + 4 * choices // 2)
        <= SCALARS
    )
    assert found.pop(("collective-permute", 2)) <= 3 * router // 2  # the router's columns, on their way to and fro
    assert not found


@pytest.mark.parametrize("fsdp", [2, 8])
def test_muon_gets_whole_matrices_once(fsdp):
    """Gradient and momentum, beside what Adam sends: layer by layer where the devices can share out the layers, which
    then go back; else all of them to all, and nothing goes back. Not once in each iteration."""
    mesh, matrices = MeshConfig(data=8 // fsdp, fsdp=fsdp), 4 * L * (4 * D * D + 3 * D * 128)
    adam, muon = (program(DENSE, mesh, one).operands() for one in (ADAM, Muon(learning_rate=1e-2)))
    more = {key: size for key in muon if (size := muon[key] - adam.get(key, 0)) > SCALARS}
    if L % fsdp:
        assert more == {("all-gather", fsdp): 2 * matrices // fsdp}
    else:
        assert more == {("all-to-all", fsdp): 4 * matrices // fsdp}


def test_what_a_device_sends_does_not_grow_with_the_copies_of_the_model():
    """But for the (n - 1) / n of an all-reduce in a ring of n. With data parallelism alone, the bytes of eight devices
    are those of the parameters (`test_data_parallel_adds_up_gradients`)."""
    found = []
    for devices in (4, 8):
        sent = program(DENSE, MeshConfig(data=devices // 2, fsdp=2), devices=devices).found()
        found.append([(one.kind, one.operand, one.times) for one in sent if one.group > 1])
    assert sorted(found[0]) == sorted(found[1])


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device that is elsewhere."""

    id: int
    slice_index: int
    platform: str = "tpu"
    process_index: int = 0
    device_kind: str = "as yet unknown"


def slices(chips: list[Chip], mesh: MeshConfig, monkeypatch) -> np.ndarray:
    """Slice index of each position of the mesh, with axes in the order of the configuration."""
    monkeypatch.setattr(jax.sharding, "Mesh", lambda devices, names, axis_types: (devices, names))
    devices, names = mesh.make(chips)
    order = [names.index(field.name) for field in dataclasses.fields(mesh)]
    return np.vectorize(lambda chip: chip.slice_index)(devices.transpose(order))


def test_slices_hold_whole_copies_of_the_model(monkeypatch):
    """Eight chips in two slices, listed in turns: the data axis goes across, all others stay within one."""
    chips = [Chip(i, i % 2, "cpu") for i in range(8)]
    places = slices(chips, MeshConfig(data=4, fsdp=2), monkeypatch).reshape(4, 2)
    np.testing.assert_array_equal(places, [[0, 0], [0, 0], [1, 1], [1, 1]])
    with pytest.raises(UserError, match="data: got 1, must be a multiple of 2, the number of slices"):
        MeshConfig(data=1, fsdp=8).make(chips)


@pytest.mark.parametrize(
    ("mesh", "hosts"),
    [
        (MeshConfig(data=1, fsdp=-1), 2),
        (MeshConfig(data=2, fsdp=-1), 4),
        (MeshConfig(data=1, fsdp=-1, tensor=4), 2),
        (MeshConfig(data=3, fsdp=2, tensor=4), 3),
    ],
    ids=str,
)
def test_any_axis_may_go_across_hosts_of_gpus_the_outermost_first(mesh, hosts, monkeypatch):
    """Eight GPUs a host, listed in turns. What one fixes of the outer axes that the hosts fill is one host."""
    chips = [Chip(i, i % hosts, "gpu", i) for i in range(8 * hosts)]
    places = slices(chips, mesh, monkeypatch)
    np.testing.assert_array_equal(places.reshape(hosts, 8), np.tile(np.arange(hosts)[:, None], 8))
    assert places.shape == tuple(mesh.sizes(8 * hosts).values())


@pytest.mark.parametrize(
    ("rows", "shares"),
    [
        ([[0], [1], [2], [3]], [(0, 4), (1, 4), (2, 4), (3, 4)]),  # a device each
        ([[0], [0], [1], [1]], [(0, 2), (0, 2), (1, 2), (1, 2)]),  # two cut rows between them
        ([[2, 3], [0, 1]], [(1, 2), (0, 2)]),
        ([[0, 2], [1, 3]], [(0, 2), (1, 2)]),
        ([[0, 0], [0, 0]], [(0, 1), (0, 1)]),
        ([[0, 0, 1], [1, 2, 2]], [(0, 1), (0, 1)]),  # three devices each, pairs of which cut rows: all read all
        ([[0, 1, 2], [3]], [(0, 1), (0, 1)]),
    ],
)
def test_processes_read_the_rows_that_their_devices_hold(rows, shares):
    held = [(process, row) for process, some in enumerate(rows) for row in some]
    assert [sharding._data_shard(held, process) for process in range(len(rows))] == shares
