"""Plans: bytes read out of compiled programs, the split of memory, FLOPs, and whole plans of a tiny experiment."""

import dataclasses
import importlib.util
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.experiment import Experiment
from gptjax.nn import MixtureOfExperts
from gptjax.optim import AdamW
from gptjax.plan import command
from gptjax.plan.arithmetic import matrix_flops
from gptjax.plan.changes import LONG, meshes
from gptjax.plan.chips import CHIPS
from gptjax.plan.collectives import collectives, sent
from gptjax.plan.compiled import compile_step
from gptjax.plan.estimate import estimate
from gptjax.plan.topology import Target
from gptjax.sharding import Mesh
from gptjax.types import UserError

D, F, B = 64, 128, 16


@pytest.fixture(scope="module")
def tiny() -> Experiment:
    base = importlib.import_module("experiments.quickstart").experiment
    model = dataclasses.replace(base.model, vocab=256, layers=2, width=64, heads=4)
    stage = base.stages["pretrain"]
    stage = dataclasses.replace(
        stage, data=dataclasses.replace(stage.data, length=32, batch=16), optimizer=AdamW(peak=1e-3)
    )
    return dataclasses.replace(base, model=model, stages={"pretrain": stage}, mesh=Mesh(data=2, fsdp=4))


def program(f, *arguments: tuple[tuple[int, ...], PartitionSpec]) -> str:
    """The compiled text of a function of float32 arrays on a mesh of 8."""
    mesh = jax.make_mesh((8,), ("fsdp",))
    with jax.set_mesh(mesh):
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, spec)) for s, spec in arguments]
        return jax.jit(f).lower(*shapes).compile().as_text()


WEIGHTS, ROWS = ((D, F), PartitionSpec("fsdp")), ((B, D), PartitionSpec("fsdp"))


def gathered(x, w):
    return x @ jax.sharding.reshard(w, PartitionSpec())


