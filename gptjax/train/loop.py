"""Training loop: steps, evaluations, checkpoints and metrics, resumable after any step."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.checkpoint.checkpoint import Checkpoints, Restored
from gptjax.distributed import sharding
from gptjax.monitor.display import Display
from gptjax.monitor.metrics import MetricsLogger, last_losses
from gptjax.monitor.profiling import Profile
from gptjax.monitor.stragglers import StragglerDetector
from gptjax.monitor.times import Clock, memory
from gptjax.monitor.watchdog import Watchdog
from gptjax.protocols import Answers, BatchIterator, Module, Tokenizer, WrittenBatches
from gptjax.train.divergence import Diverged, Skip
from gptjax.train.preemption import StopSignal, signals
from gptjax.train.program import Program, program
from gptjax.train.stage import Stage, keep_best, summary, validation_losses
from gptjax.train.state import State
from gptjax.train.step import divide
from gptjax.types import Batch, FrozenModel, Metrics, Params, UserError

if TYPE_CHECKING:
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
    sample: Sampler | None = None,
    start: str = "new parameters",
    description: dict[str, Any] | None = None,
    profile: range | None = None,
    accept_changes: bool = False,
) -> Params:
    """Run one stage to its end, resuming from its newest checkpoint in `folder`, if any. Returns the trained
    parameters.

    model           module built by a `ModelConfig`, with its sharding rules; on the current mesh (`sharding.use`)
    folder          folder of the checkpoints
    cache           folder of tokenised text, or bucket that has it
    init            abstract parameters -> initial ones with the same shardings, such as another stage's; they are
                    donated. None: initialise from `seed`. With adapters, the parameters to adapt
    frozen_models   the stage's
    sample          generates the text samples
    start           the initial parameters in words, shown before the first step
    description     stored in every checkpoint, beside the input position
    profile         steps to trace, counted from 1 at the start of this process
    accept_changes  resume with other data than the checkpoint's

    Ctrl-C or SIGTERM finishes the step, or aborts the evaluation, saves a checkpoint, and raises KeyboardInterrupt. The
    resumed run has bitwise the same results and records as an uninterrupted one. In a multi-process job any process may
    get the signal: all stop after the same step. Raises `Diverged` if the loss is not finite and the stage's policy
    cannot recover. Numbers that are not finite are never saved. With early stopping, the last checkpoint and the
    parameters are those of the lowest validation loss.
    """
    tokens, flops = stage.data.batch * stage.data.length, model.config.flops(stage.data.length)
    saves, samples = (stage.save_every,), (stage.evaluate_every,)
    pauses = {"evaluating": saves + samples, "sampling": samples, "saving": saves}
    functions, frozen = program(stage, model, seed), frozen_models
    if stage.has_frozen:
        assert init is not None, "a stage with frozen parameters needs those of another"
        frozen, init = (jax.jit(functions.freeze)(init(jax.eval_shape(functions.init_params))), *frozen), None

    with contextlib.ExitStack() as stack:
        display = stack.enter_context(Display(name, stage.last_step, tokens, flops, pauses))
        with display.phase("reading the data"):
            batches, validation = stage.read(name, tokenizer, model.rules, seed, cache)
        read = {"train": getattr(batches, "fingerprint", None), "validation": getattr(validation, "fingerprint", None)}
        checkpoints = stack.enter_context(Checkpoints(folder, max_to_keep=stage.max_to_keep))
        stack.callback(batches.close)
        abstract = jax.eval_shape(functions.init_state, *frozen)
        restored = checkpoints.restore(abstract) if checkpoints.steps() else None
        if restored is not None:
            _check_same(restored, name, tokenizer, read, folder, accept_changes)
            state = restored.state
            batches.restore(restored.extra["input"])
        elif init is not None:
            state = jax.jit(functions.create_state, donate_argnums=0)(init(jax.eval_shape(functions.init_params)))
        else:
            state = jax.jit(functions.init_state)(*frozen)
        done = int(state.step)
        rollbacks = [] if restored is None else restored.extra.get("rollbacks", [])
        losses = [] if restored is None else validation_losses(restored.step, restored.loss, restored.extra)
        # The run was interrupted before the checkpoint's evaluation.
        due = restored is not None and restored.loss is None and validation is not None and stage.evaluates(done)
        keep = functools.partial(keep_best, stage, checkpoints, abstract, display.note)
        if stage.ends(done, losses) and not due:
            records.resume(name, max([done, *dict(losses)]))  # those after the best checkpoint too
            return functions.merge(keep(state, losses).eval_params, *frozen)
        records.resume(name, done)
        losses = [entry for entry in losses if entry[0] <= done]

        stopping = stack.enter_context(signals(display.note))
        begin = start if restored is None else f"step {done:,} of {folder}"
        display.note("\n".join(summary(name, stage, model, abstract, frozen, batches, begin)))
        display.begin(done, *last_losses(records.folder, name))
        extra = (description or {}) | {"stage": name, "tokenizer": tokenizer.fingerprint, "data": read}
        if validation is None:
            display.note("no validation loss: the data have no validation split (validation 0)")
        to_global = functools.partial(sharding.global_array, rules=model.rules)
        tracing = stack.enter_context(Profile(profile, records.folder / "profile" / name, done, display.note))
        watchdog = stack.enter_context(Watchdog(records.folder, name, stage.hang_timeout, done))
        hosts, clock = StragglerDetector(), Clock(done, tokens, flops)
        schedule = stage.optimizer.learning_rate_schedule(stage.last_step)
        rates = np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(stage.last_step)))
        written = cast(WrittenBatches, batches) if stage.writes else None
        run = _Run(
            *(stage, name, model, functions, frozen, checkpoints, records, display, to_global, sample, rates, losses),
            *(tracing, clock, hosts, watchdog, written),
        )
        while True:
            try:
                if due:
                    run.catch_up(state, validation, stopping)
                state = run.steps(state, batches, validation, stopping, extra | {"rollbacks": rollbacks})
                return functions.merge(keep(state, losses).eval_params, *frozen)
            except Diverged as error:
                if len(rollbacks) >= stage.divergence.rollbacks or not checkpoints.steps():
                    raise
                bad, state, due = error.step, None, False  # a traceback would keep the state in device memory
            state, rollbacks = run.roll_back(abstract, batches, bad, rollbacks)


def _check_same(
    restored: Restored,
    name: str,
    tokenizer: Tokenizer,
    data: dict[str, str | None],
    folder: Path,
    accept_changes: bool,
) -> None:
    """Raise UserError if a checkpoint was trained with another tokenizer or, unless accepted, on other data."""
    if restored.extra["tokenizer"] != tokenizer.fingerprint:
        raise UserError(f"tokenizer: the checkpoint in {folder} was trained with another one; restore that one")
    others = [split for split in data if data[split] != restored.extra["data"][split]]
    if others and not accept_changes:
        raise UserError(
            f"{name}.data: the {' and '.join(others)} documents are not those of the checkpoint in {folder}; "
            "restore the files of the source, or resume anyway with --accept_changes"
        )


@dataclasses.dataclass(frozen=True)
class _Run:
    """A stage in progress: its steps, evaluations, checkpoints and metrics."""

    stage: Stage
    name: str
    model: Module
    program: Program
    frozen: tuple[Params | FrozenModel, ...]
    checkpoints: Checkpoints
    records: MetricsLogger
    display: Display
    to_global: Callable[[Batch], Batch]
    sample: Sampler | None
    rates: np.ndarray
    losses: list[tuple[int, float]]
    """(step, validation loss) of the evaluations so far."""
    tracing: Profile
    clock: Clock
    hosts: StragglerDetector
    watchdog: Watchdog
    written: WrittenBatches | None  # the batches, if the model writes them

    def catch_up(self, state: State, validation: Iterable[Batch] | Answers | None, stopping: StopSignal) -> None:
        """Evaluate a step that was saved before its evaluation."""
        done = int(state.step)
        losses = self.evaluate(state, done, validation, stopping)
        if losses is None:
            raise self.interruption()
        self.checkpoints.rank(done, losses["validation_loss"])
        self.losses.append((done, losses["validation_loss"]))

    def steps(
        self,
        state: State,
        batches: BatchIterator,
        validation: Iterable[Batch] | Answers | None,
        stopping: StopSignal,
        extra: dict[str, Any],
    ) -> State:
        """Train from this state to the end of the stage. Raises `Diverged`, and KeyboardInterrupt after a signal."""
        stage, done = self.stage, int(state.step)
        last = None  # step and metrics, still on the devices
        while not stage.ends(done, self.losses):
            self.clock.lap("host")
            batch = self.next_batch(batches, state, done, stopping)
            if batch is None:
                self.report(last)
                self.stop(state, done, batches, extra)
            with self.tracing.step(done + 1):
                state, metrics = self.program.step(state, batch, *self.frozen)
            self.clock.dispatched(metrics)
            done += 1
            self.display.dispatched(done, metrics["loss"][0])
            self.tracing.dispatched(done, metrics)
            self.report(last)  # of an earlier step, while the devices run this one
            last = (done, metrics) if done % stage.log_every == 0 or done == stage.last_step else None
            # Once per step: a signal may arrive at any time.
            stopped = stopping.now() and done % stage.round == 0
            evaluating = stage.evaluates(done) and not stopped  # a preemption notice is short
            saving = stage.saves(done) or stopped
            self.watchdog.beat(done, pause=evaluating or saving)
            if evaluating or saving:
                self.report(last)
                last = None
                self.check(done, divide(metrics))
            losses = self.evaluate(state, done, validation, stopping) if evaluating else {}
            stopped |= losses is None
            if (loss := (losses or {}).get("validation_loss")) is not None:
                self.losses.append((done, loss))
            if saving or stopped:
                self.save(state, done, batches, extra, loss)
            if stopped:
                self.stop(state, done, batches, extra)
        with self.display.phase("saving"):
            self.checkpoints.wait()
        return state

    def next_batch(self, batches: BatchIterator, state: State, done: int, stopping: StopSignal) -> Batch | None:
        """The batch of the next step, on the devices. None: a stop was asked for while the model wrote it."""
        if not self.stage.writes:
            batch = self.to_global(next(batches))
            self.clock.lap("input")
            return batch
        rounds, first = cast(WrittenBatches, batches), done % self.stage.round == 0
        self.watchdog.beat(done, pause=first)
        with self.display.phase("writing replies") if first else contextlib.nullcontext():
            batch = rounds.next_batch(self.policy(state, done), stopping.now)
        self.clock.lap("rollouts")
        self.watchdog.beat(done)
        if first and batch is not None:
            self.records.log(done + 1, self.name, **rounds.figures)
            self.records.replies(self.name, done + 1, rounds.records)
            if rounds.warning:
                self.display.note(f"step {done + 1}: {rounds.warning}")
        return batch

    def policy(self, state: State, done: int) -> Policy:
        """The model as it is now, to write replies."""
        from gptjax.train.rounds import Policy

        def prepare(batch: Batch) -> Batch:
            return self.program.prepare(state.params, self.to_global(batch), *self.frozen)

        rounds = cast("Rounds", self.written)
        return Policy(self.model, lambda: self.program.merge(state.params, *self.frozen), prepare, done, rounds)

    def save(
        self, state: State, done: int, batches: BatchIterator, extra: dict[str, Any], loss: float | None = None
    ) -> None:
        """Save a checkpoint of this step, with its validation loss if there is one."""
        with self.display.phase("saving"):
            self.records.store()
            known = {"input": batches.state(), "losses": self.losses[: -1 if loss is not None else None]}
            self.checkpoints.save(done, state, extra | known, loss)
        self.clock.lap("checkpoint")

    def stop(self, state: State, done: int, batches: BatchIterator, extra: dict[str, Any]) -> NoReturn:
        """End the program with a checkpoint of this step, after a signal or without a judge of replies."""
        with self.display.phase("saving"):
            self.checkpoints.wait()
        if done and self.checkpoints.latest_step() != done:
            self.save(state, done, batches, extra)
            self.checkpoints.wait()
        self.display.note(f"stopped and saved at step {done}" if done else "stopped before the first step")
        raise self.interruption()

    def interruption(self) -> BaseException:
        """The error to stop with."""
        return KeyboardInterrupt() if self.written is None else self.written.failure or KeyboardInterrupt()

    def roll_back(
        self, abstract: State, batches: BatchIterator, bad: int, before: list[list[int]]
    ) -> tuple[State, list[list[int]]]:
        """Restore the last checkpoint, with the batches after the `bad` step. Returns the state and the list of
        rollbacks: (step restored, number of batches skipped). `before` are the earlier ones."""
        steps = self.checkpoints.steps()
        regular = [step for step in steps if step % self.stage.save_every == 0]  # excludes checkpoints of interruptions
        restored = self.checkpoints.restore(abstract, max(regular or steps))
        batches.restore(restored.extra["input"])
        self.losses[:] = [entry for entry in self.losses if entry[0] <= restored.step]
        passed = bad - restored.step
        out = passed + sum(count for step, count in before if step == restored.step)
        for _ in range(out):
            next(batches)
        self.clock.lap("checkpoint")
        self.clock.take(restored.step)  # discard the times of the steps that are repeated
        self.watchdog.beat(restored.step, pause=True)
        self.records.resume(self.name, restored.step)
        self.display.begin(restored.step, *last_losses(self.records.folder, self.name))
        self.records.log(restored.step + 1, self.name, rolled_back_from=bad, batches_skipped=out)
        self.display.note(f"step {bad} is bad: rolled back to step {restored.step}, skipping {out} batches")
        return restored.state, [*before, [restored.step, passed]]

    def report(self, last: tuple[int, Metrics] | None) -> None:
        """Fetch, record and display the metrics of a step, if any."""
        if last is None:
            return
        done, values = last[0], divide(last[1])
        self.clock.lap("device")
        self.check(done, values)
        updates = done - int(values.get("skipped", 0))  # the schedule counts updates only
        times = self.clock.take(done)
        slow, note = self.hosts.compare(times)
        if note is not None:
            self.display.note(note)
        measured = times.values() | memory() | slow
        self.records.log(done, self.name, **values, learning_rate=self.rates[max(updates - 1, 0)], **measured)
        if math.isfinite(values["loss"]):
            shown = {} if self.written is None else {n: self.written.figures[n] for n in ("reward", "outcome")}
            self.display.update(done, **values | shown, waiting=times.waiting)
        if values.get("consecutive_skipped"):
            self.display.note(f"step {done} was skipped: loss {values['loss']:.3g}")
        self.watchdog.set_figures(measured)

    def evaluate(
        self, state: State, done: int, validation: Iterable[Batch] | Answers | None, stopping: StopSignal
    ) -> dict[str, float] | None:
        """Validation losses, recorded and displayed with text samples: none without validation batches. None, with
        nothing recorded, if interrupted."""
        params, texts = state.eval_params, []
        with self.display.phase("evaluating"):
            losses = self.validation_losses(state, done, validation, stopping)
            if losses is None:
                return None
            self.check(done, losses)
            if losses:
                self.display.evaluation(done, losses["validation_loss"])
        if self.sample is not None and self.stage.samples(done):
            with self.display.phase("sampling"):
                for prompt in self.stage.prompts:
                    if stopping.now():
                        return None
                    texts.append(self.sample(self.program.merge(params, *self.frozen), prompt))
                    self.display.sample(done, prompt, texts[-1])
        self.records.log(done, self.name, **losses, **memory())
        for prompt, text in zip(self.stage.prompts, texts, strict=False):
            self.records.text(done, f"{self.name}/sample", prompt + text)
        self.clock.lap("evaluation")
        return losses

    def validation_losses(
        self, state: State, done: int, validation: Iterable[Batch] | Answers | None, stopping: StopSignal
    ) -> dict[str, float] | None:
        """Validation losses by name. None, if interrupted."""
        if self.stage.writes and validation is not None:
            policy = self.policy(dataclasses.replace(state, params=state.eval_params), done)
            return cast(Answers, validation).measure(policy, stopping.now)
        total = None
        for batch in cast(Iterable[Batch], validation or ()):
            if stopping.now():
                return None
            before, metrics = total, self.program.evaluate(state.eval_params, self.to_global(batch), *self.frozen)
            total = metrics if before is None else jax.tree.map(jnp.add, before, metrics)
            jax.block_until_ready(before)  # at most two batches in flight, since a stop waits for them
        return {f"validation_{name}": value for name, value in divide(total or {}).items()}

    def check(self, done: int, values: dict[str, float]) -> None:
        """Raise `Diverged` if a value is not finite."""
        policy, skipped = self.stage.divergence, int(values.get("consecutive_skipped", 0))
        if isinstance(policy, Skip) and skipped:
            wrong = "loss" if skipped >= policy.patience else None
        else:
            bad = [name for name, value in values.items() if not math.isfinite(value)]
            wrong = "loss" if "loss" in bad else next(iter(bad), None)
        if wrong:
            last, folder = self.checkpoints.latest_step(), self.checkpoints.folder
            good = f"the last good checkpoint is step {last} in {folder}" if last else "no checkpoint was saved yet"
            many = f", after {skipped} consecutive bad steps" if skipped else ""
            raise Diverged(
                f"{self.name}: the {wrong} became {values[wrong]} at step {done}{many}; {good}. "
                f"Try a lower {self.name}.optimizer.learning_rate, a longer warmup or a smaller clip",
                step=done - max(skipped - 1, 0),
            )
