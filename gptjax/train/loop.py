"""The training loop: batches in, checkpoints and records out, and every stop a place to go on from."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from gptjax import sharding
from gptjax.nn import LoRA
from gptjax.optim import Optimizer
from gptjax.train import state as train_state
from gptjax.train.checkpoint import Checkpoints
from gptjax.train.display import Display
from gptjax.train.records import Records
from gptjax.train.state import State
from gptjax.train.step import make_step
from gptjax.types import Metrics, Params, UserError


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training run on one kind of data: pretraining, fine-tuning."""

    data: Any
    """What it reads: `data.Pretrain` or `data.Chat`."""
    objective: Any
    """What it minimises, such as `objectives.NextToken`."""
    optimizer: Optimizer
    """How, such as `optim.AdamW`."""
    steps: int
    """Optimizer steps, a batch each."""
    adapter: LoRA | None = None
    """Adapters to train over the parameters of the stage before, which then stay as they are; none: all is trained."""
    accumulate: int = 1
    """Parts that a batch goes through in, one after the other, to save memory."""
    ema: float | None = None
    """Decay of an exponential moving average of the parameters, which is then what is evaluated and deployed."""
    evaluate_every: int = 250
    """Steps between validation losses, and samples of text."""
    evaluate_rows: int = 256
    """Rows of validation data that a validation loss is taken over."""
    save_every: int = 250
    """Steps between checkpoints. Stopping by Ctrl-C or SIGTERM also saves one."""
    keep: int = 2
    """How many of the newest checkpoints stay, beside the best by validation loss."""
    log_every: int = 10
    """Steps between lines in metrics.jsonl."""
    prompts: tuple[str, ...] = ("\n",)
    """What the samples shown during training begin with."""
    evaluations: tuple[Any, ...] = ()
    """What is measured at the end: `evals.BitsPerByte`, `evals.Answers`, ..."""

    def __post_init__(self):
        for field in ("steps", "accumulate", "evaluate_every", "evaluate_rows", "save_every", "keep", "log_every"):
            if getattr(self, field) < 1:
                raise UserError(f"{field}: got {getattr(self, field)}, must be at least 1")
        if self.data.batch % self.accumulate:
            raise UserError(f"accumulate: got {self.accumulate}, must divide data.batch {self.data.batch}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"ema: got {self.ema}, must be between 0 and 1, or none")


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
    optimizer = stage.optimizer.build(stage.steps, model.config.growth)
    learning_rate = stage.optimizer.learning_rate(stage.steps)
    objective = functools.partial(stage.objective, model.apply)
    initial, merge, frozen = functools.partial(_initial, stage, model, seed), _itself, ()
    if stage.adapter is not None:
        assert start is not None, "an experiment's first stage has no adapters"
        frozen, start = (start(jax.eval_shape(initial)),), None
        objective = stage.adapter.objective(objective)
        initial = functools.partial(stage.adapter.init, jax.random.key(seed))
        merge = functools.partial(jax.jit(stage.adapter.merge), *frozen)
    step = make_step(objective, optimizer, stage.accumulate, stage.ema)
    evaluate = jax.jit(lambda params, batch, *frozen: objective(params, batch, None, *frozen))

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(folder, keep=stage.keep))
        stack.callback(batches.close)
        create = jax.jit(functools.partial(_create, stage, optimizer, seed))

        def new(*frozen: Params) -> State:
            return create(initial(*frozen))

        abstract = jax.eval_shape(new, *frozen)
        if checkpoints.steps():
            restored = checkpoints.restore(abstract)
            if restored.extra["tokenizer"] != tokenizer.fingerprint:
                raise UserError(f"tokenizer: the checkpoint in {folder} was trained with another one; restore that one")
            state = restored.state
            batches.restore(restored.extra["input"])
        else:
            state = jax.jit(new)(*frozen) if start is None else create(start(abstract.params))
        done = int(state.step)
        records.resume(name, done)

        def save(state: State, done: int, loss: float | None) -> None:
            extra = (description or {}) | {"stage": name, "tokenizer": tokenizer.fingerprint, "input": batches.state()}
            checkpoints.save(done, state, extra, loss)

        def check(done: int, values: dict[str, float]) -> None:
            wrong = [what for what, value in values.items() if not math.isfinite(value)]
            if wrong:
                what = "loss" if "loss" in wrong else wrong[0]
                last = checkpoints.latest_step()
                good = f"the last good checkpoint is step {last} in {folder}" if last else "no checkpoint was saved yet"
                raise Diverged(
                    f"{name}: the {what} became {values[what]} at step {done}; {good}. "
                    f"Try a lower {name}.optimizer.peak, a longer warmup or a smaller clip"
                )

        def show(state: State, done: int) -> float:
            inputs = (sharding.global_array(batch, model.rules) for batch in validation)
            total = _sum(evaluate(state.best, batch, *frozen) for batch in inputs)
            losses = {f"validation_{key}": value for key, value in _divide(total).items()}
            check(done, losses)
            records.log(done, name, **losses)
            display.evaluation(done, losses["validation_loss"])
            if sample is not None:
                for prompt in stage.prompts:
                    text = sample(merge(state.best), prompt)
                    records.text(done, f"{name}/sample", prompt + text)
                    display.sample(done, prompt, text)
            return losses["validation_loss"]

        if done >= stage.steps:
            return merge(state.best)
        stop = stack.enter_context(_stop_signals())
        tokens = stage.data.batch * stage.data.length
        flops = model.config.flops(stage.data.length)
        display = stack.enter_context(Display(name, stage.steps, tokens, flops, done))
        pending: tuple[int, Metrics] | None = None

        def report() -> None:
            """Fetch the metrics of an earlier step, while the device works on a later one."""
            if pending is not None:
                values = _divide(pending[1])
                check(pending[0], values)
                rate = np.asarray(learning_rate(pending[0] - 1)).item()
                records.log(pending[0], name, **values, learning_rate=rate)
                display.update(pending[0], **values)

        while done < stage.steps:
            batch = sharding.global_array(next(batches), model.rules)
            state, metrics = step(state, batch, *frozen)
            done += 1
            report()
            pending = (done, metrics) if done % stage.log_every == 0 or done == stage.steps else None
            stopping = stop.at(done)  # asked once a step: a signal may come at any moment
            evaluating = done % stage.evaluate_every == 0 or done == stage.steps
            saving = done % stage.save_every == 0 or done == stage.steps or stopping
            if evaluating or saving:
                report()
                pending = None
                check(done, _divide(metrics))
            loss = show(state, done) if evaluating else None
            if saving:
                save(state, done, loss)
            if stopping and done < stage.steps:
                checkpoints.wait()
                display.note(f"stopped and saved at step {done}")
                raise KeyboardInterrupt
        checkpoints.wait()
        return merge(state.best)


