"""Parts of a configuration chosen on the command line by the name of their class: `--model.positions ALiBi`.

A part is a field whose annotation is a dataclass, or a base class or protocol of dataclasses. Its choices are the
classes that a saved configuration may name: those that gptjax exports, and those of the experiment's modules.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import tyro

from gptjax.config import EXPORTS, allowed_modules, children, exported, fields_of, is_config, lends_keys, paths
from gptjax.types import UserError


@dataclasses.dataclass(frozen=True)
class Given:
    """An option with its values, as typed."""

    words: tuple[str, ...]

    @property
    def option(self) -> str:
        return self.words[0].partition("=")[0]

    @property
    def path(self) -> str:
        return self.option.lstrip("-").replace("-", "_") if self.option.startswith("--") else ""

    @property
    def values(self) -> tuple[str, ...]:
        _, equals, value = self.words[0].partition("=")
        return (value, *self.words[1:]) if equals else self.words[1:]


def choose(config: Any, arguments: Sequence[str]) -> tuple[Any, list[str]]:
    """Replace the parts that the arguments choose by objects with default values. Returns the configuration, not yet
    checked by its classes, and the other arguments. Raises UserError for a part that cannot be chosen."""
    given = list(_split(arguments))
    chosen: dict[str, Given] = {}
    for option in sorted(given, key=lambda option: option.path.count(".")):  # a part before the parts inside it
        if len(option.values) != 1 or (where := annotation(config, option.path)) is None:
            continue
        value, choices = option.values[0], Choices(where)
        if not choices.exist:
            continue
        if value == "None" and choices.optional:
            config = _replaced(config, option.path.split("."), None)
        elif (cls := choices.find(value)) is not None:
            config = _replaced(config, option.path.split("."), _default(cls))
        else:
            known = ", ".join(choices.names())
            raise UserError(f"{option.option}: got {value!r}, must be one of {known}")
        chosen[option.path] = option
    for path, value in [*_unset(config)]:
        if path not in {option.path for option in given}:
            owner = path.rpartition(".")[0]
            option = chosen[owner]
            choices = Choices(value)
            kinds = f", one of {', '.join(choices.names())}" if choices.exist else ""
            raise UserError(f"{option.option} {option.values[0]}: needs --{path}{kinds}")
        config = _replaced(config, path.split("."), tyro.MISSING)
    return config, [word for option in given if option.path not in chosen for word in option.words]


class _Unset:
    """Value of a field that has no default and is not given yet, with its annotation."""

    def __init__(self, annotation: Any):
        self.annotation = annotation


def _split(arguments: Sequence[str]) -> Iterator[Given]:
    words: list[str] = []
    for word in arguments:
        if word.startswith("--") and words:
            yield Given(tuple(words))
            words = []
        words.append(word)
    if words:
        yield Given(tuple(words))


def annotation(config: Any, path: str) -> Any:
    """The annotation of the field of this path. None: there is no such field."""
    root = config
    *owners, name = path.split(".")
    for owner in owners:
        config = children(config).get(owner)
    if isinstance(config, tuple) and name in children(config):
        items = typing.get_args(annotation(root, ".".join(owners)))
        return items[0] if items[-1] is ... else items[int(name)]
    if not is_config(config) or name not in {field.name for field in fields_of(config)}:
        return None
    try:
        return typing.get_type_hints(type(config))[name]
    except NameError:  # a name that is imported for type checkers alone
        return None


class Choices:
    """Classes that fit an annotation."""

    def __init__(self, annotation: Any):
        union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
        members = typing.get_args(annotation) if union else (annotation,)
        self.optional = types.NoneType in members
        self._members = [typing.get_origin(member) or member for member in members]
        self._members = [member for member in self._members if isinstance(member, type) and _is_part(member)]
        self.exist = bool(self._members)

    def find(self, name: str) -> type | None:
        """The class of this name that fits."""
        return next((cls for cls in _classes(name) if self._fits(cls)), None)

    def names(self) -> list[str]:
        """Names of all classes that fit, in alphabetical order."""
        found = {cls.__name__ for cls in _classes() if self._fits(cls)}
        return [*sorted(found), *(["None"] if self.optional else [])]

    def _fits(self, cls: type) -> bool:
        return any(_is_kind(cls, member) for member in self._members)


def _is_part(member: type) -> bool:
    """True for a dataclass, and for a class or protocol of gptjax or of an experiment that dataclasses may have."""
    ours = member.__module__.startswith("gptjax.") or member.__module__ in allowed_modules
    return dataclasses.is_dataclass(member) or ours


def _is_kind(cls: type, member: type) -> bool:
    if member in cls.__mro__:
        return True
    if not getattr(member, "_is_protocol", False):
        return False
    wanted = {name for base in member.__mro__[:-1] if getattr(base, "_is_protocol", False) for name in _declared(base)}
    fields = {field.name for field in dataclasses.fields(cls)}
    if not wanted or not all(name in fields or hasattr(cls, name) for name in wanted):
        return False
    # A protocol of one method, such as `build`, is told apart by the method's parameters.
    return len(wanted) > 1 or all(_parameters(member, name) <= _parameters(cls, name) for name in wanted)


def _parameters(cls: type, method: str) -> set[str]:
    found = getattr(cls, method, None)
    return set(inspect.signature(found).parameters) if callable(found) else set()


def _is_concrete(cls: type) -> bool:
    """False for a base class, which leaves one of its own methods to subclasses."""
    own = vars(cls).values()
    raising = any("NotImplementedError" in getattr(getattr(x, "__code__", None), "co_names", ()) for x in own)
    return not (raising or inspect.isabstract(cls) or any(getattr(x, "__isabstractmethod__", False) for x in own))


def _declared(protocol: type) -> set[str]:
    """Attributes and methods that a protocol asks for."""
    if protocol.__module__ == "typing":
        return set()
    names = {*vars(protocol), *vars(protocol).get("__annotations__", ())}
    return {name for name in names if not name.startswith("_") or name == "__call__"}


def _classes(name: str | None = None) -> Iterator[type]:
    """Classes that a saved configuration may name, all or those of one name; the experiment's own first."""
    for module in sorted(allowed_modules):
        for known, cls in vars(sys.modules.get(module, types)).items():
            ours = isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__module__ == module
            if name in (None, known) and ours and _is_concrete(cls):
                yield cls
    for package, names in EXPORTS.items():
        for known in names or importlib.import_module(package).__all__:
            if name in (None, known) and (cls := exported(package, known)) and _is_concrete(cls):
                yield cls


def _default(cls: type) -> Any:
    """An object with default values, on which no check has run."""
    made = object.__new__(cls)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            value: Any = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = _Unset(hints[field.name])
        object.__setattr__(made, field.name, value)
    return made


def _unset(config: Any) -> Iterator[tuple[str, Any]]:
    """Path and annotation of each field that is not set."""
    return ((path, value.annotation) for path, value in paths(config) if isinstance(value, _Unset))


def _replaced(config: Any, path: Sequence[str], value: Any) -> Any:
    """The configuration with another value at a path. No check runs, since other values may change too."""
    if not path:
        return value
    head, *rest = path
    if isinstance(config, tuple):
        return tuple(_replaced(item, rest, value) if str(i) == head else item for i, item in enumerate(config))
    if isinstance(config, dict):
        return {**config, head: _replaced(config[head], rest, value)}
    changed = copy.copy(config)
    for field in fields_of(config):
        item = getattr(config, field.name)
        if field.name == head:
            object.__setattr__(changed, head, _replaced(item, rest, value))
        elif lends_keys(item) and head in item:
            object.__setattr__(changed, field.name, _replaced(item, path, value))
    return changed
