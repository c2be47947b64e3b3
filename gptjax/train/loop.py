"""The training loop: batches in, checkpoints and records out, and every stop a place to go on from."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.checkpoint.checkpoint import Checkpoints
from gptjax.distributed import sharding
from gptjax.monitor.display import Display
from gptjax.monitor.metrics import MetricsLogger
from gptjax.monitor.profiling import Profile
from gptjax.monitor.stragglers import StragglerDetector
from gptjax.monitor.times import Clock, memory
from gptjax.monitor.watchdog import Watchdog
from gptjax.protocols import BatchIterator, Module, Tokenizer
from gptjax.train import preemption
from gptjax.train.divergence import Diverged, Skip
from gptjax.train.program import Program, program
from gptjax.train.stage import Stage
from gptjax.train.state import State
from gptjax.types import Batch, Metrics, Params, UserError

Sampler = Callable[[Params, str], str]
"""Parameters and a prompt -> what the model says."""


def train(
    stage: Stage,
    name: str,
    model: Module,
    tokenizer: Tokenizer,
    folder: Path,
    records: MetricsLogger,
    *,
    cache: Path,
    seed: int = 0,
    init: Callable[[Params], Params] | None = None,
    sample: Sampler | None = None,
    description: dict[str, Any] | None = None,
    profile: range | None = None,
    accept_changes: bool = False,
) -> Params:
    """Run one stage to its end, from its newest checkpoint in `folder` if there is one. Returns the trained parameters.

    model        what a `ModelConfig` builds, with its sharding rules; the mesh is the current one (`sharding.use`)
    folder       where the checkpoints lie
    cache        where tokenised text is kept
    init         abstract parameters -> initial ones with the same shardings, such as another stage's; they are donated.
                 None: initialise from `seed`. With adapters, the parameters to adapt; checkpoints hold the adapters
                 alone
    sample       shows what the model writes
    description  goes into every checkpoint, beside the input position
    profile      steps to trace, counted from 1 where this run of the stage begins or goes on
    accept_changes  go on with other data than those of the checkpoint

    Ctrl-C or SIGTERM ends the step under way, or an evaluation before it is through, saves, and raises
    KeyboardInterrupt; run again, it goes on to the same bits, and the same records, as if it had never stopped. Of
    several processes any may get the signal: all end after the same step. Raises
    `Diverged` when the loss is not finite, and the stage's policy has no remedy; what is not finite is never saved.
    """
    shard, num_shards = sharding.data_shard(model.rules)
    batches = stage.data.batches(tokenizer, "train", seed, cache, shard, num_shards)
    validation = stage.data.evaluation(tokenizer, "validation", cache, shard, num_shards, stage.eval_sequences)
    functions, frozen = program(stage, model, seed), ()
    if stage.adapter is not None:
        assert init is not None, "an experiment's first stage has no adapters"
        frozen, init = (init(jax.eval_shape(functions.parameters)),), None

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(folder, max_to_keep=stage.max_to_keep))
        stack.callback(batches.close)
        abstract, restored = jax.eval_shape(functions.new, *frozen), None
        if checkpoints.steps():
            restored = checkpoints.restore(abstract)
            if restored.extra["tokenizer"] != tokenizer.fingerprint:
                raise UserError(f"tokenizer: the checkpoint in {folder} was trained with another one; restore that one")
            if not accept_changes and restored.extra["input"].get("data") != batches.state().get("data"):
                raise UserError(
                    f"{name}.data: the checkpoint in {folder} was trained on other data; restore the files of the "
                    "source, or go on all the same with --accept_changes"
                )
            state = restored.state
            batches.restore(restored.extra["input"])
        elif init is not None:
            state = jax.jit(functions.create, donate_argnums=0)(init(abstract.params))
        else:
            state = jax.jit(functions.new)(*frozen)
        done = int(state.step)
        rollbacks = [] if restored is None else restored.extra.get("rollbacks", [])
        records.resume(name, done)
        due = restored is not None and restored.loss is None and stage.evaluates(done)  # it was stopped before it was
        if done >= stage.steps and not due:
            return functions.merge(state.best, *frozen)

        stopping = stack.enter_context(preemption.signals())
        tokens, flops = stage.data.batch * stage.data.length, model.config.flops(stage.data.length)
        display = stack.enter_context(Display(name, stage.steps, tokens, flops, done))
        extra = (description or {}) | {"stage": name, "tokenizer": tokenizer.fingerprint}
        place = functools.partial(sharding.global_array, rules=model.rules)
        tracing = stack.enter_context(Profile(profile, records.folder / "profile" / name, done, display.note))
        watchdog = stack.enter_context(Watchdog(records.folder, name, stage.hang_timeout, done))
        hosts, clock = StragglerDetector(), Clock(done, tokens, flops)
        rates = np.asarray(jax.vmap(stage.optimizer.learning_rate_schedule(stage.steps))(jnp.arange(stage.steps)))
        instruments = tracing, clock, hosts, watchdog
        run = _Run(stage, name, functions, frozen, checkpoints, records, display, place, sample, rates, *instruments)
        while True:
            try:
                if due:
                    run.catch_up(state, validation, stopping)
                state = run.steps(state, batches, validation, stopping, extra | {"rollbacks": rollbacks})
                return functions.merge(state.best, *frozen)
            except Diverged as error:
                if len(rollbacks) >= stage.divergence.rollbacks or not checkpoints.steps():
                    raise
                bad, state, due = error.step, None, False  # and no traceback, which would keep the state on the devices
            state, rollbacks = run.roll_back(abstract, batches, bad, rollbacks)


@dataclasses.dataclass(frozen=True)
class _Run:
    """A loop under way: its steps, and what it does beside them."""

    stage: Stage
    name: str
    program: Program
    frozen: tuple[Params, ...]
    checkpoints: Checkpoints
    records: MetricsLogger
    display: Display
    place: Callable[[Batch], Batch]
    sample: Sampler | None
    rates: np.ndarray
    tracing: Profile
    clock: Clock
    hosts: StragglerDetector
    watchdog: Watchdog

    def catch_up(self, state: State, validation: Iterable[Batch], stopping: preemption.Stop) -> None:
        """The evaluation of a step that was saved without it."""
        done = int(state.step)
        loss = self.evaluate(state, done, validation, stopping)
        if loss is None:
            raise KeyboardInterrupt
        self.checkpoints.rank(done, loss)

    def steps(
        self,
        state: State,
        batches: BatchIterator,
        validation: Iterable[Batch],
        stopping: preemption.Stop,
        extra: dict[str, Any],
    ) -> State:
        """From this state to the end of the stage. Raises `Diverged`, and KeyboardInterrupt when told to stop."""
        stage, done = self.stage, int(state.step)
        last = None  # step and metrics, still on the devices
        while done < stage.steps:
            self.clock.lap("host")
            batch = next(batches)
            self.clock.lap("input")
            with self.tracing.step(done + 1):
                state, metrics = self.program.step(state, self.place(batch), *self.frozen)
            self.clock.dispatched(metrics)
            done += 1
            self.tracing.dispatched(done, metrics)
            if last is not None:  # those of an earlier step, while the devices work on this one
                self.report(*last)
            last = (done, metrics) if done % stage.log_every == 0 or done == stage.steps else None
            stopped = stopping.now()  # asked once a step: a signal may come at any moment
            evaluating = stage.evaluates(done) and not stopped  # for the notice is short
            saving = done % stage.save_every == 0 or done == stage.steps or stopped
            self.watchdog.beat(done, pause=evaluating or saving)
            if evaluating or saving:
                if last is not None:
                    self.report(*last)
                last = None
                self.check(done, divide(metrics))
            loss = self.evaluate(state, done, validation, stopping) if evaluating else None
            stopped |= evaluating and loss is None
            if saving or stopped:
                self.records.store()
                self.checkpoints.save(done, state, extra | {"input": batches.state()}, loss)
                self.clock.lap("checkpoint")
            if stopped:
                self.checkpoints.wait()
                self.display.note(f"stopped and saved at step {done}")
                raise KeyboardInterrupt
        self.checkpoints.wait()
        return state

    def roll_back(
        self, abstract: State, batches: BatchIterator, bad: int, before: list[list[int]]
    ) -> tuple[State, list[list[int]]]:
        """The state of the last checkpoint, with the batches at the place after that of the `bad` step, and the list of
        roll-backs: which step to, and how many batches were left out from there. `before` are the earlier ones."""
        steps = self.checkpoints.steps()
        regular = [step for step in steps if step % self.stage.save_every == 0]  # whether it was stopped or not
        restored = self.checkpoints.restore(abstract, max(regular or steps))
        batches.restore(restored.extra["input"])
        passed = bad - restored.step
        out = passed + sum(count for step, count in before if step == restored.step)
        for _ in range(out):
            next(batches)
        self.clock.lap("checkpoint")
        self.clock.take(restored.step)  # what the steps took that are forgotten
        self.watchdog.beat(restored.step, pause=True)
        self.records.resume(self.name, restored.step)
        self.records.log(restored.step + 1, self.name, rolled_back_from=bad, batches_left_out=out)
        self.display.note(f"step {bad} is bad: back to step {restored.step}, without {out} batches from there on")
        return restored.state, [*before, [restored.step, passed]]

    def report(self, done: int, metrics: Metrics) -> None:
        """Fetch the metrics of a step, and record and show them."""
        values = divide(metrics)
        self.clock.lap("device")
        self.check(done, values)
        updates = done - int(values.get("skipped", 0))  # the schedule counts those alone
        times = self.clock.take(done)
        slow, note = self.hosts.compare(times)
        if note is not None:
            self.display.note(note)
        measured = times.values() | memory() | slow
        self.records.log(done, self.name, **values, learning_rate=self.rates[max(updates - 1, 0)], **measured)
        if math.isfinite(values["loss"]):
            self.display.update(done, **values, waiting=times.waiting)
        if values.get("skipped_in_a_row"):
            self.display.note(f"step {done} was left out: loss {values['loss']:.3g}")
        self.watchdog.set_figures(measured)

    def evaluate(self, state: State, done: int, validation: Iterable[Batch], stopping: preemption.Stop) -> float | None:
        """The validation loss, recorded and shown, with samples of text. None, and nothing of it recorded, when told to
        stop before it is through."""
        params, total, texts = state.best, None, []
        for batch in validation:
            if stopping.now():
                return None
            before, metrics = total, self.program.evaluate(params, self.place(batch), *self.frozen)
            total = metrics if before is None else jax.tree.map(jnp.add, before, metrics)
            jax.block_until_ready(before)  # two batches are under way at most, for a stop waits for them
        losses = {f"validation_{name}": value for name, value in divide(total or {}).items()}
        self.check(done, losses)
        self.display.evaluation(done, losses["validation_loss"])
        if self.sample is not None:
            for prompt in self.stage.prompts:
                if stopping.now():
                    return None
                texts.append(self.sample(self.program.merge(params, *self.frozen), prompt))
                self.display.sample(done, prompt, texts[-1])
        self.records.log(done, self.name, **losses, **memory())
        for prompt, text in zip(self.stage.prompts, texts, strict=False):
            self.records.text(done, f"{self.name}/sample", prompt + text)
        self.clock.lap("evaluation")
        return losses["validation_loss"]

    def check(self, done: int, values: dict[str, float]) -> None:
        """Raises `Diverged` where a value is not finite."""
        policy, row = self.stage.divergence, int(values.get("skipped_in_a_row", 0))
        if isinstance(policy, Skip) and row:
            wrong = "loss" if row >= policy.patience else None
        else:
            bad = [what for what, value in values.items() if not math.isfinite(value)]
            wrong = "loss" if "loss" in bad else next(iter(bad), None)
        if wrong:
            last, folder = self.checkpoints.latest_step(), self.checkpoints.folder
            good = f"the last good checkpoint is step {last} in {folder}" if last else "no checkpoint was saved yet"
            many = f", after {row} bad steps in a row" if row else ""
            raise Diverged(
                f"{self.name}: the {wrong} became {values[wrong]} at step {done}{many}; {good}. "
                f"Try a lower {self.name}.optimizer.learning_rate, a longer warmup or a smaller clip",
                step=done - max(row - 1, 0),
            )


def divide(metrics: Metrics) -> dict[str, float]:
    """Metrics fetched from the devices: each sum over its weight."""
    fetched = jax.device_get(metrics)
    return {name: float(total) / max(float(weight), 1e-8) for name, (total, weight) in fetched.items()}
