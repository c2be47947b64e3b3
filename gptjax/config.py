"""Configurations are trees of frozen dataclasses: convert them to and from JSON, compare them, and override values from
the command line. A leaf is a str, int, float, bool, None or Path; dataclasses, tuples and dicts hold the leaves.

Every value is named by its path: `model.positions.theta`. A dict of dataclasses contributes its keys and not its own
name: `stages={"pretrain": Stage(steps=100)}` has `pretrain.steps`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import importlib
import io
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, TypeVar

from gptjax.types import UserError

Config = TypeVar("Config")
Parsed = TypeVar("Parsed")

EXPORTS: dict[str, tuple[str, ...] | None] = {
    "gptjax": ("Experiment", "MeshConfig", "ShardingRules", "Stage"),
    "gptjax.data": None,
    "gptjax.evals": None,
    "gptjax.interop.templates": ("ChatTemplate",),
    "gptjax.monitor.metrics": ("WandB",),
    "gptjax.nn": None,
    "gptjax.objectives": None,
    "gptjax.optim": None,
    "gptjax.train.divergence": ("RollBack", "Skip", "Stop"),
}
"""Package -> classes of ours that a saved configuration may name. None: every frozen dataclass that it exports."""
_allowed: set[str] = set()


def allow(*modules: ModuleType) -> None:
    """Let saved configurations name the dataclasses of these modules, which the program has chosen to import."""
    _allowed.update(module.__name__ for module in modules)


def modules(config: Any) -> set[ModuleType]:
    """Modules outside gptjax that define the classes of a configuration."""
    inside = config.values() if isinstance(config, dict) else config if isinstance(config, tuple) else ()
    if _is_dataclass(config):
        inside = [getattr(config, field.name) for field in _fields(config)]
    found = set().union(*map(modules, inside))
    if _is_dataclass(config) and _public_name(type(config)) is None:
        found.add(sys.modules[type(config).__module__])
    return found


def to_json(config: Any) -> Any:
    """Convert a configuration to JSON types: a dataclass becomes `{"class": "gptjax.nn.RoPE", "theta": 1e4}` and a
    tuple a list. Raises UserError, naming the value, for what `from_json` could not restore."""
    return _to_json(config, "configuration")


def _to_json(value: Any, name: str) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Path):
        return {"class": "pathlib.Path", "path": str(value)}
    if isinstance(value, tuple):
        return [_to_json(item, f"{name}.{i}") for i, item in enumerate(value)]
    if _is_dataclass(value):
        if "." in type(value).__qualname__:
            raise UserError(f"{name}: class {type(value).__qualname__} must be defined at the top level of a module")
        fields = {f.name: _to_json(getattr(value, f.name), f"{name}.{f.name}") for f in _fields(value)}
        return {"class": _public_name(type(value)) or f"{type(value).__module__}.{type(value).__qualname__}", **fields}
    if isinstance(value, dict) and all(isinstance(key, str) and key != "class" for key in value):
        return {key: _to_json(item, f"{name}.{key}") for key, item in value.items()}
    raise UserError(
        f"{name}: got {_short(value)} ({type(value).__name__}), must be a str, int, float, bool, None, Path, "
        "dataclass, tuple, or dict with string keys other than 'class'"
    )


def from_json(data: Any) -> Any:
    """Restore a configuration from `to_json`'s output: `from_json(json.loads(json.dumps(to_json(c)))) == c`.

    A missing field gets its default. Nothing that the data names is imported: it may name only the classes in `EXPORTS`
    and the dataclasses of modules that the program has passed to `allow`. Raises UserError for another class, for a
    field that does not exist, and for a missing field without a default."""
    return _from_json(data, "configuration")


def _from_json(data: Any, name: str) -> Any:
    if isinstance(data, list):
        return tuple(_from_json(item, f"{name}.{i}") for i, item in enumerate(data))
    if not isinstance(data, dict):
        return data
    fields = {key: _from_json(item, f"{name}.{key}") for key, item in data.items() if key != "class"}
    if "class" not in data:
        return fields
    if data["class"] == "pathlib.Path" and fields.keys() == {"path"}:
        return Path(fields["path"])
    cls = _find_class(data["class"], name)
    known = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in fields:
        if key not in known:
            raise UserError(
                f"{name}.{key}: not a field of {data['class']}, which has {', '.join(known)}; "
                "use the version of the code that wrote it"
            )
    for key, field in known.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and key not in fields:
            raise UserError(
                f"{name}.{key}: missing, and {data['class']} has no default for it; "
                "use the version of the code that wrote it"
            )
    return cls(**fields)


def _find_class(path: Any, name: str) -> Any:
    module_name, _, class_name = str(path).rpartition(".")
    if (cls := _exported(module_name, class_name)) is not None:
        return cls
    if module_name in _allowed:
        cls = getattr(sys.modules.get(module_name), class_name, None)
        if isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__module__ == module_name:
            return cls
    raise UserError(
        f"{name}: got class {path}, must be a configuration that gptjax exports, or a dataclass of a module that the "
        "program allows with gptjax.config.allow(module)"
    )


def _exported(package: str, name: str) -> type | None:
    """The configuration of this name that a package of `EXPORTS` exports, or None."""
    if package not in EXPORTS:
        return None
    module = importlib.import_module(package)
    cls = getattr(module, name) if name in (EXPORTS[package] or module.__all__) else None
    configures = dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen  # pyright: ignore[reportAttributeAccessIssue]
    return cls if isinstance(cls, type) and configures and f"{cls.__module__}.".startswith(f"{package}.") else None


def _public_name(cls: type) -> str | None:
    """Name by which gptjax exports a class for configurations, such as "gptjax.nn.RoPE"; or None."""
    packages = [package for package in EXPORTS if f"{cls.__module__}.".startswith(f"{package}.")]
    return next((f"{p}.{cls.__name__}" for p in packages if _exported(p, cls.__name__) is cls), None)


def digest(data: Any) -> str:
    """SHA-256, in hex, of a value of JSON types."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def check_name(name: str, field: str) -> None:
    """Raise UserError unless a name given to a part, such as a stage, is fit for options and file names: no path."""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}", name):
        raise UserError(
            f"{field}: got the name {name[:100]!r}, must be 1 to 100 letters, digits, _, - and ., not a . first"
        )


