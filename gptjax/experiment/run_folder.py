"""The folder of a run: who trains in it, what it was made with, and what in it is derived from what."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
from rich.console import Console

from gptjax.checkpoint.checkpoint import Checkpoints
from gptjax.config import allow, differences, digest, from_json, modules, to_json
from gptjax.distributed import processes
from gptjax.distributed.xla import Value
from gptjax.io import atomic
from gptjax.protocols import Evaluation, Pretrained
from gptjax.train.progress import validation_losses
from gptjax.types import Result, UserError, one_line

if TYPE_CHECKING:
    from gptjax.checkpoint.local import LocalCheckpoints
    from gptjax.experiment.experiment import Experiment
    from gptjax.train.stage import Stage

LOCK = "run.lock"
PACKAGES = ("gptjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "sentencepiece")

CHANGEABLE = ("mesh", "rules", "xla", "wandb", "init_from", "expect")
"""Fields that do not affect training, except for the rounding of sums: a run may be resumed with other values. (The
model of `init_from` is known by its content.)"""
CHANGEABLE_OF_STAGES = ("max_to_keep", "evaluate_every", "log_every", "hang_timeout", "prompts")
"""The same, of a stage."""

SAVE_LOCAL_EVERY = 50
"""Default number of steps between local checkpoints."""


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Context in which no other job trains in the folder, which is created. Raises UserError if one does, and for a
    folder, file or disk that cannot be used."""
    usable = functools.partial(atomic.usable, folder, "out", "choose another folder with --out")
    with contextlib.ExitStack() as stack, usable():
        wrong = None
        if jax.process_index() == 0:
            try:
                with usable():
                    if not _foreign(folder):
                        folder.mkdir(parents=True, exist_ok=True)
                        stack.enter_context(atomic.lock(folder / LOCK, wait=False))
            except BlockingIOError:
                wrong = f"{folder} is in use by another run; wait for its end, or choose another folder with --out"
            except UserError as error:
                wrong = str(error)
        if (wrong := processes.allgather(wrong)[0]) is not None:
            raise UserError(wrong)
        yield


def _foreign(folder: Path) -> bool:
    """True for a folder that has something in it, but no run."""
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    return "config.json" not in names and not names <= {atomic.partial_of("config.json").name, LOCK}


def prepare(
    folder: Path, experiment: Experiment, accept_changes: bool, options: Mapping[str, Value] | None = None
) -> list[str]:
    """Create or check the run folder. Returns the differences from its configuration.

    options  XLA's, recorded beside the configuration"""
    allow(*modules(experiment))
    path, xla = folder / "config.json", dict(options or {})
    changed, content = [], {}
    if path.exists():
        try:
            content = json.loads(path.read_bytes())
            before = from_json(content["experiment"])
            kept = _with_changeable(experiment, before)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: is damaged ({one_line(error)}); restore it, or choose another --out") from error
        changed, relevant = differences(before, experiment), differences(kept, experiment)
        if relevant and (folder / "checkpoints").exists() and not accept_changes:
            raise UserError(
                f"{folder} has another configuration: {'; '.join(relevant)}. "
                "Resume anyway with --accept_changes, or choose another folder with --out"
            )
    elif _foreign(folder):
        raise UserError(f"{folder} is not empty and not a run folder; choose another one with --out")
    processes.barrier("all have read the folder")
    if jax.process_index() == 0 and (changed or content.get("xla") != xla):
        if changed and not (folder / "checkpoints").exists():
            # A run that failed before training, such as on a wrong path, does not occupy the folder.
            shutil.rmtree(folder / "tokenizer", ignore_errors=True)
        content = {
            "experiment": to_json(experiment),
            "versions": {package: _version(package) for package in PACKAGES},
            "python": sys.version.split()[0],
            "xla": xla,
            "git": _git_revision(),
        }
        atomic.write_text(path, json.dumps(content, indent=2) + "\n")
    processes.barrier("the run folder is open")
    return changed


def _with_changeable(experiment: Experiment, before: Experiment) -> Experiment:
    """The previous configuration, with this one's values of the fields that may change."""

    def free(stage: Stage, now: Stage | None) -> Stage:
        decisive = ("evaluate_every",) if stage.early_stopping is not None else ()
        return stage if now is None else _with(stage, now, [f for f in CHANGEABLE_OF_STAGES if f not in decisive])

    stages = {name: free(stage, experiment.stages.get(name)) for name, stage in before.stages.items()}
    return dataclasses.replace(_with(before, experiment, CHANGEABLE), stages=stages)


