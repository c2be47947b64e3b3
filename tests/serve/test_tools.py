"""Structured output, calls of tools and reasoning, as OpenAI's client sees them."""

import enum
import json
import random

import httpx
import jsonschema
import openai
import pydantic
import pytest
from scripted import ScriptedServer
from test_serve import TALK, Server, model

from gptjax.data.chat import conversation
from gptjax.interop.templates import ChatTemplate
from gptjax.models.language_model import LanguageModel

CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Paris"]}}, "required": ["city"]}
CITY |= {"additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": CITY}},
    {"type": "function", "function": {"name": "now"}},
]
USER = [{"role": "user", "content": "Rome?"}]


class Mood(enum.Enum):
    GOOD = "good"
    BAD = "bad"


class Person(pydantic.BaseModel):
    age: int = pydantic.Field(ge=0, le=120)
    mood: Mood
    tags: list[Mood] = pydantic.Field(max_length=2)


@pytest.fixture(scope="module")
def server():
    lm = model()
    lm = LanguageModel(lm.config, lm.params, lm.tokenizer, context=1_024)
    server = Server(lm=lm)
    yield server
    server.close()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def streamed(client, **asked):
    """The message that the chunks make, its reason for the end, and the number of chunks with a call."""
    message: dict = {"content": "", "reasoning_content": "", "reasoning": "", "calls": []}
    finish, parts = None, 0
    for i, chunk in enumerate(client.chat.completions.create(model="tiny", stream=True, **asked)):
        (choice,) = chunk.choices
        assert (choice.delta.role == "assistant") == (i == 0)
        assert finish is None
        finish = choice.finish_reason
        for name in ("content", "reasoning_content", "reasoning"):
            message[name] += getattr(choice.delta, name, None) or ""
        for call in choice.delta.tool_calls or []:
            parts += 1
            if call.id is not None:
                assert call.index == len(message["calls"])
                message["calls"].append([call.function.name, ""])
            message["calls"][call.index][1] += call.function.arguments
    return message, finish, parts


def test_replies_are_parsed_into_the_clients_own_classes(client):
    for seed in range(6):
        asked = {"model": "tiny", "messages": TALK, "seed": seed, "temperature": 1.5, "max_tokens": 400}
        reply = client.chat.completions.parse(**asked, response_format=Person)
        assert reply.choices[0].finish_reason == "stop"
        assert isinstance(reply.choices[0].message.parsed, Person)
        with client.chat.completions.stream(**asked, response_format=Person) as events:
            list(events)
            assert events.get_final_completion().choices[0].message.parsed == reply.choices[0].message.parsed
    other = client.chat.completions.create(
        **asked, response_format={"type": "json_object"}, frequency_penalty=1.0, logprobs=True, n=2
    )
    for choice in other.choices:
        assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)
        assert len(choice.logprobs.content) <= 400
    cut = client.chat.completions.create(**{**asked, "max_tokens": 1}, response_format={"type": "json_object"})
    assert (cut.choices[0].finish_reason, cut.choices[0].message.content[0]) == ("length", "{")


STRUCTURES = {
    "guided_json": ({"guided_json": CITY}, lambda text: jsonschema.validate(json.loads(text), CITY)),
    "json as text": ({"guided_json": json.dumps(CITY)}, lambda text: jsonschema.validate(json.loads(text), CITY)),
    "guided_regex": ({"guided_regex": "[ab]{3}"}, lambda text: (set(text) <= {*"ab"} and len(text) == 3) or 1 / 0),
    "guided_choice": ({"guided_choice": ["yes", "no"]}, lambda text: ["yes", "no"].index(text)),
    "guided_grammar": ({"guided_grammar": 'root ::= "x" "y"?'}, lambda text: ["x", "xy"].index(text)),
    "structured_outputs": ({"structured_outputs": {"choice": ["yes", "no"]}}, lambda text: ["yes", "no"].index(text)),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_vllms_names_for_structures(client, name):
    extra, check = STRUCTURES[name]
    reply = client.chat.completions.create(model="tiny", messages=TALK, max_tokens=100, extra_body=extra)
    assert reply.choices[0].finish_reason == "stop"
    check(reply.choices[0].message.content)
    text = client.completions.create(model="tiny", prompt="Yes", max_tokens=100, seed=3, extra_body=extra)
    check(text.choices[0].text)


def test_calls_that_are_required_or_named_keep_their_schema(server, client):
    draw = random.Random(0)
    for seed in range(8):
        asked = {"messages": TALK, "tools": TOOLS, "seed": seed, "max_tokens": 300, "temperature": 1.2}
        choice = draw.choice(["required", {"type": "function", "function": {"name": "weather"}}])
        asked |= {"tool_choice": choice, "parallel_tool_calls": bool(seed % 2)}
        whole = client.chat.completions.create(model="tiny", **asked).choices[0]
        message, finish, _ = streamed(client, **asked)
        assert finish == whole.finish_reason
        calls = [[call.function.name, call.function.arguments] for call in whole.message.tool_calls]
        assert message["calls"] == calls
        if finish == "length":
            continue
        assert finish == ("tool_calls" if choice == "required" else "stop")
        assert whole.message.content is None
        assert len({call.id for call in whole.message.tool_calls}) == len(calls) > 0
        assert seed % 2 or len(calls) == 1
        for name, arguments in calls:
            assert name == "weather" or choice == "required"
            assert isinstance(json.loads(arguments), dict)
            if name == "weather":
                jsonschema.validate(json.loads(arguments), CITY)
    cut = client.chat.completions.create(model="tiny", **{**asked, "tool_choice": "required", "max_tokens": 50})
    assert cut.choices[0].finish_reason == "length"


BAD = [
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}}, "response_format"),
    ({"guided_regex": "(("}, "guided_regex"),
    ({"guided_json": "[1"}, "guided_json"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_regex"),
    ({"structured_outputs": {"xml": "a"}}, "structured_outputs"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "fly"}}}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
    ({"tools": [{"type": "retrieval"}]}, "tools"),
    ({"tools": [*TOOLS, TOOLS[0]]}, "tools"),
    ({"tools": TOOLS * 100}, "tools"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}]}
        | {"tool_choice": "required"},
        "tools",
    ),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"n": 3, "best_of": 2}, "best_of"),
    ({"best_of": 200}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"),
]


