"""Laws of the end of a stage: early stopping is a pure function of the losses, epochs are steps of the data."""

from __future__ import annotations

import dataclasses
import itertools
import math
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptjax import data, optim
from gptjax.checkpoint.checkpoint import Checkpoints
from gptjax.experiment.run_folder import ended
from gptjax.monitor import metrics
from gptjax.monitor.metrics import MetricsLogger
from gptjax.nn import Transformer, TransformerConfig
from gptjax.objectives import NextToken
from gptjax.train.loop import train
from gptjax.train.stage import EarlyStopping, Stage
from gptjax.types import UserError

MODEL = Transformer(TransformerConfig(vocab=32, layers=1, width=8, heads=1))
TOKENIZER = data.TrainCharacters().build(iter(["abcdefgh"]))


@dataclasses.dataclass(frozen=True)
class Opposed:
    """A source whose validation split has other letters than its training split: it soon gets worse."""

    def documents(self, split: str) -> Iterator[str]:
        yield from (["abcd" * 8] if split == "train" else ["hgfe" * 8]) * 20

    def fingerprint(self) -> str:
        return "opposed"


STAGE = Stage(
    data=data.Pretrain(Opposed(), length=16, batch=8),
    objective=NextToken(),
    optimizer=optim.AdamW(learning_rate=3e-2, schedule=optim.Constant()),
    steps=12,
    evaluate_every=1,
    eval_sequences=8,
    save_every=100,
    max_to_keep=1,
    prompts=("\n", "a"),
    early_stopping=EarlyStopping(patience=2),
)


def run(folder: Path, stage: Stage = STAGE, interrupt: int | None = None) -> tuple[list[int], int | None]:
    """(steps of the checkpoints, last step that was trained)."""

    calls = itertools.count(1)

    def sample(*_) -> str:
        if next(calls) == interrupt:
            signal.raise_signal(signal.SIGINT)
        return ""

    with MetricsLogger(folder) as records:
        train(stage, "s", MODEL, TOKENIZER, folder / "checkpoints", records, cache=folder.parent, sample=sample)
    with Checkpoints(folder / "checkpoints") as saved:
        assert ended(stage, saved) == saved.latest_step()
        trained = [line["step"] for line in metrics.read(folder) if "validation_loss" in line]
        return saved.steps(), max(trained)


def test_the_rule_counts_evaluations_since_the_last_improvement():
    falls, rises = [(1, 3.0), (2, 2.0), (3, 1.9)], [(4, 2.5), (5, 1.95)]
    assert not EarlyStopping(patience=1).stops(falls)
    assert EarlyStopping(patience=1, min_delta=0.5).stops(falls)  # 0.1 is no improvement
    assert not EarlyStopping(patience=3).stops(falls + rises)
    assert EarlyStopping(patience=2).stops(falls + rises)
    assert not EarlyStopping(patience=2).stops([*falls, (4, 2.5), (5, 1.8)])
    for wrong in ({"patience": 0}, {"min_delta": -1.0}, {"min_delta": math.nan}):
        with pytest.raises(UserError, match=rf"^early_stopping\.{next(iter(wrong))}: got "):
            EarlyStopping(**wrong)


def test_a_stage_stops_early_with_its_best_checkpoint_and_resumes_to_the_same_end(tmp_path, capsys):
    """Wherever it is interrupted; and with more patience it goes on as if it had had it from the start."""
    whole = run(tmp_path / "whole")
    assert whole == ([5], 7)
    said = " ".join(capsys.readouterr().out.split())
    assert "or until 2 evaluations in a row do not lower the validation loss" in said
    assert "stopped at step 7, the lowest validation loss is" in said
    lines = [line for line in metrics.read(tmp_path / "whole") if "validation_loss" in line]
    assert run(tmp_path / "whole") == whole  # it does nothing
    for interrupt in (5, 9):  # in the evaluations of step 3 and, after that of step 3 is made up for, of step 7
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", interrupt=interrupt)
    assert run(tmp_path / "stopped") == whole
    again = [line for line in metrics.read(tmp_path / "stopped") if "validation_loss" in line]
    assert [line["validation_loss"] for line in again] == [line["validation_loss"] for line in lines]
    patient = dataclasses.replace(STAGE, early_stopping=EarlyStopping(patience=4))
    assert run(tmp_path / "whole", patient) == ([5], 9)


def test_epochs_are_steps_of_the_data(tmp_path):
    stage = dataclasses.replace(STAGE, steps=None, epochs=2.5, early_stopping=None)
    batches = stage.read("s", TOKENIZER, MODEL.rules, 0, tmp_path).batches
    steps = stage.with_steps("s", batches).last_step
    assert steps == math.ceil(2.5 * batches.epoch / 8)
    assert abs(batches.epoch - 20 * 34 / 16) <= 1  # documents of 32 letters, `bos` and `eos`
    batches.close()
    with pytest.raises(UserError, match=r"^epochs: got 2\.5, must be steps"):
        _ = stage.last_step
    for field, wrong in {"steps": {"epochs": 2.0}, "epochs": {"steps": None, "epochs": -1.0}}.items():
        with pytest.raises(UserError, match=f"^{field}: got "):
            dataclasses.replace(STAGE, **wrong)


def test_early_stopping_needs_a_validation_split(tmp_path):
    (tmp_path / "text").write_text("abcd\nefgh\n" * 50)
    source = data.Text(str(tmp_path / "text"), "\n", validation=0.0)
    with pytest.raises(UserError, match=r"^s\.early_stopping: got one, must be None: the data have no validation"):
        run(tmp_path, dataclasses.replace(STAGE, data=dataclasses.replace(STAGE.data, source=source)))
