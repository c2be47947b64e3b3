"""`gptjax plan NAME --on TARGET`: compile an experiment's training step for chips that you need not have, and print its
memory, time and price.

    gptjax plan gpt2_124m --on v5e:4x4                      every stage of the experiment, and their sum
    gptjax plan gpt2_124m --on v5e:4x4 --mesh.fsdp 4        overrides, as for python -m experiments
    gptjax plan gpt2_124m --on v6e:16x16*2                  two slices of that shape
    gptjax plan gpt2_124m --on v6e:16x16 --search           the best meshes and remat policies
    gptjax plan quickstart --on cpu:8 --stage chat          one stage; no time estimate for virtual CPU devices

Exits with 1 if a step does not fit, and prints the largest arrays and the smallest change found that makes it fit.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import tyro

# Nothing heavier up here: --help must not wait for jax.

if TYPE_CHECKING:
    from gptjax.experiment.experiment import Experiment
    from gptjax.plan.changes import Change
    from gptjax.plan.compiled import Step
    from gptjax.plan.topology import Target

BEST = 5
"""Number of search results printed."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the planner; every other option overrides a value of the experiment."""

    on: Annotated[str, tyro.conf.arg(metavar="TARGET", help_behavior_hint="(required)")] = ""
    """Chips: v4, v5e, v5p, v6e or tpu7x:SHAPE[*N], or cpu:N."""
    stage: str | None = None
    """Stage to plan. None: all; with --search the first."""
    search: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Try meshes and remat policies, and print the best."""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit code: 0 if everything fits, else 1. Raises UserError."""
    if not arguments or {"-h", "--help"} & {*arguments}:
        tyro.cli(Options, prog="gptjax plan NAME", description=__doc__, args=["--help"])
    name, *rest = arguments

    from gptjax.cli.options import override, parse_options
    from gptjax.plan.topology import Target
    from gptjax.types import UserError

    options, overrides = parse_options(Options(), rest)
    target = Target.parse(options.on)
    target.prepare()
    from gptjax.experiment.catalogue import load

    experiment = override(load(name).experiment, overrides, f"gptjax plan {name}", "")
    names = [options.stage] if options.stage else list(experiment.stages)
    if names[0] not in experiment.stages:
        raise UserError(f"stage: got {names[0]!r}, must be one of {', '.join(experiment.stages)}")
    devices = target.devices()
    if options.search:
        return search(experiment, names[0], target, devices)
    return plan(experiment, names, target, devices)


def plan(experiment: Experiment, names: Sequence[str], target: Target, devices: Sequence[Any]) -> int:
    """Print the plan of each stage and, for several, their sum. Returns the exit code."""
    from gptjax.plan.compiled import compile_step
    from gptjax.plan.estimate import Estimate, estimate
    from gptjax.plan.programs import other_programs
    from gptjax.plan.report import fits, other_lines, others_fit, report, summed

    times: dict[str, Estimate] = {}
    for name in names:
        step = compile_step(experiment, name, devices)
        print(report(experiment, name, step, target, len(devices)), flush=True)
        if not fits(step, target, len(devices)):
            return _make_fit(experiment, name, target, devices)
        others = other_programs(experiment, name, devices)
        print("\n".join(["", *other_lines(others, target, len(devices))]), flush=True)
        if not others_fit(others, target, len(devices)):
            return 1
        if target.chip is not None:
            times[name] = estimate(step, target, len(devices))
        if len(names) > 1:
            print()
    if len(times) > 1:
        print("\n".join(summed(experiment, times, target)))
    return 0


def _make_fit(experiment: Experiment, name: str, target: Target, devices: Sequence[Any]) -> int:
    """Print the smallest change found that makes the stage fit. Returns the exit code, 1."""
    from gptjax.plan import changes
    from gptjax.plan.report import fits

    for change in changes.smaller(experiment, name, len(devices)):
        _log(f"trying {change.options}")
        step = _compile(change, name, devices)
        if step is not None and fits(step, target, len(devices)):
            print(f"\nfits with {change.options}")
            return 1
    print("\nno remat policy, number of microbatches or mesh makes it fit: use more chips or a smaller model")
    return 1


def _compile(change: Change, name: str, devices: Sequence[Any]) -> Step | None:
    """Compile the changed experiment. None, with a message: the model cannot be sharded so, which may only show when
    the step is traced."""
    from gptjax.plan.compiled import compile_step
    from gptjax.types import UserError

    try:
        return compile_step(change.experiment, name, devices)
    except UserError as error:
        _log(f"skipped: {error}")
        return None


def search(experiment: Experiment, name: str, target: Target, devices: Sequence[Any]) -> int:
    """Print the meshes and remat policies with which a stage fits, the fastest first by the roofline estimate (for
    CPUs: the least memory first). Returns the exit code: 1 if none fits."""
    from gptjax.plan import changes
    from gptjax.plan.report import fits

    found: list[tuple[tuple[float, float], Change, Step]] = []
    meshes = changes.meshes(experiment, name, len(devices))
    for number, mesh in enumerate(meshes, 1):
        for change in changes.remats(mesh):
            _log(f"mesh {number} of {len(meshes)}: trying {change.options}")
            step = _compile(change, name, devices)
            if step is None:
                break
            if fits(step, target, len(devices)):
                found.append((_order(step, target, len(devices)), change, step))
                break  # recomputing more takes no less time
    if not found:
        print("no combination of mesh and remat policy fits")
        return 1
    for (time, memory), change, _ in sorted(found, key=lambda result: result[0])[:BEST]:
        duration = f"{time * 1e3:>10.4g} ms" if target.chip else "             "
        print(f"{duration}  {memory / 2**30:8.2f} GiB  {change.options}")
    return 0


def _order(step: Step, target: Target, devices: int) -> tuple[float, float]:
    from gptjax.plan.estimate import estimate

    assert step.memory is not None
    # Time: the mean of the best case (everything overlaps) and the worst (nothing does).
    times = estimate(step, target, devices) if target.chip else None
    return (0.0 if times is None else (times.best + times.worst) / 2, step.memory.total)


def _log(text: str) -> None:
    print(text, file=sys.stderr)
