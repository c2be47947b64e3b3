"""Load the model of a run: a checkpoint of it, if the configuration is what it was trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from gptjax.checkpoint.checkpoint import Checkpoints
from gptjax.config import check_name, differences, from_json
from gptjax.data.tokenizers import load_tokenizer
from gptjax.distributed.parameters import declared, nested
from gptjax.distributed.sharding import ShardingRules
from gptjax.models.identity import content_digest
from gptjax.models.loading import (
    Step,
    checked_class,
    init_from_pretrained,
    model_config,
    restore_stage_params,
    trained_tokenizer,
)
from gptjax.models.model import Model
from gptjax.types import Params, UserError


def load_run(
    path: Path, experiment: Any, dtype: str | None, rules: ShardingRules, kind: type[Model], step: Step
) -> Model:
    """Load a run's model, with the configuration `experiment`, as JSON, of its config.json. See `load`."""
    # Read as JSON: stages may have classes that only the experiment's own file defines.
    stages = experiment.get("stages") if isinstance(experiment, dict) else None
    if not isinstance(stages, dict) or not all(isinstance(stage, dict) for stage in stages.values()):
        raise UserError(f"path: got {path}, whose config.json is damaged (no stages); restore it")
    for name in stages:
        check_name(name, f"{path / 'config.json'}: stages")
    if (name := _last(path, stages)) is None:
        raise UserError(f"path: got {path}, a run without a checkpoint; train it first")
    with Checkpoints(path / "checkpoints" / name) as checkpoints:
        extra, found_step = checkpoints.extra() or {}, _step(checkpoints, step)
    _check_config(path, name, experiment, extra)
    model, data = model_config(experiment["model"], dtype), stages[name]["data"]
    found = checked_class(kind, type(model), path)
    before = list(stages)[: list(stages).index(name) + 1]
    lengths = [stages[stage]["data"].get("length") for stage in before]
    if all(isinstance(length, int) for length in lengths):  # a later stage may have shorter texts
        data = data | {"length": max(lengths)}
    adapters = {name: from_json(stages[name].get("adapter")) for name in before}
    built = model.build(rules)
    abstract = {
        name: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=x.sharding)
        for name, x in declared(built).items()
    }
    tokenizer = load_tokenizer(path / "tokenizer")

    def pretrained(abstract: Params | None) -> Params:
        if not isinstance(experiment.get("init_from"), str):
            raise UserError(f"{path / 'config.json'}: init_from: got none, must be the model that the adapters adapt")
        with Checkpoints(path / "checkpoints" / next(iter(stages))) as first:
            origin = (first.extra() or {}).get("origin") or {}
        if "sha256" in origin and origin["sha256"] != content_digest(experiment["init_from"]):
            raise UserError(
                f"init_from: got {experiment['init_from']}, whose files are not those that the adapters in {path} were "
                "trained on; restore them"
            )
        params = init_from_pretrained(experiment["init_from"], built, tokenizer, experiment["seed"])
        return jax.tree.map(lambda x, want: x.astype(want.dtype), params, abstract)

    restored = restore_stage_params(
        path / "checkpoints", adapters, name, built, nested(abstract), pretrained, found_step
    )
    _check_config(path, name, experiment, restored.extra)
    tokenizer = trained_tokenizer(path, restored.extra["tokenizer"])
    settings = found.settings_of_run(data)
    if (trained := from_json(stages[name].get("quantisation"))) is not None:
        settings["quantisation"] = trained
    return found(model, restored.state, tokenizer, rules=rules, **settings)


def _last(path: Path, stages: Mapping[str, Any]) -> str | None:
    """Name of the last stage with a checkpoint. None: there is none."""
    for name in reversed([*stages]):
        with Checkpoints(path / "checkpoints" / name) as checkpoints:
            if checkpoints.extra() is not None:
                return name
    return None


def _step(checkpoints: Checkpoints, step: Step) -> int | None:
    """Number of a step that has a checkpoint. None: the newest sound one."""
    if step == "latest":
        return None
    there, best = checkpoints.steps(), checkpoints.best_step()
    if step == "best" and best is None:
        raise UserError(f"step: got best, but {checkpoints.folder} has no checkpoint whose validation loss is known")
    if step != "best" and step not in there:
        kept = ", ".join(map(str, there))
        raise UserError(f"step: got {step}, must be one that {checkpoints.folder} has: {kept}, latest or best ({best})")
    return best if step == "best" else int(step)


def _check_config(path: Path, stage: str, experiment: dict[str, Any], extra: dict[str, Any]) -> None:
    """Raise UserError if config.json is not what a checkpoint was trained with, as its hashed manifest says."""
    trained = extra.get("configuration")
    if trained is None:  # trained without an experiment
        return
    kept = [name for name in trained["stages"] if name in experiment["stages"]]
    before, now = _decisive(trained, stage, kept), _decisive(experiment, stage, kept)
    try:
        changed = differences(from_json(before), from_json(now))  # not in the default of a field that one lacks
    except Exception:  # whatever a class makes of a damaged value
        changed = differences(before, now)
    if changed:
        raise UserError(
            f"{path / 'config.json'}: differs from the configuration of the newest checkpoint of {stage}: "
            f"{'; '.join(changed)}; restore it, or resume the run"
        )
    if others := {path.name for path in (path / "checkpoints").iterdir()} - experiment["stages"].keys():
        raise UserError(
            f"{path / 'config.json'}: names no stage {', '.join(sorted(others))}, of which there are checkpoints; "
            "restore it, or delete them"
        )


def _decisive(experiment: dict[str, Any], last: str, names: Sequence[str]) -> dict[str, Any]:
    """The values of a run's configuration that decide what the model of a stage answers, as JSON."""
    stages, data = experiment["stages"], experiment["stages"].get(last, {}).get("data")
    data = data if isinstance(data, dict) else {}
    source = data.get("source")
    return {
        **{name: experiment.get(name) for name in ("model", "seed")},
        **{f"{name}.adapter": stages[name].get("adapter") for name in names},
        f"{last}.quantisation": stages.get(last, {}).get("quantisation"),
        **{f"{last}.data.{name}": data.get(name) for name in ("length", "template")},
        f"{last}.data.source.classes": source.get("classes") if isinstance(source, dict) else None,
    }
