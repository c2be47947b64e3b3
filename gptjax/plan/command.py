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

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gptjax.types import UserError

if TYPE_CHECKING:
    from gptjax.experiment.experiment import Experiment
    from gptjax.plan.changes import Change
    from gptjax.plan.compiled import Step
    from gptjax.plan.topology import Target

BEST = 5
"""Number of search results printed."""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit code: 0 if everything fits, else 1. Raises UserError."""
    parser = argparse.ArgumentParser("gptjax plan", usage="gptjax plan NAME --on TARGET [options] [overrides]")
    parser.description, parser.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", metavar="NAME", help="name of an experiment, or path of a .py file")
    parser.add_argument("--on", required=True, metavar="TARGET", help="v4, v5e, v5p, v6e or tpu7x:SHAPE[*N], or cpu:N")
    parser.add_argument("--stage", help="stage to plan (default: all; with --search: the first)")
    parser.add_argument("--search", action="store_true", help="try meshes and remat policies, and print the best")
    options, overrides = parser.parse_known_args(arguments)

    from gptjax.plan.topology import Target

    target = Target.parse(options.on)
    target.prepare()
    from gptjax.config import override
    from gptjax.experiment.catalogue import load

    experiment = override(load(options.name).experiment, overrides, f"gptjax plan {options.name}", "")
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
    from gptjax.plan.report import fits, report, summed

    times: dict[str, Estimate] = {}
    for name in names:
        step = compile_step(experiment, name, devices)
        print(report(experiment, name, step, target, len(devices)), flush=True)
        if not fits(step, target, len(devices)):
            return _make_fit(experiment, name, target, devices)
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
