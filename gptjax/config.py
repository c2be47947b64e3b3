"""Configurations are trees of frozen dataclasses: convert them to and from JSON, and compare them. A leaf is a str,
int, float, bool, None or Path; dataclasses, tuples and dicts hold the leaves. `gptjax/cli/options.py` overrides values.

Every value is named by its path: `model.positions.theta`. A dict of dataclasses contributes its keys and not its own
name: `stages={"pretrain": Stage(steps=100)}` has `pretrain.steps`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from gptjax.types import Json, UserError

EXPORTS: dict[str, tuple[str, ...] | None] = {
    "gptjax": ("Experiment", "MeshConfig", "ShardingRules", "Stage"),
    "gptjax.data": None,
    "gptjax.data.prepare": None,
    "gptjax.evals": None,
    "gptjax.experiment.report": ("Expect",),
    "gptjax.interop.templates": ("ChatTemplate",),
    "gptjax.models.reward": ("RewardModel",),
    "gptjax.monitor.metrics": ("WandB",),
    "gptjax.nn": None,
    "gptjax.objectives": None,
    "gptjax.optim": None,
    "gptjax.inference": ("Sampling",),
    "gptjax.tasks": None,
    "gptjax.train.divergence": ("RollBack", "Skip", "Stop"),
    "gptjax.train.privacy": ("DifferentialPrivacy",),
    "gptjax.train.rollouts": ("Rollouts",),
    "gptjax.train.stage": ("EarlyStopping", "QAT"),
}
"""Package -> classes of ours that a saved configuration may name. None: every frozen dataclass that it exports."""
allowed_modules: set[str] = set()
"""Names of the modules passed to `allow`."""


def allow(*modules: ModuleType) -> None:
    """Let saved configurations name the dataclasses of these modules, which the program has chosen to import."""
    allowed_modules.update(module.__name__ for module in modules)


def modules(config: object) -> set[ModuleType]:
    """Modules outside gptjax that define the classes of a configuration."""
    inside = config.values() if isinstance(config, dict) else config if isinstance(config, tuple) else ()
    if is_config(config):
        inside = [getattr(config, field.name) for field in fields_of(config)]
    found = set().union(*map(modules, inside))
    if is_config(config) and _public_name(type(config)) is None:
        found.add(sys.modules[type(config).__module__])
    return found


def to_json(config: object) -> Any:
    """Convert a configuration to JSON types: a dataclass becomes `{"class": "gptjax.nn.RoPE", "theta": 1e4}` and a
    tuple a list. Raises UserError, naming the value, for what `from_json` could not restore."""
    return _to_json(config, "configuration")


def _to_json(value: object, name: str) -> Json:
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Path):
        return {"class": "pathlib.Path", "path": str(value)}
    if isinstance(value, tuple):
        return [_to_json(item, f"{name}.{i}") for i, item in enumerate(value)]
    if is_config(value):
        if "." in type(value).__qualname__:
            raise UserError(f"{name}: class {type(value).__qualname__} must be defined at the top level of a module")
        fields = {f.name: _to_json(getattr(value, f.name), f"{name}.{f.name}") for f in fields_of(value)}
        return {"class": _public_name(type(value)) or f"{type(value).__module__}.{type(value).__qualname__}", **fields}
    if isinstance(value, dict) and all(isinstance(key, str) and key != "class" for key in value):
        return {key: _to_json(item, f"{name}.{key}") for key, item in value.items()}
    raise UserError(
        f"{name}: got {short(value)} ({type(value).__name__}), must be a str, int, float, bool, None, Path, "
        "dataclass, tuple, or dict with string keys other than 'class'"
    )


def from_json(data: Json) -> Any:
    """Restore a configuration from `to_json`'s output: `from_json(json.loads(json.dumps(to_json(c)))) == c`.

    A missing field gets its default. Nothing that the data names is imported: it may name only the classes in `EXPORTS`
    and the dataclasses of modules that the program has passed to `allow`. Raises UserError for another class, for a
    field that does not exist, and for a missing field without a default."""
    return _from_json(data, "configuration")


def _from_json(data: Json, name: str) -> Any:
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


def _find_class(path: object, name: str) -> Any:
    module_name, _, class_name = str(path).rpartition(".")
    if (cls := exported(module_name, class_name)) is not None:
        return cls
    if module_name in allowed_modules:
        cls = getattr(sys.modules.get(module_name), class_name, None)
        if isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__module__ == module_name:
            return cls
    raise UserError(
        f"{name}: got class {path}, must be a configuration that gptjax exports, or a dataclass of a module that the "
        "program allows with gptjax.config.allow(module)"
    )


def exported(package: str, name: str) -> type | None:
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
    return next((f"{p}.{cls.__name__}" for p in packages if exported(p, cls.__name__) is cls), None)


def digest(data: object) -> str:
    """SHA-256, in hex, of a value of JSON types."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def check_name(name: str, field: str) -> None:
    """Raise UserError unless a name given to a part, such as a stage, is fit for options and file names: no path."""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}", name):
        raise UserError(
            f"{field}: got the name {name[:100]!r}, must be 1 to 100 letters, digits, _, - and ., not a . first"
        )


