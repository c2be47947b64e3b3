"""Length of the path from the command to the attention scores: `python benchmarks/path.py [--json]`.

Trains a tiny quickstart under a tracer, on the documentation of one package, and prints our own frames on the stack at
the first call of the function that computes attention scores, at its first call in a training step, the modules that
the run loads, and the lines of the files of `nn` and `kernels` that it executes, without the packages' lists of names.
About 15 CPU seconds.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import json
import sys
import tempfile
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
OURS = tuple(str(ROOT / folder) for folder in ("gptjax", "experiments"))
TINY = ["--model.layers=1", "--model.width=16", "--model.heads=2", "--tokenizer.vocab=400", "--model.vocab=400"]
for stage in ("pretrain", "chat"):
    TINY += [f"--{stage}.{source}.source.root={ROOT / 'gptjax' / 'io'}" for source in ("data", "evaluations.0")]
    values = ("steps=1", "evaluate_every=1", "eval_sequences=1", "optimizer.schedule.warmup=1", "data.length=256")
    TINY += [f"--{stage}.{value}" for value in values]


def trace() -> dict[str, list[str]]:
    """Stacks of our own frames, outermost first, the modules loaded and the files executed."""
    stacks: dict[str, list[str]] = {}
    files: set[str] = set()

    def enter(frame: FrameType, _: str, __: object) -> None:  # of a call; None: no event within it
        code = frame.f_code
        if not code.co_filename.startswith(OURS):
            return
        if code.co_flags & inspect.CO_OPTIMIZED:  # a function, not the body of a module or class
            files.add(code.co_filename)
        if code.co_name == "_forward" and code.co_filename.endswith("attention/plain.py"):
            stack = _stack(frame)
            stacks.setdefault("first call", stack)
            if any(" loss" in name or name.endswith(".loss") for name in stack):
                stacks.setdefault("training step", stack)

    from gptjax.cli.run import main

    sys.settrace(enter)
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            code = main(["quickstart", "--out", f"{folder}/run", *TINY])
    finally:
        sys.settrace(None)
    assert code == 0
    loaded = sorted(name for name in sys.modules if name.split(".")[0] in ("gptjax", "experiments"))
    model = (Path(file).relative_to(ROOT) for file in files)
    return stacks | {"modules": loaded, "model files": sorted(map(str, filter(_is_model, model)))}


def _stack(frame: FrameType | None) -> list[str]:
    stack = []
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(OURS):
            stack.append(f"{Path(code.co_filename).relative_to(ROOT)}:{frame.f_lineno} {code.co_qualname}")
        frame = frame.f_back
    return stack[::-1]


def _is_model(path: Path) -> bool:
    return path.parts[:2] in (("gptjax", "nn"), ("gptjax", "kernels")) and path.name != "__init__.py"


def lines(files: list[str]) -> int:
    """Lines of code: neither empty, nor a comment, nor part of a docstring."""
    total = 0
    for file in files:
        text = (ROOT / file).read_text()
        code = {i for i, line in enumerate(text.splitlines(), 1) if line.strip() and not line.strip().startswith("#")}
        for node in ast.walk(ast.parse(text)):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                code -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        total += len(code)
    return total


if __name__ == "__main__":
    found = trace()
    if "--json" in sys.argv[1:]:
        print(json.dumps(found))
        sys.exit()
    for name in ("first call", "training step"):
        print(f"{name}: {len(found[name])} frames", *found[name], sep="\n    ")
    files = found["model files"]
    whole = sum(len((ROOT / file).read_text().splitlines()) for file in files)
    print(f"{len(found['modules'])} modules loaded")
    print(f"{len(files)} files of nn and kernels executed: {whole:,} lines, {lines(files):,} of them code")
