"""Data that a command is given: an experiment's, by name or file, those of a run's folder, or a file of texts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptjax.data import Dataset, Tokenizer
    from gptjax.experiment.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Target:
    """Data sets and their tokenizer."""

    datasets: dict[str, Dataset]
    """Name of each stage -> its data. Of a file: one, with the name of the file."""
    tokenizer: Tokenizer
    seed: int = 0
    """Seed of the order of the sequences."""


def load_target(
    path: str, tokenizer: str | None, overrides: Sequence[str], program: str, tokens: str | None = None
) -> Target:
    """Load what `path` names: an experiment, a run's folder, or a file or glob of texts.

    tokenizer  tokenizer to use, as for `load_tokenizer`; of a model's folder, also its chat template. None: the
               experiment's; for a file, bytes
    overrides  options that change values of the experiment, or of the file's data set
    tokens     folder or bucket to keep a trained tokenizer in, or to find it. None: none is kept

    Raises UserError."""
    from gptjax.cli.options import override
    from gptjax.experiment import catalogue

    run = Path(path) / "config.json"
    if run.is_file() or path.endswith(".py") or path in catalogue.names():
        experiment = _of_run(run) if run.is_file() else catalogue.load(path).experiment
        experiment = override(experiment, overrides, f"{program} {path}", "")
        return _of_experiment(experiment, tokenizer or (path if run.is_file() else None), tokens)
    if not any(character in path for character in "/.*?[") and not Path(path).exists():
        from gptjax.types import UserError

        raise UserError(f"{catalogue.load_error(path)}, or a file of texts")
    return _of_file(path, tokenizer, overrides, program)


def _of_run(config: Path) -> Experiment:
    from gptjax.config import from_json
    from gptjax.types import UserError

    try:
        return from_json(json.loads(config.read_text())["experiment"])
    except (ValueError, LookupError, TypeError):
        raise UserError(f"path: got {config.parent}, whose config.json has no experiment; must be a run") from None


def _of_experiment(experiment: Any, tokenizer: str | None, tokens: str | None) -> Target:
    from gptjax.data import Dataset, load_tokenizer
    from gptjax.data.files import cache_dir
    from gptjax.data.prepared import tokenizer_of

    datasets = {name: stage.data for name, stage in experiment.stages.items() if isinstance(stage.data, Dataset)}
    if tokenizer is not None:
        return Target(datasets, load_tokenizer(tokenizer), experiment.seed)
    first = next(iter(experiment.stages.values())).data
    found = tokenizer_of(experiment.tokenizer, first, tokens or cache_dir() / "tokens", keep=tokens is not None)
    return Target(datasets, found, experiment.seed)


def _of_file(path: str, tokenizer: str | None, overrides: Sequence[str], program: str) -> Target:
    from gptjax.cli.options import override
    from gptjax.data import CHAT_SPECIALS, Bytes, Chat, load_tokenizer
    from gptjax.data.guess import dataset_of
    from gptjax.interop import tokenizers

    dataset = override(dataset_of(path), overrides, f"{program} {path}", "")
    if tokenizer is None:
        return Target({path: dataset}, Bytes().build(iter(())))
    if (Path(tokenizer) / "tokenizer_config.json").is_file():
        loaded, template = tokenizers.load(tokenizer), tokenizers.load_template(tokenizer)
    else:
        loaded, template = load_tokenizer(tokenizer), None
    if isinstance(dataset, Chat) and template is not None:
        dataset = dataclasses.replace(dataset, template=template)
    elif isinstance(dataset, Chat):
        loaded = loaded.with_specials(CHAT_SPECIALS)
    return Target({path: dataset}, loaded)
