"""One's own functions, which a model may call by name, with arguments as JSON.

    class Weather(Function):
        def run(self, city: str, days: int = 1) -> str: ...

    ChatTools((Weather(),))    # calls end a turn, in the model's own format; results are messages of the role "tool"
    Functions((Weather(),))    # calls and results are in the middle of a reply

A wrong call, and an error of the function, are answered in words, from which the model can learn.
"""

from __future__ import annotations

import abc
import dataclasses
import inspect
import json
import re
import typing
from collections.abc import Mapping
from typing import Any, Literal

from gptjax.data.chat import Conversation
from gptjax.tasks import sandbox
from gptjax.tasks.tools import Tool, calculate, written
from gptjax.types import Json, UserError, one_line

KINDS = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
"""Annotations of a function's parameters, and their types in JSON schema."""
PYTHON: dict[str, Any] = {name: (int, float) if kind is float else kind for kind, name in KINDS.items()}
"""Types in JSON schema, and those that their values have."""
PROTOTYPE = '{"name": ..., "arguments": {...}}'
"""A call, in words."""


class Function(abc.ABC):
    """A function that a model may call. Base class of frozen dataclasses, which define `run` with annotations, and its
    parameters by a section "Args:" of the docstring if they need words:

    class Weather(Function):
        '''Weather of a city.

        Args:
            city: Name of the city, in English.
        '''

        def run(self, city: str, days: int = 1, unit: Literal["C", "F"] = "C") -> str: ...
    """

    run: Any
    """The function: keyword arguments -> a value that the model reads, as JSON unless it is a text."""

    @property
    def name(self) -> str:
        """Name to call it by: that of the class in small letters, Weather -> weather."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    @property
    def schema(self) -> dict[str, Any]:
        """The function as OpenAI's API has it, with the JSON schema of its parameters. Raises UserError, with the
        parameter, if there is none."""
        run, name = getattr(self, "run", None), type(self).__name__
        if run is None:
            raise UserError(f"tools: {name} has no schema: it must define run")
        text, words = _documented(inspect.getdoc(type(self)) or "")
        hints, fields, required = typing.get_type_hints(run), {}, []
        for parameter in inspect.signature(run).parameters.values():
            kind = _schema(hints.get(parameter.name))
            if kind is None or parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
                names = ", ".join(kind.__name__ for kind in KINDS)
                raise UserError(
                    f"tools: {name} has no schema: its parameter {parameter.name} must be annotated as one of {names}, "
                    "or as a Literal"
                )
            said = {"description": words[parameter.name]} if parameter.name in words else {}
            fields[parameter.name] = kind | said
            if parameter.default is parameter.empty:
                required.append(parameter.name)
        parameters = {"type": "object", "properties": fields, "required": required}
        return {"type": "function", "function": {"name": self.name, "description": text, "parameters": parameters}}

    def check(self) -> None:
        """Raise UserError if the function has no schema or cannot work."""
        _ = self.schema


def _schema(kind: Any) -> dict[str, Any] | None:
    """JSON schema of an annotation. None: there is none."""
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is Literal:
        kinds = {type(value) for value in inner}
        return {"type": KINDS[kinds.pop()], "enum": list(inner)} if len(kinds) == 1 and kinds <= KINDS.keys() else None
    if origin not in KINDS:
        return None
    if origin is list and inner:
        items = _schema(inner[0])
        return None if items is None else {"type": "array", "items": items}
    return {"type": KINDS[origin]}


def _documented(docstring: str) -> tuple[str, dict[str, str]]:
    """A docstring without its section "Args:", and that section: parameter -> words."""
    text, _, section = docstring.partition("\nArgs:\n")
    return text.strip(), dict(re.findall(r"^\s+(\w+)(?:\s*\([^)]*\))?:\s*(.*)$", section, re.MULTILINE))


def _mismatch(schema: Mapping[str, Any], value: Json, name: str = "arguments") -> str:
    """Reason why a value does not fit the schema, or ""."""
    kind = schema["type"]
    if not isinstance(value, PYTHON[kind]) or (kind == "boolean") != isinstance(value, bool):
        return f"{name} must be of type {kind}"
    if value not in schema.get("enum", [value]):
        return f"{name} must be one of {', '.join(map(str, schema['enum']))}"
    if kind == "array" and "items" in schema:
        return next(filter(None, (_mismatch(schema["items"], item, f"an item of {name}") for item in value)), "")
    if "properties" not in schema:
        return ""
    fields = schema["properties"]
    if absent := [required for required in schema["required"] if required not in value]:
        return f"{absent[0]} is missing"
    if unknown := [field for field in value if field not in fields]:
        return f"no parameter {unknown[0]}, must be one of {', '.join(fields)}"
    return next(filter(None, (_mismatch(fields[field], item, field) for field, item in value.items())), "")


@dataclasses.dataclass(frozen=True)
class Toolbox:
    """Functions, which are called by name."""

    functions: tuple[Function, ...]
    """The functions."""
    longest: int = 1_000
    """Maximum number of characters of a result; the rest is left out."""

    def check(self) -> None:
        """Raise UserError if there are no functions, two of one name, or one that has no schema or cannot work."""
        names = [schema["function"]["name"] for schema in self.schemas]
        if not names or len(set(names)) < len(names):
            raise UserError(f"tools: got functions {', '.join(names) or 'none'}, must be some of different names")
        for function in self.functions:
            function.check()

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """Schemas of all functions, for the prompt."""
        return [function.schema for function in self.functions]

    def call(self, name: str, arguments: Json) -> tuple[str, bool]:
        """Result of a call, or what is wrong with it, and True if it is a result. arguments: an object, or its JSON."""
        said, right = self._called(name, arguments)
        return (said if right else f"error: {said}")[: self.longest], right

    def _called(self, name: str, arguments: Json) -> tuple[str, bool]:
        known = {function.name: function for function in self.functions}
        if name not in known:
            return f"no function {name}, must be one of {', '.join(known)}", False
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError) as error:
                return f"arguments must be JSON: {one_line(error)}", False
        if wrong := _mismatch(known[name].schema["function"]["parameters"], arguments):
            return wrong, False
        try:
            found = known[name].run(**arguments)
            return (found if isinstance(found, str) else json.dumps(found)), True
        except Exception as error:
            return f"{type(error).__name__}: {one_line(error)}", False


@dataclasses.dataclass(frozen=True)
class Functions(Toolbox, Tool):
    """Functions that are called as JSON in the middle of a reply: after
    `<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>` stands `<tool_response>...`."""

    @property
    def mark(self) -> str:
        return "</tool_call>"

    def answer(self, text: str) -> str | None:
        _, start, call = text.removesuffix(self.mark).rpartition("<tool_call>")
        if not start:
            return None
        try:
            said = json.loads(call)
            result, _ = self.call(said["name"], said.get("arguments", {}))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            result = f"error: must be {PROTOTYPE}"
        return f"<tool_response>{result}</tool_response>"


@dataclasses.dataclass(frozen=True)
class ChatTools(Toolbox):
    """Functions that are called as downloaded models know it: a turn of the assistant ends with calls in the model's
    own format, results come back as messages of the role "tool", written by its chat template, and it goes on."""

    turns: int = 8
    """Maximum number of the assistant's turns. Calls in the last one are not made, and the reply counts as cut off."""
    format: str | None = None
    """Format of the calls, a key of `gptjax.inference.formats.TOOLS`. None: that of the model's chat template."""
    offer: bool = True
    """Give the functions' schemas to the chat template. False: the task's prompts say what there is to call, for a
    template that reads no tools, as DeepSeek's."""

    def check(self) -> None:
        super().check()
        if self.turns < 1:
            raise UserError(f"tools.turns: got {self.turns}, must be at least 1")

    def offered(self, messages: Conversation) -> Conversation:
        """A prompt that offers the functions to the model. Raises UserError if it has tools of its own."""
        if not self.offer:
            return messages
        if any(message.tools for message in messages):
            raise UserError("tools: got some for prompts that offer tools of their own, must be one or the other")
        return (dataclasses.replace(messages[0], tools=tuple(self.schemas)), *messages[1:])


