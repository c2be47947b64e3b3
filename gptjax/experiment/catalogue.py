"""Catalogue of experiments: shipped ones by name, any other by the path of its file.

    load("quickstart").experiment
    load("path/to/mine.py").experiment

This module imports nothing heavy: listing the experiments does not wait for jax.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import sys
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
        if Path(name).is_file():
            return None
        return f"no file {name!r}; give the path of an experiment, or one of: {', '.join(known)}"
    if name in known:
        return None
    near = difflib.get_close_matches(name, known)
    hint = f"the nearest: {', '.join(near)}" if near else f"there are: {', '.join(known)}"
    return f"no experiment {name!r}; {hint}; or give the path of a .py file"


def load(name: str) -> ModuleType:
    """Import the experiment's module, as Python itself would. Saved configurations may then refer to its classes,
    and to those of modules that it imports from its folder. Raises UserError if it does not exist or has no
    `experiment`."""
    from gptjax.config import allow
    from gptjax.types import UserError

    if (wrong := load_error(name)) is not None:
        raise UserError(wrong)
    path = Path(name).resolve()
    if not name.endswith(".py"):
        module = importlib.import_module(f"{PACKAGE}.{name}")
    elif path in {file.resolve() for file in names().values()}:
        module = importlib.import_module(f"{PACKAGE}.{path.stem}")
    else:
        if not path.stem.isidentifier():
            raise UserError(f"{name}: {path.stem!r} cannot be the name of a Python module; rename the file")
        sys.path.insert(0, str(path.parent))
        module = importlib.import_module(path.stem)
        if Path(module.__file__ or "").resolve() != path:
            raise UserError(f"{name}: there is another module named {path.stem!r}; rename the file")
        allow(*(found for name, found in list(sys.modules.items()) if _beside(name, found, path.parent)))
    allow(module)
    if not hasattr(module, "experiment"):
        raise UserError(f"{name}: defines no `experiment`; add `experiment = Experiment(...)` to the file")
    return module


def _beside(name: str, module: ModuleType, folder: Path) -> bool:
    """True for a module that was imported by this name from the folder."""
    stem = folder.joinpath(*name.split("."))
    return vars(module).get("__file__") in (f"{stem}.py", f"{stem}/__init__.py")
