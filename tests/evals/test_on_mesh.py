"""Evaluations run on the mesh of a run: nothing is gathered on one device, and the results are those of one device."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from gptjax import data, evals, optim
from gptjax.distributed.sharding import DEFAULT_RULES, MeshConfig
from gptjax.experiment.experiment import Experiment, Stage
from gptjax.models.language_model import LanguageModel
from gptjax.nn import TransformerConfig
from gptjax.objectives import NextToken
from gptjax.protocols import Evaluation
from gptjax.tasks import Score, Task
from gptjax.types import Result


@dataclasses.dataclass(frozen=True)
class Talks:
    """Conversations about numbers, or the texts in them, or pairs of which the true one was chosen."""

    kind: str = "talks"

    def documents(self, split):
        for i in range(24):
            question, answer = f"{split} {i * i}?", f"{i} times {i}."
            talk = data.Message("user", question), data.Message("assistant", answer)
            pair = data.Preference(talk[:1], talk[1], data.Message("assistant", f"{i} times {i + 1}."))
            yield {"talks": talk, "texts": question + answer, "pairs": pair}[self.kind]

    def questions(self, n):
        return [(f"validation {i * i}?", f"{i} times {i}.") for i in range(n)]

    def fingerprint(self):
        return repr(self)


@dataclasses.dataclass(frozen=True)
class Placement(Evaluation):
    """Sharding of an MLP's weights [L, D, F], and the largest array that a device has all of."""

    def __call__(self, model: Any) -> Result:
        up = model.params["blocks"]["mlp"]["up"]
        whole = max(x.size for x in jax.tree.leaves(model.params) if x.sharding.is_fully_replicated)
        assert up.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
        return Result("Placement", {"devices": len(up.sharding.device_set), "largest_whole": whole}, "")


@dataclasses.dataclass(frozen=True)
class Repeat(Task):
    """Numbers to repeat. A reply of an even length is half right."""

    def __len__(self):
        return 3

    def example(self, i):
        return data.Message("user", f"{i} times?"), data.Message("assistant", f"{i} times")

    def score(self, i, reply):
        return Score(1.0 if reply.text == f"{i} times" else len(reply.text) % 2 / 2)


STAGE = Stage(
    data=data.Chat(data.Mix((Talks(), Talks("texts")), (1, 1)), length=32, batch=8),
    objective=NextToken(),
    optimizer=optim.AdamW(learning_rate=1e-2, schedule=optim.Constant()),
    steps=4,
    evaluate_every=4,
    eval_sequences=8,
    prompts=(),
    evaluations=(
        Placement(),
        evals.BitsPerByte(Talks("texts")),
        evals.Answers(Talks(), count=2, max_tokens=6),
        evals.Generative(Repeat(), max_tokens=6, workers=1),
        evals.PreferenceAccuracy(Talks("pairs")),
    ),
)
EXPERIMENT = Experiment(
    model=TransformerConfig(vocab=64, layers=2, width=16, heads=2),
    tokenizer=data.TrainCharacters(),
    stages={"chat": STAGE},
    mesh=MeshConfig(data=1, fsdp=4, tensor=2),
    rules=dataclasses.replace(DEFAULT_RULES, vocab=None),  # not the default, which an evaluation must not assume
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a finished run, and the model that its evaluations had, with parameters on one device."""
    folder, found = tmp_path_factory.mktemp("mesh") / "run", []

    def noting(*args, **fields):
        model = LanguageModel(*args, **fields)
        found.append(LanguageModel(model.config, jax.device_get(model.params), model.tokenizer))
        return model

    noting.settings_of_run = LanguageModel.settings_of_run
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTJAX_CACHE", str(folder.parent / "cache"))
        patch.setattr("gptjax.experiment.experiment.model_class", lambda _: noting)
        EXPERIMENT.run(folder)
    (one,) = found
    return folder, one


def results(folder) -> list[Result]:
    return [Result(**each) for each in json.loads((folder / "report" / "chat.json").read_text())["results"]]


def test_parameters_stay_sharded(run):
    folder, _ = run
    placement = results(folder)[0]
    assert placement.values == {"devices": 8, "largest_whole": 2 * 16}  # the scales of a norm


def test_results_are_those_of_one_device(run):
    folder, one = run
    _, bits, answers, replies, pairs = results(folder)
    for name, value in STAGE.evaluations[1](one).values.items():
        # A sum of some 700 terms of 1 to 8 nats, of logits that differ by the rounding of sums of 16 to 64 products.
        np.testing.assert_allclose(bits.values[name], value, rtol=1e-5)
    assert answers == STAGE.evaluations[2](one)
    again = STAGE.evaluations[3](one)
    assert replies == dataclasses.replace(again, items=())
    assert pairs == dataclasses.replace(STAGE.evaluations[4](one), items=())
    lines = (folder / "report" / "chat.3.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == json.loads(json.dumps(again.items))


def test_a_stage_that_lacks_its_evaluations_is_restored_on_the_mesh(run, monkeypatch):
    folder, _ = run
    monkeypatch.setenv("GPTJAX_CACHE", str(folder.parent / "cache"))
    before = results(folder)
    (folder / "report" / "chat.json").unlink()
    EXPERIMENT.run(folder)
    assert results(folder) == before
