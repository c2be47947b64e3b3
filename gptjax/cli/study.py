"""`gptjax run NAME --folds 10`, `--sweep OPTION=VALUES`, `--seeds 3`: several runs of one experiment, each a process of
its own in a folder of its own, one after the other.

A run that fails does not stop the others. The same command goes on with what is missing, and tries again what failed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gptjax.cli.options import override, parse_options
from gptjax.cli.run import Options, pair
from gptjax.config import paths
from gptjax.data.folds import with_fold
from gptjax.experiment import study, study_report
from gptjax.experiment.study import Outcome, Trial
from gptjax.io import atomic
from gptjax.types import UserError

if TYPE_CHECKING:
    from gptjax.experiment.experiment import Experiment

OWN = ("folds", "sweep", "seeds", "search", "trials", "figure", "maximise", "worker", "stop_on_failure", "out")
"""Options of a study, which its runs do not get."""
CHOOSING = ("depth", "variant")
"""Options of the launcher that can be swept: they choose the experiment."""
CHILD = "import sys; from gptjax.cli.study import child; sys.exit(child(sys.argv[1:]))"


def run(name: str, arguments: Sequence[str], options: Options, experiment: Experiment) -> int:
    """Train the runs of a study that are missing and write the report. Returns the exit code: 0 all are done, 1 some
    failed.

    experiment  with the overrides that all runs have"""
    study_folder = options.folder
    _check(options, experiment)
    _, overrides = parse_options(Options(options.out), arguments)
    planned = list(_trials(options, experiment, study_folder, dry=True))
    for trial in planned:  # a mistake in any of them is shown before the first one is trained
        settings = [f"--{path}={value}" for path, value in trial.settings.items() if path not in CHOOSING]
        override(experiment, settings, "sweep", "")
    if options.folds is not None:
        for index in range(options.folds):
            with_fold(experiment.stages, index, options.folds)
    study_folder.mkdir(parents=True, exist_ok=True)
    given = {field: getattr(options, field) for field in OWN if field not in ("worker", "out")}
    atomic.write_text(study_folder / "study.json", json.dumps({"arguments": list(arguments), **given}, indent=1) + "\n")
    started: list[Trial] = []
    index, count = (1, 1) if options.worker is None else pair("worker", options.worker)
    for number, trial in enumerate(_trials(options, experiment, study_folder)):
        started.append(trial)
        if number % count != index - 1:
            continue
        code = _train(name, overrides, options, trial, study_folder, f"{number + 1}/{len(planned)}")
        if code and options.stop_on_failure:
            break
    findings = study_report.write(study_folder, started, options.figure, options.maximise)
    print("\n".join(["", *findings, f"report: {study_folder / 'report' / 'report.md'}"]))
    outcomes = [Outcome.read(trial.folder(study_folder)) for trial in started]
    return int(any(outcome is not None and outcome.code for outcome in outcomes))


def _check(options: Options, experiment: Experiment) -> None:
    """Raise UserError for options that do not fit together."""
    if options.fold is not None:
        raise UserError(f"fold: got {options.fold} with several runs, must be None; --folds trains all of them")
    for field in ("folds", "seeds"):
        least = 2 if field == "folds" else 1
        if (value := getattr(options, field)) is not None and value < least:
            raise UserError(f"{field}: got {value}, must be at least {least}")
    if options.trials < 1:
        raise UserError(f"trials: got {options.trials}, must be at least 1")
    if options.search != "grid" and not options.sweep:
        raise UserError(f"search: got {options.search} without --sweep, must have options to search")
    if options.worker is not None:
        index, count = pair("worker", options.worker)
        if not 1 <= index <= count:
            raise UserError(f"worker: got {options.worker}, must be I:N with I from 1 to N")
        if options.search == "optuna":
            raise UserError("worker: got one with --search optuna, whose suggestions wait for earlier runs; use random")
    for field in ("mirror", "profile"):
        if getattr(options, field) is not None:
            raise UserError(f"{field}: got {getattr(options, field)} with several runs, must be None")
    if options.coordinates or options.distributed:
        raise UserError("a study runs on one machine: neither --coordinates nor --distributed fit; see --worker")
    if any(name.partition(".")[0] == "seed" for name in study.parse_sweep(options.sweep, _known(experiment))):
        raise UserError("sweep: got seed, must be another option; --seeds trains each setting with several")


def _known(experiment: Experiment) -> list[str]:
    """Paths of all options of an experiment, and those of the launcher that choose one."""
    return [*CHOOSING, *(path for path, _ in paths(experiment))]


def _trials(options: Options, experiment: Experiment, folder: Path, dry: bool = False) -> Iterator[Trial]:
    """The runs of the study. Optuna is asked for each setting after the runs of those before it.

    dry  settings that are not suggested yet are drawn"""
    choices = study.parse_sweep(options.sweep, _known(experiment))
    more = options.seeds, experiment.seed, options.folds
    if options.search == "grid" or not choices:
        yield from study.trials(study.grid(choices), *more)
        return
    if options.search == "random" or dry:
        yield from study.trials(study.draw(choices, options.trials), *more)
        return
    done: list[Trial] = []
    for _ in range(options.trials):
        values = study_report.ranking(folder, done, options.figure)
        asked = list(dict.fromkeys(tuple(trial.settings.items()) for trial in done))
        history = [(dict(settings), values.get(settings)) for settings in asked]
        new = list(study.trials([study.suggest(choices, history, options.maximise)], *more))
        yield from new
        done += new


def _train(name: str, overrides: list[str], options: Options, trial: Trial, study_folder: Path, place: str) -> int:
    """Train a run, unless it is done. Returns its exit code. Raises KeyboardInterrupt if it was interrupted."""
    folder = trial.folder(study_folder)
    title = f"{place}  {folder.relative_to(study_folder)}"
    arguments = [name, *overrides, *trial.arguments]
    outcome = Outcome.read(folder)
    if outcome is not None and outcome.code == 0:
        if outcome.arguments != arguments:
            raise UserError(
                f"out: {folder} was trained with {shlex.join(outcome.arguments)}, not {shlex.join(arguments)}; "
                "choose another folder with --out"
            )
        return 0
    print(title, flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log, started = folder.parent / f"{folder.name}.log", time.monotonic()
    accept = ["--accept_changes"] if options.accept_changes else []
    command = [sys.executable, "-c", CHILD, str(os.getpid()), *arguments, *accept, f"--out={folder}"]
    with log.open("ab") as output:
        # In a session of its own, so that Ctrl-C does not reach it twice.
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        with _forwarding(process):
            code = process.wait()
    if code == 130:
        raise KeyboardInterrupt
    last = "" if code == 0 else _last_line(log)
    Outcome(arguments, code, round(time.monotonic() - started, 1), last).write(folder)
    print(f"{title}: {'done' if code == 0 else f'failed with exit code {code}: {last}'}", flush=True)
    return code


@contextlib.contextmanager
def _forwarding(process: subprocess.Popen) -> Iterator[None]:
    """Context in which SIGTERM and Ctrl-C reach the run, which saves a checkpoint; then KeyboardInterrupt is raised."""
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def forward(number: int, _: object) -> None:
        process.send_signal(number)

    for number in signals:
        signal.signal(number, forward)
    try:
        yield
    finally:
        for number, handler in signals.items():
            signal.signal(number, handler)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ")[:500] if lines else "no output"


def child(arguments: Sequence[str]) -> int:
    """Run one experiment, `[pid of the study, *arguments]`, and be killed if the study is: a run resumes from its
    checkpoint."""
    parent, *arguments = arguments
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(parent):
            return 1
    from gptjax.cli.run import main

    return main(arguments)
