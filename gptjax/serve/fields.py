"""The fields of a request: each is read, changes nothing, or is refused by name. Unknown ones are ignored and named, as
a JSON list, in the header `X-Ignored-Fields` of the reply."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from gptjax.inference.constraints import Constraint
from gptjax.inference.engine import Request
from gptjax.inference.sampling import Sampling
from gptjax.io.json_file import FLAG, INTEGER, NATURAL, NUMBER, OBJECT, POSITIVE, TEXT, Kind, check
from gptjax.serve import structure
from gptjax.serve.errors import ApiError

SEED = Kind("an integer of 64 bits", lambda x: type(x) is int and -(2**63) <= x < 2**64)
SAMPLING: dict[str, Any] = {
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), NUMBER),
    **dict.fromkeys(("frequency_penalty", "presence_penalty"), NUMBER),
    "top_k": INTEGER,
}
COMMON: dict[str, Any] = {
    **SAMPLING,
    "model": TEXT,
    "n": POSITIVE,
    "stream": FLAG,
    "stream_options": {"include_usage": FLAG},
    "stop": (TEXT, [TEXT]),
    "seed": SEED,
    "logit_bias": {"*": NUMBER},
    "ignore_eos": FLAG,
    "min_tokens": NATURAL,
    "best_of": POSITIVE,
    **structure.FIELDS,
    "priority": INTEGER,
}
CHAT: dict[str, Any] = {
    **COMMON,
    "messages": [OBJECT],
    "tools": [OBJECT],
    "tool_choice": (TEXT, OBJECT),
    "parallel_tool_calls": FLAG,
    "max_tokens": POSITIVE,
    "max_completion_tokens": POSITIVE,
    "logprobs": FLAG,
    "top_logprobs": NATURAL,
    "truncation": TEXT,
    "chat_template_kwargs": OBJECT,
}
COMPLETION: dict[str, Any] = {
    **COMMON,
    "prompt": (TEXT, [TEXT], [NATURAL], [[NATURAL]]),
    "max_tokens": NATURAL,
    "logprobs": NATURAL,
    "echo": FLAG,
}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "modalities": (["text"],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "store": (False,),
    "suffix": ("",),
    "audio": (),
    "functions": ([],),
    "prediction": (),
    "reasoning_effort": (),
    "web_search_options": (),
    "chat_template": (),
}
"""Fields that are not supported, with the values that mean nothing."""
HARMLESS = {"user", "metadata", "service_tier", "parallel_tool_calls", "prompt_cache_key", "safety_identifier"}
"""Fields that do not change a reply."""
STOPS, CHOICES = 4, 128
"""Maximum number of stop strings, and of choices."""


def read(body: Mapping[str, Any], schema: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The fields that are set, and the names of those that are unknown. Raises UserError for a value of another type,
    `ApiError` for a field that is not supported."""
    for name, neutral in NEUTRAL.items():
        if body.get(name) is not None and body[name] not in neutral and name not in schema:
            raise ApiError(400, f"{name}: got {str(body[name])[:100]}, which this server does not support", name)
    check(dict(body), dict(schema), "body")
    fields = {name: body[name] for name in schema if body.get(name) is not None}
    return fields, sorted(set(body) - set(schema) - set(NEUTRAL) - HARMLESS)


def request(
    fields: Mapping[str, Any],
    prompt: tuple[int, ...],
    room: int,
    base: Sampling,
    client: str,
    constraint: Constraint | None = None,
    marks: Mapping[int, str] | None = None,
) -> Request:
    """The engine's request.

    prompt  token ids
    room    number of tokens that fit after it
    base    sampling settings that the model's authors recommend
    client  whom pages are shared with
    marks   special tokens that are part of the reply
    """
    changes = {name: fields[name] for name in SAMPLING if name in fields}
    if changes.get("top_k", 1) <= 0:  # others' "no limit"
        changes["top_k"] = None
    if changes.get("top_p") == 0:
        changes |= {"top_k": 1, "top_p": None}
    asked = fields.get("max_completion_tokens", fields.get("max_tokens"))
    if room < 1 and asked is None:
        raise ApiError(
            400,
            f"messages: got {len(prompt)} tokens, must leave room for an answer in the context of "
            f'{len(prompt) + room}; shorten them, or ask for "truncation": "auto"',
            "messages",
            "context_length_exceeded",
        )
    stop = fields.get("stop", ())
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stop) > STOPS:
        raise ApiError(400, f"stop: got {len(stop)} strings, must be at most {STOPS}", "stop")
    wanted = fields.get("top_logprobs", 0) if "messages" in fields else fields.get("logprobs", 0)
    return Request(
        prompt=prompt,
        max_tokens=room if asked is None else asked,
        sampling=dataclasses.replace(base, **changes),
        seed=fields.get("seed", 0) % 2**32,
        stop=stop,
        stop_token_ids=() if fields.get("ignore_eos") else None,
        bias={_token(name): value for name, value in fields.get("logit_bias", {}).items()},
        alternatives=wanted,
        prompt_logprobs=bool(fields.get("echo")) and ("logprobs" in fields or asked == 0),
        min_tokens=fields.get("min_tokens", 0),
        constraint=constraint,
        marks=marks or {},
        priority=fields.get("priority", 0),
        client=client,
    )


def choices(fields: Mapping[str, Any], texts: int = 1) -> tuple[int, int]:
    """Number of choices of each text, and of those that are written for them, of which they are the best."""
    n = fields.get("n", 1)
    best_of = fields.get("best_of", n)
    name = "n" if best_of == n else "best_of"
    if best_of < n:
        raise ApiError(400, f"best_of: got {best_of}, must be at least n, which is {n}", "best_of")
    if best_of > n and fields.get("stream"):
        raise ApiError(400, f"best_of: got {best_of} of a stream, must be n, {n}", "best_of")
    if best_of * texts > CHOICES:
        raise ApiError(400, f"{name}: got {best_of} for {texts} prompts, must be at most {CHOICES} together", name)
    return n, best_of


def _token(name: str) -> int:
    if not (name.isascii() and name.isdecimal() and len(name) < 10):
        raise ApiError(400, f"logit_bias: got the key {name[:40]!r}, must be a token id", "logit_bias")
    return int(name)
