"""Runs side by side: size, tokens, time, FLOPs, figures and curves of each, read from their folders."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import from_json
from gptjax.distributed.parameters import declared
from gptjax.experiment.report import VALIDATION_LOSS, figures
from gptjax.monitor import metrics, times
from gptjax.train.state import parameter_count
from gptjax.types import UserError

Curve = list[tuple[int, float]]
"""(step, validation loss) of a stage's evaluations."""


@dataclasses.dataclass(frozen=True)
class StageSummary:
    """Size and losses of one stage of a run."""

    steps: int
    """Number of steps trained."""
    tokens: int
    """Number of tokens trained on, padding included."""
    flops: float | None
    """FLOPs of the model, forward and backward. None: the model's configuration cannot be read."""
    seconds: float
    curve: Curve


@dataclasses.dataclass(frozen=True)
class Summary:
    """One run."""

    folder: Path
    name: str
    model: str
    """Class of its configuration."""
    parameters: int | None
    """Number of parameters. None: the model's configuration cannot be read."""
    stages: dict[str, StageSummary]
    figures: dict[str, float]

    def total(self, field: str) -> float | None:
        """Sum of `tokens`, `flops` or `seconds` over the stages. None: it is not known."""
        values = [getattr(stage, field) for stage in self.stages.values()]
        return None if None in values else sum(values)


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Run folders: those named, and all in folders that are none. Raises UserError for a path without any, and for no
    path."""
    found: list[Path] = []
    for path in paths:
        inside = [path] if (path / "config.json").exists() else sorted(f.parent for f in path.rglob("config.json"))
        runs = [folder for folder in inside if _is_run(folder)]
        if not runs:
            raise UserError(f"runs: got {path}, must be a run folder, or a folder with some")
        found += [run for run in runs if run not in found]
    if not found:
        raise UserError("runs: got none, must be at least one run folder, or a folder with some")
    return found


def _is_run(folder: Path) -> bool:
    try:
        return "stages" in json.loads((folder / "config.json").read_bytes())["experiment"]
    except (OSError, ValueError, LookupError, TypeError):
        return False


def summarise(folder: Path, name: str) -> Summary:
    """Summary of a run, finished or not. Raises UserError for a folder without a run."""
    found = figures(folder)
    config = json.loads((folder / "config.json").read_bytes())["experiment"]
    model = _model(config["model"])
    records, stages = metrics.read(folder), {}
    for stage, of in config["stages"].items():
        lines = [line for line in records if line["stage"] == stage]
        timed = [line for line in lines if line.get("time_step")]
        steps = max((line["step"] for line in lines if "loss" in line), default=0)
        tokens = steps * of["data"]["batch"] * of["data"]["length"]
        spans = np.diff([0, *(line["step"] for line in timed)])
        seconds = [sum(line.get(f"time_{part}", 0.0) for part in (*times.TRAINING, *times.BESIDE)) for line in timed]
        stages[stage] = StageSummary(
            steps,
            tokens,
            None if model is None else float(tokens) * model.flops(of["data"]["length"]),
            float(np.dot(seconds, spans)) if timed else 0.0,
            [(line["step"], line[VALIDATION_LOSS]) for line in lines if VALIDATION_LOSS in line],
        )
    kind = str(config["model"]["class"]).rpartition(".")[2]
    parameters = None if model is None else parameter_count(declared(model.build()))
    return Summary(folder, name, kind, parameters, stages, found)


def _model(config: Any) -> Any:
    """The model's configuration, or None if it names classes of a file that is not loaded."""
    try:
        return from_json(config)
    except UserError:
        return None
