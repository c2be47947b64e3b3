"""`gptjax plan NAME --on TARGET`: compile an experiment's training step for chips that you need not have, and print its
memory, time and price.

    gptjax plan gpt2_124m --on v5e:4x4                      every stage of the experiment, and their sum
    gptjax plan gpt2_124m --on v5e:4x4 --mesh.fsdp 4        overrides, as for python -m experiments
    gptjax plan gpt2_124m --on v6e:16x16*2                  two slices of that shape
    gptjax plan gpt2_124m --on h100:8                       a box of eight GPUs; h100:8*2: two boxes
    gptjax plan gpt2_124m --on v6e:16x16 --search           the best meshes, remat policies and microbatches
    gptjax plan assistant --variant 1b --on v5e:4x4         one of an experiment's variants
    gptjax plan quickstart --on cpu:8 --stage chat          one stage; no time estimate for virtual CPU devices

Exits with 1 if a step does not fit, and prints the largest arrays and the smallest change found that makes it fit.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import tyro

# Nothing heavier up here: --help must not wait for jax.

if TYPE_CHECKING:
    from gptjax.experiment.experiment import Experiment
    from gptjax.plan.changes import Change
    from gptjax.plan.compiled import Step
    from gptjax.plan.topology import Target

    Call = Callable[[Callable[[Sequence[Any]], Any]], Any]
    """Calls a function of devices: `Target.call`, or with other devices."""

BEST = 5
"""Number of search results printed."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the planner; every other option overrides a value of the experiment."""

    on: Annotated[str, tyro.conf.arg(metavar="TARGET", help_behavior_hint="(required)")] = ""
    """Chips: v4, v5e, v5p, v6e or tpu7x:SHAPE[*N]; a100, h100, h200 or b200:N[*BOXES]; or cpu:N."""
    variant: str | None = None
    """One of the experiment's `variants`, by name."""
    stage: str | None = None
    """Stage to plan. None: all; with --search the first."""
    search: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Try meshes, remat policies and microbatches, and print the best."""


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
    from gptjax.cli.run import chosen_experiment
    from gptjax.experiment.catalogue import load

    experiment = override(
        chosen_experiment(name, load(name), None, options.variant), overrides, f"gptjax plan {name}", ""
    )
    names = [options.stage] if options.stage else list(experiment.stages)
    if names[0] not in experiment.stages:
        raise UserError(f"stage: got {names[0]!r}, must be one of {', '.join(experiment.stages)}")
    if options.search:
        return search(experiment, names[0], target, target.call)
    return plan(experiment, names, target, target.call)


def plan(experiment: Experiment, names: Sequence[str], target: Target, call: Call) -> int:
    """Print the plan of each stage and, for several, their sum. Returns the exit code."""
    from gptjax.plan.compiled import compile_step
    from gptjax.plan.estimate import Estimate, estimate
    from gptjax.plan.programs import other_programs
    from gptjax.plan.report import fits, other_lines, others_fit, report, summed

    times: dict[str, Estimate] = {}
    devices = target.num_devices
    for name in names:
        step = call(functools.partial(compile_step, experiment, name))
        print(report(experiment, name, step, target, devices), flush=True)
        if not fits(step, target, devices):
            return _make_fit(experiment, name, target, call)
        _log("compiling the first state, a validation loss and a text sample")
        others = other_programs(experiment, name, call)
        print("\n".join(["", *other_lines(others, target, devices)]), flush=True)
        if not others_fit(others, target, devices):
            return 1
        if target.chip is not None:
            times[name] = estimate(step, target, devices)
        if len(names) > 1:
            print()
    if len(times) > 1:
        print("\n".join(summed(experiment, times, target)))
    return 0


def _make_fit(experiment: Experiment, name: str, target: Target, call: Call) -> int:
    """Print the smallest change found that makes the stage fit. Returns the exit code, 1."""
    from gptjax.plan import changes
    from gptjax.plan.report import fits

    for change in changes.smaller(experiment, name, target.num_devices):
        _log(f"trying {change.options}")
        step = _compile(change, name, call)
        if step is not None and fits(step, target, target.num_devices):
            print(f"\nfits with {change.options}")
            return 1
    print("\nno remat policy, number of microbatches or mesh makes it fit: use more chips or a smaller model")
    return 1


def _compile(change: Change, name: str, call: Call) -> Step | None:
    """Compile the changed experiment. None, with a message: the model cannot be sharded so, which may only show when
    the step is traced."""
    from gptjax.plan.compiled import compile_step
    from gptjax.types import UserError

    try:
        return call(functools.partial(compile_step, change.experiment, name))
    except UserError as error:
        _log(f"skipped: {error}")
        return None


def search(experiment: Experiment, name: str, target: Target, call: Call) -> int:
    """Print the meshes, remat policies and numbers of microbatches with which a stage fits, the fastest first by its
    expected time (for CPUs: the least memory first). Returns the exit code: 1 if none fits."""
    from gptjax.plan import changes

    found: list[tuple[tuple[float, float], Change]] = []
    meshes = changes.meshes(experiment, name, target.num_devices)
    for number, mesh in enumerate(meshes, 1):
        _log(f"mesh {number} of {len(meshes)}")
        found += _fitting(mesh, name, target, call)
    if not found:
        print("no combination of mesh, remat policy and microbatches fits")
        return 1
    for (time, memory), change in sorted(found, key=lambda result: result[0])[:BEST]:
        duration = f"{time * 1e3:>10.4g} ms" if target.chip else "             "
        print(f"{duration}  {memory / 2**30:8.2f} GiB  {change.options}")
    return 0


def _fitting(mesh: Change, name: str, target: Target, call: Call) -> Iterator[tuple[tuple[float, float], Change]]:
    """The remat policy that fits and recomputes least, for each number of microbatches until nothing is recomputed:
    more microbatches only send and read more then."""
    from gptjax.plan import changes
    from gptjax.plan.estimate import expected
    from gptjax.plan.report import fits

    for batch in (mesh, *changes.microbatches(mesh, name, target.num_devices)):
        for index, change in enumerate(changes.remats(batch)):
            _log(f"trying {change.options}")
            step = _compile(change, name, call)
            if step is None:
                return
            if fits(step, target, target.num_devices):
                assert step.memory is not None
                time = expected(step, target, target.num_devices) if target.chip else 0.0
                yield (time, step.memory.total), change
                if index == 0:
                    return
                break


def _log(text: str) -> None:
    print(text, file=sys.stderr)
