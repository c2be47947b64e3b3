"""Memory of the programs that a run has beside its training step, and the idle time of its pipeline."""

import dataclasses
import math

import jax
import pytest

from experiments.quickstart import experiment as quickstart
from gptjax.distributed.sharding import MeshConfig
from gptjax.nn import LayerOverrides, TransformerConfig
from gptjax.optim import AdamW
from gptjax.plan import programs
from gptjax.plan.chips import CHIPS
from gptjax.plan.compiled import Step, compile_step
from gptjax.plan.programs import other_programs
from gptjax.plan.report import other_lines, report
from gptjax.plan.topology import Target


def test_other_programs_of_a_run_are_planned():
    """Each runs beside the state. A validation loss is split into microbatches: it needs no more than a step."""
    stage = quickstart.stages["pretrain"]
    data = dataclasses.replace(stage.data, length=32, batch=128)
    stage = dataclasses.replace(
        stage, data=data, optimizer=AdamW(learning_rate=1e-3), accumulate=4, prompts=("a",), evaluations=()
    )
    model = TransformerConfig(vocab=256, layers=2, width=64, heads=4)
    mesh = MeshConfig(data=2, fsdp=4)
    experiment = dataclasses.replace(quickstart, model=model, stages={"pretrain": stage}, mesh=mesh)
    memory = compile_step(experiment, "pretrain", jax.devices()).memory
    others = other_programs(experiment, "pretrain", lambda function: function(jax.devices()))
    assert memory is not None
    assert memory.state <= others["first state"] < memory.total
    assert memory.state < others["validation loss"] < memory.total
    assert memory.state + memory.parameters < others["text sample"]  # layers are split: a copy


@pytest.mark.alone
@pytest.mark.slow
def test_a_text_sample_of_many_layers_is_planned_from_few():
    """To the byte where every layer needs the same."""
    leading = (LayerOverrides(hidden=48),) * 2
    model = TransformerConfig(vocab=64, layers=11, width=32, heads=2, leading_layers=leading, pipeline_chunks=3)
    stage = dataclasses.replace(quickstart.stages["pretrain"], optimizer=AdamW(learning_rate=1e-3))
    experiment = dataclasses.replace(
        quickstart, model=model, stages={"pretrain": stage}, mesh=MeshConfig(fsdp=8, data=1)
    )
    depths = []

    def call(function):
        depths.append(function.args[0].model.layers)
        return function(jax.devices())

    planned = other_programs(experiment, "pretrain", call)["text sample"]
    assert depths == [11, 11, 4, 6, 4, 6]
    both = programs._begin, programs._decode
    whole = max(programs._in_use(experiment, "pretrain", part, jax.devices()) for part in both)
    assert planned == pytest.approx(whole, rel=0.01)


def test_the_largest_of_the_other_programs_is_named_if_it_does_not_fit(monkeypatch):
    target = Target("v5e", (2, 4))
    monkeypatch.setitem(CHIPS, "v5e", dataclasses.replace(CHIPS["v5e"], memory=2**20))
    *_, last = other_lines({"first state": 2**20 + 1, "validation loss": math.inf, "text sample": 1}, target, 8)
    assert last.startswith("does not fit: the validation loss needs more than 1.00 MiB; ")
    assert "accumulate" in last
    assert "does not fit" not in "".join(other_lines({"first state": 2**20}, target, 8))


def test_a_plan_says_how_long_a_pipeline_waits():
    """A lap of 4 microbatches in 2 chunks of 4 stages, in each of 2 accumulated batches."""
    model = TransformerConfig(vocab=64, layers=8, width=32, heads=2, pipeline_chunks=2)
    stage = quickstart.stages["pretrain"]
    stage = dataclasses.replace(stage, data=dataclasses.replace(stage.data, batch=16), accumulate=2)
    mesh = MeshConfig(data=2, pipeline=4)
    experiment = dataclasses.replace(quickstart, model=model, stages={"pretrain": stage}, mesh=mesh)
    step = Step({}, 1, None)
    assert "22 ticks, 27% idle" in report(experiment, "pretrain", step, Target.parse("cpu:8"), 8)
    beside = dataclasses.replace(experiment, mesh=MeshConfig(data=8))
    assert "idle" not in report(beside, "pretrain", step, Target.parse("cpu:8"), 8)
