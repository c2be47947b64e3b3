"""The interface's own document, and requests drawn from it: whatever comes, no reply is a server's error."""

import httpx
import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.generation import GenerationMode
from test_serve import TALK

from gptjax.serve import openapi
from gptjax.serve.app import OPEN_ROUTES, ROUTES

OPERATIONS = [*ROUTES, *(("GET", path) for path in OPEN_ROUTES)]


@pytest.fixture(scope="module")
def document(server):
    return httpx.get(f"{server.url}/openapi.json").json()


def test_the_document_is_valid_and_has_every_route(document):
    schema = schemathesis.openapi.from_dict(document)
    schema.validate()
    found = {(operation.ok().method.upper(), operation.ok().path) for operation in schema.get_all_operations()}
    assert found == set(OPERATIONS)
    assert openapi.BODIES.keys() <= document["paths"].keys()
    asked = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    whole = {**asked, "components": document["components"]}
    jsonschema.validate({"messages": TALK, "temperature": 1.0, "stop": ["a"], "seed": None}, whole)
    for wrong in ({}, {"messages": TALK, "temperature": "hot"}, {"messages": [{"content": "x"}]}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, whole)


QUICK = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.sampled
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
def test_no_request_is_the_servers_fault(server, document, mode):
    seen = set()
    with httpx.Client(timeout=60) as client:

        def ask(case) -> None:
            sent = case.as_transport_kwargs(base_url=server.url)
            reply = client.request(sent["method"], sent["url"], json=sent.get("json"))
            seen.add((case.operation.path, reply.status_code))
            assert reply.status_code < 500 or (case.operation.path, reply.status_code) == ("/admin/reload", 501)
            if reply.status_code >= 400:
                jsonschema.validate(reply.json(), openapi.ERROR)

        for result in schemathesis.openapi.from_dict(document).get_all_operations():
            operation = result.ok()
            if mode is GenerationMode.POSITIVE or operation.path in openapi.BODIES:
                QUICK(given(operation.as_strategy(generation_mode=mode))(ask))()
    assert {path for path, _ in seen} >= set(openapi.BODIES)
    assert mode is GenerationMode.NEGATIVE or ("/v1/completions", 200) in seen
    assert httpx.get(f"{server.url}/health").status_code == 200
