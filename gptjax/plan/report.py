"""The text of a plan."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping

from gptjax.distributed.sharding import axes_of
from gptjax.distributed.xla import described
from gptjax.experiment.experiment import Experiment
from gptjax.nn.config import BackboneConfig
from gptjax.nn.pipeline import Schedule
from gptjax.plan.chips import PRICED
from gptjax.plan.collectives import KINDS, sent
from gptjax.plan.compiled import Step
from gptjax.plan.estimate import DAY, Estimate, estimate, expected
from gptjax.plan.topology import Target

_REMEDIES = {
    "first state": "shard the parameters over more devices (--mesh.fsdp)",
    "validation loss": "split batches into more microbatches (accumulate)",
    "text sample": "shard the parameters over more devices (--mesh.fsdp), or train without samples (prompts)",
}
LARGEST = 8
"""Number of arrays listed when a program does not fit."""


def fits(step: Step, target: Target, devices: int) -> bool:
    """True if the program compiled and fits into a device's memory."""
    available = capacity(target, devices)
    return step.memory is not None and (available is None or step.memory.total <= available)


def others_fit(others: Mapping[str, float], target: Target, devices: int) -> bool:
    """True if the run's other programs fit into a device's memory."""
    available = capacity(target, devices)
    return available is None or all(size <= available for size in others.values())


def other_lines(others: Mapping[str, float], target: Target, devices: int) -> list[str]:
    """Memory while the run's other programs run, the largest first; the last line names one that does not fit."""
    available = capacity(target, devices)
    ordered = sorted(others.items(), key=lambda item: -item[1])
    lines = [
        "memory per device while other programs run",
        *(f"  {name:26}{'does not compile' if size == math.inf else _size(size):>12}" for name, size in ordered),
    ]
    if others_fit(others, target, devices):
        return lines
    assert available is not None
    largest = ordered[0][0]
    return [*lines, "", f"does not fit: the {largest} needs more than {_size(available)}; {_REMEDIES[largest]}"]


def capacity(target: Target, devices: int) -> float | None:
    """Memory of a device that a program can use, in bytes. None: unknown (CPU). On GPUs jax takes a fraction."""
    if target.chip is None:
        return None
    fraction = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")) if target.is_gpu else 1.0
    return fraction * target.chip.memory * target.chips / devices


def report(experiment: Experiment, name: str, step: Step, target: Target, devices: int) -> str:
    """The plan of the stage `name`, as lines of text."""
    stage = experiment.stages[name]
    tokens = stage.data.batch * stage.data.length
    useful = experiment.model.flops(stage.data.length) * tokens
    sizes = experiment.mesh.sizes(devices)
    mesh = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "of one device"
    hardware = f"{target.chips} {target.chip.name} chips" if target.chip else f"{devices} CPU devices"
    hardware += f" in {target.slices} {_groups(target)}" if target.slices > 1 else ""
    lines = [
        f"{name} on {target}: {hardware}, mesh {mesh}",
        "",
        f"trained parameters   {_count(step.count)}",
        f"tokens per step      {tokens:,}",
        f"FLOPs per step       {useful:.3g} of the model"
        + (f", {step.flops * devices:.3g} executed by all devices" if step.memory else ""),
        *_pipeline(experiment, name, sizes),
        *([f"attention kernels    {_calls(step)}"] if target.chip is not None and step.memory else []),
        *(f"{'XLA option':21}{option}" for option in described(step.options)),
    ]
    if step.memory is None:
        lines += ["", *_failed(step)]
    else:
        lines += ["", *_memory(step, capacity(target, devices)), "", *_traffic(step, target)]
        if not fits(step, target, devices):
            lines += ["", "does not fit", *_largest(step)]
        elif target.chip is None:
            lines += ["", "no time estimate: the CPU's peak rates are unknown"]
        else:
            times = estimate(step, target, devices)
            likely = expected(step, target, devices)
            lines += ["", *_time(times, likely, useful, tokens, stage.last_step, target)]
    return "\n".join(lines)


def summed(experiment: Experiment, times: dict[str, Estimate], target: Target) -> list[str]:
    """Time and price of all stages together."""
    steps = {name: experiment.stages[name].last_step for name in times}
    low = sum(steps[name] * time.best for name, time in times.items())
    high = sum(steps[name] * time.worst for name, time in times.items())
    return [f"all {len(times)} stages".ljust(21) + f"{_hours(low)} to {_hours(high)}", _price(low, high, target)]


def _memory(step: Step, available: float | None) -> list[str]:
    memory = step.memory
    assert memory is not None
    rows = {
        "parameters": memory.parameters,
        "optimizer": memory.optimizer,
        "average of parameters": memory.average,
        "batch and padding": memory.batch,
        "activations, temporaries": memory.temporaries,
        "program": memory.program,
    }
    share = "" if available is None else f"of {_size(available)} ({memory.total / available:.0%})"
    return [
        "memory per device",
        *(f"  {label:26}{_size(size):>12}" for label, size in rows.items() if size),
        f"  {'total':26}{_size(memory.total):>12} {share}".rstrip(),
    ]