def test_an_fsdp_product_gathers_its_weights_and_no_more():
    found = collectives(program(gathered, ROWS, WEIGHTS))
    assert [(c.kind, c.operand, c.group, c.times) for c in found] == [("all-gather", D * F * 4 // 8, 8, 1)]
    assert sent(found) == {"all-gather": D * F * 4 * 7 / 8}


def test_its_gradient_is_reduced_over_the_devices():
    def gradient(x, w):
        return jax.grad(lambda w: jnp.square(x @ w).sum())(w)

    moved = sent(collectives(program(gradient, ROWS, ((D, F), PartitionSpec()))))
    assert moved == {"all-reduce": 2 * D * F * 4 * 7 / 8}


def test_what_is_in_a_loop_counts_as_often_as_it_runs():
    def scanned(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(gathered(x, w)), None), x, w)[0]

    stack = ((5, D, D), PartitionSpec(None, "fsdp"))
    assert sent(collectives(program(scanned, ROWS, stack))) == {"all-gather": 5 * D * D * 4 * 7 / 8}


WINDOWED = """\
%body (p: (f32[4,8], u32[])) -> (f32[4,8], u32[]) {
  %p = (f32[4,8]{1,0}, u32[]) parameter(0)
  %x = f32[4,8]{1,0:T(8,128)} get-tuple-element(%p), index=0
  %i = u32[] get-tuple-element(%p), index=1
  %two = u32[] constant(2)
  %next = u32[] add(%i, %two)
  %start = (f32[4,8], f32[4,8]) collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %done = f32[4,8] collective-permute-done(%start)
  ROOT %out = (f32[4,8], u32[]) tuple(%done, %next)
}

%condition (q: (f32[4,8], u32[])) -> pred[] {
  %q = (f32[4,8]{1,0}, u32[]) parameter(0)
  %end = u32[]{:T(128)} constant(8)
  %j = u32[] get-tuple-element(%q), index=1
  ROOT %less = pred[] compare(%j, %end), direction=LT
}

ENTRY %main (a: (f32[4,8], u32[])) -> (f32[4,8], u32[]) {
  %a = (f32[4,8]{1,0}, u32[]) parameter(0)
  ROOT %loop = (f32[4,8], u32[]) while(%a), condition=%condition, body=%body
}
"""
"""As TPUs' programs have it: no trip count is noted, the count goes up by two, and the loop is asynchronous inside."""


def test_the_trips_of_a_loop_are_found_where_they_are_not_noted():
    assert sent(collectives(WINDOWED)) == {"collective-permute": 4 * 4 * 8 * 4}


def test_flops_count_loops_and_recomputation():
    x, w = jnp.ones((B, D)), jnp.ones((5, D, D))

    def loss(w, step):
        return jax.lax.scan(lambda x, w: (step(x, w), None), x, w)[0].sum()

    one = 5 * 2 * B * D * D

    def count(step):
        return matrix_flops(jax.make_jaxpr(jax.grad(partial(loss, step=step)))(w).jaxpr)

    def layer(x, w):
        return jnp.tanh(x @ w)

    assert count(layer) == 3 * one
    assert count(jax.checkpoint(layer, policy=jax.checkpoint_policies.nothing_saveable)) == 4 * one


def test_experts_that_devices_share_out_count_once(tiny):
    """As on one device, though each of them has the rows of all."""
    mixture = MixtureOfExperts(experts=4, implementation="ragged")
    model = dataclasses.replace(tiny.model, mlp=mixture)
    flops = {}
    for mesh in (Mesh(), Mesh(data=2, expert=4)):
        flops[mesh] = compile_step(dataclasses.replace(tiny, model=model, mesh=mesh), "pretrain", jax.devices()).flops
    one, shared = flops.values()
    assert shared == pytest.approx(one, rel=0.3)  # but for the spare rows that each has for a block
    assert one > 3 * tiny.stages["pretrain"].data.batch * 32 * 2 * 64 * 64


def test_the_split_of_memory_adds_up(tiny, monkeypatch):
    """To what the compiler says; and what is sharded four ways is a quarter, in Adam's moments too."""
    analyses = []
    original = jax.stages.Compiled.memory_analysis
    monkeypatch.setattr(jax.stages.Compiled, "memory_analysis", lambda s: analyses.append(original(s)) or analyses[-1])
    step = compile_step(tiny, "pretrain", jax.devices())
    (said,), memory = analyses, step.memory
    assert memory is not None
    assert memory.total == (
        said.argument_size_in_bytes
        + said.output_size_in_bytes
        - said.alias_size_in_bytes
        + said.temp_size_in_bytes
        + said.generated_code_size_in_bytes
    )
    sharded = sum(size for name, size in step.arrays.items() if name.startswith("params.blocks"))
    assert step.count * 4 / 4 <= memory.parameters < step.count * 4 / 4 * 1.02  # norms are on every device
    assert 0 < sharded < memory.parameters
    assert 0 <= memory.batch < 2**14
    useful = tiny.model.flops(32) * 16 * 32
    assert useful <= step.flops < 1.1 * useful
    times = estimate(step, CHIPS["v5e"], 8, 8)
    assert times.compute == step.flops / (8 * 197e12)
    assert times.best == max(dataclasses.astuple(times)) <= times.worst


def test_a_plan_for_cpus(tiny, capsys):
    assert command.plan(tiny, ["pretrain"], Target.parse("cpu:8"), jax.devices()) == 0
    text = capsys.readouterr().out
    assert "mesh data 2 x fsdp 4" in text
    assert "all-gather" in text
    assert "no estimate of time" in text


def test_what_does_not_fit_is_named_with_what_would(tiny, capsys, monkeypatch):
    """On a chip that holds just less than the step takes."""
    memory = compile_step(tiny, "pretrain", jax.devices()).memory
    assert memory is not None
    target = Target("v5e", (2, 4))
    monkeypatch.setitem(CHIPS, "v5e", dataclasses.replace(CHIPS["v5e"], memory=memory.total - 1))
    assert command.plan(tiny, ["pretrain"], target, jax.devices()) == 1
    text = capsys.readouterr().out
    assert "does not fit" in text
    assert "params.blocks.mlp.down" in text
    assert "fits with --" in text


def test_the_stages_of_a_run_are_summed(tiny, capsys):
    one, two = (dataclasses.replace(tiny.stages["pretrain"], steps=steps) for steps in (10**9, 10**10))
    stages = {"one": one, "two": two}
    twice = dataclasses.replace(tiny, stages=stages)
    assert command.plan(twice, list(stages), Target("v5e", (2, 4)), jax.devices()) == 0
    text = capsys.readouterr().out
    prices = [int(price.replace(",", "")) for price in re.findall(r"price +\$([\d,]+)", text)]
    assert len(prices) == 3
    assert prices[2] == pytest.approx(prices[0] + prices[1], abs=1)
    assert prices[1] > prices[0] > 0
    assert "all 2 stages" in text


def test_a_search_cuts_what_the_model_has(tiny):
    """Layers of a dense model, experts of a mixture, and rows where they are long."""
    stage = tiny.stages["pretrain"]
    data = dataclasses.replace(stage.data, length=LONG, batch=8)
    model = dataclasses.replace(tiny.model, mlp=MixtureOfExperts(experts=4))
    kinds = {
        "tensor": tiny,
        "expert": dataclasses.replace(tiny, model=model),
        "context": dataclasses.replace(tiny, stages={"pretrain": dataclasses.replace(stage, data=data)}),
    }
    for axis, experiment in kinds.items():
        found = [change.experiment.mesh for change in meshes(experiment, "pretrain", 8)]
        assert {mesh.data * mesh.fsdp * getattr(mesh, axis) for mesh in found} == {8}
        assert len(found) == len(set(found))
        assert {getattr(mesh, axis) for mesh in found} >= {1, 2, 4}
    with pytest.raises(UserError, match=r"model\.mlp\.experts: got 4, must be a multiple of 8"):
        dataclasses.replace(kinds["expert"], mesh=Mesh(expert=8)).check(8)


@pytest.mark.parametrize("target", ["v5e", "v5e:4", "v5p:4x4", "v9:2x2", "cpu:0", "cpu:2x2"])
def test_what_is_no_target_is_refused(target):
    with pytest.raises(UserError, match="on: got"):
        Target.parse(target)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[plan]'")
def test_a_plan_for_tpus():
    """From the command line, with overrides, in a process of its own: libtpu reads its environment once."""
    tiny = ["--model.layers", "2", "--model.width", "128", "--model.heads", "2", "--model.dtype", "bfloat16"]
    arguments = ["plan", "quickstart", "--on", "v5e:2x2", "--mesh.data", "1", "--mesh.fsdp", "4", *tiny]
    run = subprocess.run(
        [sys.executable, "-m", "gptjax.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0, run.stderr
    for words in ("4 TPU v5e chips, mesh fsdp 4", "of 16.00 GiB", "MFU", "tokens a day", "price"):
        assert words in run.stdout
