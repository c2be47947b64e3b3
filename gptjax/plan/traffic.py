"""Bytes that a device moves to and from its memory in a compiled program, read from its text.

An instruction reads its operands and writes its result. A fusion is one instruction: values inside it are not moved. Of
an array that is sliced, gathered from or updated in place, only that part counts. A TPU's vector memory is not HBM.
Kernels count as if they read every operand once.
"""

from __future__ import annotations

from gptjax.plan import hlo

_STILL = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "async-done"),
}
"""Opcodes that move nothing themselves."""
_KERNELS = ("tpu_custom_call", "__cudnn$", "__cublas$", "__cub$", "__gpu$", "triton", "mosaic_gpu")
"""Parts of custom calls' targets that are kernels; others are annotations for the compiler."""


def moved(program: hlo.Program) -> float:
    """Bytes moved per step."""
    return sum(run.times * moved_by(program, run) for run in program.runs())


def moved_by(program: hlo.Program, run: hlo.Run) -> float:
    """Bytes moved by one execution of an instruction. None of those within a fusion."""
    instruction = run.instruction
    if run.within is not None or instruction.opcode in _STILL or instruction.opcode.endswith("-done"):
        return 0.0
    if instruction.opcode == "custom-call" and not any(name in instruction.target for name in _KERNELS):
        return 0.0
    result = hlo.size_in_hbm(instruction.shape)
    if instruction.opcode == "fusion":
        (inner,) = program.called(instruction)
        computation = program.computations[inner]
        parameters = sorted((i for i in computation.values() if i.opcode == "parameter"), key=lambda i: int(i.operands))
        read = (
            min(hlo.size_in_hbm(shape), _read(program, computation, parameter.name) if hlo.size_in_hbm(shape) else 0)
            for parameter, shape in zip(parameters, run.shapes, strict=False)
        )
        return sum(read) + min(result, _written(program, computation, hlo.result(computation)))
    operands = [hlo.size_in_hbm(shape) for shape in run.shapes]
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return (hlo.size(instruction.shape) if operands[0] else 0) + result
    if instruction.opcode == "dynamic-update-slice":
        return operands[1] + (hlo.size(run.shapes[1]) if result else 0)
    if instruction.opcode.endswith("-start"):  # the result includes the operands
        result = max(result - sum(operands), 0)
    return sum(operands) + result


def _read(program: hlo.Program, computation: dict[str, hlo.Instruction], name: str) -> float:
    """Bytes that a fusion reads of its value `name`. Infinity: all of it."""
    total = 0.0
    for instruction in computation.values():
        for index, operand in enumerate(instruction.names):
            if operand != name:
                continue
            if instruction.opcode in ("dynamic-slice", "slice", "gather") and index == 0:
                total += hlo.size(instruction.shape)
            elif instruction.opcode in ("bitcast", "reshape"):
                total += _read(program, computation, instruction.name)
            elif instruction.opcode == "fusion":
                (called,) = program.called(instruction)
                inner = program.computations[called]
                arrived = next(i for i in inner.values() if i.opcode == "parameter" and int(i.operands) == index)
                total += _read(program, inner, arrived.name)
            elif not (instruction.opcode == "dynamic-update-slice" and index == 0):
                return float("inf")
    return total


def _written(program: hlo.Program, computation: dict[str, hlo.Instruction], instruction: hlo.Instruction) -> float:
    """Bytes that a fusion writes of the result of its instruction. Infinity: all of it."""
    if instruction.opcode == "dynamic-update-slice":
        return hlo.size(computation[instruction.names[1]].shape)
    if instruction.opcode in ("bitcast", "reshape"):
        return _written(program, computation, computation[instruction.names[0]])
    if instruction.opcode == "tuple":
        return sum(_written_of(program, computation, inner) for inner in instruction.names)
    if instruction.opcode == "fusion":
        (called,) = program.called(instruction)
        inner = program.computations[called]
        return _written(program, inner, hlo.result(inner))
    return float("inf")


def _written_of(program: hlo.Program, computation: dict[str, hlo.Instruction], name: str) -> float:
    """Bytes that a fusion writes of an element of its result. An element of a kernel's results, `call#1`: all of it."""
    size = hlo.size_in_hbm(hlo.shape_in(computation, name))
    return min(_written(program, computation, computation[name]), size) if name in computation else size
