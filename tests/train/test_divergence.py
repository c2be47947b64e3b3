"""Laws of the policies for a loss that breaks or leaps: what is left out is as if it had never been there."""

from __future__ import annotations

import dataclasses
import functools
import re
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import data, optim
from gptjax.checkpoint.checkpoint import Checkpoints
from gptjax.distributed import sharding
from gptjax.distributed.sharding import DEFAULT_RULES, MeshConfig, ShardingRules
from gptjax.monitor import metrics as train_records
from gptjax.monitor.metrics import MetricsLogger
from gptjax.nn import Transformer, TransformerConfig
from gptjax.objectives import NextToken
from gptjax.train.divergence import Diverged, RollBack, Skip, Stop
from gptjax.train.loop import train
from gptjax.train.program import program
from gptjax.train.stage import Stage
from gptjax.types import Batch, UserError

CONFIG = TransformerConfig(vocab=16, layers=1, width=16, heads=2)
TOKENIZER = data.TrainCharacters(specials=()).build(iter(["abcdefghijklmnop"]))
BAD = TOKENIZER.encode("p")[0]


class Numbered:
    """Batches that are each a pure function of their number; those numbered in `bad` hold only the token p."""

    def __init__(self, bad: tuple[int, ...], absent: tuple[int, ...]):
        self.bad, self.absent, self.step = bad, absent, 0

    def __next__(self) -> Batch:
        number = [n for n in range(64) if n not in self.absent][self.step]
        self.step += 1
        ids = np.random.default_rng(number).integers(0, BAD, (8, 8), np.int32)
        tokens = np.full_like(ids, BAD) if number in self.bad else ids
        places = np.tile(np.arange(8, dtype=np.int32), (8, 1))
        return Batch(tokens, ids, np.ones((8, 8), np.float32), np.ones((8, 8), np.int32), places)

    def state(self) -> dict[str, int]:
        return {"step": self.step}

    def restore(self, state: dict[str, int]) -> None:
        self.step = state["step"]

    def close(self) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class Data:
    bad: tuple[int, ...] = ()
    absent: tuple[int, ...] = ()
    batch: int = 8
    length: int = 8

    def batches(self, *_, **__) -> Numbered:
        return Numbered(self.bad, self.absent)

    def evaluation(self, *_, **__) -> list[Batch]:
        return [next(Numbered((), ()))]


@dataclasses.dataclass(frozen=True)
class Worse(NextToken):
    """The loss is multiplied where a p is read."""

    factor: float = float("nan")

    def __call__(self, apply, params, batch, key=None):
        metrics = super().__call__(apply, params, batch, key)
        total, weight = metrics["loss"]
        return metrics | {"loss": (jnp.where(jnp.any(batch.tokens == BAD), self.factor, 1.0) * total, weight)}


STAGE = Stage(
    data=Data(),
    objective=Worse(),
    optimizer=optim.AdamW(learning_rate=1e-2, schedule=optim.Constant()),
    steps=12,
    ema=0.5,
    evaluate_every=100,
    save_every=3,
    log_every=1,
    max_to_keep=3,
    prompts=(),
)


def run(
    folder: Path, divergence: Stop, records: Any = MetricsLogger, rules: ShardingRules = ShardingRules(), **changes: Any
) -> tuple[list[Any], list[dict[str, Any]]]:
    """The trained parameters, and the lines recorded."""
    stage = dataclasses.replace(STAGE, divergence=divergence, **changes)
    with records(folder) as writer:
        model = Transformer(CONFIG, rules)
        params = train(stage, "stage", model, TOKENIZER, folder / "checkpoints", writer, cache=folder)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)], train_records.read(folder)


def same(a: list[Any], b: list[Any]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@functools.cache
def usual(folder: Path, absent: tuple[int, ...], steps: int, policy: Stop = Skip(window=8)) -> list[Any]:
    """A run of the same policy, and so of the same program, that never sees those batches."""
    return run(folder / f"{absent}", policy, data=Data(absent=absent), steps=steps)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("usual")


@pytest.mark.sampled
@pytest.mark.parametrize("factor", [float("nan"), 100.0])
def test_skip_is_a_run_without_that_batch(tmp_path, folder, factor):
    """Parameters, moments and average; the learning rate goes by the updates."""
    params, lines = run(tmp_path, Skip(window=8), data=Data(bad=(6,)), objective=Worse(factor=factor))
    assert same(params, usual(folder, (6,), 11))
    assert [line["skipped"] for line in lines if "loss" in line] == [0] * 6 + [1] * 6


def test_roll_back_is_a_run_without_that_window(tmp_path, folder):
    """Two bad batches, both after the checkpoint of step 3: those up to each are left out."""
    params, lines = run(tmp_path, RollBack(window=8), data=Data(bad=(4, 6)), log_every=2)
    assert same(params, usual(folder, (3, 4, 5, 6), 12, RollBack(window=8)))
    told = [line for line in lines if "rolled_back_from" in line]
    assert [(line["step"], line["rolled_back_from"], line["batches_skipped"]) for line in told] == [(4, 5, 4)]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8, 10, 12]


