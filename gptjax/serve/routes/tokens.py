"""POST /tokenize, /detokenize"""

from __future__ import annotations

import asyncio

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from gptjax.io.json_file import FLAG, NATURAL, TEXT
from gptjax.serve.access import Client
from gptjax.serve.errors import ApiError
from gptjax.serve.service import Service, fields_of, require

TOKENIZE = {"model": TEXT, "prompt": TEXT, "add_special_tokens": FLAG}
DETOKENIZE = {"model": TEXT, "tokens": [NATURAL]}
LONGEST = 1_000_000
"""Maximum characters of a text to tokenize."""


async def tokenize(service: Service, http: HttpRequest, client: Client) -> Response:
    """Token ids of a text."""
    fields, _ = await fields_of(http, TOKENIZE)
    _, served = service.choose(fields)
    require(fields, "prompt")
    if len(fields["prompt"]) > LONGEST:
        raise ApiError(413, f"prompt: must have at most {LONGEST:,} characters", "prompt")
    model = served.model
    encode = model.encode_prompt if fields.get("add_special_tokens", True) else model.tokenizer.encode
    ids = await asyncio.to_thread(encode, fields["prompt"])
    return JSONResponse({"tokens": list(ids), "count": len(ids), "max_model_len": served.engine.context})


async def detokenize(service: Service, http: HttpRequest, client: Client) -> Response:
    """Text of token ids."""
    fields, _ = await fields_of(http, DETOKENIZE)
    _, served = service.choose(fields)
    require(fields, "tokens")
    if fields["tokens"] and max(fields["tokens"]) >= served.model.tokenizer.vocab:
        raise ApiError(400, f"tokens: must be less than {served.model.tokenizer.vocab}", "tokens")
    text = await asyncio.to_thread(served.model.tokenizer.decode, fields["tokens"])
    return JSONResponse({"prompt": text})
