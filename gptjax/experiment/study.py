"""Studies: several runs of one experiment with other settings, seeds or folds, and a report of all of them.

    RUN/  study.json              what was asked for
          folds/0/ ...            run folders of the folds, or
          runs/SETTINGS/ ...      those of the settings and seeds
          runs/SETTINGS.json      how a run ended: its arguments, exit code and seconds
          runs/SETTINGS.log       what it printed
          report/                 report.md, curves.png

Which runs there are is a pure function of the sweep, so that a study that was stopped, or is divided among machines,
goes on with what is missing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.io import atomic
from gptjax.types import UserError

Settings = Mapping[str, str]
"""Path of an option -> its value, as typed."""


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers between two bounds, to draw from: whole ones if both bounds are, in equal steps of the logarithm if the
    larger is at least ten times the smaller, else uniformly."""

    low: float
    high: float
    whole: bool

    @property
    def logarithmic(self) -> bool:
        return self.low > 0 and self.high >= 10 * self.low

    def at(self, fraction: float) -> str:
        """Value at a fraction of the way from the low to the high bound, of three digits."""
        if self.logarithmic:
            value = math.exp(math.log(self.low) + fraction * math.log(self.high / self.low))
        else:
            value = self.low + fraction * (self.high - self.low)
        return str(min(max(round(value), int(self.low)), int(self.high))) if self.whole else f"{value:.3g}"


Choices = Sequence[str] | Range


def parse_sweep(sweep: Sequence[str], known: Sequence[str]) -> dict[str, Choices]:
    """Choices of each option of a sweep: `optimizer.learning_rate=1e-3,3e-4` or `model.layers=2:8`.

    known  paths of all options. A path may lack its beginning where no other ends alike

    Raises UserError."""
    found: dict[str, Choices] = {}
    for text in sweep:
        name, equals, values = text.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        paths = [path for path in known if f".{path}".endswith(f".{name}")]
        paths = [name] if name in paths else paths
        if not equals or not values or len(paths) != 1:
            could = f"{name} could be {' or '.join(paths)}" if len(paths) > 1 else f"there is no option {name}"
            why = "must be OPTION=VALUE,VALUE or OPTION=LOW:HIGH" if not equals or not values else could
            raise UserError(f"sweep: got {text}, {why}")
        if paths[0] in found:
            raise UserError(f"sweep: got {paths[0]} twice, must be once with all values")
        found[paths[0]] = _range(text, values) or _values(text, values)
    return found


def _values(text: str, values: str) -> list[str]:
    given = values.split(",")
    if "" in given or len(set(given)) < len(given):
        raise UserError(f"sweep: got {text}, must be values that differ, separated by commas")
    return given


def _range(text: str, values: str) -> Range | None:
    number = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
    match = re.fullmatch(f"({number}):({number})", values)
    if match is None:
        return None
    low, high = float(match[1]), float(match[2])
    if not low < high:
        raise UserError(f"sweep: got {text}, must be LOW:HIGH with the smaller first")
    return Range(low, high, all(re.fullmatch(r"[-+]?\d+", bound) for bound in match.groups()))


def grid(choices: Mapping[str, Choices]) -> list[Settings]:
    """All combinations. Raises UserError for a range."""
    listed = {path: values for path, values in choices.items() if not isinstance(values, Range)}
    for path in choices.keys() - listed.keys():
        raise UserError(f"sweep: got a range for {path}, must be values; or draw from it with --search random")
    return [dict(zip(listed, values, strict=True)) for values in itertools.product(*listed.values())]


def draw(choices: Mapping[str, Choices], trials: int) -> list[Settings]:
    """Random settings, the same ones every time, each different."""
    rng, found = np.random.default_rng(0), []
    for _ in range(100 * trials):
        drawn = {path: _at(values, rng.random()) for path, values in choices.items()}
        found += [drawn] if drawn not in found else []
        if len(found) == trials:
            return found
    raise UserError(f"trials: got {trials}, must be at most {len(found)}, the number of different settings")


def _at(values: Choices, fraction: float) -> str:
    return values.at(fraction) if isinstance(values, Range) else values[int(fraction * len(values))]


