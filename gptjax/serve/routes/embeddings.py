"""POST /v1/embeddings"""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from gptjax.io.json_file import NATURAL, POSITIVE, TEXT
from gptjax.serve.access import Client
from gptjax.serve.errors import ApiError
from gptjax.serve.service import Service, fields_of, require

FIELDS: dict[str, Any] = {
    "model": TEXT,
    "input": (TEXT, [TEXT], [NATURAL], [[NATURAL]]),
    "encoding_format": TEXT,
    "dimensions": POSITIVE,
}
TEXTS = 2_048
"""Maximum number of texts of a request."""


async def embed(service: Service, http: HttpRequest, client: Client) -> Response:
    """A vector for each text."""
    fields, _ = await fields_of(http, FIELDS)
    require(fields, "input")
    name, model, context = service.choose_encoder(fields)
    texts = [fields["input"]] if isinstance(fields["input"], str) else fields["input"]
    coding = fields.get("encoding_format", "float")
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ApiError(400, "input: must be a text or a list of texts, none of them empty; not token ids", "input")
    if len(texts) > TEXTS:
        raise ApiError(400, f"input: got {len(texts):,} texts, must be at most {TEXTS:,}", "input")
    if coding not in ("float", "base64"):
        reason = f"encoding_format: got {coding[:40]!r}, must be float or base64"
        raise ApiError(400, reason, "encoding_format")

    def read() -> tuple[list[str], int]:
        kept = [service.policy.filters.read(text) for text in texts]
        lengths = model.token_counts(kept)
        if context is not None and max(lengths) > context:
            raise ApiError(400, f"input: got a text of {max(lengths)} tokens, must be at most {context}", "input")
        return kept, sum(lengths)

    kept, client.tokens = await asyncio.to_thread(read)
    client.model = name
    charge = service.quotas.admit(client.key, 1, client.tokens)
    client.at_end.callback(lambda: charge.settle(client.tokens))
    async with service.embedding:
        # One at a time: a text's vector then does not depend on those beside it.
        vectors = await asyncio.to_thread(model.embed, kept, batch=1)
    width = vectors.shape[1]
    if fields.get("dimensions", width) != width:
        raise ApiError(400, f"dimensions: got {fields['dimensions']}, must be {width} for {name}", "dimensions")
    data = [{"object": "embedding", "index": i, "embedding": _coded(v, coding)} for i, v in enumerate(vectors)]
    usage = {"prompt_tokens": client.tokens, "total_tokens": client.tokens}
    return JSONResponse({"object": "list", "data": data, "model": name, "usage": usage})


def _coded(vector: np.ndarray, coding: str) -> list[float] | str:
    if coding == "float":
        return vector.tolist()
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
