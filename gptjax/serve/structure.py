"""Fields that ask for a structure of the reply: `response_format` as OpenAI has it, `guided_json`, `guided_regex`,
`guided_choice` and `guided_grammar`, and `structured_outputs` as vLLM has them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from typing import Any

from gptjax.inference.constraints import Choice, Constraint, Ebnf, Grammar, JsonSchema, Regex
from gptjax.inference.engine import Engine
from gptjax.io.json_file import FLAG, OBJECT, TEXT
from gptjax.serve.errors import ApiError
from gptjax.types import Json, UserError

ANY_OBJECT = JsonSchema({"type": "object"})
FIELDS: dict[str, Any] = {
    "response_format": {"type": TEXT, "json_schema": {"name": TEXT, "schema": OBJECT, "strict": FLAG}},
    "structured_outputs": {
        "json": (OBJECT, TEXT),
        "regex": TEXT,
        "choice": [TEXT],
        "grammar": TEXT,
        "json_object": FLAG,
    },
    "guided_json": (OBJECT, TEXT),
    "guided_regex": TEXT,
    "guided_choice": [TEXT],
    "guided_grammar": TEXT,
}


def grammar(fields: Mapping[str, Any]) -> tuple[Grammar, str] | None:
    """The grammar of the reply, and the field that asks for it. None: any text. Raises `ApiError` for more than one."""
    found: dict[str, Grammar] = {}
    for name in FIELDS:
        if name in fields:
            kinds = fields[name] if name == "structured_outputs" else {name.removeprefix("guided_"): fields[name]}
            one = [_grammar(kind, value, name) for kind, value in kinds.items() if value is not None]
            found |= {f"{name}{i or ''}": value for i, value in enumerate(filter(None, one))}
    if len(found) > 1:
        raise ApiError(400, f"{' and '.join(found)}: got more than one structure, must be one", next(iter(found)))
    return next(((value, name) for name, value in found.items()), None)


async def constraint(compiling: asyncio.Lock, engine: Engine, asked: Grammar, param: str) -> Constraint:
    """The engine's constraint. Raises `ApiError`, which names the field, for a grammar that is invalid, too large or
    takes too long.

    compiling  held while it is compiled: slow grammars take one thread together
    """
    async with compiling:
        try:
            return await asyncio.to_thread(engine.constraint, asked)
        except UserError as error:
            raise ApiError(400, f"{param}: {error}", param) from None


def _grammar(kind: str, value: Json, param: str) -> Grammar | None:
    match kind:
        case "response_format":
            return _response_format(value)
        case "json":
            return JsonSchema(_object(value, param))
        case "regex":
            return Regex(value)
        case "choice":
            return Choice(tuple(value))
        case "grammar":
            return Ebnf(value)
        case "json_object":
            return ANY_OBJECT if value else None
    raise ApiError(400, f"{param}: got {kind}, must be json, regex, choice, grammar or json_object", param)


def _response_format(value: Mapping[str, Any]) -> Grammar | None:
    param = "response_format"
    match value.get("type"):
        case "text":
            return None
        case "json_object":
            return ANY_OBJECT
        case "json_schema":
            schema = (value.get("json_schema") or {}).get("schema")
            if schema is None:
                raise ApiError(400, f"{param}: got no json_schema.schema, must be given", param)
            return JsonSchema(schema)
    raise ApiError(400, f"{param}: got {value.get('type')!r}, must be text, json_object or json_schema", param)


def _object(value: Json, param: str) -> Mapping[str, Any]:
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, Mapping):
        raise ApiError(400, f"{param}: got no JSON object, must be a JSON schema", param)
    return value