def differences(a: Any, b: Any) -> list[str]:
    """List the changes from a to b, one line each: `model.layers: 4 → 12`. Empty if they are equal."""
    return list(_differences(a, b, ""))


def _differences(a: Any, b: Any, name: str) -> Iterator[str]:
    inside_a, inside_b = _children(a), _children(b)
    if type(a) is type(b) and inside_a and inside_b:
        for key in inside_a | inside_b:
            path = f"{name}.{key}" if name else key
            if key not in inside_b:
                yield f"{path}: {_short(inside_a[key])} → nothing"
            elif key not in inside_a:
                yield f"{path}: nothing → {_short(inside_b[key])}"
            else:
                yield from _differences(inside_a[key], inside_b[key], path)
    elif a != b:
        yield f"{name or 'configuration'}: {_short(a)} → {_short(b)}"


def override(config: Config, arguments: Sequence[str], prog: str, description: str) -> Config:
    """Apply arguments like `--model.layers 12 --pretrain.steps=100` to a configuration.

    Values are parsed by the types of the fields; a field that holds a dataclass is narrowed to that dataclass's class.
    `--help` prints the description and every option with its field's docstring, then exits. Raises UserError for an
    unknown option or a bad value."""
    from tyro import conf

    try:
        names = list(_names(config, ""))
    except RecursionError:
        raise UserError("configuration: contains itself, must be a tree") from None
    settings = {"prog": prog, "description": description, "registry": _as_held()}
    settings["config"] = conf.AvoidSubcommands, conf.FlagConversionOff, conf.SuppressFixed
    changed, unknown = _parse(config, arguments, **settings)
    if unknown:
        raise UserError(_unknown(unknown[0].partition("=")[0], names, prog))
    return changed


def parse_options(options: Config, arguments: Sequence[str]) -> tuple[Config, list[str]]:
    """Parse a command's own options. Returns them and the arguments that are none of them, `--help` among these.

    Raises UserError for a bad value."""
    return _parse(options, arguments, add_help=False)


def describe_options(options: Any) -> str:
    """Help text of a command's own options."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        _parse(options, ["--help"])
    _, _, text = printed.getvalue().partition("\n\n")  # after its usage
    return text.strip("\n")


def _parse(default: Config, arguments: Sequence[str], **settings: Any) -> tuple[Config, list[str]]:
    """Replace the values of a configuration that the arguments name. Returns it and the unknown arguments."""
    import tyro

    settings |= {"default": default, "args": arguments, "use_underscores": True, "return_unknown_args": True}
    return parsed(lambda: tyro.cli(type(default), **settings))


def parsed(parse: Callable[[], Parsed]) -> Parsed:
    """Result of a call of tyro; numbers are finite, and integers have 64 bits. Raises UserError instead of exiting for
    a mistake."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), _numbers():
            return parse()
    except SystemExit as stop:
        if not stop.code:
            raise
        raise _rejection(stop, errors.getvalue()) from None


