"""Replies of the page live on the server: readers come, leave and come again, and get the same events."""

import json

import httpx
import pytest
from scripted import ScriptedServer

from gptjax.serve import live
from gptjax.serve.filters import Refuse
from gptjax.serve.markdown import render

SAID = "# Title\n\nSome *text* here.\n\n```python\nx = [1]\n```\n\nThe end, 完"
TALK = [{"role": "user", "content": "Say it"}]


@pytest.fixture(scope="module")
def server():
    server = ScriptedServer(lambda prompt: SAID, keys=("mine", "theirs"))
    yield server
    server.close()


@pytest.fixture
def client(server):
    with client_of(server, "mine") as client:
        yield client


def client_of(server, key):
    return httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {key}"}, timeout=20)


def start(client, **fields):
    reply = client.post("/page/replies", json={"messages": TALK, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


def read(client, reply, start=0, headers=None):
    """(number, event) of each event."""
    query = {} if headers else {"from": start}
    text = client.get(f"/page/replies/{reply}", params=query, headers=headers).text
    found = [part.split("\ndata: ") for part in text.split("\n\n") if part.startswith("id: ")]
    return [(int(number[4:]), json.loads(data)) for number, data in found]


def test_a_reply_is_read_again_from_any_event(server, client):
    started = start(client, model="tiny", temperature=0.5, max_tokens=500)
    assert (started["model"], started["left_out"]) == ("tiny", 0)
    with client.stream("GET", f"/page/replies/{started['id']}") as first:  # a reader that leaves
        next(first.iter_text())
    events = read(client, started["id"])
    assert [number for number, _ in events] == list(range(1, len(events) + 1))
    texts = [event for _, event in events if "text" in event]
    assert "".join(event["text"] for event in texts) == SAID
    tokens = [token for event in texts for token in event["tokens"]]
    assert len(tokens) == len(SAID.encode())
    assert tokens[0] == ["#", 0.3012, [["#", 0.3012], ["d", 0.0821]]]
    assert [event["html"] for _, event in events if "html" in event] == render(SAID)
    end = events[-1][1]
    assert (end["finish"], end["usage"]["completion_tokens"]) == ("stop", len(tokens))
    assert 0 <= end["first"] <= end["seconds"]
    assert server.engine.requests[-1].sampling.temperature == 0.5
    for seen in (1, len(events) // 2, len(events) - 1, len(events)):
        assert read(client, started["id"], seen) == events[seen:]
        assert read(client, started["id"], headers={"last-event-id": str(seen)}) == events[seen:]


def test_it_goes_on_without_a_reader_until_it_is_stopped(server, client):
    server.engine.pause = 0.02
    reply = start(client)["id"]
    with client.stream("GET", f"/page/replies/{reply}") as first:  # until there is text
        next(piece for piece in first.iter_text() if '"text"' in piece)
    assert client.post(f"/page/replies/{reply}/stop").status_code == 200
    server.engine.pause = 0.0
    events = read(client, reply)
    text = "".join(event.get("text", "") for _, event in events)
    assert text
    assert SAID.startswith(text)
    assert text != SAID
    assert events[-1][1]["finish"] == "cancelled"
    assert "".join(event.get("html", "") for _, event in events) == "".join(render(text))


def test_a_reply_continues_the_assistants_words(server, client):
    begun = "I begin\n\n- with a list\n"
    started = start(client, messages=[*TALK, {"role": "assistant", "content": begun}], **{"continue": True})
    assert server.engine.prompts[-1].endswith(begun)
    events = read(client, started["id"])
    assert events[0][1] == {"text": begun, "tokens": []}
    assert "".join(event.get("text", "") for _, event in events) == begun + SAID
    assert [event["html"] for _, event in events if "html" in event] == render(begun + SAID)


def test_reasoning_is_kept_apart(server, client):
    said = "<think>\nHm. **Well**\n</think>\n\nThe *answer*"
    server.engine.script = lambda prompt: said
    events = [event for _, event in read(client, start(client)["id"])]
    server.engine.script = lambda prompt: SAID
    assert "".join(event.get("thought", "") for event in events) == "Hm. **Well**"
    assert "".join(event.get("text", "") for event in events) == "The *answer*"
    assert [event["html"] for event in events if "html" in event] == ["<p>The <em>answer</em></p>\n"]
    assert sum(len(event.get("tokens", ())) for event in events) == len(said)


def test_what_a_filter_holds_is_not_in_the_tokens(client, server, monkeypatch):
    monkeypatch.setattr(server.app.state.service.live, "_filters", (Refuse(("Title",)),))
    events = [event for _, event in read(client, start(client)["id"])]
    assert events[-1]["finish"] == "content_filter"
    assert "Title" not in json.dumps(events)
    assert not any(event.get("tokens") for event in events)


def test_a_reply_is_its_clients_alone(server, client):
    reply = start(client)["id"]
    with client_of(server, "theirs") as other, client_of(server, "wrong") as stranger:
        for ask in (
            lambda c: c.get(f"/page/replies/{reply}"),
            lambda c: c.post(f"/page/replies/{reply}/stop"),
            lambda c: c.delete(f"/page/replies/{reply}"),
        ):
            assert ask(other).status_code == 404
            assert ask(stranger).status_code == 401
        for path in ("/page/replies", "/page/markdown"):
            assert stranger.post(path, json={}).status_code == 401
    assert read(client, reply)[-1][1]["finish"] == "stop"
    assert client.delete(f"/page/replies/{reply}").status_code == 200
    assert client.get(f"/page/replies/{reply}").status_code == 404


def test_what_is_kept_is_bounded(client, monkeypatch):
    monkeypatch.setattr(live, "COUNT", 3)
    replies = []
    for _ in range(5):
        replies.append(start(client)["id"])
        read(client, replies[-1])
    status = [client.get(f"/page/replies/{reply}").status_code for reply in replies]
    assert status == [404, 404, 200, 200, 200]
    monkeypatch.setattr(live, "AGE", 0.0)
    assert client.get(f"/page/replies/{replies[-1]}").status_code == 404


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"messages": []}, 400, "messages"),
        ({"continue": True}, 400, "messages"),
        ({"n": 2}, 400, "n"),
        ({"temperature": -1}, 400, "temperature"),
        ({"model": "none"}, 404, "model"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, 400, "messages"),
    ],
    ids=str,
)
def test_bad_requests_are_named(client, fields, status, param):
    reply = client.post("/page/replies", json={"messages": TALK, **fields})
    assert (reply.status_code, reply.json()["error"]["param"]) == (status, param), reply.text


def test_old_messages_are_left_out_and_counted(client):
    long = [{"role": role, "content": "x" * 900} for role in ("user", "assistant") * 3]
    assert start(client, messages=[*long, *TALK])["left_out"] == 2


def test_the_page_loads_its_own_files_alone(client):
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in page.text.replace('xmlns="http://www.w3.org', "")
    for name in ("main.js", "style.css", "icon.svg"):
        file = httpx.get(f"{client.base_url}/assets/{name}")  # without a key
        assert file.status_code == 200
        assert file.headers["x-content-type-options"] == "nosniff"
        assert "text/html" not in file.headers["content-type"]
    for name in ("index.html", "..%2fapp.py", "app.py", "%2e%2e%2fapp.py"):
        assert client.get(f"/assets/{name}").status_code == 404
    made = client.post("/page/markdown", json={"texts": ["*a*", "b"]}).json()
    assert made == {"html": [["<p><em>a</em></p>\n"], ["<p>b</p>\n"]]}
    assert client.post("/page/markdown", json={"texts": ["x" * 300_000]}).status_code == 413
    assert client.get("/page/replies/x?from=-1").status_code == 404
    assert client.get(f"/page/replies/{start(client)['id']}?from=-1").json()["error"]["param"] == "from"
