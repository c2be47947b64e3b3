"""Changes to an experiment that reduce its step's memory: tried when it does not fit, and by a search."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from gptjax.distributed.sharding import MeshConfig
from gptjax.experiment.experiment import Experiment
from gptjax.types import UserError

REMAT = (None, "dots_with_no_batch_dims_saveable", "attention_saveable", "nothing_saveable")
"""Rematerialisation policies, each saving fewer activations and recomputing more than the one before."""
LONG = 32_768
"""Sequence length from which a search uses context parallelism instead of tensor parallelism."""


@dataclasses.dataclass(frozen=True)
class Change:
    """A changed experiment, and the command-line options that produce it."""

    options: str
    experiment: Experiment


def smaller(experiment: Experiment, name: str, devices: int) -> Iterator[Change]:
    """Changes that need less memory, the smallest first: remat policies, then microbatches, then parameters sharded
    over all devices (FSDP), then all of these together; last expert, context or tensor parallelism with the strongest
    remat policy."""
    sharded = Change("--mesh.data 1 --mesh.fsdp -1", dataclasses.replace(experiment, mesh=_fully_sharded(experiment)))
    for base in (Change("", experiment), sharded):
        if base is not sharded or _possible(base.experiment, devices):
            if base is sharded:
                yield base
            policies = [policy for policy in _policies(base.experiment) if policy is not None]
            rematted = [_remat(base, policy) for policy in policies]
            yield from rematted
            last = rematted[-1] if rematted else base
            yield from microbatches(last, name, devices)
    policy = next(reversed(_policies(experiment)), None) if hasattr(experiment.model, "remat") else None
    for change in meshes(experiment, name, devices):
        mesh = change.experiment.mesh
        if mesh.data == 1 and mesh.fsdp < devices and mesh != experiment.mesh:
            yield change if policy is None else _remat(change, policy)


def meshes(experiment: Experiment, name: str, devices: int) -> list[Change]:
    """All meshes of data, fsdp and a third axis that the experiment accepts, the fewest shards first. The third axis is
    expert for a mixture of experts, context for sequences of `LONG` tokens or more, else tensor."""
    experts = max((size for axis, _, size in experiment.model.axes if axis == "experts"), default=1)
    length = experiment.stages[name].data.length
    third, largest = ("expert", experts) if experts > 1 else ("context", 64) if length >= LONG else ("tensor", 8)
    found = []
    for shards in (n for n in range(1, min(largest, devices) + 1) if devices % n == 0 and n & (n - 1) == 0):
        for fsdp in (n for n in range(1, devices // shards + 1) if (devices // shards) % n == 0):
            sizes = {"data": devices // shards // fsdp, "fsdp": fsdp, third: shards}
            changed = dataclasses.replace(experiment, mesh=MeshConfig(**sizes))
            if _possible(changed, devices):
                reset = {axis: 1 for axis, size in dataclasses.asdict(experiment.mesh).items() if size != 1} | sizes
                options = " ".join(f"--mesh.{axis} {size}" for axis, size in reset.items())
                found.append(Change(options, changed))
    return found


def remats(change: Change) -> Iterator[Change]:
    """The change with every remat policy, starting with None, which recomputes nothing."""
    yield from (_remat(change, policy) for policy in (REMAT if hasattr(change.experiment.model, "remat") else ()))


def _policies(experiment: Experiment) -> tuple[str | None, ...]:
    """Remat policies that save less than the experiment's own."""
    current = getattr(experiment.model, "remat", "nothing_saveable")
    return REMAT[REMAT.index(current) + 1 :] if current in REMAT else ("nothing_saveable",)


def _remat(change: Change, policy: str | None) -> Change:
    model = dataclasses.replace(change.experiment.model, remat=policy)  # pyright: ignore[reportArgumentType, reportCallIssue]
    options = f"{change.options} --model.remat {policy}".strip()
    return Change(options, dataclasses.replace(change.experiment, model=model))


def microbatches(change: Change, name: str, devices: int) -> Iterator[Change]:
    """The change with 2, 4 and 8 times the microbatches, where they divide the batch and the devices them."""
    stage = change.experiment.stages[name]
    for times in (2, 4, 8):
        count = stage.accumulate * times
        if stage.data.batch % count == 0:
            stages = change.experiment.stages | {name: dataclasses.replace(stage, accumulate=count)}
            options = f"{change.options} --{name}.accumulate {count}".strip()
            changed = dataclasses.replace(change.experiment, stages=stages)
            if _possible(changed, devices):
                yield Change(options, changed)


def _fully_sharded(experiment: Experiment) -> MeshConfig:
    return dataclasses.replace(experiment.mesh, data=1, fsdp=-1)


def _possible(experiment: Experiment, devices: int) -> bool:
    try:
        experiment.check(devices)
    except UserError:
        return False
    return True