def _initial(stage: Stage, model: Any, seed: int) -> Params:
    _, key = jax.random.split(jax.random.key(seed))
    tokens = jnp.zeros((stage.data.batch, stage.data.length), jnp.int32, out_sharding=model.rules("batch", "sequence"))
    return model.init(key, tokens)["params"]


def _create(stage: Stage, optimizer: Any, seed: int, params: Params) -> State:
    key, _ = jax.random.split(jax.random.key(seed))
    return train_state.create(params, optimizer, key, stage.ema is not None)


def _itself(params: Params) -> Params:
    return params


def _sum(metrics: Iterator[Metrics]) -> Metrics:
    return functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), metrics)


def _divide(metrics: Metrics) -> dict[str, float]:
    fetched = jax.device_get(metrics)
    return {name: float(total) / max(float(weight), 1e-8) for name, (total, weight) in fetched.items()}


class _Stop:
    """Whether to stop: after the first Ctrl-C or SIGTERM; a second Ctrl-C interrupts at once.

    Of several processes, any may get the signal and all stop after the same step, which jax's preemption service agrees
    on between the hosts. That service listens to SIGTERM itself, so a Ctrl-C is passed on to it as one.
    """

    signals = (signal.SIGINT, signal.SIGTERM)
    is_set = False

    def at(self, step: int) -> bool:
        return self.is_set

    def __call__(self, number: int, frame: Any) -> None:
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True


class _StopTogether(_Stop):
    signals = (signal.SIGINT,)

    def at(self, step: int) -> bool:
        return multihost_utils.reached_preemption_sync_point(step)

    def __call__(self, number: int, frame: Any) -> None:
        super().__call__(number, frame)
        os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def _stop_signals() -> Iterator[_Stop]:
    stop = _Stop() if jax.process_count() == 1 else _StopTogether()
    try:
        before = {number: signal.signal(number, stop) for number in stop.signals}
    except ValueError:  # not the main thread: signals are somebody else's business
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
