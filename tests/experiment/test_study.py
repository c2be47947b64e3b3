"""Laws of studies: their runs are a pure function of the sweep, and the report finds what is best and how surely."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from gptjax import data
from gptjax.cli import plan, run
from gptjax.config import to_json
from gptjax.experiment import study, study_report
from gptjax.experiment.report import Expect, check, figures, find_figure, verdict
from gptjax.experiment.study import Outcome, Range, Trial
from gptjax.types import UserError

KNOWN = ["model.layers", "pretrain.optimizer.learning_rate", "chat.optimizer.learning_rate", "pretrain.steps"]


def finished(folder: Path, loss: float, bits: float, early: bool = False) -> None:
    """Files of a run as it leaves them."""
    (folder / "report").mkdir(parents=True)
    stage = {"early_stopping": {} if early else None}
    (folder / "config.json").write_text(json.dumps({"experiment": {"stages": {"a": stage}}}))
    lines = [{"step": s, "stage": "a", "validation_loss": loss + x} for s, x in ((1, 1.0), (2, -0.5), (3, 0.0))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = {"title": "Held-out text", "values": {"bits_per_byte": bits, "documents": 7}, "markdown": ""}
    (folder / "report" / "a.json").write_text(json.dumps({"results": [result]}))
    Outcome([], 0, 1.0).write(folder)


def test_a_sweep_names_options_by_their_ends():
    assert study.parse_sweep(["layers=2,4"], KNOWN) == {"model.layers": ["2", "4"]}
    assert study.parse_sweep(["--pretrain.optimizer.learning-rate=1e-4:1e-2"], KNOWN) == {
        "pretrain.optimizer.learning_rate": Range(1e-4, 1e-2, whole=False)
    }
    for wrong in ("learning_rate=1,2", "depth=1,2", "layers", "layers=1,1", "layers=5:2", "layers=1,"):
        with pytest.raises(UserError, match=f"^sweep: got {wrong}, "):
            study.parse_sweep([wrong], KNOWN)
    with pytest.raises(UserError, match=r"could be pretrain.* or chat"):
        study.parse_sweep(["learning_rate=1,2"], KNOWN)


def test_the_grid_is_all_combinations_and_every_run_has_a_folder_of_its_own():
    choices = study.parse_sweep(["layers=2,4", "steps=1,2,3"], KNOWN)
    runs = list(study.trials(study.grid(choices), 2, 5, 3))
    assert len(runs) == len({trial.folder(Path()) for trial in runs}) == 2 * 3 * 2 * 3
    assert runs[0].arguments == ["--model.layers=2", "--pretrain.steps=1", "--seed=5", "--fold=0:3"]
    assert runs[0].folder(Path()) == Path("runs/layers=2,steps=1,seed=5,fold=0")
    assert Trial({}, None, (3, 10)).folder(Path("x")) == Path("x/folds/3")
    assert Trial({"a": "b/../c"}).folder(Path("x")).parent == Path("x/runs")


def test_draws_are_the_same_every_time_and_within_their_ranges():
    choices = study.parse_sweep(["chat.optimizer.learning_rate=1e-5:1e-1", "layers=2:9", "steps=10,20"], KNOWN)
    drawn = study.draw(choices, 200)
    assert drawn == study.draw(choices, 200)
    rates = np.log10([float(settings["chat.optimizer.learning_rate"]) for settings in drawn])
    assert abs(rates.mean() + 3) < 5 * (4 / 12**0.5) / 200**0.5  # uniform in the logarithm
    assert {settings["model.layers"] for settings in drawn} == {str(n) for n in range(2, 10)}
    with pytest.raises(UserError, match=r"^sweep: got a range for"):
        study.grid(choices)
    with pytest.raises(UserError, match=r"^trials: got 9, must be at most 2"):
        study.draw(study.parse_sweep(["steps=1,2"], KNOWN), 9)


def test_optuna_learns_from_the_runs_so_far():
    choices = study.parse_sweep(["chat.optimizer.learning_rate=1e-5:1e-1", "steps=10,20"], KNOWN)
    history: list = []
    for _ in range(30):
        settings = study.suggest(choices, history, maximise=False)
        assert settings == study.suggest(choices, history, maximise=False)
        rate = math.log10(float(settings["chat.optimizer.learning_rate"]))
        failed = len(history) == 5
        history.append((settings, None if failed else (rate + 3) ** 2 + (settings["pretrain.steps"] == "10")))
    late = [value for _, value in history[20:]]
    assert np.median(late) < 0.3 * np.median([value for _, value in history[:10] if value is not None])


def test_the_report_names_the_best_setting_and_how_surely(tmp_path):
    trials = list(study.trials([{"x": "1"}, {"x": "2"}, {"x": "3"}], 3, 0, None))
    for trial in trials:
        assert trial.seed is not None
        level = {"1": 3.1, "2": 2.0, "3": 9.0}[trial.settings["x"]]
        if trial.settings["x"] != "3":
            finished(trial.folder(tmp_path), level + 0.3 * trial.seed + 0.01 * (trial.seed == 1), level)
    Outcome(["a"], 2, 1.0, "no memory").write(trials[-1].folder(tmp_path))
    findings = study_report.write(tmp_path, trials, None, False)
    assert findings[0].startswith("Best by lowest a/validation_loss of x=2: 2.303 [")
    assert "The next is x=1: +1.1" in findings[1]
    assert "beyond chance" in findings[1]  # paired by seed, though the intervals overlap
    assert findings[2:] == ["2 of 9 runs have not ended", "1 of 9 runs failed"]
    text = (tmp_path / "report" / "report.md").read_text()
    assert text.index("| x=2 | 3 |") < text.index("| x=1 | 3 |")
    assert "x=3,seed=2 | 2 | no memory" in text
    assert (tmp_path / "report" / "curves.png").stat().st_size > 10_000
    assert study_report.write(tmp_path, trials, "bits_per_byte", True)[0].startswith("Best by highest a/Held-out text")
    with pytest.raises(UserError, match=r"^figure: got speed, must be one of: a/validation_loss"):
        study_report.write(tmp_path, trials, "speed", False)


def test_folds_are_clusters_and_their_values_are_shown(tmp_path):
    trials = list(study.trials([{}], 2, 0, 2))
    for trial in trials:
        assert trial.fold is not None
        finished(trial.folder(tmp_path), 2.0 + trial.fold[0], 1.0)
    assert study_report.write(tmp_path, trials, None, False)[0].startswith(
        "a/validation_loss of the experiment: 2.5 [-3.853, 8.853], 4 runs"
    )  # t with one degree of freedom, 12.7 times a standard error of 0.5
    assert "| a/validation_loss | 2.5 [-3.853, 8.853] | 2 | 3 | 2 | 3 |" in (tmp_path / "report/report.md").read_text()


def test_expectations_are_compared_with_a_run(tmp_path, capsys):
    finished(tmp_path / "run", 2.0, 1.5)
    assert figures(tmp_path / "run")["a/validation_loss"] == 2.0
    finished(tmp_path / "early", 2.0, 1.5, early=True)
    assert figures(tmp_path / "early")["a/validation_loss"] == 1.5  # its last checkpoint is the best
    expected = (Expect("bits_per_byte", below=1.6), Expect("a/validation_loss", above=2.5), Expect("absent", below=1))
    checked = check(tmp_path / "run", expected)
    assert [holds for _, _, holds in checked] == [True, False, False]
    assert [verdict(*one) for one in checked] == [
        "bits_per_byte below 1.6: holds (1.5)",
        "a/validation_loss above 2.5: DOES NOT HOLD (2)",
        "absent below 1: DOES NOT HOLD (not measured)",
    ]
    with pytest.raises(UserError, match=r"^figure: got loss, could be|^figure: got loss, must"):
        find_figure(["a/loss", "b/loss"], "loss")
    with pytest.raises(UserError, match=r"^expect: got no bound of x"):
        Expect("x")
    (tmp_path / "report").mkdir()
    finished(tmp_path / "quickstart", 2.0, 1.45)
    assert run.main(["check", "quickstart", "--run", str(tmp_path / "quickstart")]) == 0
    assert "bits_per_byte above 1.38 and below 1.5: holds (1.45)" in capsys.readouterr().out
    assert run.main(["check", "gpt2_124m"]) == 2
    assert run.main(["check", "quickstart", "--run", str(tmp_path)]) == 2


PROMISES = """
import dataclasses
from gptjax import Expect

