"""Preparation of a run before its first step: checks of what would fail later, and the data of later stages."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console

from gptjax.checkpoint.checkpoint import Checkpoints
from gptjax.data.tokenizers import Tokenizer
from gptjax.distributed.sharding import ShardingRules
from gptjax.experiment import run_folder
from gptjax.models.loading import check_frozen, load_frozen
from gptjax.protocols import ModelConfig, Module
from gptjax.train.stage import Reading, Stage
from gptjax.types import FrozenModel, UserError

GENERATING = ("decoder", "encoder-decoder")
"""Architectures that generate text."""


def check_stages(model: ModelConfig, stages: Mapping[str, Stage], folder: Path, tokenizer: Tokenizer) -> None:
    """Raise UserError for a prompt, an evaluation or a frozen model that cannot be used, before training."""
    for name, stage in stages.items():
        if model.architecture in GENERATING:
            _check_prompts(model, name, stage, tokenizer)
        if not (folder / "report" / f"{name}.json").exists():
            for number, evaluation in enumerate(stage.evaluations):
                with naming(f"{name}.evaluations.{number}"):
                    evaluation.check(tokenizer)
                    evaluation.check_chat(tokenizer, getattr(stage.data, "template", None))
        for field, frozen in stage.frozen_models.items():
            with Checkpoints(folder / "checkpoints" / name) as saved, naming(f"{name}.objective.{field}"):
                if not saved.steps():
                    check_frozen(frozen, tokenizer)


def _check_prompts(model: ModelConfig, name: str, stage: Stage, tokenizer: Tokenizer) -> None:
    read = "max_source_positions" if model.architecture == "encoder-decoder" else "max_positions"
    limit = getattr(model, read) or sys.maxsize
    for prompt in stage.prompts:
        size = len(stage.data.prompt(tokenizer, prompt))
        if not 0 < size < limit:
            raise UserError(
                f"{name}.prompts: got {prompt!r} of {size} tokens, must be at least 1 "
                "and less than the maximum of model.positions"
            )


def read_data(
    stages: Mapping[str, Stage],
    folder: Path,
    cache: str,
    tokenizer: Tokenizer,
    model: Module,
    seed: int,
    console: Console,
    ending: contextlib.ExitStack,
) -> tuple[dict[str, Stage], dict[str, Reading]]:
    """The stages, with `steps` in place of `epochs`, and the data of later ones, which `ending` closes. Raises
    UserError for data of a later stage that cannot be trained on, before the first stage is trained; its texts are
    tokenised. Call it with the mesh set."""
    known, readings, waiting = dict(stages), {}, 0
    for name, stage in stages.items():
        if stage.epochs is None:
            with Checkpoints(folder / "checkpoints" / name) as saved:
                waiting += (unfinished := run_folder.ended(stage, saved) is None)
            if not unfinished or waiting == 1:  # the data of the first one that is unfinished are read next
                continue
        with console.status(f"reading the data of {name} ..."):
            seed_of_stage = run_folder.seed_of(name, stage, folder, seed)
            readings[name] = stage.read(name, tokenizer, model.rules, seed_of_stage, cache)
        ending.callback(readings[name].batches.close)
        known[name] = stage.with_steps(name, readings[name].batches)
    return known, readings


def load_frozen_models(name: str, stage: Stage, tokenizer: Tokenizer, rules: ShardingRules) -> tuple[FrozenModel, ...]:
    """The models that a stage's objective reads and does not train."""
    with naming(f"{name}.objective"):
        return tuple(load_frozen(model, tokenizer, rules) for model in stage.frozen_models.values())


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Context in which a UserError's field is prefixed with this path."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}.{error}") from None
