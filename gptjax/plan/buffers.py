"""Buffer assignment of a compiled program, read from the compiler's dump: memory by use, and the arrays alive at its
peak."""

from __future__ import annotations

import collections
import dataclasses
import re
from typing import Any

from gptjax.plan import hlo


@dataclasses.dataclass(frozen=True)
class Buffers:
    """Bytes of one device's main memory that a program uses."""

    arguments: int
    outputs: int
    """Results that are not written in place of an argument."""
    constants: int
    temporaries: int
    peak: tuple[tuple[str, int], ...] = ()
    """(instruction, bytes) of each array alive when most is. Empty: unknown."""

    @classmethod
    def of(cls, analysis: Any) -> Buffers:
        """Take `jax.stages.Compiled.memory_analysis()`."""
        return cls(
            analysis.argument_size_in_bytes,
            analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
            analysis.generated_code_size_in_bytes,
            analysis.temp_size_in_bytes,
        )

    @classmethod
    def parse(cls, assignment: str, live: str = "") -> Buffers:
        """Parse the dumps `*-buffer-assignment.txt` and `*-live-range.txt`."""
        sizes: dict[str, int] = collections.defaultdict(int)
        for size, uses in re.findall(r"^allocation \d+: size (\d+), (.*)$", assignment, re.MULTILINE):
            if not re.search(r"\bcolor [1-9]", uses):  # another memory, such as a TPU's VMEM
                sizes[next((use for use in ("parameter", "live-out", "constant") if use in uses), "")] += int(size)
        _, _, peak = live.partition("(peak):\n")
        arrays = re.findall(r"^\s+([\w.\-]+)\{[\d,]*\}: (\d+) bytes \(cumulative", peak, re.MULTILINE)
        return cls(
            sizes["parameter"],
            sizes["live-out"],
            sizes["constant"],
            sizes[""],
            tuple((name, int(size)) for name, size in arrays),
        )


def named(program: hlo.Program, buffers: Buffers) -> dict[str, int]:
    """Description -> bytes at the peak, the largest first. Arrays of one operation and shape are summed: `12 x
    bf16[32,1024,3072] of jvp(Transformer)/Block/dot_general`. Arguments of the step have their names."""
    instructions = {name: found for body in program.computations.values() for name, found in body.items()}
    sizes: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
    for name, size in buffers.peak:
        instruction = instructions.get(name)
        operation = re.search(r'op_name="([^"]*)"', instruction.rest) if instruction is not None else None
        label = operation[1] if operation is not None else name
        shape = "" if instruction is None else _shape_of(instruction.shape, size)
        if label.startswith("state"):  # an argument
            shape, label = "", re.sub(r"[.\[\]'\\]+", ".", label).strip(".").removeprefix("state.")
        sizes[shape, label.removeprefix("jit(step)/")].append(size)
    found = {
        (f"{len(each)} x " if len(each) > 1 else "") + (f"{shape} of {label}" if shape else label): sum(each)
        for (shape, label), each in sizes.items()
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _shape_of(shape: str, size: int) -> str:
    """Type and dimensions of the array with `size` bytes in an instruction's result, nearest if layouts add padding."""
    arrays = re.findall(r"\b[a-z]\w*\[[\d,]*\]", shape)
    return min(arrays, key=lambda array: abs(hlo.size(array) - size), default="")
