"""Progress of a stage: its state and position, new or restored from a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import jax

from gptjax.checkpoint.checkpoint import Checkpoints, Restored
from gptjax.protocols import BatchIterator, Tokenizer
from gptjax.train.program import Program
from gptjax.train.stage import Reading, Stage
from gptjax.train.state import State
from gptjax.types import FrozenModel, Params, UserError

if TYPE_CHECKING:  # few runs have them
    from gptjax.checkpoint.local import LocalCheckpoints

Frozen = tuple[Params | FrozenModel, ...]
"""Arguments of a stage's program that are not trained, see `Program`."""


@dataclasses.dataclass
class Progress:
    """State and position of a stage, changed by every step."""

    state: State
    """Parameters, optimizer state, ..., of step `done`."""
    done: int
    """Steps done."""
    losses: list[tuple[int, float]]
    """(step, validation loss) of the evaluations so far."""
    rollbacks: list[list[int]]
    """(step restored, number of batches skipped) of the rollbacks so far."""
    due: bool
    """True: the run was interrupted before the validation of this step."""

    @classmethod
    def new(cls, program: Program, frozen: Frozen, init: Callable[[Params], Params] | None) -> Self:
        """Before the first step.

        init  as for `train`"""
        if init is None:
            state = jax.jit(program.init_state)(*frozen)
        else:
            state = jax.jit(program.create_state, donate_argnums=0)(init(jax.eval_shape(program.init_params)))
        return cls(state, int(state.step), [], [], False)

    @classmethod
    def resumed(cls, stage: Stage, restored: Restored, validates: bool) -> Self:
        """At a checkpoint. `losses` has later ones too, if the checkpoint is the best of a stage that stopped early."""
        losses = validation_losses(restored.step, restored.loss, restored.extra)
        done = int(restored.state.step)
        due = restored.loss is None and validates and stage.evaluates(done)
        return cls(restored.state, done, losses, restored.extra.get("rollbacks", []), due)

    def roll_back(self, restored: Restored, bad: int) -> int:
        """Return to a checkpoint before a bad step. Returns the number of batches after it to leave out."""
        self.state, self.done = restored.state, restored.step
        self.losses[:] = [entry for entry in self.losses if entry[0] <= restored.step]
        passed = bad - restored.step
        before = sum(count for step, count in self.rollbacks if step == restored.step)
        self.rollbacks = [*self.rollbacks, [restored.step, passed]]
        return passed + before

    def extra(self, batches: BatchIterator) -> dict[str, Any]:
        """All but the state that a checkpoint has of it, of JSON types."""
        return {"input": batches.state(), "losses": self.losses, "rollbacks": self.rollbacks}

    def ended(self, stage: Stage) -> bool:
        """True if there is nothing left to do."""
        return stage.ends(self.done, self.losses) and not self.due


def restore_newest(
    checkpoints: Checkpoints, local: LocalCheckpoints | None, abstract: State, start: str
) -> tuple[Restored | None, str]:
    """The newest checkpoint, of the run folder or of its hosts, and where it is from in words; `start` if there is
    none."""
    steps = checkpoints.steps()
    if local is not None:
        restored = local.restore(abstract, max(steps, default=-1))
        if restored is not None:
            return restored, local.found
    restored = checkpoints.restore(abstract) if steps else None
    start = start if restored is None else f"step {restored.step:,} of {checkpoints.folder}"
    return restored, f"{start}; {local.found}" if local is not None and local.found else start


def validation_losses(step: int, loss: float | None, extra: Mapping[str, Any]) -> list[tuple[int, float]]:
    """(step, validation loss) of the evaluations that a checkpoint knows: the earlier ones, its own and, after early
    stopping, later ones."""
    known = dict(extra.get("losses", [])) | ({} if loss is None else {step: loss})
    return sorted(known.items())


def check_same(
    restored: Restored, stage: Stage, name: str, tokenizer: Tokenizer, reading: Reading, folder: Path, accept: bool
) -> None:
    """Raise UserError if a checkpoint was trained with another tokenizer, for another promise of privacy or, unless
    accepted, on other data."""
    if restored.extra["tokenizer"] != tokenizer.fingerprint:
        raise UserError(f"tokenizer: the checkpoint in {folder} was trained with another one; restore that one")
    if restored.extra.get("privacy") != stage.promise(reading.batches):
        raise UserError(
            f"{name}.privacy: the steps of the checkpoint in {folder} were made for another promise, number of steps, "
            "batch size or number of sequences, and together with others keep none; choose another folder with --out"
        )
    data = reading.fingerprints
    others = [split for split in data if data[split] != restored.extra["data"][split]]
    if others and not accept:
        raise UserError(
            f"{name}.data: the {' and '.join(others)} documents are not those of the checkpoint in {folder}; "
            "restore the files of the source, or resume anyway with --accept_changes"
        )


def keep_best(
    stage: Stage, checkpoints: Checkpoints, abstract: State, note: Callable[[str], None], progress: Progress
) -> State:
    """State of a stage that has ended: with early stopping that of its best checkpoint, which becomes the last."""
    best = checkpoints.best_step()
    if stage.early_stopping is None or best is None or best == checkpoints.latest_step():
        return progress.state
    losses = progress.losses
    last = losses[-1][0]
    early = f"stopped at step {last:,}, " if last < stage.last_step else ""
    note(f"{early}the lowest validation loss is {dict(losses)[best]:.4f}, of step {best:,}, which is kept")
    checkpoints.end_at(best, {"losses": losses})
    return checkpoints.restore(abstract, best).state
