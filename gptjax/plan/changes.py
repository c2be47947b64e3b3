"""Changes to an experiment that make its step smaller: to try when it does not fit, and to search."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from gptjax.distributed.sharding import MeshConfig
from gptjax.experiment.experiment import Experiment
from gptjax.types import UserError

REMAT = (None, "dots_with_no_batch_dims_saveable", "attention_saveable", "nothing_saveable")
"""Policies that keep less and less, and compute more and more again."""
LONG = 32_768
"""Tokens of a row from which on a search cuts rows, not layers, into parts."""


@dataclasses.dataclass(frozen=True)
class Change:
    """An experiment, and the options that make it of the one before."""

    options: str
    experiment: Experiment


def smaller(experiment: Experiment, name: str, devices: int) -> Iterator[Change]:
    """Ways to need less memory, the smallest change first: what is computed again, then microbatches, then parameters
    that are shared out, then all of it; last experts, rows or layers cut into parts, with the least kept."""
    shared = Change("--mesh.data 1 --mesh.fsdp -1", dataclasses.replace(experiment, mesh=_shared_out(experiment)))
    for start in (Change("", experiment), shared):
        if start is not shared or _possible(start.experiment, devices):
            if start is shared:
                yield start
            policies = [policy for policy in _policies(start.experiment) if policy is not None]
            rematted = [_remat(start, policy) for policy in policies]
            yield from rematted
            last = rematted[-1] if rematted else start
            yield from (c for c in _accumulated(last, name) if _possible(c.experiment, devices))
    policy = next(reversed(_policies(experiment)), None) if hasattr(experiment.model, "remat") else None
    for cut in meshes(experiment, name, devices):
        mesh = cut.experiment.mesh
        if mesh.data == 1 and mesh.fsdp < devices and mesh != experiment.mesh:
            yield cut if policy is None else _remat(cut, policy)


def meshes(experiment: Experiment, name: str, devices: int) -> list[Change]:
    """Every mesh of data, fsdp and one axis more that the experiment fits, the least cut first. The third is expert for
    a mixture of experts, context for rows of `LONG` tokens or more, else tensor."""
    experts = max((size for axis, _, size in experiment.model.axes if axis == "experts"), default=1)
    length = experiment.stages[name].data.length
    third, widest = ("expert", experts) if experts > 1 else ("context", 64) if length >= LONG else ("tensor", 8)
    found = []
    for parts in (n for n in range(1, min(widest, devices) + 1) if devices % n == 0 and n & (n - 1) == 0):
        for fsdp in (n for n in range(1, devices // parts + 1) if (devices // parts) % n == 0):
            sizes = {"data": devices // parts // fsdp, "fsdp": fsdp, third: parts}
            changed = dataclasses.replace(experiment, mesh=MeshConfig(**sizes))
            if _possible(changed, devices):
                reset = {axis: 1 for axis, size in dataclasses.asdict(experiment.mesh).items() if size != 1} | sizes
                options = " ".join(f"--mesh.{axis} {size}" for axis, size in reset.items())
                found.append(Change(options, changed))
    return found


def remats(change: Change) -> Iterator[Change]:
    """With every policy from none on, the one that computes least again first."""
    yield from (_remat(change, policy) for policy in (REMAT if hasattr(change.experiment.model, "remat") else ()))


def _policies(experiment: Experiment) -> tuple[str | None, ...]:
    """Those that keep less than the experiment's own."""
    now = getattr(experiment.model, "remat", "nothing_saveable")
    return REMAT[REMAT.index(now) + 1 :] if now in REMAT else ("nothing_saveable",)


def _remat(change: Change, policy: str | None) -> Change:
    model = dataclasses.replace(change.experiment.model, remat=policy)  # pyright: ignore[reportArgumentType, reportCallIssue]
    options = f"{change.options} --model.remat {policy}".strip()
    return Change(options, dataclasses.replace(change.experiment, model=model))


def _accumulated(change: Change, name: str) -> Iterator[Change]:
    stage = change.experiment.stages[name]
    for times in (2, 4, 8):
        parts = stage.accumulate * times
        if stage.data.batch % parts == 0:
            stages = change.experiment.stages | {name: dataclasses.replace(stage, accumulate=parts)}
            options = f"{change.options} --{name}.accumulate {parts}".strip()
            yield Change(options, dataclasses.replace(change.experiment, stages=stages))


def _shared_out(experiment: Experiment) -> MeshConfig:
    return dataclasses.replace(experiment.mesh, data=1, fsdp=-1)


def _possible(experiment: Experiment, devices: int) -> bool:
    try:
        experiment.check(devices)
    except UserError:
        return False
    return True
