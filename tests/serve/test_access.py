"""Who may ask, and how much: keys in a file, their scopes and quotas, and a table of routes without a gap."""

import stat
import time

import httpx
import pytest
from test_serve import TALK, Server

from gptjax.cli.main import main
from gptjax.serve import keys as keys_file
from gptjax.serve.access import Policy
from gptjax.serve.app import OPEN_ROUTES, ROUTES
from gptjax.serve.errors import ApiError
from gptjax.serve.keys import ANYONE, DAY, SCOPES, Key, Keys
from gptjax.serve.quotas import Bucket, Quotas
from gptjax.types import UserError

CHAT = "/v1/chat/completions"


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("keys") / "keys.json"


@pytest.fixture(scope="module")
def server(file):
    keys_file.write(file, ())
    server = Server(policy=Policy(keys=Keys(file, ["root"])), queue=12)
    yield server
    server.close()


def ask(server, secret, path="/v1/models", **body):
    method = "POST" if body else "GET"
    return httpx.request(method, server.url + path, json=body or None, headers=bearer(secret), timeout=60)


def test_every_route_needs_a_key_with_its_scope(server, file):
    """The application itself is asked, whatever table it was made of."""
    known = {path for _, path in ROUTES} | set(OPEN_ROUTES)
    assert {route.path for route in server.app.routes} == known
    limited = {scope: keys_file.add(file, f"all but {scope}", scopes=tuple({*SCOPES} - {scope})) for scope in SCOPES}
    assert set(OPEN_ROUTES) >= {"/health", "/"}
    for (method, path), (_, scope) in ROUTES.items():
        url = server.url + path.replace("{", "").replace("}", "")
        for headers in ({}, bearer("wrong"), {"authorization": "Basic root"}, {"authorization": "Bearer"}):
            reply = httpx.request(method, url, headers=headers)
            assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key"), path
        if scope is not None:
            assert httpx.request(method, url, headers=bearer(limited[scope])).status_code == 403
        assert httpx.request(method, url, headers=bearer("root")).status_code not in (401, 403)
    for path in OPEN_ROUTES:
        assert httpx.get(server.url + path.replace("{name}", "main.js")).status_code == 200


def test_keys_come_and_go_while_the_server_runs(server, file, capsys):
    assert main(["keys", "add", "alice", "--file", str(file), "--scopes", "chat", "--expires", "1d"]) == 0
    secret = capsys.readouterr().out.strip()
    assert secret not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert ask(server, secret).status_code == 200
    assert main(["keys", "list", "--file", str(file)]) == 0
    assert "alice; chat; expires" in capsys.readouterr().out
    assert main(["keys", "revoke", "alice", "--file", str(file)]) == 0
    assert ask(server, secret).status_code == 401
    expired = keys_file.add(file, "late", expires=time.time() - 1)
    assert "expired" in ask(server, expired).json()["error"]["message"]
    before = file.read_text()
    file.write_text("{")
    assert ask(server, "root").status_code == 503, "a file that cannot be read admits nobody"
    file.write_text(before)
    assert ask(server, "root").status_code == 200


def test_mistakes_with_keys_are_named(file, tmp_path, capsys):
    for arguments, message in (
        (["add", "x", "--expires", "soon"], "--expires: got 'soon', must be a number and m, h, d or w"),
        (["add", "x", "--tokens-per-day", "0"], "--tokens-per-day: got 0, must be"),
        (["revoke", "nobody"], "name: got nobody, must be one of the names"),
    ):
        assert main(["keys", *arguments, "--file", str(file)]) == 2
        assert message in capsys.readouterr().err
    for content in ("[]", "{}", '{"keys": [{}]}', '{"keys": [{"name": 1}]}', '{"keys": [{"name": "x", "more": 1}]}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(UserError, match=r"keys: got .*bad\.json"):
            Keys(tmp_path / "bad.json")
    with pytest.raises(UserError, match="cannot be read"):
        Keys(tmp_path / "none.json")


def test_too_many_requests_and_tokens_are_told_when_to_come_back(server, file):
    often = keys_file.add(file, "often", requests_per_minute=2)
    replies = [ask(server, often) for _ in range(3)]
    assert [reply.status_code for reply in replies] == [200, 200, 429]
    assert replies[0].headers["x-ratelimit-remaining-requests"] == "1"
    assert 1 <= int(replies[2].headers["retry-after"]) <= 30
    assert replies[2].json()["error"]["code"] == "rate_limit_exceeded"

    much = keys_file.add(file, "much", tokens_per_day=200)
    asked = {"messages": TALK, "max_tokens": 5, "ignore_eos": True}
    first = ask(server, much, CHAT, **asked)
    used = first.json()["usage"]["total_tokens"]
    assert ask(server, much, CHAT, **asked, n=100).json()["error"]["param"] == "max_tokens", "more than it ever may"
    second = ask(server, much, CHAT, messages=TALK, max_tokens=1)
    left = int(second.headers["x-ratelimit-remaining-tokens"])
    assert left <= 200 - used, "charged before, settled after"
    refused = ask(server, much, CHAT, messages=TALK, max_tokens=150)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert int(refused.headers["retry-after"]) > 60


def test_a_key_cannot_fill_the_queue(server, file):
    flooding = keys_file.add(file, "flooding")
    refused = ask(server, flooding, CHAT, messages=TALK, n=9)  # of 4 rows and a queue of 12, half
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert server.engine.active + server.engine.waiting == 0
    assert ask(server, flooding, CHAT, messages=TALK, n=8, max_tokens=1).status_code == 200


def test_buckets_fill_evenly():
    now = [0.0]
    bucket = Bucket(60, 60, clock=lambda: now[0])
    bucket.take(60)
    assert bucket.wait(30) == 30
    now[0] = 10
    assert (bucket.level, bucket.wait(30)) == (10, 20)
    bucket.take(-100)
    assert bucket.level == 60, "never more than it holds"


def test_charges_are_settled_once():
    quotas = Quotas(rows=4, tokens=100)
    key = Key("a", "a", tokens_per_day=DAY)
    charge = quotas.admit(key, 3, 60)
    for rows, tokens in ((2, 1), (1, 41)):
        with pytest.raises(ApiError) as error:
            quotas.admit(ANYONE, rows, tokens)
        assert (error.value.status, error.value.headers) == (429, {"retry-after": "1"})
    charge.settle(10)
    charge.settle(0)
    assert quotas.headers(key)["x-ratelimit-remaining-tokens"] == str(DAY - 10)
    quotas.admit(ANYONE, 4, 100)


def test_a_callers_id_is_only_echoed(server):
    body = {"messages": TALK, "max_tokens": 1}
    replies = [
        httpx.post(server.url + CHAT, json=body, headers={**bearer("root"), "x-request-id": "mine"}) for _ in range(2)
    ]
    assert {reply.headers["x-request-id"] for reply in replies} == {"mine"}
    assert len({reply.json()["id"] for reply in replies}) == 2
    assert len(ask(server, "root").headers["x-request-id"]) == 16