def check_tools(tools: tuple[Tool, ...] | ChatTools, form: str | None) -> None:
    """Raise UserError for tools that cannot be used for prompts of this form, "chat" or "text"."""
    if isinstance(tools, ChatTools):
        tools.check()
        if form == "text":
            raise UserError('tools: got ChatTools for prompts of the form "text", must be "chat"')
        return
    for tool in tools:
        if not isinstance(tool, Tool):
            raise UserError(
                f"tools: got {type(tool).__name__} among tools, must be a Tool, or ChatTools(functions) in their place"
            )
        tool.check()


@dataclasses.dataclass(frozen=True)
class Calculate(Function):
    """Value of an arithmetic expression of numbers, + - * / // and parentheses, such as 12*(3+4)."""

    def run(self, expression: str) -> str:
        found = calculate(expression)
        if found is None:
            raise ValueError("no arithmetic expression, or a division by zero")
        return written(found)


@dataclasses.dataclass(frozen=True)
class RunPython(Function):
    """Output of a Python program, which must print what is to be known."""

    seconds: float = 5.0
    """Time that a program may take."""
    memory: int = 512
    """Memory of a program, in MiB."""
    unconfined: bool = False
    """True: run programs also where the system has no sandbox for them, with limits of time and memory alone."""

    def check(self) -> None:
        super().check()
        self.run("")

    def run(self, program: str) -> str:
        return sandbox.run(program, self.seconds, self.memory, self.unconfined).said
