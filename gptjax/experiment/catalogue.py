"""Catalogue of experiments: shipped ones by name, any other by the path of its file.

    load("quickstart").experiment
    load("path/to/mine.py").experiment

This module imports nothing heavy: listing the experiments does not wait for jax.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType

PACKAGE = "gptjax.experiments"


def names() -> dict[str, Path]:
    """Name -> file of each shipped experiment, in alphabetical order."""
    folders = importlib.import_module(PACKAGE).__path__
    files = sorted(path for folder in folders for path in Path(folder).glob("*.py"))
    return {path.stem: path for path in files if not path.name.startswith("_")}


def headline(path: Path) -> str:
    """First line of a file's docstring, without importing the file."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def load_error(name: str) -> str | None:
    """Error message for the name or path of an experiment that cannot be loaded, or None."""
    known = list(names())
    if name.endswith(".py"):
        if os.path.isfile(name):
            return None
        return f"no file {name!r}; give the path of an experiment, or one of: {', '.join(known)}"
    if name in known:
        return None
    near = difflib.get_close_matches(name, known)
    hint = f"the nearest: {', '.join(near)}" if near else f"there are: {', '.join(known)}"
    return f"no experiment {name!r}; {hint}; or give the path of a .py file"


def load(name: str) -> ModuleType:
    """Import the experiment's module, as Python itself would. Saved configurations may then refer to its classes,
    and to those of modules that it imports from its folder. Raises UserError if it does not exist, raises an error, or
    has no experiment named `experiment`."""
    from gptjax.config import allow
    from gptjax.types import UserError

    if (wrong := load_error(name)) is not None:
        raise UserError(wrong)
    path = Path(name).resolve()
    if not name.endswith(".py"):
        path = names()[name].resolve()
        module = _import(f"{PACKAGE}.{name}", path)
    elif path in {file.resolve() for file in names().values()}:
        module = _import(f"{PACKAGE}.{path.stem}", path)
    else:
        if not path.stem.isidentifier():
            raise UserError(f"{name}: {path.stem!r} cannot be the name of a Python module; rename the file")
        sys.path.insert(0, str(path.parent))
        module = _import(path.stem, path)
        if Path(module.__file__ or "").resolve() != path:
            raise UserError(f"{name}: there is another module named {path.stem!r}; rename the file")
        allow(*(found for name, found in list(sys.modules.items()) if _beside(name, found, path.parent)))
    allow(module)
    if not hasattr(module, "experiment"):
        raise UserError(f"{name}: defines no `experiment`; add `experiment = Experiment(...)` to the file")
    found = module.experiment
    if isinstance(found, type) or not dataclasses.is_dataclass(found) or not hasattr(found, "run"):
        kind = f"the class {found.__name__}" if isinstance(found, type) else f"a value of type {type(found).__name__}"
        raise UserError(f"{name}: experiment: got {kind}, must be an `Experiment(...)`")
    return module


def _import(module: str, path: Path) -> ModuleType:
    """Import a module. Raises UserError, with the innermost line of the files in its folder, if it raises an error."""
    from gptjax.types import UserError, one_line

    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _inside(frame.filename, path.parent)]
        places = [(frame.filename, frame.lineno) for frame in frames] or [(str(path), None)]
        message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"
        if isinstance(error, SyntaxError):
            message = f"{type(error).__name__}: {error.msg}"
            places += [(error.filename, error.lineno)] if _inside(error.filename or "", path.parent) else []
        file, line = places[-1]
        raise UserError(f"{file}{'' if line is None else f', line {line}'}: {message}") from error


def _inside(file: str, folder: Path) -> bool:
    return os.path.isabs(file) and Path(file).is_relative_to(folder) and "site-packages" not in file


def _beside(name: str, module: ModuleType, folder: Path) -> bool:
    """True for a module that was imported by this name from the folder."""
    stem = folder.joinpath(*name.split("."))
    return vars(module).get("__file__") in (f"{stem}.py", f"{stem}/__init__.py")
