"""Law of the prose: a docstring opens with a noun phrase or an imperative, never with an indirect question."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OPENING = re.compile(r"\s*(What|How|Whether|Where|Which|Why|Of)\b")


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of the docstrings of the module, its classes, functions and attributes."""
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for i, item in enumerate(body if isinstance(body, list) else []):
            match item:
                case ast.Expr(ast.Constant(str(text))):
                    documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                    if (i == 0 and documented) or (i and isinstance(body[i - 1], ast.Assign | ast.AnnAssign)):
                        yield item.lineno, text


def files() -> Iterator[Path]:
    for folder in ("gptjax", "experiments", "benchmarks", "tests"):
        yield from sorted(ROOT.glob(f"{folder}/**/*.py"))


def test_docstrings_open_with_the_thing_itself():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for path in files()
        for line, text in docstrings(path.read_text())
        if OPENING.match(text)
    ]
    assert not found, "\n".join(found)


def test_every_kind_of_docstring_is_read():
    source = '"""A."""\nx = 1\n"""B."""\nclass C:\n    """C."""\n    y: int = 1\n    """D."""\n    def f(): "E."\n'
    assert [text.strip(".") for _, text in sorted(docstrings(source))] == list("ABCDE")
    assert OPENING.match("What it is.")
    assert not OPENING.match("Whatever it is.")
