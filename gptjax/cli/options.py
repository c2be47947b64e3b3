"""Options of the command line: overrides of a configuration's values, a command's own options, and their help."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import math
import re
from collections.abc import Callable, Container, Sequence
from typing import Annotated, Any, TypeVar

from gptjax.config import children, is_config, lends_keys, paths, short
from gptjax.types import UserError

Config = TypeVar("Config")
Parsed = TypeVar("Parsed")


def override(config: Config, arguments: Sequence[str], prog: str, description: str) -> Config:
    """Apply arguments like `--model.layers 12 --model.positions ALiBi --pretrain.steps=100` to a configuration.

    Values are parsed by the types of the fields. A part, a field that holds a dataclass, is chosen by the name of its
    class (`parts.py`), with default values, and then has that class's fields. `--help` prints the description and the
    sections, `--help SECTION` the options of one with their fields' docstrings, `--help all` all; then it exits. Raises
    UserError for an unknown option or a bad value."""
    arguments, section = _help_asked(arguments)
    try:
        inner = {path for path, value in paths(config) if children(value)}
    except RecursionError:
        raise UserError("configuration: contains itself, must be a tree") from None
    if any(_may_choose(word, following, inner) for word, following in itertools.pairwise([*arguments, ""])):
        from gptjax.cli.parts import choose

        config, arguments = choose(config, arguments)
    if section is not None:
        from gptjax.cli.help import describe

        print(describe(config, section, prog, description))
        raise SystemExit(0)
    changed, unknown = _parse(config, arguments, prog=prog, add_help=False, **as_held())
    if unknown:
        raise UserError(_unknown(unknown[0].partition("=")[0], [path for path, _ in paths(config)], prog))
    return changed


def _may_choose(word: str, following: str, inner: set[str]) -> bool:
    """True if this argument may choose a part, whose path is one of `inner` or whose class the value names."""
    option, equals, value = word.partition("=")
    value = value if equals else following
    return option.startswith("--") and (option[2:].replace("-", "_") in inner or value[:1].isupper())


def _help_asked(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """The arguments without `--help SECTION`, and the section: "" for a bare `--help`, None without it."""
    arguments = list(arguments)
    at = next((i for i, word in enumerate(arguments) if word in ("-h", "--help")), None)
    if at is None:
        return arguments, None
    named = arguments[at + 1 : at + 2] if arguments[at + 1 : at + 2] and not arguments[at + 1].startswith("-") else []
    return [*arguments[:at], *arguments[at + 1 + len(named) :]], named[0] if named else ""


def parse_options(options: Config, arguments: Sequence[str]) -> tuple[Config, list[str]]:
    """Parse a command's own options. Returns them and the arguments that are none of them, `--help` among these.

    Raises UserError for a bad value."""
    return _parse(options, arguments, add_help=False)


def describe_options(options: Any, **settings: Any) -> str:
    """Help text of the options of a command or, with the settings of `as_held`, of a configuration."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        _parse(options, ["--help"], **settings)
    _, _, text = printed.getvalue().partition("\n\n")  # after its usage
    text = re.sub(r"^ *-h, --help.*\n( *show this help.*\n)?", "", text, flags=re.MULTILINE)
    text = re.sub(r"^ *options *\n *-+ *\n( *\n)+", "", text, flags=re.MULTILINE)  # a box that is empty now
    return re.sub(r" +$", "", text, flags=re.MULTILINE).strip("\n")


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
        raise ValueError(f"got {short(text)}, must be an integer of at most 64 bits")
    return number


def _finite(text: str) -> float:
    with contextlib.suppress(ValueError):
        if math.isfinite(number := float(text)):
            return number
    raise ValueError(f"got {short(text)}, must be a finite number")


def as_held(hidden: Container[str] = ()) -> dict[str, Any]:
    """Settings of tyro that type a field by the dataclass it holds, not by its annotation (a base class, protocol or
    union), and that name the values of a dict of dataclasses by their keys alone.

    hidden  fields of the root that have no options"""
    import tyro
    from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

    registry = ConstructorRegistry()
    asking, root = False, True

    def held(field: StructFieldSpec) -> StructFieldSpec:
        if lends_keys(field.default):
            return dataclasses.replace(field, type=Annotated[field.type, tyro.conf.arg(name="")])
        if is_config(field.default) or (isinstance(field.default, tuple) and children(field.default)):
            return dataclasses.replace(field, type=_type(field.default))
        return field

    @registry.struct_rule
    def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal asking, root
        if asking or not dataclasses.is_dataclass(info.type):
            return None
        asking = True  # disables this rule, so that tyro's own rule for dataclasses answers
        spec = ConstructorRegistry.get_struct_spec(info)
        asking = False
        if not isinstance(spec, StructConstructorSpec):
            return None
        fields = spec.fields
        if root:
            root, fields = False, tuple(field for field in fields if field.name not in hidden)
        return dataclasses.replace(spec, fields=tuple(map(held, fields)))

    config = tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff, tyro.conf.SuppressFixed
    return {"registry": registry, "config": config}


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
    return f"no option {option}; {hint}see all with {prog} --help all"
