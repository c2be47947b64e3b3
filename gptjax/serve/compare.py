"""The application in which people compare replies side by side, without knowing whose they are.

app = make_app(Comparison(folder, prompts, ["a", "b"]), code="")

GET  /                 the page
GET  /next?judge=ann   a pair of replies that the judge has not voted on, and how far they are
GET  /last?judge=ann   the pair that the judge voted on last, to change the vote
POST /votes            {"judge": "ann", "unit": ..., "choice": "left" | "right" | "tie" | "both bad"}
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gptjax.evals.comparison import MODEL_JUDGE, Comparison, Unit
from gptjax.evals.ratings import CHOICES, Vote
from gptjax.serve.access import LOOPBACK, check_host
from gptjax.serve.errors import ApiError
from gptjax.serve.guard import failed
from gptjax.serve.markdown import render
from gptjax.serve.routes.page import FOLDER as PAGE
from gptjax.serve.routes.page import HEADERS
from gptjax.types import Json

FOLDER = Path(__file__).parent / "compare_page"
FILES = {
    "compare.js": (FOLDER / "compare.js", "text/javascript"),
    "compare.css": (FOLDER / "compare.css", "text/css"),
    "icon.svg": (PAGE / "icon.svg", "image/svg+xml"),
}
NAME = 64
"""Maximum characters of a judge's name."""
BODY = 4_096
"""Maximum bytes of a vote."""


def make_app(comparison: Comparison, code: str = "", voted: Callable[[Vote], None] | None = None) -> Starlette:
    """The application.

    code   word that judges must bring, as the fragment of the page's address. "": only this machine may ask
    voted  called after each vote
    """

    def guarded(endpoint: Callable[[HttpRequest], Awaitable[Response]], needs_code: bool = True) -> Any:
        @functools.wraps(endpoint)
        async def answer(http: HttpRequest) -> Response:
            try:
                check_host(http, None if code else LOOPBACK)
                given = http.headers.get("authorization", "").partition(" ")[2]
                if needs_code and not hmac.compare_digest(given.encode(), code.encode()):
                    raise ApiError(401, "the address of this page ends with #CODE; ask whoever sent it to you")
                return await endpoint(http)
            except ApiError as error:
                return failed(error)

        return answer

    async def page(http: HttpRequest) -> Response:
        return Response((FOLDER / "index.html").read_bytes(), media_type="text/html", headers=HEADERS)

    async def asset(http: HttpRequest) -> Response:
        name = http.path_params["name"]
        if name not in FILES:
            raise ApiError(404, f"there is no {http.url.path}")
        path, media_type = FILES[name]
        return Response(path.read_bytes(), media_type=media_type, headers=HEADERS)

    async def following(http: HttpRequest) -> Response:
        judge = _judge(http.query_params.get("judge"))
        chosen, units = comparison.chosen(judge), comparison.units(judge)
        unit = next((unit for unit in units if unit not in chosen), None)
        return _shown(comparison, judge, unit, units)

    async def last(http: HttpRequest) -> Response:
        judge = _judge(http.query_params.get("judge"))
        units = comparison.units(judge)
        mine = [Unit(vote.item, vote.pair) for vote in comparison.votes if vote.judge == judge]
        unit = next((unit for unit in reversed(mine) if unit in units), None)
        if unit is None:
            raise ApiError(404, "there is no vote of yours")
        return _shown(comparison, judge, unit, units)

    async def vote(http: HttpRequest) -> Response:
        body = await _body(http)
        judge, choice = _judge(body.get("judge")), body.get("choice")
        unit = next((unit for unit in comparison.units(judge) if _name(unit) == body.get("unit")), None)
        if unit is None:
            raise ApiError(400, "unit: there is no such pair of replies", "unit")
        if choice not in CHOICES:
            raise ApiError(400, f"choice: must be one of {', '.join(CHOICES)}", "choice")
        made = Vote(unit.item, *unit.sides(judge), choice, judge)
        comparison.add_vote(made)
        if voted is not None:
            voted(made)
        return JSONResponse({})

    return Starlette(
        routes=[
            Route("/", guarded(page, needs_code=False)),
            Route("/assets/{name}", guarded(asset, needs_code=False)),
            Route("/next", guarded(following)),
            Route("/last", guarded(last)),
            Route("/votes", guarded(vote), methods=["POST"]),
        ]
    )


def _shown(comparison: Comparison, judge: str, unit: Unit | None, units: list[Unit]) -> Response:
    """A pair of replies, without the names of the models. None: the judge has seen all."""
    chosen = comparison.chosen(judge)
    state: dict[str, Any] = {"done": sum(unit in chosen for unit in units), "count": len(units)}
    if unit is not None:
        left, right = ("".join(render(comparison.replies[model][unit.item])) for model in unit.sides(judge))
        prompt = [
            {"role": message.role, "html": "".join(render(message.text))} for message in comparison.prompts[unit.item]
        ]
        state |= {"unit": _name(unit), "prompt": prompt, "left": left, "right": right, "choice": chosen.get(unit)}
    return JSONResponse(state, headers={"cache-control": "no-store"})


def _name(unit: Unit) -> str:
    """Name of a unit for the page. It is the same whichever model is on which side."""
    return hashlib.sha256(json.dumps([unit.item, *unit.pair]).encode()).hexdigest()[:24]


def _judge(name: Json) -> str:
    name = name.strip() if isinstance(name, str) else ""
    if not name or len(name) > NAME or not name.isprintable() or name.startswith(MODEL_JUDGE):
        raise ApiError(400, f"judge: must be a name of at most {NAME} characters", "judge")
    return name


async def _body(http: HttpRequest) -> dict[str, Any]:
    content = b""
    async for chunk in http.stream():
        content += chunk
        if len(content) > BODY:
            raise ApiError(413, f"the body has more than {BODY:,} bytes")
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise ApiError(400, "the body is not a JSON object")
    return body