def differences(a: object, b: object) -> list[str]:
    """List the changes from a to b, one line each: `model.layers: 4 → 12`. Empty if they are equal."""
    return list(_differences(a, b, ""))


def _differences(a: object, b: object, name: str) -> Iterator[str]:
    inside_a, inside_b = children(a), children(b)
    if type(a) is type(b) and inside_a and inside_b:
        for key in inside_a | inside_b:
            path = f"{name}.{key}" if name else key
            if key not in inside_b:
                yield f"{path}: {short(inside_a[key])} → nothing"
            elif key not in inside_a:
                yield f"{path}: nothing → {short(inside_b[key])}"
            else:
                yield from _differences(inside_a[key], inside_b[key], path)
    elif a != b:
        yield f"{name or 'configuration'}: {short(a)} → {short(b)}"


def is_config(value: object) -> bool:
    """True for a dataclass instance."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def fields_of(value: Any) -> Iterator[dataclasses.Field]:
    """The fields of a dataclass that its constructor takes."""
    return (field for field in dataclasses.fields(value) if field.init)


def lends_keys(value: object) -> bool:
    """True for a dict of dataclasses, which contributes its keys and not its own name to paths."""
    return isinstance(value, dict) and len(value) > 0 and all(is_config(item) for item in value.values())


def children(value: object) -> dict[str, Any]:
    """The direct children of a value, by name. Empty for a leaf; a tuple of leaves is a leaf too."""
    if is_config(value):
        inside = {}
        for field in fields_of(value):
            item = getattr(value, field.name)
            named = item if lends_keys(item) else {field.name: item}
            for key in named.keys() & inside.keys():
                raise UserError(
                    f"{field.name}: the name {key!r} is taken by a field of {type(value).__name__}; use another"
                )
            inside |= named
        return inside
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, tuple) and any(children(item) for item in value):
        return {str(i): item for i, item in enumerate(value)}
    return {}


def leaf_paths(value: object, name: str = "") -> Iterator[str]:
    """Paths of the leaves of a configuration."""
    inside = children(value)
    if not inside and name:
        yield name
    for key, item in inside.items():
        yield from leaf_paths(item, f"{name}.{key}" if name else key)


def path_of(config: object, name: str) -> str | None:
    """Path of the field of this name in a configuration. None: there is none, or there are several."""
    found = [path for path, _ in paths(config) if path.rpartition(".")[2] == name]
    return found[0] if len(found) == 1 else None


def paths(value: object, name: str = "") -> Iterator[tuple[str, Any]]:
    """Paths of all values of a configuration, of leaves or not, with the values."""
    for key, item in children(value).items():
        path = f"{name}.{key}" if name else key
        yield path, item
        yield from paths(item, path)


def short(value: object) -> str:
    """`repr` of a value, of 100 characters at most."""
    text = repr(value)
    return text if len(text) <= 100 else text[:99] + "…"
