"""A student learns from a teacher of another size; a run knows its teacher by its content."""

from __future__ import annotations

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from tiny_experiment import PRETRAIN

from gptjax import data, load
from gptjax.distributed.sharding import MeshConfig
from gptjax.experiment.experiment import Experiment
from gptjax.models.language_model import LanguageModel
from gptjax.nn import LearnedPositions, TransformerConfig
from gptjax.objectives import Distillation
from gptjax.plan.compiled import compile_step
from gptjax.protocols import Pretrained
from gptjax.types import UserError

STUDENT = TransformerConfig(vocab=64, layers=1, width=16, heads=2, positions=LearnedPositions(64))
TEACHER = dataclasses.replace(STUDENT, layers=2, width=32)
STAGE = dataclasses.replace(PRETRAIN, ema=None, prompts=(), evaluations=(), save_every=4)


def save(folder, tokenizer, seed: int = 0) -> str:
    params = jax.jit(TEACHER.build().init)(jax.random.key(seed), np.zeros((1, 4), np.int32))["params"]
    shutil.rmtree(folder, ignore_errors=True)
    LanguageModel(TEACHER, params, tokenizer).save(folder)
    return str(folder)


def student(path: str) -> Experiment:
    stage = dataclasses.replace(STAGE, objective=Distillation(Pretrained(path), beta=0.5))
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    return Experiment(STUDENT, data.TrainCharacters(), {"distil": stage}, mesh)


@pytest.mark.alone
def test_a_run_learns_from_its_teacher_and_no_other(tmp_path):
    tokenizer = data.TrainCharacters().build(STAGE.data.texts())
    path = save(tmp_path / "teacher", tokenizer)
    run = tmp_path / "run"
    student(path).run(run)
    assert isinstance(load(run), LanguageModel)
    assert student(path).run(run) == 0, "nothing is left to do"

    save(tmp_path / "teacher", tokenizer, seed=1)
    with pytest.raises(UserError, match=r"^distil: was trained with other content of the models that its objective"):
        student(path).run(run)
    shutil.rmtree(tmp_path / "teacher")
    assert student(path).run(run) == 0, "the teacher of a finished stage may be gone"

    other = save(tmp_path / "other", data.TrainCharacters().build(iter(["other letters"])))
    with pytest.raises(UserError, match=r"^distil\.objective\.teacher\.path: got .*/other, whose tokenizer is not"):
        student(other).run(tmp_path / "refused")


def test_a_plan_counts_the_teacher(tmp_path):
    path = save(tmp_path / "teacher", data.TrainCharacters().build(STAGE.data.texts()))
    alone = dataclasses.replace(student(path), mesh=MeshConfig(data=1), stages={"distil": STAGE})
    teacher_bytes = sum(x.nbytes for x in jax.tree.leaves(load(path).params))
    devices = jax.devices()[:1]
    distilled = dataclasses.replace(student(path), mesh=MeshConfig(data=1))
    without, counted = (compile_step(experiment, "distil", devices).memory for experiment in (alone, distilled))
    assert without is not None
    assert counted is not None
    assert counted.batch - without.batch == teacher_bytes
