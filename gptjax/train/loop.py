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

from gptjax import sharding
from gptjax.train import stop
from gptjax.train.checkpoint import Checkpoints
from gptjax.train.display import Display
from gptjax.train.program import Program, program
from gptjax.train.records import Records
from gptjax.train.stage import Stage
from gptjax.train.state import State
from gptjax.types import Batch, Metrics, Params, UserError


class Diverged(RuntimeError):
    """The loss, or its gradient, is not a finite number any more."""


Sampler = Callable[[Params, str], str]
"""Parameters and a prompt -> what the model says."""


def train(
    stage: Stage,
    name: str,
    model: Any,
    tokenizer: Any,
    folder: Path,
    records: Records,
    *,
    cache: Path,
    seed: int = 0,
    start: Callable[[Params], Params] | None = None,
    sample: Sampler | None = None,
    description: dict[str, Any] | None = None,
) -> Params:
    """Run one stage to its end, from its newest checkpoint in `folder` if there is one. Returns the trained parameters.

    model        what a `ModelConfig` builds, with its sharding rules; the mesh is the current one (`sharding.use`)
    folder       where the checkpoints lie
    cache        where tokenised text is kept
    start        gives the parameters to begin from, another stage's say, placed as the abstract ones that it is given;
                 none: they are initialised from `seed`. With adapters, those that they adapt; checkpoints hold the
                 adapters alone
    sample       shows what the model writes
    description  goes into every checkpoint, beside the input position

    Ctrl-C or SIGTERM ends the step under way, saves, and raises KeyboardInterrupt; run again, it goes on to the same
    bits as if it had never stopped. Of several processes any may get the signal: all end after the same step. Raises
    `Diverged` when the loss is not finite; what is not finite is never saved.
    """
    share: dict[str, Any] = {"cache_dir": cache, "rank": jax.process_index(), "ranks": jax.process_count()}
    batches = stage.data.batches(tokenizer, "train", seed=seed, **share)
    validation = stage.data.evaluation(tokenizer, "validation", rows=stage.evaluate_rows, **share)
    functions, frozen = program(stage, model, seed), ()
    if stage.adapter is not None:
        assert start is not None, "an experiment's first stage has no adapters"
        frozen, start = (start(jax.eval_shape(functions.parameters)),), None

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(folder, keep=stage.keep))
        stack.callback(batches.close)
        abstract = jax.eval_shape(functions.new, *frozen)
        if checkpoints.steps():
            restored = checkpoints.restore(abstract)
            if restored.extra["tokenizer"] != tokenizer.fingerprint:
                raise UserError(f"tokenizer: the checkpoint in {folder} was trained with another one; restore that one")
            state = restored.state
            batches.restore(restored.extra["input"])
        elif start is not None:
            state = jax.jit(functions.create)(start(abstract.params))
        else:
            state = jax.jit(functions.new)(*frozen)
        done = int(state.step)
        records.resume(name, done)
        if done >= stage.steps:
            return functions.merge(state.best, *frozen)

        stopping = stack.enter_context(stop.signals())
        tokens, flops = stage.data.batch * stage.data.length, model.config.flops(stage.data.length)
        display = stack.enter_context(Display(name, stage.steps, tokens, flops, done))
        extra = (description or {}) | {"stage": name, "tokenizer": tokenizer.fingerprint}
        place = functools.partial(sharding.global_array, rules=model.rules)
        run = _Run(stage, name, functions, frozen, checkpoints, records, display, place, sample)
        last = None  # step and metrics, still on the devices
        while done < stage.steps:
            state, metrics = functions.step(state, place(next(batches)), *frozen)
            done += 1
            if last is not None:  # those of an earlier step, while the devices work on this one
                run.report(*last)
            last = (done, metrics) if done % stage.log_every == 0 or done == stage.steps else None
            stopped = stopping.at(done)  # asked once a step: a signal may come at any moment
            evaluating = done % stage.evaluate_every == 0 or done == stage.steps
            saving = done % stage.save_every == 0 or done == stage.steps or stopped
            if evaluating or saving:
                if last is not None:
                    run.report(*last)
                last = None
                run.check(done, divide(metrics))
            loss = run.evaluate(state, done, validation) if evaluating else None
            if saving:
                checkpoints.save(done, state, extra | {"input": batches.state()}, loss)
            if stopped and done < stage.steps:
                checkpoints.wait()
                display.note(f"stopped and saved at step {done}")
                raise KeyboardInterrupt
        checkpoints.wait()
        return functions.merge(state.best, *frozen)


@dataclasses.dataclass(frozen=True)
class _Run:
    """What a loop under way does beside its steps."""

    stage: Stage
    name: str
    program: Program
    frozen: tuple[Params, ...]
    checkpoints: Checkpoints
    records: Records
    display: Display
    place: Callable[[Batch], Batch]
    sample: Sampler | None

    def report(self, done: int, metrics: Metrics) -> None:
        """Fetch the metrics of a step, and record and show them."""
        values = divide(metrics)
        self.check(done, values)
        rate = np.asarray(self.stage.optimizer.learning_rate(self.stage.steps)(done - 1)).item()
        self.records.log(done, self.name, **values, learning_rate=rate)
        self.display.update(done, **values)

    def evaluate(self, state: State, done: int, validation: Iterable[Batch]) -> float:
        """The validation loss, recorded and shown, with samples of text."""
        params = state.best
        total = _sum(self.program.evaluate(params, self.place(batch), *self.frozen) for batch in validation)
        losses = {f"validation_{name}": value for name, value in divide(total).items()}
        self.check(done, losses)
        self.records.log(done, self.name, **losses)
        self.display.evaluation(done, losses["validation_loss"])
        if self.sample is not None:
            for prompt in self.stage.prompts:
                text = self.sample(self.program.merge(params, *self.frozen), prompt)
                self.records.text(done, f"{self.name}/sample", prompt + text)
                self.display.sample(done, prompt, text)
        return losses["validation_loss"]

    def check(self, done: int, values: dict[str, float]) -> None:
        """Raises `Diverged` where a value is not finite."""
        wrong = [what for what, value in values.items() if not math.isfinite(value)]
        if wrong:
            what = "loss" if "loss" in wrong else wrong[0]
            last, folder = self.checkpoints.latest_step(), self.checkpoints.folder
            good = f"the last good checkpoint is step {last} in {folder}" if last else "no checkpoint was saved yet"
            raise Diverged(
                f"{self.name}: the {what} became {values[what]} at step {done}; {good}. "
                f"Try a lower {self.name}.optimizer.peak, a longer warmup or a smaller clip"
            )


def divide(metrics: Metrics) -> dict[str, float]:
    """Metrics fetched from the devices: each sum over its weight."""
    fetched = jax.device_get(metrics)
    return {name: float(total) / max(float(weight), 1e-8) for name, (total, weight) in fetched.items()}


def _sum(metrics: Iterable[Metrics]) -> Metrics:
    return functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), metrics)
