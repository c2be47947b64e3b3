"""Laws of the code itself: imports point one way, start-up is light, files stay short, every experiment lowers."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from gptjax.distributed.sharding import MeshConfig, abstract_array
from gptjax.experiment.experiment import Experiment
from gptjax.train.program import program
from gptjax.types import FrozenModel

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted([*ROOT.glob("gptjax/**/*.py"), *ROOT.glob("experiments/*.py")])
EXPERIMENTS = sorted(path.stem for path in ROOT.glob("experiments/*.py") if not path.stem.startswith("_"))
FLOORS = (
    {"types"},
    {"config", "distributed", "io", "kernels"},
    {"protocols"},
    {"nn", "data", "objectives", "optim"},
    {"inference", "monitor", "checkpoint", "tasks"},
    {"train"},
    {"evals", "interop"},
    {"models"},
    {"experiment", "serve"},
    {"plan"},
    {"cli", "gptjax"},
    {"experiments"},
)
"""A room may import those of the floors below. Rooms of one floor do not know each other: an objective or a data set
never sees a model's code. "gptjax" is the package's own __init__.py."""


ROOMS = frozenset().union(*FLOORS)


def floor(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def room(module: str) -> str:
    """The room of a module, or of a name imported from one."""
    parts = module.split(".")
    return parts[1] if parts[0] == "gptjax" and len(parts) > 1 and parts[1] in ROOMS else parts[0]


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    """The syntax of a file, parsed once for all laws."""
    return list(ast.walk(ast.parse(path.read_text())))


def imports(path: Path) -> Iterator[str]:
    """Full name of everything that a file imports, at any level of it."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_point_one_way():
    for path in FILES:
        here = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
        assert here in ROOMS, f"{path}: say on which floor {here} is"
        for name in imports(path):
            if name.split(".")[0] in ("gptjax", "experiments"):
                there = room(name)
                assert there == here or floor(there) < floor(here), f"{path}: {here} must not import {name}"


def test_only_nn_knows_flax():
    knowing = [path for path in FILES if any(name.split(".")[0] == "flax" for name in imports(path))]
    assert {path.parent for path in knowing} == {ROOT / "gptjax" / "nn"}


SLOW = {"grain", "matplotlib", "orbax", "sentencepiece", "tensorboardX", "tensorflow_datasets", "tokenizers", "torch"}


@pytest.mark.parametrize(("module", "slow"), [("gptjax", SLOW | {"jax"}), (f"experiments.{EXPERIMENTS[0]}", SLOW)])
def test_start_up_is_light(module, slow):
    """Slow modules are imported inside the functions that use them."""
    program = f"import sys, {module}; sys.exit(', '.join({slow} & set(sys.modules)) or 0)"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.stderr == "", f"import {module} also imports {run.stderr}"


@pytest.mark.alone
def test_a_run_takes_a_short_path():
    """The whole quickstart: other programs' files, other architectures and other kernels are not imported."""
    command = [sys.executable, "benchmarks/path.py", "--json"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert "gptjax.interop" not in found["modules"]
    assert len(found["modules"]) <= 110, "\n".join(found["modules"])
    assert len(found["first call"]) <= 14, "\n".join(found["first call"])
    assert len(found["training step"]) <= 15, "\n".join(found["training step"])


def test_a_name_that_is_imported_late_is_not_a_modules():
    """Importing the module would put it in the place of the name, from the second use on."""
    packages = [path.parent for path in FILES if path.name == "__init__.py" and "def __getattr__" in path.read_text()]
    assert len(packages) >= 7
    for folder in packages:
        package = importlib.import_module(".".join(folder.relative_to(ROOT).parts))
        assert package._HOME.keys().isdisjoint(path.stem for path in folder.iterdir()), folder


def test_files_can_be_read_in_one_go():
    files = [*FILES, *ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/*.py")]
    assert {path.name: lines for path in files if (lines := len(path.read_text().splitlines())) > 400} == {}


def test_files_of_tests_have_names_of_their_own():
    """There are no packages of tests: a process that imports one by its name must find that one."""
    names = [path.name for path in ROOT.glob("tests/**/*.py") if path.name != "conftest.py"]
    assert [name for name in set(names) if names.count(name) > 1] == []


def test_functions_can_be_read_at_a_glance():
    """At most 80 lines, without signature and docstring."""
    long = {}
    for path in FILES:
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                start = node.body[1].lineno if ast.get_docstring(node) and len(node.body) > 1 else node.body[0].lineno
                long[f"{path.name}: {node.name}"] = (node.end_lineno or start) - start + 1
    assert {name: lines for name, lines in long.items() if lines > 80} == {}


@pytest.mark.sampled
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_steps_of_an_experiment_lower_without_devices_or_data(name):
    """For TPUs, on a mesh that shares out the batch, the parameters and the layers."""
    experiment: Experiment = importlib.import_module(f"experiments.{name}").experiment
    experiment.check(math.prod(size for size in dataclasses.astuple(experiment.mesh) if size > 0))
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    dataclasses.replace(experiment, mesh=MeshConfig(**sizes)).check(8)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Explicit,) * 3)
    model = experiment.model.build(experiment.rules)
    for stage in experiment.stages.values():
        with jax.sharding.use_abstract_mesh(mesh):
            functions = program(stage, model)
            batch = abstract_array(stage.data.abstract_batch(), model.rules, mesh)
            params = jax.eval_shape(functions.init_params)
            frozen = (jax.eval_shape(functions.freeze, params),) if stage.has_frozen else ()
            frozen += tuple(FrozenModel(params, model) for _ in stage.frozen_models)
            traced = functions.step.trace(jax.eval_shape(functions.init_state, *frozen), batch, *frozen)
            text = traced.lower(lowering_platforms=("tpu",)).as_text()
        assert '"data"=2, "fsdp"=2, "tensor"=2' in text
