"""How many bytes a device moves to and from its memory in a compiled program, read from its text.

An instruction reads its operands and writes its result; a fusion is one instruction, and nothing moves between its
parts. Of an array that is sliced, gathered from or updated in place, only the part counts. What lies in a TPU's vector
memory is not in HBM. Kernels count as if they read everything once.
"""

from __future__ import annotations

from gptjax.plan import hlo

_STILL = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "async-done"),
}
"""What moves nothing itself."""


def moved(program: hlo.Program) -> float:
    """Bytes in a step."""
    return sum(
        run.times * _moved(program, run)
        for run in program.runs()
        if run.within is None and run.instruction.opcode not in _STILL and not run.instruction.opcode.endswith("-done")
    )


def _moved(program: hlo.Program, run: hlo.Run) -> float:
    one = run.instruction
    if one.opcode == "custom-call" and "tpu_custom_call" not in one.rest:  # a note to the compiler
        return 0.0
    result = hlo.size_in_hbm(one.shape)
    if one.opcode == "fusion":
        (inner,) = program.called(one)
        part = program.computations[inner]
        parameters = sorted((i for i in part.values() if i.opcode == "parameter"), key=lambda i: int(i.operands))
        read = (
            min(hlo.size_in_hbm(shape), _read(program, part, parameter.name) if hlo.size_in_hbm(shape) else 0)
            for parameter, shape in zip(parameters, run.shapes, strict=False)
        )
        return sum(read) + min(result, _written(program, part, hlo.result(part)))
    operands = [hlo.size_in_hbm(shape) for shape in run.shapes]
    if one.opcode in ("dynamic-slice", "slice", "gather"):
        return (hlo.size(one.shape) if operands[0] else 0) + result
    if one.opcode == "dynamic-update-slice":
        return operands[1] + (hlo.size(run.shapes[1]) if result else 0)
    if one.opcode.endswith("-start"):  # the result has the operands in it
        result = max(result - sum(operands), 0)
    return sum(operands) + result


def _read(program: hlo.Program, part: dict[str, hlo.Instruction], name: str) -> float:
    """Bytes that a fusion reads of what has this name in it; infinite where that is all."""
    total = 0.0
    for one in part.values():
        for place, operand in enumerate(one.names):
            if operand != name:
                continue
            if one.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
                total += hlo.size(one.shape)
            elif one.opcode in ("bitcast", "reshape"):
                total += _read(program, part, one.name)
            elif one.opcode == "fusion":
                (called,) = program.called(one)
                inner = program.computations[called]
                arrived = next(i for i in inner.values() if i.opcode == "parameter" and int(i.operands) == place)
                total += _read(program, inner, arrived.name)
            elif not (one.opcode == "dynamic-update-slice" and place == 0):
                return float("inf")
    return total


def _written(program: hlo.Program, part: dict[str, hlo.Instruction], one: hlo.Instruction) -> float:
    """Bytes that a fusion writes of this, one of its instructions; infinite where that is all."""
    if one.opcode == "dynamic-update-slice":
        return hlo.size(part[one.names[1]].shape)
    if one.opcode in ("bitcast", "reshape"):
        return _written(program, part, part[one.names[0]])
    if one.opcode == "tuple":
        parts = (min(_written(program, part, part[inner]), hlo.size_in_hbm(part[inner].shape)) for inner in one.names)
        return sum(parts)
    if one.opcode == "fusion":
        (called,) = program.called(one)
        inner = program.computations[called]
        return _written(program, inner, hlo.result(inner))
    return float("inf")
