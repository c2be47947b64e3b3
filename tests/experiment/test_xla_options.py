"""Options of XLA: the table's, those of the environment and of the command line, in a run and in its plan."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re

import jax
import pytest
from tiny_experiment import EXPERIMENT, PRETRAIN

from gptjax.cli import plan as command
from gptjax.distributed import processes, xla
from gptjax.distributed.sharding import MeshConfig
from gptjax.experiment import run_folder
from gptjax.plan import programs
from gptjax.plan.topology import Target
from gptjax.train.program import program
from gptjax.types import UserError

KNOWN = "xla_cpu_prefer_vector_width"
TINY = dataclasses.replace(EXPERIMENT, stages={"pretrain": PRETRAIN}, mesh=MeshConfig(data=8))


@pytest.fixture
def table(monkeypatch):
    options = (xla.Option(KNOWN, 128, ""), xla.Option("xla_of_another_version", True, ""))
    monkeypatch.setattr(xla, "OPTIONS", {"cpu": options})
    # A command that ran in this process before may have left its own.
    monkeypatch.setenv("XLA_FLAGS", re.sub(rf"--{KNOWN}=\S+", "", os.environ["XLA_FLAGS"]))


def test_an_option_given_wins_over_the_environment_and_that_over_the_table(table, monkeypatch):
    device = jax.devices()[0]
    assert xla.options(device) == {KNOWN: 128}  # the other is unknown here
    assert xla.options(device, (f"{KNOWN}=256",)) == {KNOWN: 256}
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{KNOWN}=512")
    assert xla.options(device) == {}
    assert xla.options(device, (f"--{KNOWN}=256",)) == {KNOWN: 256}


@pytest.mark.parametrize("change", [KNOWN, "xla_foo=1", f"{KNOWN}=wide", "a b=1"])
def test_an_option_that_xla_refuses_is_one_line(change, tmp_path):
    """Before anything is made."""
    experiment = dataclasses.replace(TINY, xla=(change,))
    with pytest.raises(UserError, match=rf"xla: got {re.escape(change)}, (must be NAME=VALUE|which XLA refuses)"):
        experiment.run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_records_the_options(table, tmp_path):
    read = lambda: json.loads((tmp_path / "config.json").read_bytes())["xla"]  # noqa: E731
    experiment = dataclasses.replace(TINY, xla=("xla_llvm_disable_expensive_passes=true",))
    for now in (TINY, experiment):  # which may change while a run is resumed
        run_folder.prepare(tmp_path, now, False, xla.options(jax.devices()[0], now.xla))
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        assert read() == {KNOWN: 128} | ({"xla_llvm_disable_expensive_passes": True} if now.xla else {})


def test_the_step_and_the_validation_loss_are_compiled_with_them():
    model = TINY.model.build(TINY.rules)
    with jax.set_mesh(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])):
        functions = program(PRETRAIN, model, compiler_options={"xla_foo": 1})
        state, batch = jax.eval_shape(functions.init_state), PRETRAIN.data.abstract_batch()
        for compile in (
            functools.partial(functions.step.lower, state),
            functools.partial(functions.evaluate.lower, state.params),
        ):
            with pytest.raises(jax.errors.JaxRuntimeError, match="xla_foo"):
                compile(batch).compile()


def test_a_plan_lists_them(table, monkeypatch, capsys):
    monkeypatch.setattr(programs, "other_programs", lambda *_: {})
    experiment = dataclasses.replace(TINY, xla=("xla_llvm_disable_expensive_passes=true",))
    target = Target.parse("cpu:8")
    assert command.plan(experiment, ["pretrain"], target, lambda function: function(jax.devices())) == 0
    printed = re.findall("XLA option +(.*)", capsys.readouterr().out)
    assert printed == [f"{KNOWN}=128", "xla_llvm_disable_expensive_passes=true"]


def test_every_program_on_a_gpu_has_the_table_s(monkeypatch):
    monkeypatch.setattr(processes.glob, "glob", lambda pattern: ["/dev/nvidia0"] if "nvidia" in pattern else [])
    option = xla.OPTIONS["gpu"][0]
    for flags, expected in (("", option.text), (f"--{option.name}=other", "other")):
        monkeypatch.setenv("XLA_FLAGS", flags)
        processes.configure()
        assert re.findall(rf"--{option.name}=(\S+)", processes.os.environ["XLA_FLAGS"]) == [expected]
