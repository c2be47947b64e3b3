"""OpenAI's Responses interface as its own client sees it: items, typed events in order, tools, structure."""

import json

import httpx
import openai
import pydantic
import pytest
from scripted import ScriptedServer
from test_serve import TALK, model
from test_tools import CALL, TOOLS

FLAT = [{"type": "function", **tool["function"]} for tool in TOOLS]


def events(url: str, **body) -> list[dict]:
    """The events of a stream, which are numbered and named."""
    text = httpx.post(f"{url}/v1/responses", json={**body, "stream": True}, timeout=60).text
    found = []
    for block in filter(None, text.split("\n\n")):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def plain(response: dict) -> list[dict]:
    """Items without their names."""
    return [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in response["output"]]


def test_a_response_is_the_models_reply(client, server):
    expected = model().chat(TALK, max_tokens=20, temperature=0).content
    asked = {"instructions": TALK[0]["content"], "input": TALK[1]["content"], "max_output_tokens": 20, "temperature": 0}
    response = client.responses.create(model="tiny", **asked)
    assert response.output_text == expected
    assert (response.status, response.store) == ("incomplete" if response.incomplete_details else "completed", False)
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    with client.responses.stream(model="tiny", **asked) as stream:
        joined = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert (joined, stream.get_final_response().output_text) == (expected, expected)
    found = events(server.url, **asked)
    kinds = [event["type"].removeprefix("response.") for event in found]
    deltas = [kind for kind in kinds if kind == "output_text.delta"]
    head = ["created", "in_progress", "output_item.added", "content_part.added"]
    tail = ["output_text.done", "content_part.done", "output_item.done", found[-1]["response"]["status"]]
    assert kinds == [*head, *deltas, *tail]
    parts = [[{"type": "input_text", "text": m["content"]}] for m in TALK]
    items = [{"role": m["role"], "content": content} for m, content in zip(TALK, parts, strict=True)]
    assert (
        client.responses.create(model="tiny", input=items, temperature=0, max_output_tokens=20).output_text == expected
    )


def test_calls_and_reasoning_are_items():
    server = ScriptedServer(lambda prompt: f"<think>Hm.</think>Let me see.\n{CALL}")
    try:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            response = client.responses.create(model="tiny", input="Rome?", tools=FLAT)
            reasoning, message, call = response.output
            assert reasoning.content[0].text.strip() == "Hm."
            assert message.content[0].text.strip() == "Let me see."
            assert (call.name, json.loads(call.arguments), response.status) == (
                "weather",
                {"city": "Rome"},
                "completed",
            )
            found = events(server.url, input="Rome?", tools=FLAT)
            assert plain(found[-1]["response"]) == plain(response.model_dump(exclude_none=True))
            arguments = "".join(e["delta"] for e in found if e["type"] == "response.function_call_arguments.delta")
            assert arguments == call.arguments
            result = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny, 25 degrees"}
            said = [{"role": "user", "content": "Rome?"}, *response.output, result]
            client.responses.create(model="tiny", input=said, tools=FLAT)
            assert server.engine.prompts[-1].index('"city": "Rome"') < server.engine.prompts[-1].index(
                "Sunny, 25 degrees"
            )
    finally:
        server.close()


class Answer(pydantic.BaseModel):
    yes: bool


def test_structured_output(client):
    response = client.responses.parse(model="tiny", input="Is it?", text_format=Answer, max_output_tokens=150)
    assert isinstance(response.output_parsed, Answer)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": "x", "store": True}, "store"),
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "x", "background": True}, "background"),
        ({"input": [{"type": "computer_call"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]}, "input"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools"),
        ({"input": [{"role": "clown", "content": "x"}]}, "role"),
        ({}, "input"),
    ],
)
def test_mistakes_are_named(server, fields, param):
    reply = httpx.post(f"{server.url}/v1/responses", json=fields)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
