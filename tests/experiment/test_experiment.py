"""Laws of an experiment: what is done is not done again, and neither a mistake nor a kill spoils what is there."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import gptjax
from gptjax import data, evals, optim
from gptjax.checkpoint.checkpoint import Checkpoints
from gptjax.cli import main as command_line
from gptjax.cli import run as launcher
from gptjax.config import from_json
from gptjax.distributed import sharding
from gptjax.distributed.sharding import MeshConfig
from gptjax.experiment import run_folder
from gptjax.experiment.experiment import Experiment, Stage
from gptjax.io import atomic
from gptjax.monitor import metrics
from gptjax.nn import LearnedPositions, TransformerConfig
from gptjax.objectives import NextToken
from gptjax.train.loop import train
from gptjax.types import UserError

ROOT = Path(__file__).resolve().parents[2]
LETTERS = "abcdefghijklmnopqrstuvwxyz ."


@dataclasses.dataclass(frozen=True)
class Words:
    """A source: documents of random letters."""

    count: int = 20

    def documents(self, split: str) -> Iterator[str]:
        rng = np.random.default_rng([split == "train"])
        yield LETTERS
        for _ in range(self.count):
            yield "".join(rng.choice(list(LETTERS), rng.integers(1, 40)))

    def fingerprint(self) -> str:
        return repr(self)


@dataclasses.dataclass(frozen=True)
class Sums:
    """A source of conversations."""

    def documents(self, split: str) -> Iterator[tuple[data.Message, ...]]:
        for i in range(10):
            yield data.Message("user", "ab" * i + "?"), data.Message("assistant", "ba" * i + ".")

    def questions(self, count: int) -> list[tuple[str, str]]:
        return [("ab?", "ba.")] * count

    def fingerprint(self) -> str:
        return "sums"


PRETRAIN = Stage(
    data=data.Pretrain(Words(), length=32, batch=8),
    objective=NextToken(),
    optimizer=optim.AdamW(schedule=optim.Cosine(warmup=1)),
    steps=4,
    ema=0.5,
    evaluate_every=100,
    eval_sequences=8,
    save_every=2,
    evaluations=(evals.BitsPerByte(Words(), documents=2, length=16),),
)
CHAT = dataclasses.replace(
    PRETRAIN,
    data=data.Chat(Sums(), length=32, batch=8),
    prompts=(),
    evaluations=(evals.Answers(Sums(), count=1, max_tokens=4),),
)
EXPERIMENT = Experiment(
    model=TransformerConfig(vocab=64, layers=2, width=16, heads=2, positions=LearnedPositions(64)),
    tokenizer=data.TrainCharacters(),
    stages={"pretrain": PRETRAIN, "chat": CHAT},
    mesh=MeshConfig(data=2, fsdp=2, tensor=2),
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Tokens are kept apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def specs() -> dict[str, PartitionSpec]:
    """Sharding of an MLP's weights [L, D, F] at the end of each stage of the run `finished`."""
    return {}


@pytest.fixture(scope="module")
def finished(cache, specs, tmp_path_factory) -> Path:
    """The folder of a finished run; a test that changes it takes a copy."""

    def noting(stage, name, *args, **options):
        params = train(stage, name, *args, **options)
        specs[name] = params["blocks"]["mlp"]["up"].sharding.spec
        return params

    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptjax.experiment.experiment.train", noting)
        assert EXPERIMENT.run(folder) == 0
    return folder