def learnt(line: dict[str, Any]) -> dict[str, Any]:
    """The metrics that do not depend on the machine."""
    return {name: value for name, value in line.items() if not re.match("time|tokens_per_second|memory|goodput", name)}


class Killed(BaseException):
    """Stand-in for a kill: nothing more is saved."""


def broken_off(step: int, error: type[BaseException]) -> Any:
    class Breaking(MetricsLogger):
        def log(self, at: int, stage: str, **values) -> None:
            super().log(at, stage, **values)
            if at == step:
                if error is KeyboardInterrupt:
                    signal.raise_signal(signal.SIGTERM)
                else:
                    raise error

    return Breaking


@pytest.mark.sampled
@pytest.mark.parametrize("policy", [Skip(window=8), RollBack(window=8)])
def test_stopped_and_killed_in_between_is_the_same(tmp_path, policy):
    """Before the bad step, by a signal; and after it, and after the return from it, by a kill."""
    whole, lines = run(tmp_path / "whole", policy, data=Data(bad=(4, 6)))
    for step, error in ((3, KeyboardInterrupt), (5, Killed), (8, Killed)):
        with pytest.raises(error):
            run(tmp_path / "parts", policy, broken_off(step, error), data=Data(bad=(4, 6)))
    parts, again = run(tmp_path / "parts", policy, data=Data(bad=(4, 6)))
    assert same(parts, whole)
    assert [learnt(line) for line in again] == [learnt(line) for line in lines]


@pytest.mark.sampled
@pytest.mark.parametrize("policy", [Skip(window=8), RollBack(window=8)])
def test_on_a_mesh(tmp_path, policy):
    with sharding.use(MeshConfig(data=2, fsdp=2, tensor=2).make()):
        params, _ = run(tmp_path / "bad", policy, rules=DEFAULT_RULES, data=Data(bad=(4,)))
        without = {Skip: ((4,), 11), RollBack: ((3, 4), 12)}[type(policy)]
        changes = {"data": Data(absent=without[0]), "steps": without[1]}
        assert same(params, run(tmp_path / "without", policy, rules=DEFAULT_RULES, **changes)[0])


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("policy", "step"), [(Stop(), 5), (Skip(window=8, limit=3), 7), (RollBack(window=8, limit=1), 4)]
)
def test_there_is_a_limit_and_what_is_saved_is_finite(tmp_path, policy, step):
    with pytest.raises(Diverged, match=rf"^stage: the loss became nan at step {step}\b.* last good checkpoint is step"):
        run(tmp_path, policy, data=Data(bad=tuple(range(4, 60))))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        restored = checkpoints.restore_params(ema=True)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restored.state))


def test_the_default_keeps_nothing_and_judges_nothing(tmp_path):
    """A checkpoint from before there were policies fits, and the step computes nothing that it did not."""
    plain, skipping = (program(dataclasses.replace(STAGE, divergence=d), Transformer(CONFIG)) for d in (Stop(), Skip()))
    batch, state = next(Numbered((), ())), jax.jit(plain.init_state)()
    texts = [p.step.lower(jax.eval_shape(p.init_state), batch).as_text() for p in (plain, skipping)]
    assert texts[0].count("is_finite") == texts[1].count("is_finite") - 1
    older = {name: value for name, value in vars(state).items() if name != "statistics"}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, older, {})
        restored = checkpoints.restore(jax.eval_shape(plain.init_state)).state
    assert same(jax.tree.leaves(restored.params), jax.tree.leaves(state.params))
    assert restored.statistics is None


@pytest.mark.parametrize(("field", "value"), [("spike", 0.0), ("window", 1), ("limit", 0)])
def test_values_that_make_no_sense(field, value):
    with pytest.raises(UserError, match=rf"^divergence\.{field}: got {value}"):
        Skip(**{field: value})
