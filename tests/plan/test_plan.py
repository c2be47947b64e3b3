"""Plans: bytes read out of compiled programs, the split of memory, FLOPs, and whole plans of a tiny experiment."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.cli import plan as command
from gptjax.distributed.parameters import parameter_info
from gptjax.distributed.sharding import MeshConfig
from gptjax.experiment.experiment import Experiment
from gptjax.nn import MixtureOfExperts
from gptjax.optim import AdamW, Muon
from gptjax.plan import changes, compiled, hlo, programs
from gptjax.plan.arithmetic import product_flops
from gptjax.plan.changes import LONG, Change, meshes
from gptjax.plan.chips import CHIPS
from gptjax.plan.collectives import collectives, sent
from gptjax.plan.compiled import Memory, Step, compile_step
from gptjax.plan.estimate import estimate
from gptjax.plan.topology import Target
from gptjax.plan.traffic import moved
from gptjax.types import UserError

D, F, B = 64, 128, 16


@pytest.fixture(scope="module")
def tiny() -> Experiment:
    base = importlib.import_module("experiments.quickstart").experiment
    model = dataclasses.replace(base.model, vocab=256, layers=2, width=64, heads=4)
    stage = base.stages["pretrain"]
    stage = dataclasses.replace(
        stage, data=dataclasses.replace(stage.data, length=32, batch=16), optimizer=AdamW(learning_rate=1e-3)
    )
    return dataclasses.replace(base, model=model, stages={"pretrain": stage}, mesh=MeshConfig(data=2, fsdp=4))


def on_cpus(function):
    return function(jax.devices())


def program(f, *arguments: tuple[tuple[int, ...], PartitionSpec]) -> hlo.Program:
    """The compiled program of a function of float32 arrays on a mesh of 8."""
    mesh = jax.make_mesh((8,), ("fsdp",))
    with jax.set_mesh(mesh):
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, spec)) for s, spec in arguments]
        return hlo.Program.parse(jax.jit(f).lower(*shapes).compile().as_text())


WEIGHTS, ROWS = ((D, F), PartitionSpec("fsdp")), ((B, D), PartitionSpec("fsdp"))


def gathered(x, w):
    return x @ jax.sharding.reshard(w, PartitionSpec())


def test_an_fsdp_product_gathers_its_weights_and_no_more():
    found = collectives(program(gathered, ROWS, WEIGHTS))
    assert [(c.kind, c.operand, c.group, c.times) for c in found] == [("all-gather", D * F * 4 // 8, 8, 1)]
    assert sent(found) == {"all-gather": D * F * 4 * 7 / 8}


@pytest.mark.parametrize("cost", ['"flops":"96","transcendentals":"0"', '"bytes_accessed":"8","flops":"96"'])
def test_a_kernel_counts_what_it_estimates(cost):
    """libtpu 0.0.42 writes the FLOPs first, 0.0.52 in alphabetical order."""
    config = f'backend_config={{"custom_call_config":{{"cost_estimate":{{{cost}}}}}}}'
    text = f"""\
ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %y = f32[8]{{0}} custom-call(%x), custom_call_target="tpu_custom_call", {config}
}}
"""
    assert product_flops(hlo.Program.parse(text)) == 96


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
    assert sent(collectives(hlo.Program.parse(WINDOWED))) == {"collective-permute": 4 * 4 * 8 * 4}


def test_flops_count_loops_and_recomputation():
    """On each device: of a batch that the eight share out, an eighth; of what all of them do, all."""

    def loss(w, x, step):
        return jax.lax.scan(lambda x, w: (step(x, w), None), x, w)[0].sum()

    def count(step, rows=ROWS):
        return product_flops(program(lambda x, w: jax.grad(partial(loss, step=step))(w, x), rows, stack))

    def layer(x, w):
        return jnp.tanh(x @ w)

    stack, one = ((5, D, D), PartitionSpec()), 5 * 2 * B * D * D
    assert count(layer) == 3 * one / 8
    assert count(jax.checkpoint(layer, policy=jax.checkpoint_policies.nothing_saveable)) == 4 * one / 8
    assert count(layer, ((B, D), PartitionSpec())) == 3 * one


CONVOLUTION = """\
ENTRY %main (x: bf16[4,64,1,2,8], w: bf16[2,8,16,32,1]) -> bf16[4,64,16,32,1] {
  %x = bf16[4,64,1,2,8]{4,1,3,2,0} parameter(0)
  %w = bf16[2,8,16,32,1]{3,1,4,2,0} parameter(1)
  ROOT %y = bf16[4,64,16,32,1]{3,1,4,2,0} convolution(%x, %w), window={WINDOW}, dim_labels=0b12f_2i1o0->0b1f2
}
"""


def test_flops_of_a_product_that_is_a_convolution():
    """As TPUs have it: [4 x 64, 2 x 8] x [2 x 8, 16 x 32], where the 16 are a window over one place and padding."""
    text = CONVOLUTION.replace("WINDOW", "size=1x16x2 pad=0_0x15_15x0_0 rhs_reversal=0x1x0")
    assert product_flops(hlo.Program.parse(text)) == 2 * (4 * 64) * (2 * 8) * (16 * 32)


def test_memory_traffic_is_of_what_is_touched():
    """A loop reads a matrix of the stack in each turn, not the stack; and the traffic grows as the turns do."""

    def scanned(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    one, two = (moved(program(scanned, ((B, D), PartitionSpec()), ((n, D, D), PartitionSpec()))) for n in (50, 100))
    turn = 4 * (D * D + 2 * B * D)
    assert 50 * turn <= two - one <= 50 * 4 * turn


def test_what_every_device_does_alike_counts_on_each(tiny):
    """Muon's iterations, where copies of the model are alike: A = X X', B = b A + c A A, X = a X + B X."""
    muon = dataclasses.replace(
        tiny,
        mesh=MeshConfig(),
        stages={"pretrain": dataclasses.replace(tiny.stages["pretrain"], optimizer=Muon(learning_rate=1e-3))},
    )
    one = compile_step(muon, "pretrain", jax.devices()[:1]).flops
    eight = compile_step(dataclasses.replace(muon, mesh=MeshConfig(data=8)), "pretrain", jax.devices()).flops
    iterations = 0.0
    for info in jax.tree.leaves(parameter_info(tiny.model.build())):
        if info.is_matrix:
            short, long = sorted(info.fan)
            iterations += tiny.model.layers * 5 * (4 * short**2 * long + 2 * short**3)
    assert (8 * eight - one) / 7 == pytest.approx(iterations, rel=0.01)


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
    assert useful <= 8 * step.flops < 1.1 * useful
    times = estimate(step, Target("v5e", (2, 4)), 8)
    assert times.compute == step.flops / 197e12
    assert times.best == max(dataclasses.astuple(times)) <= times.worst


def test_a_plan_for_cpus(tiny, capsys):
    assert command.plan(tiny, ["pretrain"], Target.parse("cpu:8"), on_cpus) == 0
    text = capsys.readouterr().out
    assert "mesh data 2 x fsdp 4" in text
    assert "all-gather" in text
    assert "no time estimate" in text


@pytest.mark.alone
def test_what_does_not_fit_is_named_with_what_would(tiny, capsys, monkeypatch):
    """On a chip that holds just less than the step takes."""
    memory = compile_step(tiny, "pretrain", jax.devices()).memory
    assert memory is not None
    target = Target("v5e", (2, 4))
    monkeypatch.setitem(CHIPS, "v5e", dataclasses.replace(CHIPS["v5e"], memory=memory.total - 1))
    assert command.plan(tiny, ["pretrain"], target, on_cpus) == 1
    text = capsys.readouterr().out
    assert "does not fit" in text
    assert "params.blocks.mlp.down" in text
    assert "fits with --" in text


def test_the_stages_of_a_run_are_summed(tiny, capsys, monkeypatch):
    one, two = (dataclasses.replace(tiny.stages["pretrain"], steps=steps) for steps in (10**9, 10**10))
    stages = {"one": one, "two": two}
    twice = dataclasses.replace(tiny, stages=stages)
    monkeypatch.setattr(programs, "other_programs", lambda *_: {})
    assert command.plan(twice, list(stages), Target("v5e", (2, 4)), on_cpus) == 0
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
        dataclasses.replace(kinds["expert"], mesh=MeshConfig(expert=8)).check(8)


@pytest.mark.parametrize("target", ["v5e", "v5e:4", "v5p:4x4", "v9:2x2", "cpu:0", "cpu:2x2", "cpu:8*2", "v5e:4x4*0"])
def test_what_is_no_target_is_refused(target):
    with pytest.raises(UserError, match="on: got"):
        Target.parse(target)


def test_a_search_passes_over_what_cannot_be(tiny, capsys, monkeypatch):
    """A mesh that the model refuses when it is traced; the best of the others come first, by memory on a CPU."""
    refused, kept = (Change(f"--mesh.fsdp {n}", dataclasses.replace(tiny, mesh=MeshConfig(fsdp=n))) for n in (8, 4))
    monkeypatch.setattr(changes, "meshes", lambda *_: [refused, kept])
    monkeypatch.setattr(changes, "REMAT", (None,))

    def compile_step(experiment, *rest):
        if experiment.mesh == refused.experiment.mesh:
            raise UserError("mesh: not so")
        return original(experiment, *rest)

    original = compiled.compile_step
    monkeypatch.setattr(compiled, "compile_step", compile_step)
    assert command.search(tiny, "pretrain", Target.parse("cpu:8"), on_cpus) == 0
    said = capsys.readouterr()
    assert "skipped: mesh: not so" in said.err
    assert re.fullmatch(r"\s+\d+\.\d\d GiB  --mesh.fsdp 4 --model.remat None\n", said.out)


def test_the_last_changes_that_are_tried_cut_rows_or_experts_or_layers(tiny):
    def last(experiment):
        return [change.experiment.mesh for change in changes.smaller(experiment, "pretrain", 8)][-1]

    assert last(tiny) == MeshConfig(data=1, fsdp=2, tensor=4)  # of which there are heads
    assert last(mixture_of(tiny)) == MeshConfig(data=1, fsdp=2, expert=4)


def mixture_of(experiment: Experiment) -> Experiment:
    model = dataclasses.replace(experiment.model, mlp=MixtureOfExperts(experts=4))  # pyright: ignore[reportCallIssue]
    return dataclasses.replace(experiment, model=model)


def test_slices_are_named_after_their_number():
    assert (str(Target.parse("v5e:4x4*2")), Target.parse("v5e:4x4*2").chips) == ("v5e:4x4*2", 32)
    assert [Target.parse(on).wraps for on in ("v5e:4x4", "v6e:16x16", "v5p:2x2x1", "v5p:4x4x8")] == [0, 1, 0, 1]


SENT_AND_RECEIVED = """\
ENTRY %main (x: bf16[256,1024]) -> bf16[256,1024] {
  %x = bf16[256,1024]{1,0} parameter(0)
  %start = token[] after-all()
  %send = (bf16[256,1024]{1,0}, u32[], token[]) send(%x, %start), is_host_transfer=true, frontend_attributes={\
_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (bf16[256,1024]{1,0}, u32[], token[]) recv(%start), is_host_transfer=true
  %done = (bf16[256,1024]{1,0}, token[]) recv-done(%recv)
  ROOT %y = bf16[256,1024]{1,0} get-tuple-element(%done), index=0
}
"""


def test_what_goes_between_slices_takes_the_network(tiny):
    found = collectives(hlo.Program.parse(SENT_AND_RECEIVED))
    assert [(c.kind, c.between_slices, c.sent) for c in found] == [("all-reduce", True, 2 * 256 * 1024)]
    step = Step({}, 0, Memory(0, 0, 0, 0, 0, 0), collectives=found)
    times = estimate(step, Target("v5e", (4, 4), 2), 32)
    assert (times.network, times.interconnect) == (2 * 256 * 1024 / 3.125e9, 0)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[plan]'")
def test_a_plan_for_tpus():
    """From the command line, with overrides, in a process of its own: libtpu reads its environment once."""
    tiny = ["--model.layers", "2", "--model.width", "128", "--model.heads", "2", "--model.dtype", "bfloat16"]
    arguments = ["plan", "quickstart", "--on", "v5e:2x2", "--mesh.data", "1", "--mesh.fsdp", "4", *tiny]
    run = subprocess.run(
        [sys.executable, "-m", "gptjax.cli.main", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0, run.stderr
    for words in ("4 TPU v5e chips, mesh fsdp 4", "of 16.00 GiB", "MFU", "tokens per day", "price"):
        assert words in run.stdout


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[plan]'")
def test_every_generation_makes_a_mesh():
    """And where an axis is a part of one of the chips': in a program of its own, as libtpu wants its environment set
    before jax starts."""
    program = """
from gptjax.plan.chips import CHIPS
from gptjax.plan.topology import Target
from gptjax.distributed.sharding import MeshConfig
for kind, chip in CHIPS.items():
    if chip.dimensions == 1:
        continue
    target = Target.parse(f"{kind}:" + "x".join(["2", "2", "1"][: chip.dimensions]))
    assert len(target.devices()) == target.num_devices
    target.prepare()
    print(kind, MeshConfig(fsdp=-1, data=1).make(target.devices()).size)
print("part", MeshConfig(data=1, fsdp=-1, pipeline=2).make(Target.parse("v5p:4x4x4").devices()).size)
print("parts", MeshConfig(data=4, fsdp=-1, pipeline=2).make(Target.parse("v5p:4x4x4*2").devices()).size)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    two = {"tpu7x": 8}  # whose chips are two devices each
    assert dict(line.split() for line in run.stdout.splitlines()) == {
        **{k: str(two.get(k, 4)) for k, chip in CHIPS.items() if chip.dimensions > 1},
        "part": "64",
        "parts": "128",
    }


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[plan]'")
def test_plans_for_other_tpus():
    """A mixture on v5p, two slices of v6e. FLOPs are those that a step must have, but for the spare rows of experts;
    between slices gradients are summed, in bfloat16, of the quarter of the parameters that a device has."""
    program = Path(__file__).with_name("plan_for_tpus.py")
    run = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["dense"] == pytest.approx(1, abs=0.01)
    assert found["mixture"] == pytest.approx(1, abs=0.01)
    assert found["between slices"] == {"all-reduce": pytest.approx(found["parameters"] / 4 * 2, rel=0.02)}
    assert found["network"] == found["between slices"]["all-reduce"] / 12.5e9
