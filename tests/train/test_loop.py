"""Laws of the training loop: however it is stopped, it goes on to the same bits; what is broken is never saved."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from gptjax import data, optim
from gptjax.checkpoint.checkpoint import Checkpoints
from gptjax.distributed.parameters import parameter_info
from gptjax.monitor import metrics as train_records
from gptjax.monitor.metrics import MetricsLogger
from gptjax.nn import Transformer, TransformerConfig
from gptjax.objectives import NextToken
from gptjax.train import preemption
from gptjax.train import state as train_state
from gptjax.train.loop import Diverged, train
from gptjax.train.stage import Stage
from gptjax.types import UserError

MODEL = Transformer(TransformerConfig(vocab=64, layers=2, width=16, heads=2, dropout=0.1))
MEASURED = re.compile("time|tokens_per_second|memory|goodput")
LETTERS = "abcdefghijklmnopqrstuvwxyz ."
TOKENIZER = data.TrainCharacters().build(iter([LETTERS]))
BROKEN = TOKENIZER.encode("z")[0]


@dataclasses.dataclass(frozen=True)
class Words:
    """A source: documents of random letters, and one of z after `whole` others."""

    seed: int = 0
    letters: str = LETTERS[:-3]
    whole: int = 40

    def documents(self, split: str) -> Iterator[str]:
        rng = np.random.default_rng([self.seed, split == "train"])
        for _ in range(self.whole):
            yield "".join(rng.choice(list(self.letters), rng.integers(1, 40)))
        yield "z" * 64 if split == "train" else "a"

    def fingerprint(self) -> str:
        return repr(self)


STAGE = Stage(
    data=data.Pretrain(data.Mix((Words(0), Words(1, "aeiou")), (3, 1)), length=16, batch=8),
    objective=NextToken(),
    optimizer=optim.AdamW(learning_rate=1e-2, schedule=optim.Cosine(warmup=2)),
    steps=6,
    ema=0.5,
    evaluate_every=2,
    eval_sequences=8,
    save_every=100,
    log_every=1,
    prompts=("\n", "a"),
)


def run(
    folder: Path,
    stage: Stage = STAGE,
    records: MetricsLogger | None = None,
    sample: Any = lambda *_: "text",
    **options: Any,
) -> None:
    with records or MetricsLogger(folder) as writer:
        cache = folder.parent / "tokens"
        train(stage, "stage", MODEL, TOKENIZER, folder / "checkpoints", writer, cache=cache, sample=sample, **options)


def outcome(folder: Path) -> tuple[dict[str, bytes], dict[str, Any], list[dict[str, Any]]]:
    """All that a run leaves: the bytes of its state, the position in the data, the records but what the clock says."""

    def create() -> train_state.State:
        params = MODEL.init(jax.random.key(0), jnp.zeros((8, 16), jnp.int32))["params"]
        return train_state.create(
            params, STAGE.optimizer.build(STAGE.steps, parameter_info(MODEL)), jax.random.key(0), average=True
        )

    with Checkpoints(folder / "checkpoints") as checkpoints:
        restored = checkpoints.restore(jax.eval_shape(create))
    state = dataclasses.replace(restored.state, key=jax.random.key_data(restored.state.key))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    lines = [{k: v for k, v in line.items() if not MEASURED.match(k)} for line in train_records.read(folder)]
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}, restored.extra, lines


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(folder)
    return folder


@dataclasses.dataclass(frozen=True)
class Continued(Words):
    """Words with one more document in a split."""

    split: str = "train"

    def documents(self, split: str) -> Iterator[str]:
        yield from super().documents(split)
        if split == self.split:
            yield "another"


@pytest.mark.sampled
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_resume_is_bound_to_its_data(tmp_path, split):
    """Unless other data are accepted; and a batch of another size begins at the next sequence."""
    folder = tmp_path / "run"
    before, other = (data.Pretrain(source, length=16, batch=4) for source in (Words(), Continued(split=split)))
    run(folder, dataclasses.replace(STAGE, steps=2, data=before))
    with pytest.raises(UserError, match=rf"^stage\.data: the {split} documents are not those of .* --accept_changes"):
        run(folder, dataclasses.replace(STAGE, data=other))
    assert outcome(folder)[1]["input"] == {"sequence": 2 * 4}
    run(folder, dataclasses.replace(STAGE, steps=3, data=other), accept_changes=True)
    run(folder, dataclasses.replace(STAGE, steps=5, data=dataclasses.replace(other, batch=2)))
    assert outcome(folder)[1]["input"] == {"sequence": 3 * 4 + 2 * 2}


def test_every_step_is_recorded(whole):
    state, extra, lines = outcome(whole)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "validation_loss" in line] == [2, 4, 6]
    assert [line["sample"] for line in lines if "sample" in line] == ["\ntext", "atext"] * 3
    assert extra["input"] == {"sequence": 6 * STAGE.data.batch}
    assert extra["tokenizer"] == TOKENIZER.fingerprint
    assert any(".ema" in name for name in state)


class Stopping(MetricsLogger):
    """Metrics that get a SIGTERM while the first step is recorded."""

    def log(self, step: int, stage: str, **values) -> None:
        super().log(step, stage, **values)
        if step == 1:
            signal.raise_signal(signal.SIGTERM)


def test_a_run_that_is_stopped_goes_on_to_the_same_bits(tmp_path, whole):
    """Parameters, moments, average, order of the data, dropout, records: all the same, wherever it is stopped."""
    folder, before = tmp_path / "run", signal.getsignal(signal.SIGINT)

    def stopped(records: MetricsLogger | None = None, interrupt: int = 0) -> tuple[int, bool]:
        """The step that was saved last, and whether it was evaluated, of a run that was told to stop while the records
        are written, or while so many samples have been."""
        calls = itertools.count(1)

        def sample(params, prompt) -> str:
            if next(calls) == interrupt:
                signal.raise_signal(signal.SIGINT)
            return "text"

        with pytest.raises(KeyboardInterrupt):
            run(folder, records=records, sample=sample)
        with Checkpoints(folder / "checkpoints") as checkpoints:
            last = checkpoints.latest_step() or 0
            return last, checkpoints.complete(last)

    assert stopped(Stopping(folder)) == (2, False)  # which was to be evaluated
    assert stopped(interrupt=1) == (2, False)  # this is made up for, and broken off
    assert stopped(interrupt=2) == (3, False)  # it is through, and the next step ends
    assert stopped(interrupt=1) == (4, False)
    assert stopped(interrupt=3) == (6, False)
    run(folder)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        assert checkpoints.complete(6)
    assert outcome(folder) == outcome(whole)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_without_a_validation_split(tmp_path, capsys):
    """It says so, shows samples, resumes to the same bits, and does nothing when it is done."""
    (tmp_path / "text").write_text("\n".join(Words(2).documents("train")))
    source = data.Text(str(tmp_path / "text"), "\n", validation=0.0)
    stage = dataclasses.replace(STAGE, data=dataclasses.replace(STAGE.data, source=source))
    run(tmp_path / "whole", stage)
    assert "no validation loss: the data have no validation split" in capsys.readouterr().out
    lines = outcome(tmp_path / "whole")[2]
    assert [line["step"] for line in lines if "sample" in line] == [2, 2, 4, 4, 6, 6]
    assert not any(name.startswith("validation") for line in lines for name in line)
    calls = itertools.count(1)

    def sample(*_) -> str:
        if next(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return "text"

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", stage, sample=sample)
    with Checkpoints(tmp_path / "stopped" / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == 3
    for _ in range(2):
        run(tmp_path / "stopped", stage)
        assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_moments_to_stop_at_are_counted_from_stage_to_stage(monkeypatch):
    """Several processes stop at a number that jax agrees on, one above all that it was asked about."""
    asked = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda n: asked.append(n) or len(asked) == 5)
    for stage in ([False, False, False], [False, True, True]):  # and once agreed on it stays so
        with preemption.signals(print) as stopping:
            assert [stopping.now() for _ in stage] == stage
    assert asked == [*range(asked[0], asked[0] + 5)]


def test_a_run_that_is_done_does_nothing(whole):
    def left() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in whole.rglob("*") if path.is_file() and path.parent.name != "stage"}

    before = left()
    run(whole, sample=None)
    assert left() == before


def test_another_tokenizer_is_refused(whole, tmp_path):
    other = data.TrainCharacters().build(iter([LETTERS + "!"]))
    with (
        MetricsLogger(tmp_path) as records,
        pytest.raises(UserError, match=r"^tokenizer: the checkpoint in .* another one"),
    ):
        train(STAGE, "stage", MODEL, other, whole / "checkpoints", records, cache=tmp_path / "tokens")


@dataclasses.dataclass(frozen=True)
class Breaks(NextToken):
    """The loss is as ever, but its gradient is not a number where a z is read."""

    def __call__(self, apply, params, batch, key=None):
        metrics = super().__call__(apply, params, batch, key)
        total, weight = metrics["loss"]
        whole = 1.0 - jnp.any(batch.tokens == BROKEN)
        total += jnp.sqrt(whole + 0.0 * jnp.sum(params["embedding"])) - whole  # sqrt'(0) is infinite
        return metrics | {"loss": (total, weight)}


def test_what_is_not_finite_stops_the_run_and_is_not_saved(tmp_path):
    folder = tmp_path / "run"
    words = data.Pretrain(Words(whole=20), length=16, batch=8, shuffle=False)  # the z comes last
    run_on = dataclasses.replace(STAGE, data=words, objective=Breaks(), steps=50, save_every=1, evaluate_every=50)
    with pytest.raises(Diverged) as end:
        run(folder, run_on)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        last = checkpoints.latest_step() or 0
        params = checkpoints.restore_params(ema=True).state
    assert last >= 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    good = f"the last good checkpoint is step {last} in {folder / 'checkpoints'}"
    assert str(end.value).startswith(f"stage: the gradient_norm became nan at step {last + 1}; {good}. Try a lower")
    assert "\n" not in str(end.value)


def test_what_led_to_a_checkpoint_is_stored_with_it(tmp_path, monkeypatch):
    """On a mounted bucket too, which has nothing of a file until it is closed: here, a buffer larger than the file."""
    from orbax.checkpoint import v1

    folder, stored, path_open, save = tmp_path / "run", [], Path.open, v1.save_async

    def mounted(path: Path, mode: str = "r", buffering: int = -1, **options):
        return path_open(path, mode, 1 << 20 if path.name == "metrics.jsonl" and mode == "ab" else buffering, **options)

    def noting(*args, **options):
        stored.append([line["step"] for line in train_records.read(folder) if "loss" in line])
        return save(*args, **options)

    monkeypatch.setattr(Path, "open", mounted)
    monkeypatch.setattr(v1, "save_async", noting)
    run(folder, dataclasses.replace(STAGE, save_every=2, steps=4))
    assert stored == [[1, 2], [1, 2, 3, 4]]


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    from orbax.checkpoint import v1

    folder, saves, save = tmp_path / "run", [], v1.save_async

    def full_after_one(*args, **options):
        saves.append(1)
        if len(saves) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(*args, **options)

    monkeypatch.setattr(v1, "save_async", full_after_one)
    with pytest.raises(
        UserError, match=r"could not write step 2 .* No space left .* the last good checkpoint is step 1$"
    ):
        run(folder, dataclasses.replace(STAGE, save_every=1))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        assert checkpoints.restore_params().step == 1