@pytest.mark.parametrize(("fields", "param"), BAD, ids=lambda x: str(x)[:50])
def test_bad_structures_are_named_and_touch_nobody(server, fields, param):
    reply = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": TALK, **fields}, timeout=60)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text
    assert server.engine.active == server.engine.waiting == 0


def test_the_best_of_several_and_least_lengths(client):
    asked = {"model": "tiny", "prompt": "Once", "max_tokens": 12, "seed": 1, "logprobs": 0}
    every = client.completions.create(**asked, n=5).choices
    best = client.completions.create(**asked, n=2, best_of=5)
    means = [sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs) for choice in every]
    order = sorted(range(5), key=lambda i: -means[i])
    assert [choice.text for choice in best.choices] == [every[i].text for i in order[:2]]
    assert best.usage.completion_tokens == sum(len(choice.logprobs.tokens) for choice in every)
    bias = {"logit_bias": {str(model().tokenizer.eos): 50}}
    for least in (0, 5):
        reply = client.completions.create(**asked, **bias, extra_body={"min_tokens": least})
        assert (len(reply.choices[0].logprobs.tokens), reply.choices[0].finish_reason) == (least + 1, "stop")


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


@pytest.fixture(scope="module")
def said():
    """A service that says what `said.text` has."""
    server = ScriptedServer(lambda prompt: server.text)
    server.text = ""
    yield server
    server.close()


def test_calls_and_reasoning_are_taken_out_of_a_reply(said):
    said.text = f"<think>\nHm, Rome.\n</think>\n\nI look.\n{CALL}\n{CALL}"
    with openai.OpenAI(base_url=f"{said.url}/v1", api_key="none", max_retries=0) as client:
        asked = {"messages": USER, "tools": TOOLS}
        choice = client.chat.completions.create(model="tiny", **asked).choices[0]
        call = ["weather", '{"city": "Rome"}']
        assert [[c.function.name, c.function.arguments] for c in choice.message.tool_calls] == [call, call]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
        assert choice.message.reasoning_content == choice.message.reasoning == "Hm, Rome."
        message, finish, parts = streamed(client, **asked)
        expected = {"content": "I look.", "reasoning_content": "Hm, Rome.", "reasoning": "Hm, Rome."}
        assert (message, finish) == ({**expected, "calls": [call, call]}, "tool_calls")
        assert parts > 10, "arguments come piece by piece"
        # Without tools, or without leave to call them, a call is text, and the prompt has no tools.
        for fewer in ({"messages": USER}, {**asked, "tool_choice": "none"}):
            choice = client.chat.completions.create(model="tiny", **fewer).choices[0]
            assert (choice.message.content, choice.finish_reason) == (f"I look.\n{CALL}\n{CALL}", "stop")
            assert "weather" not in said.engine.prompts[-1]
        # The reply is understood as a part of the next request.
        message = {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function"}]}
        for arguments in ('{"city": "Rome"}', "{broken", '"text"'):
            message["tool_calls"][0]["function"] = {"name": "weather", "arguments": arguments}
            history = [*USER, message, {"role": "tool", "tool_call_id": "a", "content": "Sun <|end|>"}]
            client.chat.completions.create(model="tiny", messages=history, tools=TOOLS)
            assert f'"arguments": {arguments}}}' in said.engine.prompts[-1]
            assert "<tool_response>\nSun <|end|>\n</tool_response>" in said.engine.prompts[-1]


def test_a_template_may_open_the_reasoning_and_want_arguments_as_it_likes():
    for source, shown in (
        ("{{ call.function.arguments | tojson }}", '{"city": "Rome"}'),
        ("{{ '' + call.function.arguments }}", '{"city": "Rome"}'),
        ("{% for k, v in call.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}", "city=Rome;"),
    ):
        template = ChatTemplate(
            "{{ '<tool_call>'[:0] }}{% for m in messages %}{{ m.content or '' }}|{{ m.reasoning_content or '' }}"
            "{% for call in m.tool_calls or [] %}" + source + "{% endfor %}\n{% endfor %}"
            "{% if tools %}{{ tools | length }}{% endif %}<think>\n"
        )
        function = {"name": "weather", "arguments": '{"city": "Rome"}'}
        call = {"id": "a", "type": "function", "function": function}
        for broken in (False, True):
            function["arguments"] = "{broken" if broken else '{"city": "Rome"}'
            said = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "so"}
            text = template.text(conversation([said], TOOLS))
            assert text.startswith("|so" + (shown if not broken else "")), text
            assert broken is ("{broken" in text)
    lm = LanguageModel(model().config, model().params, model().tokenizer, context=4_096, template=template)
    server = ScriptedServer(lambda prompt: "Hm.\n</think>\n\nRome.", lm=lm)
    try:
        reply = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": USER}, timeout=60).json()
        message = reply["choices"][0]["message"]
        assert (message["content"], message["reasoning_content"]) == ("Rome.", "Hm.")
    finally:
        server.close()
