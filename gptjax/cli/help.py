"""Help of a configuration's options: an overview of its sections, one section, or everything."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any

from gptjax.cli.options import as_held, describe_options
from gptjax.cli.parts import Choices, annotation
from gptjax.config import children, is_config, lends_keys, paths
from gptjax.types import UserError

MARGIN = " " * 8


def describe(config: Any, section: str, prog: str, description: str) -> str:
    """Help text: the overview (""), all options ("all"), or those of a section, such as "pretrain.optimizer". Raises
    UserError for a section that does not exist."""
    usage = f"usage: {prog} [OPTIONS]\n"
    if section == "all":
        return "\n".join([usage, description, "", *_parts(config, ""), describe_options(config, **as_held())])
    if section:
        return _section(config, section.removeprefix("--").replace("-", "_"))
    sections = {name: value for name, value in children(config).items() if children(value)}
    width = max(map(len, sections), default=0)
    about = f"Sections of the experiment ({prog} --help SECTION shows one, --help all everything):"
    rows = [about, *(f"  {name:{width}}  {_heading(value)}" for name, value in sections.items()), ""]
    hidden = {field.name for field in dataclasses.fields(config) if _is_section(getattr(config, field.name))}
    values = describe_options(config, **as_held(hidden))
    return "\n".join([usage, description, "", *(rows if sections else []), values])


def _is_section(value: Any) -> bool:
    return lends_keys(value) or bool(children(value))


def _heading(config: Any) -> str:
    """A section in one line: its class, and those of its parts."""
    parts = [type(value).__name__ for value in children(config).values() if is_config(value)]
    return type(config).__name__ + (f": {', '.join(parts)}" if parts else "")


def _section(config: Any, path: str) -> str:
    value = config
    for name in path.split("."):
        inside = children(value)
        if not children(inside.get(name)):
            known = ", ".join(key for key, item in inside.items() if children(item))
            raise UserError(f"--help: no section {path!r}; must be all or a section, such as {known}")
        value = inside[name]
    heading = f"{path}: {_heading(value)}\n"
    for name in reversed(path.split(".")):
        wrapper: Any = dataclasses.make_dataclass("Section", [(name, type(value))])
        value = wrapper(value)
    return "\n".join([heading, *_parts(config, path), describe_options(value, **as_held())])


def _parts(config: Any, section: str) -> list[str]:
    """The parts in a section, and the classes that may be chosen for each."""
    rows = list(_choices(config, section))
    if not rows:
        return []
    fill = functools.partial(textwrap.fill, width=max(shutil.get_terminal_size().columns - 1, 40))
    fill = functools.partial(fill, initial_indent=MARGIN, subsequent_indent=MARGIN)
    lines = [f"  {path} {now}\n{fill(names)}" for path, now, names in rows]
    return ["Parts, with the class of each and those that may be chosen instead by name:", *lines, ""]


def _choices(config: Any, section: str) -> Iterator[tuple[str, str, str]]:
    for path, now in paths(config):
        where = annotation(config, path) if f"{path}.".startswith(f"{section}." if section else "") else None
        choices = None if where is None else Choices(where)
        if choices is not None and choices.exist and len(names := choices.names()) > 1:
            yield f"--{path}", "None" if now is None else type(now).__name__, ", ".join(names)
