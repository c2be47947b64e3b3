"""An experiment of two stages that takes seconds, and what its run folder holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from gptjax import data, evals, optim
from gptjax.checkpoint.checkpoint import Checkpoints
from gptjax.distributed.sharding import MeshConfig
from gptjax.experiment.experiment import Experiment, Stage
from gptjax.nn import LearnedPositions, TransformerConfig
from gptjax.objectives import NextToken

LETTERS = "abcdefghijklmnopqrstuvwxyz ."


@dataclasses.dataclass(frozen=True)
class Words:
    """A source: documents of random letters."""

    count: int = 20

    def documents(self, split: str) -> Iterator[str]:
        rng = np.random.default_rng([split == "train"])
        yield LETTERS
        for _ in range(self.count):
            yield "".join(rng.choice(list(LETTERS), rng.integers(1, 40)))

    def fingerprint(self) -> str:
        return repr(self)


@dataclasses.dataclass(frozen=True)
class Sums:
    """A source of conversations."""

    def documents(self, split: str) -> Iterator[tuple[data.Message, ...]]:
        for i in range(10):
            yield data.Message("user", "ab" * i + "?"), data.Message("assistant", "ba" * i + ".")

    def questions(self, count: int) -> list[tuple[str, str]]:
        return [("ab?", "ba.")] * count

    def fingerprint(self) -> str:
        return "sums"


PRETRAIN = Stage(
    data=data.Pretrain(Words(), length=32, batch=8),
    objective=NextToken(),
    optimizer=optim.AdamW(schedule=optim.Cosine(warmup=1)),
    steps=4,
    ema=0.5,
    evaluate_every=100,
    eval_sequences=8,
    save_every=2,
    evaluations=(evals.BitsPerByte(Words(), documents=2, length=16),),
)


CHAT = dataclasses.replace(
    PRETRAIN,
    data=data.Chat(Sums(), length=32, batch=8),
    prompts=(),
    evaluations=(evals.Answers(Sums(), count=1, max_tokens=4),),
)


EXPERIMENT = Experiment(
    model=TransformerConfig(vocab=64, layers=2, width=16, heads=2, positions=LearnedPositions(64)),
    tokenizer=data.TrainCharacters(),
    stages={"pretrain": PRETRAIN, "chat": CHAT},
    mesh=MeshConfig(data=2, fsdp=2, tensor=2),
)


def left(folder: Path) -> dict[str, bytes]:
    """Every file of a run, but TensorBoard's."""
    files = [path for path in folder.rglob("*") if path.is_file() and "tensorboard" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def params(folder: Path, stage: str, ema: bool = True):
    with Checkpoints(folder / "checkpoints" / stage) as checkpoints:
        return jax.device_get(checkpoints.restore_params(ema=ema).state)


def equal(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
