"""Replies of a run's evaluations: written in the chat template that the stage was trained with, and checked before."""

from __future__ import annotations

import dataclasses
import json

import pytest

import gptjax
from gptjax import data, evals, optim, tasks
from gptjax.data.chat import Message
from gptjax.data.plain_text import PlainText
from gptjax.experiment.experiment import Experiment
from gptjax.nn import TransformerConfig
from gptjax.objectives import NextToken
from gptjax.tasks import ChatTools
from gptjax.train.stage import Stage
from gptjax.types import UserError

DIALOGUE = PlainText("Q: ", " A: ")


@dataclasses.dataclass(frozen=True)
class Talks:
    """Short conversations."""

    def documents(self, split):
        yield from ((Message("user", f"{i} times?"), Message("assistant", f"{i} times")) for i in range(12))

    def fingerprint(self):
        return repr(self)


@dataclasses.dataclass(frozen=True)
class Repeat(tasks.Task):
    """Numbers to repeat."""

    def __len__(self):
        return 3

    def example(self, i):
        return Message("user", f"{i} times?"), Message("assistant", f"{i} times")

    def score(self, i, reply):
        return tasks.Score(float(reply.text == f"{i} times"))


EVALUATION = evals.Generative(Repeat(), max_tokens=8, workers=1)
STAGE = Stage(
    data=data.Chat(Talks(), length=32, batch=8, template=DIALOGUE),
    objective=NextToken(),
    optimizer=optim.AdamW(learning_rate=1e-2, schedule=optim.Constant()),
    steps=2,
    evaluate_every=2,
    eval_sequences=8,
    prompts=(),
    evaluations=(EVALUATION,),
)
EXPERIMENT = Experiment(
    model=TransformerConfig(vocab=64, layers=1, width=16, heads=2),
    tokenizer=data.TrainCharacters(),
    stages={"chat": STAGE},
)


@pytest.mark.alone
def test_replies_follow_the_template_of_the_stage(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    EXPERIMENT.run(tmp_path / "run")
    lines = (tmp_path / "run" / "report" / "chat.0.jsonl").read_text().splitlines()
    loaded = gptjax.load(tmp_path / "run")
    assert loaded.template == DIALOGUE
    assert [json.loads(line) for line in lines] == json.loads(json.dumps(EVALUATION(loaded).items))
    ours = dataclasses.replace(loaded, template=None)
    assert EVALUATION(ours).items != EVALUATION(loaded).items


def test_tools_that_the_template_cannot_write_are_refused_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    evaluation = dataclasses.replace(EVALUATION, tools=ChatTools((tasks.Calculate(),)))
    stage = dataclasses.replace(STAGE, evaluations=(evaluation,))
    with pytest.raises(UserError, match=r"^chat\.evaluations\.0\.template: got a call of a tool, must be a template"):
        dataclasses.replace(EXPERIMENT, stages={"chat": stage}).run(tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
