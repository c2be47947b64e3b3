"""Training loop: steps, evaluations, checkpoints and metrics, resumable after any step."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.checkpoint.checkpoint import Checkpoints
from gptjax.distributed import sharding
from gptjax.distributed.xla import Value
from gptjax.monitor.display import Display
from gptjax.monitor.metrics import MetricsLogger, last_losses
from gptjax.monitor.profiling import Profile
from gptjax.monitor.stragglers import StragglerDetector
from gptjax.monitor.times import Clock, memory
from gptjax.monitor.watchdog import Watchdog
from gptjax.protocols import Answers, Module, Tokenizer, WrittenBatches
from gptjax.train.divergence import Diverged
from gptjax.train.preemption import signals
from gptjax.train.program import Program, program
from gptjax.train.progress import Frozen, Progress, check_same, keep_best, restore_newest
from gptjax.train.stage import Reading, Stage, step_size, summary
from gptjax.train.state import State
from gptjax.train.step import divide
from gptjax.types import Batch, FrozenModel, Json, Metrics, Params, UserError

if TYPE_CHECKING:
    from gptjax.checkpoint.local import LocalCheckpoints
    from gptjax.train.rounds import Policy, Rounds

Sampler = Callable[[Params, str], str]
"""(parameters, prompt) -> generated text."""


def train(
    stage: Stage,
    name: str,
    model: Module,
    tokenizer: Tokenizer,
    folder: Path,
    records: MetricsLogger,
    *,
    cache: str | Path,
    seed: int = 0,
    init: Callable[[Params], Params] | None = None,
    frozen_models: tuple[FrozenModel, ...] = (),
    reading: Reading | None = None,
    sample: Sampler | None = None,
    start: str = "new parameters",
    description: dict[str, Json] | None = None,
    profile: range | None = None,
    accept_changes: bool = False,
    compiler_options: Mapping[str, Value] | None = None,
    local: LocalCheckpoints | None = None,
) -> Params:
    """Run one stage to its end, resuming from its newest checkpoint in `folder`, if any. Returns the trained
    parameters.

    model           module built by a `ModelConfig`, with its sharding rules; on the current mesh (`sharding.use`)
    folder          folder of the checkpoints
    cache           folder of tokenised text, or bucket that has it
    init            abstract parameters -> initial ones with the same shardings, such as another stage's; they are
                    donated. None: initialise from `seed`. With adapters, the parameters to adapt
    frozen_models   the stage's
    reading         what `stage.read` returned, to be closed here. None: it is read here
    sample          generates the text samples
    start           the initial parameters in words, shown before the first step
    description     stored in every checkpoint, beside the input position
    profile         steps to trace, counted from 1 at the start of this process
    accept_changes  resume with other data than the checkpoint's
    compiler_options  of XLA; see `distributed/xla.py`
    local           the stage's checkpoints on the hosts, beside those in `folder`. None: none

    Ctrl-C or SIGTERM finishes the step, or aborts the evaluation, saves a checkpoint, and raises KeyboardInterrupt. An
    error of writing or scoring replies is raised after a checkpoint too. The resumed run has bitwise the same results
    and records as an uninterrupted one. In a multi-process job any process may get the signal: all stop after the same
    step. Raises `Diverged` if the loss is not finite and the stage's policy cannot recover. Numbers that are not finite
    are never saved. With early stopping, the last checkpoint and the parameters are those of the lowest validation
    loss.
    """
    with contextlib.ExitStack() as stack:
        display = stack.enter_context(Display(name, stage.last_step, *step_size(stage, model), stage.pauses))
        if reading is None:
            with display.phase("reading the data"):
                reading = stage.read(name, tokenizer, model.rules, seed, cache)
        stack.callback(reading.batches.close)
        frozen: Frozen = frozen_models
        functions = program(stage, model, seed, compiler_options, stage.mechanism(reading.batches))
        if stage.has_frozen:
            assert init is not None, "a stage with frozen parameters needs those of another"
            frozen, init = (jax.jit(functions.freeze)(init(jax.eval_shape(functions.init_params))), *frozen), None
        checkpoints = stack.enter_context(Checkpoints(folder, max_to_keep=stage.max_to_keep))
        stack.enter_context(local or contextlib.nullcontext())
        abstract = jax.eval_shape(functions.init_state, *frozen)
        records.wall.lap("start")
        restored, start = restore_newest(checkpoints, local, abstract, start)
        if restored is None:
            progress = Progress.new(functions, frozen, init)
        else:
            check_same(restored, stage, name, tokenizer, reading, folder, accept_changes)
            reading.batches.restore(restored.extra["input"])
            progress = Progress.resumed(stage, restored, reading.validation is not None)
        keep = functools.partial(keep_best, stage, checkpoints, abstract, display.note, progress)
        if progress.ended(stage):
            records.resume(name, max([progress.done, *dict(progress.losses)]))  # those after the best checkpoint too
            return functions.merge(keep().eval_params, *frozen)

        extra = (description or {}) | {"stage": name, "tokenizer": tokenizer.fingerprint, "data": reading.fingerprints}
        if stage.privacy is not None:
            extra["privacy"] = stage.promise(reading.batches)
        run = _Run(
            *(stage, name, model, functions, frozen, reading, progress),
            *(checkpoints, local, records, display, sample, extra),
        )
        display.note("\n".join(summary(name, stage, model, abstract, frozen, reading.batches, start)))
        run.begin(stack, profile)
        while not progress.ended(stage):
            try:
                if progress.due:
                    run.catch_up()
                    continue
                batch = run.next_batch()
                with run.tracing.step(progress.done + 1):
                    progress.state, metrics = functions.step(progress.state, batch, *frozen)
                run.after_step(metrics)
                continue
            except Diverged as error:
                if len(progress.rollbacks) >= stage.divergence.rollbacks or not checkpoints.steps():
                    raise
                bad = error.step  # a traceback would keep arrays in device memory
            run.roll_back(abstract, bad)
        run.commit()
        return functions.merge(keep().eval_params, *frozen)


@dataclasses.dataclass
class _Run:
    """A stage in progress: its steps, evaluations, checkpoints and metrics."""

    stage: Stage
    name: str
    model: Module
    program: Program
    frozen: Frozen
    reading: Reading
    progress: Progress
    checkpoints: Checkpoints
    local: LocalCheckpoints | None
    records: MetricsLogger
    display: Display
    sample: Sampler | None
    extra: dict[str, Json]
    """Stored in every checkpoint."""
    failure: UserError | None = None
    """Error of writing or scoring replies."""
    last: tuple[int, Metrics] | None = None
    """Step and metrics that are not yet reported, on the devices."""
    hosts: StragglerDetector = dataclasses.field(default_factory=StragglerDetector)

    def begin(self, stack: contextlib.ExitStack, profile: range | None) -> None:
        """Start what watches the run, until `stack` ends; show where it starts."""
        stage, progress, records = self.stage, self.progress, self.records
        records.resume(self.name, progress.done)
        progress.losses[:] = [entry for entry in progress.losses if entry[0] <= progress.done]
        self.stopping = stack.enter_context(signals(self.display.note))
        self.display.begin(progress.done, *last_losses(records.folder, self.name))
        if self.reading.validation is None:
            self.display.note("no validation loss: the data have no validation split (validation 0)")
        folder = records.folder / "profile" / self.name
        self.tracing = stack.enter_context(Profile(profile, folder, progress.done, self.display.note))
        self.watchdog = stack.enter_context(Watchdog(records.folder, self.name, stage.hang_timeout, progress.done))
        records.wall.account("restore" if progress.done else "start", self.name, progress.done)
        self.clock = Clock(progress.done, *step_size(stage, self.model), records.wall.spend)
        schedule = stage.optimizer.learning_rate_schedule(stage.last_step)
        self.to_global = functools.partial(sharding.global_array, rules=self.model.rules)
        self.rates = np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(stage.last_step)))

    def catch_up(self) -> None:
        """Evaluate a step that was saved before its evaluation."""
        progress, progress.due = self.progress, False
        losses = self.evaluate()
        if losses is None:
            raise self.failure or KeyboardInterrupt()
        self.checkpoints.rank(progress.done, losses["validation_loss"])
        progress.losses.append((progress.done, losses["validation_loss"]))

    def next_batch(self) -> Batch:
        """The batch of the next step, on the devices. Stops the run if that is asked for while the model writes it."""
        done, first = self.progress.done, self.progress.done % self.stage.round == 0
        self.clock.lap("host")
        if not self.stage.writes:
            batch = self.to_global(next(self.reading.batches))
            self.clock.lap("input")
            return batch
        self.watchdog.beat(done, pause=first)
        with self.display.phase("writing replies") if first else contextlib.nullcontext():
            batch = self.written(self.rounds.next_batch, self.progress.state)
        self.clock.lap("rollouts")
        self.watchdog.beat(done)
        if batch is None:
            self.report_last()
            self.stop()
        if first:
            self.records.log(done + 1, self.name, **self.rounds.figures)
            self.records.replies(self.name, done + 1, self.rounds.records)
            if self.rounds.warning:
                self.display.note(f"step {done + 1}: {self.rounds.warning}")
        return batch

    @property
    def rounds(self) -> WrittenBatches:
        """The batches, if the model writes them."""
        return cast(WrittenBatches, self.reading.batches)

    def policy(self, state: State) -> Policy:
        """The model as it is now, to write replies."""
        from gptjax.train.rounds import Policy

        def prepare(batch: Batch) -> Batch:
            return self.program.prepare(state.params, self.to_global(batch), *self.frozen)

        def params() -> Params:
            return sharding.on_own_devices(self.program.deployed(state.params, *self.frozen))

        return Policy(self.model, params, prepare, self.progress.done, cast("Rounds", self.rounds))

    def written(self, function: Callable[[Policy, Callable[[], bool]], Any], state: State) -> Any:
        """Result of a function that lets the model write. None: a stop was asked for, or it failed."""
        try:
            return function(self.policy(state), self.stopping.now)
        except UserError as error:
            self.failure = error
            return None

    def after_step(self, metrics: Metrics) -> None:
        """Report the step before this one while the devices run it, then evaluate and save what is due. Raises
        `Diverged`, and KeyboardInterrupt after a signal."""
        stage, progress = self.stage, self.progress
        progress.done = done = progress.done + 1
        self.clock.dispatched(metrics)
        self.display.dispatched(done, metrics["loss"][0])
        self.tracing.dispatched(done, metrics)
        self.report_last()
        self.last = (done, metrics) if done % stage.log_every == 0 or done == stage.last_step else None
        # Once per step: a signal may arrive at any time.
        stopped = self.stopping.now() and done % stage.round == 0
        evaluating = stage.evaluates(done) and not stopped  # a preemption notice is short
        local = self.local is not None and done % self.local.every == 0
        saving = stage.saves(done) or stopped
        self.watchdog.beat(done, pause=evaluating or saving or local)
        if evaluating or saving or local:
            self.report_last()
            self.check(divide(metrics))
        losses = self.evaluate() if evaluating else {}
        stopped |= losses is None
        loss = (losses or {}).get("validation_loss")
        if saving or stopped or local:
            self.save(loss, local=not (saving or stopped))
        if loss is not None:
            progress.losses.append((done, loss))
        if stopped:
            self.stop()

    def save(self, loss: float | None = None, local: bool = False) -> None:
        """Save a checkpoint of this step, with its validation loss if there is one. local: on the hosts."""
        progress, part = self.progress, "local_checkpoint" if local else "checkpoint"
        checkpoints = self.local if self.local is not None and local else self.checkpoints
        with self.display.phase("saving on the hosts" if local else "saving"):
            self.records.store()
            checkpoints.save(progress.done, progress.state, self.extra | progress.extra(self.reading.batches), loss)
        self.clock.lap(part)
        self.records.wall.account(part, self.name, progress.done)

    def commit(self) -> None:
        """Wait for the last checkpoint, which those on the hosts are no use beside."""
        with self.display.phase("saving"):
            self.checkpoints.wait()
        if self.local is not None:
            self.local.clear()
        self.records.wall.account("commit", self.name, self.progress.done)

    def stop(self) -> NoReturn:
        """End the program with a checkpoint of this step, after a signal or a failure to write replies."""
        done = self.progress.done
        if done and self.checkpoints.latest_step() != done:
            self.save()
        self.commit()
        self.display.note(f"stopped and saved at step {done}" if done else "stopped before the first step")
        raise self.failure or KeyboardInterrupt()

    def roll_back(self, abstract: State, bad: int) -> None:
        """Restore the last checkpoint, and skip the batches from it to the `bad` step."""
        progress, wall = self.progress, self.records.wall
        self.clock.lap("device")
        wall.account("device", self.name, progress.done)
        del progress.state
        self.last, progress.due = None, False
        steps = self.checkpoints.steps()
        regular = [step for step in steps if step % self.stage.save_every == 0]  # excludes checkpoints of interruptions
        restored = self.checkpoints.restore(abstract, max(regular or steps))
        if self.local is not None:
            self.local.clear()
        self.reading.batches.restore(restored.extra["input"])
        out = progress.roll_back(restored, bad)
        for _ in range(out):
            next(self.reading.batches)
        wall.account("restore", self.name, restored.step)
        self.clock.restart(restored.step)
        self.watchdog.beat(restored.step, pause=True)
        self.records.resume(self.name, restored.step)
        self.display.begin(restored.step, *last_losses(self.records.folder, self.name))
        self.records.log(restored.step + 1, self.name, rolled_back_from=bad, batches_skipped=out)
        self.display.note(f"step {bad} is bad: rolled back to step {restored.step}, skipping {out} batches")

    def report_last(self) -> None:
        """Report the step whose metrics are still on the devices, if there is one."""
        if self.last is not None:
            self.report(*self.last)
        self.last = None

    def report(self, done: int, metrics: Metrics) -> None:
        """Fetch, record and display the metrics of a step."""
        values = divide(metrics)
        self.clock.lap("device")
        self.check(values, done)
        updates = done - int(values.get("skipped", 0))  # the schedule counts updates only
        times = self.clock.take(done)
        slow, note = self.hosts.compare(times)
        if note is not None:
            self.display.note(note)
        measured = times.values() | memory() | slow | self.records.wall.account("host", self.name, done)
        self.records.log(done, self.name, **values, learning_rate=self.rates[max(updates - 1, 0)], **measured)
        if math.isfinite(values["loss"]):
            shown = {name: self.rounds.figures[name] for name in ("reward", "outcome")} if self.stage.writes else {}
            self.display.update(done, **values | shown, waiting=times.waiting)
        if values.get("consecutive_skipped"):
            self.display.note(f"step {done} was skipped: loss {values['loss']:.3g}")
        self.watchdog.set_figures(measured)

    def evaluate(self) -> dict[str, float] | None:
        """Validation losses, recorded and displayed with text samples: none without validation batches. None, with
        nothing recorded, if interrupted."""
        done, params, texts = self.progress.done, self.progress.state.eval_params, []
        with self.display.phase("evaluating"):
            losses = self.validation_losses()
            if losses is None:
                return None
            self.check(losses)
            if losses:
                self.display.evaluation(done, losses["validation_loss"])
        if self.sample is not None and self.stage.samples(done):
            with self.display.phase("sampling"):
                for prompt in self.stage.prompts:
                    if self.stopping.now():
                        return None
                    texts.append(self.sample(self.program.deployed(params, *self.frozen), prompt))
                    self.display.sample(done, prompt, texts[-1])
        self.records.log(done, self.name, **losses, **memory())
        for prompt, text in zip(self.stage.prompts, texts, strict=False):
            self.records.text(done, f"{self.name}/sample", prompt + text)
        self.clock.lap("evaluation")
        return losses

    def validation_losses(self) -> dict[str, float] | None:
        """Validation losses by name. None, if interrupted."""
        state, validation = self.progress.state, self.reading.validation
        if self.stage.writes and validation is not None:
            return self.written(cast(Answers, validation).measure, dataclasses.replace(state, params=state.eval_params))
        total = None
        for batch in cast(Iterable[Batch], validation or ()):
            if self.stopping.now():
                return None
            before, metrics = total, self.program.evaluate(state.eval_params, self.to_global(batch), *self.frozen)
            total = metrics if before is None else jax.tree.map(jnp.add, before, metrics)
            jax.block_until_ready(before)  # at most two batches in flight, since a stop waits for them
        return {f"validation_{name}": value for name, value in divide(total or {}).items()}

    def check(self, values: dict[str, float], step: int | None = None) -> None:
        """Raise `Diverged` if a value is not finite. step: None: the last."""
        done = self.progress.done if step is None else step
        if wrong := self.stage.divergence.fault(values):
            skipped = int(values.get("consecutive_skipped", 0))
            last, folder = self.checkpoints.latest_step(), self.checkpoints.folder
            good = f"the last good checkpoint is step {last} in {folder}" if last else "no checkpoint was saved yet"
            many = f", after {skipped} consecutive bad steps" if skipped else ""
            raise Diverged(
                f"{self.name}: the {wrong} became {values[wrong]} at step {done}{many}; {good}. "
                f"Try a lower {self.name}.optimizer.learning_rate, a longer warmup or a smaller clip",
                step=done - max(skipped - 1, 0),
            )