@dataclasses.dataclass(frozen=True)
class Promise:
    below: float

    @property
    def expect(self):
        return (Expect("bits_per_byte", below=self.below),)

    def run(self, folder):
        print(f"trained in {folder}")

experiment, variants = Promise(1.6), {"better": Promise(1.2)}
"""


def test_a_variant_is_held_to_its_own_promise(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("promises.py").write_text(PROMISES)
    for folder in ("promises-check", "promises-better-check"):
        finished(Path("runs") / folder, 2.0, 1.5)
    assert run.main(["check", "promises.py"]) == 0
    assert capsys.readouterr().out == "trained in runs/promises-check\nbits_per_byte below 1.6: holds (1.5)\n"
    assert run.main(["check", "promises.py", "--variant", "better"]) == 1
    better = "trained in runs/promises-better-check\nbits_per_byte below 1.2: DOES NOT HOLD (1.5)\n"
    assert capsys.readouterr().out == better
    assert run.main(["check", "promises.py", "--variant", "worse"]) == 2
    assert "--variant: got worse, must be one of: better" in capsys.readouterr().err


TINY = """
from gptjax import Experiment, Stage, data, objectives, optim
from gptjax.nn import TransformerConfig

stage = Stage(
    data=data.Pretrain(data.Text("text", "\\n"), length=16, batch=8),
    objective=objectives.NextToken(),
    optimizer=optim.AdamW(learning_rate=1e-2),
    steps=60, evaluate_every=20, eval_sequences=8, save_every=20, prompts=(),
)
experiment = Experiment(TransformerConfig(vocab=32, layers=1, width=8, heads=1), data.TrainCharacters(), {"a": stage})
"""


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    """Its run is killed with it; a run that fails does not stop the others; two workers share the rest."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.py").write_text(TINY)
    Path("text").write_text("\n".join(f"{i} times {i} is {i * i}" for i in range(200)))
    command = [sys.executable, "-m", "gptjax.cli.main", "run", "tiny.py", "--out", "s"]
    command += ["--sweep", "learning_rate=1e-2,1e30", "--folds", "2"]
    first = Path("s/runs/learning_rate=1e-2,fold=0")
    process = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    while not (first / "checkpoints" / "a" / "20").exists():
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Outcome.path(first).exists()
    for worker in ("1:2", "2:2"):
        done = subprocess.run([*command, "--worker", worker], capture_output=True, text=True, check=False)
        assert done.returncode == 1, done.stderr
    assert "2 of 4 runs failed" in done.stdout
    assert "Best by" not in done.stdout
    assert {path.name for path in Path("s/runs").glob("*.json")} == {
        f"learning_rate={rate},fold={fold}.json" for rate in ("1e-2", "1e30") for fold in (0, 1)
    }
    before = Outcome.read(first)
    subprocess.run(command, capture_output=True, check=False)
    assert Outcome.read(first) == before  # what is done is not run again