def _with(config: Any, other: Any, fields: Sequence[str]) -> Any:
    """The configuration with the other's values of these fields."""
    return dataclasses.replace(config, **{field: getattr(other, field) for field in fields})


def ended(stage: Stage, saved: Checkpoints) -> int | None:
    """Step of the last checkpoint of a stage that has been trained to its end. None: it has not. No file is verified.

    stage  with `steps`"""
    last = saved.latest_step()
    if last is None or (stage.early_stopping is not None and last != saved.best_step()):
        return None
    content = saved.content(last) or {}
    return last if stage.ends(last, validation_losses(last, content.get("loss"), content.get("extra", {}))) else None


def seed_of(name: str, stage: Stage, folder: Path, seed: int) -> int:
    """Random seed of a stage: the run's, or, of a private stage, one that nobody can guess, kept in the folder. Raises
    UserError if it is gone and the stage has checkpoints: draws of a second seed would keep no promise."""
    if stage.privacy is None:
        return seed
    path = folder / "secret_seed"
    with Checkpoints(folder / "checkpoints" / name) as saved:
        trained = saved.latest_step() is not None

    def kept() -> int:
        if not path.exists() and not trained:
            atomic.write_text(path, f"{secrets.randbits(63)}\n")
            path.chmod(0o600)
        try:
            return int(path.read_text() if path.exists() else "")
        except ValueError:
            raise UserError(
                f"{path}: is missing or damaged, and {name} cannot be resumed without it; restore it, or choose "
                "another folder with --out"
            ) from None

    return processes.on_first(kept)


Identity = dict[str, Any]
"""A checkpoint: stage, step and the SHA-256 of what decides its parameters."""


def identity(folder: Path, stage: str, which: Literal["latest", "best"] = "latest") -> Identity:
    """Identity of a checkpoint of a stage. The same training gives the same identity, on any mesh: a step that is
    trained a second time, after its checkpoint was damaged, is the same. Raises UserError if there is no best one."""
    with Checkpoints(folder / "checkpoints" / stage) as checkpoints:
        step = checkpoints.best_step() if which == "best" else checkpoints.latest_step()
        if step is None:
            raise UserError(f"init_from: got {which}, but no checkpoint of {stage} has a validation loss")
        extra = checkpoints.extra(step) or {}
    whole = extra["configuration"]
    changeable = {*CHANGEABLE_OF_STAGES, "evaluations"}
    decisive = {name: value for name, value in whole["stages"][stage].items() if name not in changeable}
    made = {name: whole.get(name) for name in ("model", "seed")} | {"stage": decisive}
    made |= {name: extra.get(name) for name in ("tokenizer", "input", "rollbacks", "origin")}
    return {"stage": stage, "step": step, "sha256": digest(made)}


def pretrained_identity(folder: Path, stage: str, path: str | None) -> Identity | None:
    """Identity of the model that the first stage starts from, by its content. None: it starts from new parameters. If
    that model is gone, it is the one that the stage was trained from. Raises UserError if there is neither."""
    if path is None:
        return None
    from gptjax.models.identity import content_digest

    try:
        return {"init_from": path, "sha256": content_digest(path)}
    except UserError:
        with Checkpoints(folder / "checkpoints" / stage) as checkpoints:
            extra = checkpoints.extra()
        if extra is None or extra.get("origin") is None:
            raise
        return extra["origin"]


def with_frozen(folder: Path, stage: str, origin: Identity | None, models: Mapping[str, Pretrained]) -> Identity | None:
    """The origin of a stage with the content of the models that it reads and does not train, wherever they are. If one
    is gone, they are those that the stage was trained with. Raises UserError if it was not trained yet."""
    if not models:
        return origin
    from gptjax.models.identity import content_digest

    try:
        found = [content_digest(model.path) for model in models.values()]
    except UserError:
        with Checkpoints(folder / "checkpoints" / stage) as checkpoints:
            found = ((checkpoints.extra() or {}).get("origin") or {}).get("frozen")
        if found is None:
            raise
    return (origin or {}) | {"frozen": found}