def suggest(
    choices: Mapping[str, Choices], history: Sequence[tuple[Settings, float | None]], maximise: bool
) -> Settings:
    """Setting that Optuna's TPE suggests after these ones and their figures; None: it failed. A pure function of them.
    Raises UserError without Optuna."""
    try:
        import optuna
    except ImportError:
        raise UserError("search: got optuna, which is not installed; pip install 'gptjax[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kinds: dict[str, optuna.distributions.BaseDistribution] = {
        path: optuna.distributions.FloatDistribution(0.0, 1.0)
        if isinstance(values, Range)
        else optuna.distributions.CategoricalDistribution(list(values))
        for path, values in choices.items()
    }
    sampler = optuna.samplers.TPESampler(seed=len(history))
    study = optuna.create_study(sampler=sampler, direction="maximize" if maximise else "minimize")
    for settings, value in history:
        point = {path: _fraction(choices[path], text) for path, text in settings.items()}
        state = optuna.trial.TrialState.FAIL if value is None else optuna.trial.TrialState.COMPLETE
        study.add_trial(optuna.trial.create_trial(state=state, value=value, params=point, distributions=kinds))
    asked = study.ask(kinds).params
    return {path: v.at(asked[path]) if isinstance(v, Range) else asked[path] for path, v in choices.items()}


def _fraction(values: Choices, text: str) -> float | str:
    """Fraction of the way from the low to the high bound of a range, of a value; another value is itself."""
    if not isinstance(values, Range):
        return text
    scale = math.log if values.logarithmic else float
    fraction = (scale(float(text)) - scale(values.low)) / (scale(values.high) - scale(values.low))
    return min(max(fraction, 0.0), 1.0)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a study."""

    settings: Settings
    seed: int | None = None
    """None: the experiment's."""
    fold: tuple[int, int] | None = None
    """Fold that is held out, and number of folds. None: the sources' own splits."""

    @property
    def arguments(self) -> list[str]:
        """Arguments of `gptjax run`, after the experiment's own."""
        given = [f"--{path}={value}" for path, value in self.settings.items()]
        given += [] if self.seed is None else [f"--seed={self.seed}"]
        return given + ([] if self.fold is None else [f"--fold={self.fold[0]}:{self.fold[1]}"])

    @property
    def label(self) -> str:
        """Settings in words; "" without any."""
        return label(self.settings)

    def folder(self, study: Path) -> Path:
        """Run folder, named by what differs from the experiment."""
        if self.fold is not None and not self.settings and self.seed is None:
            return study / "folds" / str(self.fold[0])
        seed = [] if self.seed is None else [f"seed={self.seed}"]
        fold = [] if self.fold is None else [f"fold={self.fold[0]}"]
        name = ",".join([*([self.label.replace(" ", ",")] if self.settings else []), *seed, *fold])
        safe = re.sub(r"[^A-Za-z0-9_.,=+-]", "_", name)
        if safe != name or len(name) > 150:
            safe = f"{safe[:130]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        return study / "runs" / safe


def label(settings: Settings) -> str:
    """Settings in words: `learning_rate=1e-3 layers=2`, with as much of a path as tells it from the others."""

    def short(path: str) -> str:
        parts = path.split(".")
        ends = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        return next((e for e in ends if sum(f".{other}".endswith(f".{e}") for other in settings) == 1), path)

    return " ".join(f"{short(path)}={value}" for path, value in settings.items())


def trials(settings: Sequence[Settings], seeds: int | None, first_seed: int, folds: int | None) -> Iterator[Trial]:
    """The runs of a study: every setting with every seed and fold."""
    for setting, seed, fold in itertools.product(
        settings,
        [None] if seeds is None else range(first_seed, first_seed + seeds),
        [None] if folds is None else [(index, folds) for index in range(folds)],
    ):
        yield Trial(setting, seed, fold)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """End of a run, in a file beside its folder."""

    arguments: list[str]
    code: int
    """Exit code of the process. 0: done."""
    seconds: float
    error: str = ""
    """Last line that it printed, of one that failed."""

    @staticmethod
    def path(folder: Path) -> Path:
        return folder.parent / f"{folder.name}.json"

    def write(self, folder: Path) -> None:
        atomic.write_text(self.path(folder), json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Outcome | None:
        """The outcome of the run in a folder. None: it has not ended."""
        try:
            stored: dict[str, Any] = json.loads(cls.path(folder).read_bytes())
            return cls(**stored)
        except (OSError, ValueError, TypeError):
            return None