def test_mistakes_of_a_study_are_one_line(tmp_path, capsys):
    def refused(*arguments: str) -> str:
        assert run.main(["quickstart", "--out", str(tmp_path / "x"), *arguments]) == 2
        return capsys.readouterr().err

    assert refused("--folds", "1") == "error: --folds: got 1, must be at least 2\n"
    assert refused("--fold", "3") == "error: --fold: got 3, must be two numbers, such as 3:10\n"
    assert refused("--seeds", "2", "--worker", "3:2").startswith("error: --worker: got 3:2, must be I:N")
    assert refused("--sweep", "learning_rate=1,2").startswith("error: --sweep: got learning_rate=1,2, learning_rate co")
    assert "model.layers" in refused("--sweep", "model.layers=2,two")
    assert refused("--sweep", "seed=1,2").startswith("error: --sweep: got seed, must be another option; --seeds")
    assert refused("--search", "random", "--seeds", "2").startswith("error: --search: got random without --sweep")
    assert not (tmp_path / "x").exists()


def test_a_fold_of_an_experiment_is_in_its_configuration():
    options = run.Options("out")
    parsed, experiment = run._parse("quickstart", ["--fold", "2:5"], options, "p")
    assert dataclasses.replace(parsed, fold=None) == options
    source = experiment.stages["chat"].data.source
    assert source == data.Fold(data.PyDocsChat(), 2, 5)
    assert to_json(experiment)["stages"]["pretrain"]["evaluations"][0]["source"]["index"] == 2


def test_a_variant_of_an_experiment_is_chosen_by_name(tmp_path, capsys):
    """And its sentences can be divided into folds."""
    with zipfile.ZipFile(tmp_path / "polarity.zip", "w") as archive:
        for ending, word in (("neg", "bad"), ("pos", "good")):
            lines = "".join(f"a {word} film {i} .\n" for i in range(40))
            archive.writestr(f"rt-polarity.{ending}", lines)
    path = f"--train.data.source.path={tmp_path / 'polarity.zip'}"
    _, experiment = run._parse("polarity", ["--variant", "regularised", "--fold", "1:4", path], run.Options("o"), "p")
    stage = experiment.stages["train"]
    assert stage.early_stopping is not None
    assert stage.objective.label_smoothing == 0.1
    parts = {split: list(stage.data.source.documents(split)) for split in ("train", "validation")}
    assert len(parts["train"]) + len(parts["validation"]) == 80
    assert {(example.text.split()[1], example.label) for example in parts["train"]} == {("bad", 0), ("good", 1)}
    assert run.main(["polarity", "--variant", "bret", "--print"]) == 2
    assert "error: --variant: got bret, must be one of: rnn, transformer, bert, " in capsys.readouterr().err
    assert run.main(["quickstart", "--variant", "bert", "--print"]) == 2
    assert "must be None: quickstart has no `variants`, as polarity has" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"^variant: got bret, must be one of: rnn, "):
        plan.main(["polarity", "--variant", "bret", "--on", "cpu:8"])
