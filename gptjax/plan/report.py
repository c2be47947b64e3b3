"""A plan as text."""

from __future__ import annotations

import re

from gptjax.experiment.experiment import Experiment
from gptjax.plan.chips import PRICED
from gptjax.plan.collectives import KINDS, sent
from gptjax.plan.compiled import Step
from gptjax.plan.estimate import DAY, Estimate, estimate
from gptjax.plan.topology import Target

LARGEST = 8
"""Arrays that are named when a program does not fit."""


def fits(step: Step, target: Target, devices: int) -> bool:
    """Whether the program compiled, and takes no more than a device has."""
    room = capacity(target, devices)
    return step.memory is not None and (room is None or step.memory.total <= room)


def capacity(target: Target, devices: int) -> float | None:
    """Bytes of a device; none where that is not known."""
    return None if target.chip is None else target.chip.memory * target.chips / devices


def report(experiment: Experiment, name: str, step: Step, target: Target, devices: int) -> str:
    """The plan of the stage `name`, lines of text."""
    stage = experiment.stages[name]
    tokens = stage.data.batch * stage.data.length
    useful = experiment.model.flops(stage.data.length) * tokens
    sizes = experiment.mesh.sizes(devices)
    mesh = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "of one device"
    what = f"{target.chips} {target.chip.name} chips" if target.chip else f"{devices} CPU devices"
    what += f" in {target.slices} slices" if target.slices > 1 else ""
    lines = [
        f"{name} on {target}: {what}, mesh {mesh}",
        "",
        f"parameters trained   {_count(step.count)}",
        f"tokens a step        {tokens:,}",
        f"FLOPs a step         {useful:.3g} of the model"
        + (f", {step.flops * devices:.3g} of all that devices compute" if step.memory else ""),
    ]
    room = capacity(target, devices)
    if step.memory is None:
        lines += ["", *_refused(step)]
    else:
        lines += ["", *_memory(step, room), "", *_traffic(step)]
        if not fits(step, target, devices):
            lines += ["", "does not fit", *_largest(step)]
        elif target.chip is None:
            lines += ["", "no estimate of time: a CPU's peaks are not known"]
        else:
            times = estimate(step, target, devices)
            lines += ["", *_time(times, useful, tokens, stage.steps, target)]
    return "\n".join(lines)


def summed(experiment: Experiment, times: dict[str, Estimate], target: Target) -> list[str]:
    """What all the stages take."""
    steps = {name: experiment.stages[name].steps for name in times}
    low = sum(steps[name] * one.best for name, one in times.items())
    high = sum(steps[name] * one.worst for name, one in times.items())
    return [f"all {len(times)} stages".ljust(21) + f"{_hours(low)} to {_hours(high)}", _price(low, high, target)]


def _memory(step: Step, room: float | None) -> list[str]:
    memory = step.memory
    assert memory is not None
    rows = {
        "parameters": memory.parameters,
        "optimizer": memory.optimizer,
        "parameter average": memory.average,
        "batch and padding": memory.batch,
        "activations, temporaries": memory.temporaries,
        "program": memory.program,
    }
    of = "" if room is None else f"of {_size(room)} ({memory.total / room:.0%})"
    return [
        "memory of a device",
        *(f"  {what:26}{_size(size):>12}" for what, size in rows.items() if size),
        f"  {'all':26}{_size(memory.total):>12} {of}".rstrip(),
    ]


def _traffic(step: Step) -> list[str]:
    lines = [f"a device moves to and from its memory in a step {_size(step.moved)}"]
    if not step.collectives:
        return [*lines, "nothing is sent between devices"]
    lines.append("sent by a device in a step")
    for between, where in ((False, ""), (True, " between slices")):
        found = [c for c in step.collectives if c.between_slices == between]
        total = sent(found)
        lines += [
            f"  {kind + where:32}{_size(total[kind]):>12}  in {sum(c.times for c in found if c.kind == kind):,}"
            for kind in KINDS
            if kind in total
        ]
    return lines


def _time(times: Estimate, useful: float, tokens: int, steps: int, target: Target) -> list[str]:
    chip = target.chip
    assert chip is not None
    peak = target.chips * chip.flops
    low, high = times.best, times.worst
    return [
        "a step, by roofline (at the peak of each part)",
        f"  {'compute':26}{_seconds(times.compute):>12}",
        f"  {'HBM':26}{_seconds(times.memory):>12}",
        f"  {'interconnect':26}{_seconds(times.interconnect):>12}",
        *([f"  {'network between slices':26}{_seconds(times.network):>12}"] if target.slices > 1 else []),
        f"  {'all overlapping':26}{_seconds(low):>12}  bound by {times.bound}",
        f"  {'nothing overlapping':26}{_seconds(high):>12}",
        f"  {'MFU':26}{useful / peak / high:>6.0%} to {useful / peak / low:.0%}",
        "",
        f"tokens a day         {_count(tokens * DAY / high)} to {_count(tokens * DAY / low)}",
        f"{steps:,} steps".ljust(21) + f"{_hours(steps * low)} to {_hours(steps * high)}",
        _price(steps * low, steps * high, target),
        "",
        "Assumed: bfloat16 peaks; what instructions read and write crosses HBM, the fused parts of one do not; a",
        f"collective uses one axis of the slice, {'both ways round' if target.wraps else 'one way: it has no ring'}; "
        "evaluations, checkpoints, input and vector",
        "arithmetic take no time. A bound to compare with, not a measurement: runs take longer.",
    ]


def _price(low: float, high: float, target: Target) -> str:
    """Of a run of so many seconds."""
    chip = target.chip
    assert chip is not None
    price = target.chips * chip.price / 3600
    rate = f"${chip.price:.2f} a chip and hour ({PRICED}, on demand)"
    return f"price                ${low * price:,.0f} to ${high * price:,.0f}, at {rate}"


def _refused(step: Step) -> list[str]:
    """With what the compiler said, where it names the bytes."""
    said = re.search(r"\((\S+)\) exceeds available HBM \((\S+)\)", step.refusal)
    takes = (
        f": it needs {said[1]}iB for what lives within the step, of {said[2]}iB that a program can use" if said else ""
    )
    return [f"does not fit{takes}", f"state of a device    {_size(sum(step.arrays.values()))}", *_largest(step)]


def _largest(step: Step) -> list[str]:
    largest = sorted(step.arrays.items(), key=lambda item: -item[1])[:LARGEST]
    return ["largest of the state:", *(f"  {_size(size):>12}  {name}" for name, size in largest)]


def _size(size: float) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:,.2f} {unit}"
    return f"{size:,.0f} B"


def _count(number: float) -> str:
    for unit, factor in (("trillion", 1e12), ("billion", 1e9), ("million", 1e6)):
        if number >= factor:
            return f"{number / factor:,.3g} {unit}"
    return f"{number:,.0f}"


def _seconds(time: float) -> str:
    return f"{time:.2f} s" if time >= 1 else f"{time * 1e3:.3g} ms"


def _hours(time: float) -> str:
    if time < 3600:
        return f"{time / 60:.2g} minutes"
    return f"{time / 3600:,.3g} hours" if time < 2 * DAY else f"{time / DAY:,.3g} days"
