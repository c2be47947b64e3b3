"""Kernels of a compiled program: FLOPs and bytes of each instruction that the device executes, one after the other."""

from __future__ import annotations

import collections
import dataclasses
import re

from gptjax.plan import arithmetic, hlo, traffic


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An instruction, with all of its executions in a step."""

    name: str
    flops: float
    """FLOPs of its matrix products."""
    moved: float
    """Bytes that it reads from memory and writes to it."""


def kernels(program: hlo.Program, expert_shards: int = 1) -> tuple[Kernel, ...]:
    """The kernels that multiply matrices or move bytes, in order. expert_shards: see `arithmetic.product_flops`."""
    found: list[Kernel] = []
    for run in program.runs():
        flops = run.times * arithmetic.flops(run, expert_shards)
        if run.within is None:
            found.append(Kernel(run.instruction.name, flops, run.times * traffic.moved_by(program, run)))
        elif flops:  # a product in a fusion, which comes before its parts
            found[-1] = dataclasses.replace(found[-1], flops=found[-1].flops + flops)
    return tuple(kernel for kernel in found if kernel.flops or kernel.moved)


def attention(program: hlo.Program) -> dict[str, int]:
    """Implementation -> calls per step of attention as a kernel of its own, forward and backward."""
    calls: dict[str, int] = collections.Counter()
    for run in program.runs():
        instruction = run.instruction
        names = f"{instruction.name} {_operation(instruction)}"
        if instruction.target.startswith("__cudnn$fmha"):
            calls["cuDNN"] += run.times
        elif instruction.target and re.search("splash|flash|attention|mha", names):
            calls["Pallas"] += run.times
    return dict(calls)


def _operation(instruction: hlo.Instruction) -> str:
    """Name of the operation that an instruction is compiled from; on GPUs, of a Pallas kernel."""
    found = re.search(r'op_name="([^"]*)"', instruction.rest)
    return found[1].removesuffix("/pallas_call").split("/")[-1] if found is not None else ""
