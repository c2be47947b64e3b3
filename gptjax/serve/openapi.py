"""GET /openapi.json: the interface as an OpenAPI document, made of the tables by which requests are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gptjax.data.chat import ROLES
from gptjax.io.json_file import FLAG, INTEGER, NATURAL, NUMBER, OBJECT, POSITIVE, TEXT, Kind
from gptjax.serve import fields, responses
from gptjax.serve.routes import embeddings, page, tokens

KINDS: dict[Kind, dict[str, Any]] = {
    TEXT: {"type": "string"},
    FLAG: {"type": "boolean"},
    NUMBER: {"type": "number"},
    OBJECT: {"type": "object"},
    INTEGER: {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1},
    NATURAL: {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
    POSITIVE: {"type": "integer", "minimum": 1, "maximum": 2**31 - 1},
    fields.SEED: {"type": "integer", "minimum": -(2**63), "maximum": 2**64 - 1},
}
BODIES: dict[str, tuple[Mapping[str, Any], tuple[str, ...]]] = {
    "/v1/chat/completions": (fields.CHAT, ("messages",)),
    "/v1/completions": (fields.COMPLETION, ("prompt",)),
    "/v1/responses": (responses.FIELDS, ("input",)),
    "/v1/embeddings": (embeddings.FIELDS, ("input",)),
    "/tokenize": (tokens.TOKENIZE, ("prompt",)),
    "/detokenize": (tokens.DETOKENIZE, ("tokens",)),
    "/page/replies": (page.REPLY, ("messages",)),
    "/page/markdown": (page.MARKDOWN, ("texts",)),
}
"""Path -> fields of the body, and those that must be there. Other bodies are empty objects."""
MESSAGE = {
    "type": "object",
    "properties": {"role": {"enum": [*ROLES, "developer"]}, "content": {"type": ["string", "array", "null"]}},
    "required": ["role"],
}
ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}


def document(routes: Iterable[tuple[str, str, str, bool]]) -> dict[str, Any]:
    """The document. routes: method, path, summary, and True if it needs a key."""
    paths: dict[str, Any] = {}
    for method, path, summary, needs_key in routes:
        operation: dict[str, Any] = {"summary": summary, "responses": _replies()}
        names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
        if names:
            place = {"in": "path", "required": True, "schema": {"type": "string"}}
            operation["parameters"] = [{"name": name, **place} for name in names]
        if method == "POST":
            table, required = BODIES.get(path, ({}, ()))
            body = {"application/json": {"schema": _object(table, required)}}
            operation["requestBody"] = {"required": True, "content": body}
        if needs_key:
            operation["security"] = [{"key": []}]
        paths.setdefault(path, {})[method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "gptjax", "version": "1"},
        "paths": paths,
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Error": ERROR, "Message": MESSAGE},
        },
    }


def schema_of(kind: Any) -> dict[str, Any]:
    """The JSON schema of one of `gptjax.io.json_file`."""
    if isinstance(kind, Kind):
        return KINDS[kind]
    if isinstance(kind, tuple):
        return {"anyOf": [schema_of(one) for one in kind]}
    if isinstance(kind, list):
        return {"type": "array", "items": schema_of(kind[0])}
    if "*" in kind:
        return {"type": "object", "additionalProperties": schema_of(kind["*"])}
    return _object(kind, ())


def _object(table: Mapping[str, Any], required: Iterable[str]) -> dict[str, Any]:
    """An object; fields that are not required may be null."""
    properties = {}
    for name, kind in table.items():
        one = {"type": "array", "items": {"$ref": "#/components/schemas/Message"}} if name == "messages" else None
        one = one or schema_of(kind)
        properties[name] = one if name in required else {"anyOf": [one, {"type": "null"}]}
    return {"type": "object", "properties": properties, "required": [*required]}


def _replies() -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {"200": {"description": "The reply"}, "default": {"description": "An error", "content": error}}