def _numbers() -> Any:
    """A tyro registry whose integers have 64 bits and whose numbers are finite."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry = ConstructorRegistry()
    asking = False

    @registry.primitive_rule
    def rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        nonlocal asking
        if asking or info.type not in (int, float):
            return None
        asking = True  # disables this rule, so that tyro's own rule answers
        spec = ConstructorRegistry.get_primitive_spec(info)
        asking = False
        assert isinstance(spec, PrimitiveConstructorSpec)
        parse = _integer if info.type is int else _finite
        return dataclasses.replace(spec, instance_from_str=lambda texts: parse(texts[0]))

    return registry


def _integer(text: str) -> int:
    digits = text.strip().lstrip("+-")
    number = int(text) if len(digits) < 100 and re.fullmatch(r"\d+(_\d+)*", digits) else None
    if number is None or not -(2**63) <= number < 2**63:
        raise ValueError(f"got {_short(text)}, must be an integer of at most 64 bits")
    return number


def _finite(text: str) -> float:
    with contextlib.suppress(ValueError):
        if math.isfinite(number := float(text)):
            return number
    raise ValueError(f"got {_short(text)}, must be a finite number")


def _as_held() -> Any:
    """A tyro registry that types a field by the dataclass it holds, not by its annotation (a base class, protocol or
    union), and that names the values of a dict of dataclasses by their keys alone."""
    import tyro
    from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

    registry = ConstructorRegistry()
    asking = False

    def as_held(field: StructFieldSpec) -> StructFieldSpec:
        if _lends_keys(field.default):
            return dataclasses.replace(field, type=Annotated[field.type, tyro.conf.arg(name="")])
        if _is_dataclass(field.default) or (isinstance(field.default, tuple) and _children(field.default)):
            return dataclasses.replace(field, type=_type(field.default))
        return field

    @registry.struct_rule
    def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal asking
        if asking or not dataclasses.is_dataclass(info.type):
            return None
        asking = True  # disables this rule, so that tyro's own rule for dataclasses answers
        spec = ConstructorRegistry.get_struct_spec(info)
        asking = False
        if not isinstance(spec, StructConstructorSpec):
            return None
        return dataclasses.replace(spec, fields=tuple(map(as_held, spec.fields)))

    return registry


def _type(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple[tuple(map(_type, value))]
    return int | float if type(value) is int else type(value)  # (source, 1) may become (source, 0.5)


def _rejection(stop: SystemExit, printed: str) -> UserError:
    """tyro's reason for exiting: the UserError of a `__post_init__` if there is one, else the first lines of its
    box."""
    cause: BaseException | None = stop
    while cause is not None:
        if isinstance(cause, UserError):
            return cause
        cause = cause.__context__
    # A box has a title line, then paragraphs separated by rules; the first paragraph is the reason.
    paragraphs = re.split(r"[─-]{5,}", re.sub(r"\x1b\[[0-9;]*m", "", printed))
    lines = (line.strip(" │|╭╮╰╯+") for line in paragraphs[min(1, len(paragraphs) - 1)].splitlines())
    reason, _, errors = " ".join(line for line in lines if line).partition(" Got errors:")
    if ours := re.search(r"got '.*?, must be [^']*?(?=$| - <class)", errors):  # of a number that may be None
        reason = f"{reason.partition(':')[0]}: {ours[0]}"
    if reason.startswith("Unrecognized options: "):
        near = [option for text in paragraphs[2:] for option in re.findall(r"--[\w.-]+", text) if option != "--help"]
        hint = f"; nearest: {near[0]}" if near else ""
        return UserError(f"no option {reason.removeprefix('Unrecognized options: ').split(',')[0]}{hint}")
    return UserError(reason.removeprefix("Error parsing ").removesuffix("."))


def _unknown(option: str, names: Sequence[str], prog: str) -> str:
    if not option.startswith("--"):
        return f"got {option!r}, which is not an option; give values as --name value"
    wanted = option[2:].replace("-", "_")
    if wanted in names:
        return f"{option}: cannot be set from the command line; change it in Python"
    end = wanted.rpartition(".")[2]
    ends = difflib.get_close_matches(end, {name.rpartition(".")[2] for name in names})
    candidates = [name for name in names if name.rpartition(".")[2] in ends]
    near = difflib.get_close_matches(wanted, candidates or names, n=3, cutoff=0.0 if candidates else 0.6)
    hint = f"nearest: {', '.join('--' + name for name in near)}; " if near else ""
    return f"no option {option}; {hint}see all with {prog} --help"


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _fields(value: Any) -> Iterator[dataclasses.Field]:
    return (field for field in dataclasses.fields(value) if field.init)


def _lends_keys(value: Any) -> bool:
    return isinstance(value, dict) and len(value) > 0 and all(_is_dataclass(item) for item in value.values())


def _children(value: Any) -> dict[str, Any]:
    """The direct children of a value, by name. Empty for a leaf; a tuple of leaves is a leaf too."""
    if _is_dataclass(value):
        inside = {}
        for field in _fields(value):
            item = getattr(value, field.name)
            named = item if _lends_keys(item) else {field.name: item}
            for key in named.keys() & inside.keys():
                raise UserError(
                    f"{field.name}: the name {key!r} is taken by a field of {type(value).__name__}; use another"
                )
            inside |= named
        return inside
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, tuple) and any(_children(item) for item in value):
        return {str(i): item for i, item in enumerate(value)}
    return {}


def _names(value: Any, name: str) -> Iterator[str]:
    inside = _children(value)
    if not inside and name:
        yield name
    for key, item in inside.items():
        yield from _names(item, f"{name}.{key}" if name else key)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:99] + "…"