def _pipeline(experiment: Experiment, name: str, sizes: dict[str, int]) -> list[str]:
    """Ticks of a pipeline, and the share of them that is idle. FLOPs and times include it."""
    model, stage, rules = (
        getattr(experiment.model, "backbone", experiment.model),
        experiment.stages[name],
        experiment.rules,
    )
    stages = rules.num_shards("layers", sizes)
    if stages == 1 or not isinstance(model, BackboneConfig):
        return []
    copies = rules.without(axes_of(rules.layers)).num_shards("batch", sizes)
    rows = stage.data.batch // stage.accumulate // copies
    schedule = Schedule(stages, model.microbatches or math.gcd(rows, stages), model.pipeline_chunks)
    return [f"pipeline             {stage.accumulate * schedule.ticks} ticks, {schedule.idle:.0%} idle"]


def _groups(target: Target) -> str:
    return "boxes" if target.is_gpu else "slices"


def _calls(step: Step) -> str:
    calls = (f"{count:,} calls of {name}" for name, count in step.attention.items())
    return ", ".join(calls) or "none: products and a softmax, with scores in memory"


def _traffic(step: Step, target: Target) -> list[str]:
    lines = [f"moved to and from a device's memory per step: {_size(step.moved)}"]
    if not step.collectives:
        return [*lines, "nothing is sent between devices"]
    lines.append("sent by a device per step")
    within = " over NVLink" if target.is_gpu else ""
    for between, suffix in ((False, within), (True, f" between {_groups(target)}")):
        found = [c for c in step.collectives if c.between_slices == between]
        total = sent(found)
        lines += [
            f"  {kind + suffix:32}{_size(total[kind]):>12}  in {sum(c.times for c in found if c.kind == kind):,}"
            for kind in KINDS
            if kind in total
        ]
    return lines


def _time(times: Estimate, likely: float, useful: float, tokens: int, steps: int, target: Target) -> list[str]:
    chip = target.chip
    assert chip is not None
    peak = target.chips * chip.flops
    low, high = times.best, times.worst
    return [
        "time per step, by roofline (each resource at its peak)",
        f"  {'compute':26}{_seconds(times.compute):>12}",
        f"  {'HBM':26}{_seconds(times.memory):>12}",
        f"  {'NVLink' if target.is_gpu else 'interconnect':26}{_seconds(times.interconnect):>12}",
        *([f"  {f'network between {_groups(target)}':26}{_seconds(times.network):>12}"] if target.slices > 1 else []),
        f"  {'everything overlaps':26}{_seconds(low):>12}  bound by {times.bound}",
        f"  {'nothing overlaps':26}{_seconds(high):>12}",
        f"  {'MFU':26}{useful / peak / high:>6.0%} to {useful / peak / low:.0%}",
        f"  {'expected':26}{_seconds(likely):>12}  MFU {useful / peak / likely:.0%}",
        "",
        f"tokens per day       {_count(tokens * DAY / high)} to {_count(tokens * DAY / low)}",
        f"{steps:,} steps".ljust(21) + f"{_hours(steps * low)} to {_hours(steps * high)}",
        _price(steps * low, steps * high, target),
        "",
        "Assumed: bfloat16 peaks; operands and results of instructions cross HBM, values inside a fusion do not;",
        _assumed(target),
        "evaluations, checkpoints, input and vector arithmetic take no time. Expected: kernels one after the other at",
        "rates that good ones reach, while data is sent. Not a measurement.",
    ]


def _assumed(target: Target) -> str:
    if target.is_gpu:
        return "jax takes XLA_PYTHON_CLIENT_MEM_FRACTION of a GPU's memory, 0.75 if unset;"
    directions = "both directions" if target.wraps else "one direction: no ring"
    return f"a collective uses one axis of the slice, {directions};"


def _price(low: float, high: float, target: Target) -> str:
    """Price of a run that takes `low` to `high` seconds."""
    chip = target.chip
    assert chip is not None
    price = target.chips * chip.price / 3600
    rate = f"${chip.price:.2f} per chip-hour ({PRICED}, on demand)"
    return f"price                ${low * price:,.0f} to ${high * price:,.0f}, at {rate}"


def _failed(step: Step) -> list[str]:
    """Report of a step that did not compile, with the bytes in the compiler's message if it names them."""
    found = re.search(r"\((\S+)\) exceeds available HBM \((\S+)\)", step.refusal)
    needs = f": temporaries need {found[1]}iB of the {found[2]}iB that a program can use" if found else ""
    return [f"does not fit{needs}", f"state per device     {_size(sum(step.arrays.values()))}", *_largest(step)]


def _largest(step: Step) -> list[str]:
    title, arrays = ("at the peak", step.peak) if step.peak else ("of the state", step.arrays)
    largest = sorted(arrays.items(), key=lambda item: -item[1])[:LARGEST]
    return [f"largest arrays {title}:", *(f"  {_size(size):>12}  {name}" for name, size in largest)]


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