def left(folder: Path) -> dict[str, bytes]:
    """Every file of a run, but TensorBoard's."""
    files = [path for path in folder.rglob("*") if path.is_file() and "tensorboard" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def params(folder: Path, stage: str, ema: bool = True):
    with Checkpoints(folder / "checkpoints" / stage) as checkpoints:
        return jax.device_get(checkpoints.restore_params(ema=ema).state)


def equal(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_the_folder_holds_all_of_a_run(finished):
    names = {str(path.relative_to(finished)) for path in finished.rglob("*")}
    assert {"config.json", "metrics.jsonl", "tokenizer", "tensorboard/pretrain", "tensorboard/chat"} <= names
    assert {f"checkpoints/{stage}/{step}" for stage in ("pretrain", "chat") for step in (2, 4)} <= names
    assert {"report/report.md", "report/pretrain.png", "report/chat.png"} <= names
    config = json.loads((finished / "config.json").read_text())
    assert from_json(config["experiment"]) == EXPERIMENT
    assert config["versions"]["jax"] == jax.__version__
    assert [line["stage"] for line in metrics.read(finished) if "sample" in line] == ["pretrain"]


def test_the_second_stage_begins_with_the_average_of_the_first(finished):
    with Checkpoints(finished / "checkpoints/chat") as checkpoints:
        first = checkpoints.restore_params(2).state  # after two steps of Adam, of at most its learning rate each
    peak = CHAT.optimizer.learning_rate
    far = jax.tree.map(lambda a, b: np.abs(a - b).max(), params(finished, "pretrain"), first)
    assert 0 < max(jax.tree.leaves(far)) < 4 * peak
    untouched = params(finished, "pretrain", ema=False)
    assert not equal(untouched, params(finished, "pretrain"))


def test_every_stage_shares_out_the_parameters_as_declared(finished, specs):
    shared = PartitionSpec(None, "fsdp", "tensor")
    assert specs == {"pretrain": shared, "chat": shared}


@dataclasses.dataclass(frozen=True)
class Monologues(Sums):
    """Conversations without an answer."""

    def documents(self, split: str) -> Iterator[tuple[data.Message, ...]]:
        for talk in super().documents(split):
            yield talk[:1]

    def fingerprint(self) -> str:
        return "monologues"


def test_data_of_a_later_stage_are_refused_before_the_first_is_trained(tmp_path, capsys):
    chat = dataclasses.replace(CHAT, data=data.Chat(Monologues(), length=32, batch=8), evaluations=())
    experiment = dataclasses.replace(EXPERIMENT, stages={"pretrain": PRETRAIN, "chat": chat})
    with pytest.raises(UserError, match=r"^chat\.data\.source: Monologues\(\) has nothing to learn for train: "):
        experiment.run(tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_says_what_it_can_do(finished, monkeypatch, tmp_path, capsys):
    """Chat only where a stage taught it; and a profile of a finished run is none."""
    monkeypatch.chdir(finished.parent)
    EXPERIMENT.run(finished, profile=range(1, 2))
    out = capsys.readouterr().out
    assert out.endswith('\n\nNow try:\n  gptjax chat run\n  gptjax generate run --prompt "..."\n')
    nothing = "profile: {} has done its 4 steps, so there is none to trace; choose another folder with --out\n"
    assert all(nothing.format(name) in out for name in ("pretrain", "chat"))
    alone = dataclasses.replace(EXPERIMENT, stages={"pretrain": dataclasses.replace(PRETRAIN, evaluations=())})
    alone.run(tmp_path / "alone")
    out = capsys.readouterr().out
    assert "profile" not in out
    assert f'\n\nNow try:\n  gptjax generate {tmp_path / "alone"} --prompt "..."\n' in out
    for folder, notes in ((finished, 0), (tmp_path / "alone", 1)):
        monkeypatch.setattr(sys, "stdin", io.StringIO("/quit"))
        assert command_line.main(["chat", str(folder)]) == 0
        assert capsys.readouterr().err.count(f"({folder} was trained on text, not on conversations: ") == notes


def test_what_is_done_is_not_done_again(finished, monkeypatch):
    for name in ("train", "model_class"):
        monkeypatch.setattr(f"gptjax.experiment.experiment.{name}", None)
    monkeypatch.setattr(Words, "documents", None)  # the text is not needed any more
    before = left(finished)
    assert EXPERIMENT.run(finished) == 0
    assert left(finished) == before


def test_a_damaged_end_of_a_stage_is_made_again(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    largest = max((folder / "checkpoints/pretrain/4").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert EXPERIMENT.run(folder) == 0
    for stage in ("pretrain", "chat"):
        assert equal(params(folder, stage), params(finished, stage))
    for name in ("pretrain.json", "chat.json", "pretrain.png"):
        assert (folder / "report" / name).read_bytes() == (finished / "report" / name).read_bytes()
    again, before = ((path / "report" / "report.md").read_text().splitlines() for path in (folder, finished))
    assert [line for line in again if "Speed: " not in line] == [line for line in before if "Speed: " not in line]


def test_another_configuration_is_refused_until_it_is_accepted(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text(f"from {__name__} import EXPERIMENT as experiment")
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = left(folder)
    command = [str(tmp_path / "mine.py"), "--out", str(folder), "--chat.save_every", "77"]
    assert launcher.main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder} has another configuration: chat.save_every: 2 → 77. ")
    assert error.count("\n") == 1
    assert left(folder) == before
    assert launcher.main([*command, "--accept_changes"]) == 0
    assert "changed: chat.save_every: 2 → 77\n" in capsys.readouterr().out
    assert launcher.main(command) == 0  # it is the folder's configuration now


def test_a_run_goes_on_on_another_mesh(tmp_path, monkeypatch):
    """Without being told to; what it reads is the same, and what it learns too but for the order of sums."""
    steps, rate, eps = 6, 1e-2, 1e-3
    adam = optim.AdamW(learning_rate=rate, schedule=optim.Constant(), eps=eps)
    stage = dataclasses.replace(PRETRAIN, optimizer=adam, steps=steps, log_every=1, evaluations=(), prompts=())
    experiment = dataclasses.replace(EXPERIMENT, stages={"pretrain": stage}, mesh=MeshConfig(data=4, fsdp=2))
    place, read, stop = sharding.global_array, [], False

    def noting(batch, rules):
        read.append(np.asarray(batch.tokens).tolist())
        if stop and len(read) == 4:  # two steps, the validation of their checkpoint, and one more
            signal.raise_signal(signal.SIGTERM)
        return place(batch, rules=rules)

    monkeypatch.setattr(sharding, "global_array", noting)
    experiment.run(tmp_path / "whole")
    expected, read, stop = read, [], True
    with pytest.raises(KeyboardInterrupt):
        experiment.run(tmp_path / "run")
    assert len(read) == 4
    dataclasses.replace(experiment, mesh=MeshConfig(data=1, fsdp=4, tensor=2)).run(tmp_path / "run")
    assert read == expected
    found, whole = (
        {line["step"]: line["loss"] for line in metrics.read(folder) if "loss" in line}
        for folder in (tmp_path / "run", tmp_path / "whole")
    )
    assert list(found) == list(whole) == [*range(1, steps + 1)]
    # A step makes at most rate / eps of the rounding in its gradient (of length 1), as in tests/train/test_step.py.
    rounding = (8 * 32) ** 0.5 * float(np.finfo(np.float32).eps)
    np.testing.assert_allclose(list(found.values()), list(whole.values()), atol=steps * rate / eps * rounding)


def stages(prompts: tuple[str, ...] = ("a",), accumulate: int = 1, **of_data) -> dict[str, Stage]:
    source = dataclasses.replace(PRETRAIN.data, **of_data)
    return {"x": dataclasses.replace(PRETRAIN, data=source, prompts=prompts, accumulate=accumulate)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": {}}, "stages: got none, must be at least one"),
        ({"stages": stages(length=65)}, "x.data.length: got 65, must be at most 64"),
        ({"stages": stages(batch=6)}, "x.data.batch: got 6, must be a multiple of 4"),
        ({"stages": stages(accumulate=4)}, "x.data.batch: got 2, must be a multiple of 4"),
        ({"stages": stages(prompts=("a" * 70,))}, "x.prompts: got 'aaa.*' of 71 tokens"),
        ({"mesh": MeshConfig(data=3)}, "mesh: data 3 does not fit 8 device"),
        ({"mesh": MeshConfig(data=2, tensor=4)}, "model.heads: got 2, must be a multiple of 4"),
        ({"model": TransformerConfig(63, 1, 16, 2)}, "model.vocab: got 63, must be a multiple of 2"),
        ({"model": TransformerConfig(32, 1, 16, 2)}, "model.vocab: got 32, but the tokenizer has 34 ids"),
    ],
)
def test_what_does_not_fit_is_refused_before_it_is_trained(change, message, tmp_path):
    with pytest.raises(UserError, match=f"^{message}"):
        dataclasses.replace(EXPERIMENT, **change).run(tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


NO_NAMES = ("", ".", "..", "../../x", "/x", "a/b", "a\\b", ".x", "a b", "a\n", "é", "\0", "a" * 101)


@pytest.mark.parametrize("name", NO_NAMES)
def test_the_name_of_a_stage_is_not_a_path(finished, tmp_path, name):
    """A stage's name is that of its folder: nothing is written or read outside the run."""
    with pytest.raises(UserError, match=r"^stages: got the name .*, must be 1 to 100 letters, digits"):
        dataclasses.replace(EXPERIMENT, stages={name: PRETRAIN})
    brought = json.loads((finished / "config.json").read_text())
    brought["experiment"]["stages"] = {name: brought["experiment"]["stages"]["pretrain"]}
    (tmp_path / "config.json").write_text(json.dumps(brought))
    with pytest.raises(UserError, match=r"config\.json: stages: got the name "):
        gptjax.load(tmp_path)
    assert dataclasses.replace(EXPERIMENT, stages={"Pre-train_1.b": PRETRAIN}).stages


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        (evals.Answers(Words()), r"source: got Words\(.*must have questions"),
        (evals.BitsPerByte(Sums()), r"source: got Sums\(.*whose documents are tuple, must be str"),
        (evals.BitsPerByte(data.Jsonl("nowhere.jsonl")), "path: .*nowhere"),
    ],
)
def test_an_evaluation_that_does_not_fit_its_source_is_refused_before_it_is_trained(evaluation, message, tmp_path):
    stage = dataclasses.replace(PRETRAIN, evaluations=(*PRETRAIN.evaluations, evaluation))
    with pytest.raises(UserError, match=rf"^x\.evaluations\.1\.{message}"):
        dataclasses.replace(EXPERIMENT, stages={"x": stage}).run(tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_evaluation_of_another_kind_of_model_is_refused():
    stage = dataclasses.replace(PRETRAIN, evaluations=(evals.Accuracy(Words()),))
    with pytest.raises(UserError, match=r"^x\.evaluations\.0: got Accuracy, which measures classifier models, must"):
        dataclasses.replace(EXPERIMENT, stages={"x": stage})


@pytest.mark.parametrize(("field", "value"), [("accumulate", 3), ("ema", 1.0), ("steps", 0), ("save_every", 0)])
def test_a_stage_that_cannot_be_is_refused(field, value):
    with pytest.raises(UserError, match=f"^{field}: got {value}, must "):
        dataclasses.replace(PRETRAIN, **{field: value})


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not empty and not a run folder"):
        EXPERIMENT.run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_configuration_that_is_not_the_checkpoints_is_refused(finished, tmp_path):
    """One bit of config.json, anywhere: the same model, or one line that says what differs."""
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    text = path.read_text()

    def said(before: str, after: str) -> str:
        assert before in text
        path.write_text(text.replace(before, after, 1))
        with pytest.raises(UserError) as error:
            gptjax.load(path.parent)
        return str(error.value).partition(f"{path}: ")[2]

    differs = "differs from the configuration of the newest checkpoint of chat: "
    assert said('"heads": 2', '"heads": 4').startswith(f"{differs}model.heads: 2 → 4; restore it")
    assert said("gptjax.nn.SwiGLU", "gptjax.nn.GeGLU").startswith(f"{differs}model.mlp: ")
    assert said('"length": 64', '"length": 65').startswith(f"{differs}model.positions.length: 64 → 65")
    assert said('"model"', '"mofel"').startswith(f"{differs}model: ")
    assert said('"chat"', '"chau"').startswith("names no stage chat, of which there are checkpoints; restore it")
    path.write_text(text)
    lm, damaged = gptjax.load(path.parent), 0
    for at, bit in np.random.default_rng(0).integers([0, 0], [len(text), 8], (40, 2)):
        content = bytearray(text.encode())
        content[at] ^= 1 << bit
        path.write_bytes(content)
        try:
            found = gptjax.load(path.parent)
        except UserError as error:
            damaged += "\n" not in str(error)
        else:
            assert (found.config, found.context) == (lm.config, lm.context)
            damaged += 1
    assert damaged == 40


def test_two_runs_in_one_folder(finished, monkeypatch, capsys):
    """The second is refused in one line, and touches nothing. A run that has ended, however it did, holds no lock."""
    monkeypatch.setattr("gptjax.experiment.catalogue.load", lambda _: types.SimpleNamespace(experiment=EXPERIMENT))
    command = ["quickstart", "--out", str(finished)]
    before = left(finished)
    with atomic.lock(finished / "run.lock"):
        assert launcher.main(command) == 2
    line = f"error: {finished} is in use by another run; wait for its end, or choose another folder with --out\n"
    assert capsys.readouterr() == ("", line)
    assert left(finished) == before
    assert launcher.main(command) == 0


def test_a_disk_that_is_full_is_named(tmp_path, monkeypatch):
    """One line for each of the files of a run; what is there afterwards is whole."""
    sync = atomic._sync
    for full in ("config.json", "tokenizer"):

        def fail(path, full=full):
            if path.name == f"{full}.partial":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(path)

        monkeypatch.setattr(atomic, "_sync", fail)
        with pytest.raises(UserError, match=r"^out: cannot use .*run \(No space left on device\); free some"):
            EXPERIMENT.run(tmp_path / "run")
        assert not (tmp_path / "run" / full).exists()


def test_a_folder_that_cannot_be_used_is_named(tmp_path, monkeypatch, capsys):
    """One line with the path and the option, exit code 2, and nothing of the user's is touched."""
    monkeypatch.setattr("gptjax.experiment.catalogue.load", lambda _: types.SimpleNamespace(experiment=EXPERIMENT))
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "locked" / "run.lock").mkdir(parents=True)
    (tmp_path / "folder" / "config.json").mkdir(parents=True)

    def everything() -> list[Path]:
        return sorted(path for path in tmp_path.rglob("*") if path != tmp_path / "folder" / "run.lock")

    before = everything()

    def said(out: Path | str) -> str:
        assert launcher.main(["quickstart", "--out", str(out)]) == 2
        printed, message = capsys.readouterr()
        assert (printed, message.count("\n")) == ("", 1)
        assert everything() == before
        return message

    assert said(tmp_path / "file") == (
        f"error: --out: cannot use {tmp_path}/file (Not a directory); free some space, make it writable, or choose "
        "another folder with --out\n"
    )
    assert f"cannot use {tmp_path}/file/below (Not a directory)" in said(tmp_path / "file" / "below")
    assert f"cannot use {tmp_path}/{'x' * 300} (File name too long)" in said(tmp_path / ("x" * 300))
    assert f"cannot use {tmp_path}/locked/run.lock (Is a directory)" in said(tmp_path / "locked")
    assert f"cannot use {tmp_path}/folder/config.json (Is a directory)" in said(tmp_path / "folder")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_killed_in_its_first_moment_is_not_something_else(tmp_path):
    (tmp_path / "config.json.partial").write_text("{")
    assert run_folder.prepare(tmp_path, EXPERIMENT, accept_changes=False) == []
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_run_that_failed_before_it_trained_does_not_hold_its_folder(tmp_path):
    small = dataclasses.replace(EXPERIMENT, model=TransformerConfig(32, 1, 16, 2))
    with pytest.raises(UserError, match=r"^model.vocab: got 32, but the tokenizer has 34 ids"):
        small.run(tmp_path)
    assert "model.vocab: 32 → 64" in run_folder.prepare(tmp_path, EXPERIMENT, accept_changes=False)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


DIVERGING = """
import dataclasses
from gptjax.train.loop import Diverged

@dataclasses.dataclass(frozen=True)
class Diverging:
    def run(self, folder, accept_changes):
        raise Diverged("pretrain: the loss became nan at step 7; the last good checkpoint is step 6")

experiment = Diverging()
"""


def test_a_run_that_diverges_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "diverging.py").write_text(DIVERGING)
    assert launcher.main([str(tmp_path / "diverging.py"), "--out", str(tmp_path / "run")]) == 3
    message = "error: pretrain: the loss became nan at step 7; the last good checkpoint is step 6\n"
    assert capsys.readouterr() == ("", message)


TINY = """
import dataclasses
from gptjax import data, objectives, optim
from gptjax.experiment import run_folder
from gptjax.experiment.experiment import Experiment, Stage
from gptjax.nn import TransformerConfig

@dataclasses.dataclass(frozen=True)
class Counting:
    first: int

    def documents(self, split):
        for i in range(200):
            yield str(self.first + i * i)

    def fingerprint(self):
        return repr(self)

experiment = Experiment(
    model=TransformerConfig(vocab=16, layers=2, width=16, heads=2),
    tokenizer=data.TrainCharacters(specials=()),
    stages={
        "pretrain": Stage(
            data=data.Pretrain(data.Mix((Counting(1), Counting(2)), (2, 1)), length=16, batch=8),
            objective=objectives.NextToken(),
            optimizer=optim.AdamW(schedule=optim.Cosine(warmup=1)),
            steps=16,
            ema=0.9,
            evaluate_every=100,
            eval_sequences=8,
            save_every=1,
            log_every=1,
            prompts=(),
        )
    },
)
"""


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_at_any_moment_changes_nothing(tmp_path, kills):
    """Killed at random, every other time amid a checkpoint, a run ends with the bits of one left alone."""
    steps = max(16, 2 * kills)
    (tmp_path / "tiny.py").write_text(TINY)
    (tmp_path / "torch.py").write_text("raise ImportError")  # TensorBoard's writer would import it, for seconds
    environment = {
        **os.environ,
        "GPTJAX_CACHE": str(tmp_path / "cache"),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compilation"),
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
    }

    def start(folder: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "experiments", str(tmp_path / "tiny.py"), "--out", str(folder)]
        command += ["--pretrain.steps", str(steps)]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)

    def recorded(folder: Path) -> int:
        return sum("loss" in line for line in metrics.read(folder))

    def writing(folder: Path) -> bool:
        return any("tmp" in path.name for path in folder.glob("checkpoints/*/*"))

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    moments = sorted(random.sample(range(1, steps - 2), kills))
    print(f"kills after steps {moments}")
    for number, step in enumerate(moments):
        run = start(killed)
        while run.poll() is None and not (recorded(killed) >= step and (number % 2 or writing(killed))):
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.02))
        run.kill()
        assert run.wait() == -signal.SIGKILL, moments
    runs = start(killed), start(whole)
    assert [run.wait() for run in runs] == [0, 0], moments

    for ema in (False, True):
        assert equal(params(killed, "pretrain", ema), params(whole, "pretrain", ema)), moments
    measured = re.compile("time|tokens_per_second|memory")
    lines = [
        [{name: value for name, value in line.items() if not measured.match(name)} for line in metrics.read(folder)]
        for folder in (killed, whole)
    ]
    assert lines[0] == lines[1], moments
    assert [line["step"] for line in lines[0] if "loss" in line] == [*range(1, steps + 1)]