def check_local(stages: Mapping[str, Stage], local: str | None, every: int | None) -> int:
    """Steps between local checkpoints. Raises UserError for what does not fit the stages."""
    if local is None and every is not None:
        raise UserError(f"save_local_every: got {every}, must be None without local_checkpoints, the folder for them")
    every = SAVE_LOCAL_EVERY if every is None else every
    for name, stage in stages.items():
        if local is not None and (every < 1 or every % stage.round):
            must = f"a multiple of {stage.round}, the steps of a round of {name}" if stage.round > 1 else "at least 1"
            raise UserError(f"save_local_every: got {every}, must be {must}")
    return every


def local_checkpoints(
    folder: Path, stage: str, origin: Identity | None, local: str | None, every: int
) -> LocalCheckpoints | None:
    """Checkpoints of a stage in the folder `local` of each host. They are bound to the stage's folder, by a file in it,
    and to its origin. None: none."""
    if local is None:
        return None
    path = folder / "checkpoints" / stage / "local_id"

    def kept() -> list[str]:
        if not path.exists():
            atomic.write_text(path, secrets.token_hex(8))
        return [path.read_text(), str(folder)]

    from gptjax.checkpoint.local import LocalCheckpoints

    return LocalCheckpoints(local, [*processes.on_first(kept), stage, origin], every)


def describe(origin: Identity | None) -> str:
    """Line about the parameters that a stage starts from."""
    if origin is None or "sha256" not in origin:
        return "new parameters"
    return origin["init_from"] if "init_from" in origin else f"step {origin['step']:,} of {origin['stage']}"


def set_stale_aside(folder: Path, stage: str, origin: Identity | None, accept_changes: bool, console: Console) -> None:
    """Move the checkpoints of a stage that started from other parameters than those of `origin`, such as before the
    previous stage was extended, to `stale/`, so that it is trained again. Raises UserError unless `accept_changes`."""
    path = folder / "checkpoints" / stage
    with Checkpoints(path) as checkpoints:
        extra = checkpoints.extra()
    before = None if extra is None else extra.get("origin")
    changed = [key for key in ("sha256", "frozen") if (before or {}).get(key) != (origin or {}).get(key)]
    if extra is None or not changed:
        return
    was, now = describe(before), describe(origin)
    why = f"{stage}: was trained from {was}, which is not {now}"
    if was == now:
        why = f"{stage}: was trained from other content of {now}"
    if changed == ["frozen"]:
        why = f"{stage}: was trained with other content of the models that its objective names"
    if not accept_changes:
        raise UserError(f"{why}; train it again with --accept_changes, or choose another folder with --out")
    number = 1
    while (aside := folder / "stale" / f"{stage}-{number}").exists():
        number += 1
    processes.barrier("all know the stale checkpoints")
    if jax.process_index() == 0:
        atomic.move(path, aside)
    processes.barrier("stale checkpoints are set aside")
    console.print(f"{why}; trained again (the old checkpoints are in {aside})")


@dataclasses.dataclass(frozen=True)
class StoredResults:
    """Results of a stage's evaluations in a file, bound to the checkpoint and the evaluations that gave them."""

    path: Path
    of: Identity
    evaluations: Sequence[Evaluation]

    def read(self) -> list[Result] | None:
        """The results. None: there are none of this checkpoint and these evaluations."""
        found = None
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            stored = json.loads(self.path.read_bytes())
            if (stored["checkpoint"], stored["evaluations"]) == (self.of, self._configuration):
                found = [dataclasses.asdict(Result(**result)) for result in stored["results"]]
        found = processes.allgather(found)[0]
        return None if found is None else [Result(**result) for result in found]

    def write(self, results: Sequence[Result]) -> None:
        if jax.process_index() == 0:
            for number, result in enumerate(results):
                if result.items:
                    lines = "".join(json.dumps(item) + "\n" for item in result.items)
                    atomic.write_text(self.path.with_suffix(f".{number}.jsonl"), lines)
            values = [{k: v for k, v in dataclasses.asdict(result).items() if k != "items"} for result in results]
            content = {"checkpoint": self.of, "evaluations": self._configuration, "results": values}
            atomic.write_text(self.path, json.dumps(content, indent=2) + "\n")

    @property
    def _configuration(self) -> Any:
        return json.loads(json.dumps(to_json(self.evaluations)))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Commit of the working directory, with "+" if there are changes. None: not in a git repository."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
