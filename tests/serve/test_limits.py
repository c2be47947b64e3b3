"""Limits of the server: what is too much, too slow or too late ends with an error, and the rest goes on."""

import contextlib
import datetime
import ipaddress
import json
import signal
import socket
import ssl
import threading
import time

import httpx
import pytest
from test_serve import TALK, Server, until

from gptjax.cli.main import main
from gptjax.serve import server as http_server
from gptjax.serve import service
from gptjax.serve.access import Policy

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
BODY = HEAD + b"content-type: application/json\r\ncontent-length: 100\r\n\r\n{"
CHAT = "/v1/chat/completions"
LONG = {"messages": TALK, "max_tokens": 220, "ignore_eos": True}


@pytest.fixture(scope="module")
def server():
    server = Server(policy=Policy(requests=2, origins=("https://page.example",)), connections=20)
    yield server
    server.close()


def connect(server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def answer(connection: socket.socket) -> tuple[int, dict, float]:
    """Status, body and seconds until the server closed the connection."""
    started, data = time.monotonic(), b""
    while piece := connection.recv(65_536):
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body), time.monotonic() - started


def test_slow_clients_are_told_and_closed(server, monkeypatch):
    """Slow loris: nothing, half a head, a byte now and then, half a body."""
    monkeypatch.setattr(http_server, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(service, "BODY_SECONDS", 0.5)
    for sent in (b"", HEAD, BODY):
        with connect(server) as connection:
            connection.sendall(sent)
            status, error, seconds = answer(connection)
            assert (status, error["error"]["type"]) == (408, "invalid_request_error")
            assert 0.3 < seconds < 5
    with connect(server) as connection:
        started = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() < started + 10:
                connection.sendall(b"G")
                time.sleep(0.05)
        assert time.monotonic() < started + 5
    with connect(server) as connection:  # the second request of a connection likewise
        request = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
        connection.sendall(request)
        assert b"200 OK" in connection.recv(65_536)
        connection.sendall(request[:9])
        assert answer(connection)[0] == 408


def test_heads_that_are_too_long_or_no_http(server):
    flood = b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + b"".join(
        b"x-%d: %s\r\n" % (i, b"y" * 90) for i in range(900)
    )
    for sent, expected in ((flood, 431), (b"GET /" + b"a" * 50_000, 431), (b"\x16\x03\x01 hello\r\n\r\n", 400)):
        with connect(server) as connection:
            connection.sendall(sent)
            status, error, _ = answer(connection)
            assert (status, set(error)) == (expected, {"error"})
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_values_without_end_are_the_clients_fault(server):
    sent = {"content-type": "application/json"}
    deep = '{"a":' * 900 + "[]" + "}" * 900
    for path, field, value in (
        (CHAT, "messages", '[{"role": "user", "content": %s}]'),
        (CHAT, "tools", '[{"type": "function", "function": {"name": "f", "parameters": %s}}]'),
        (CHAT, "response_format", '{"type": "json_schema", "json_schema": {"name": "f", "schema": %s}}'),
        (CHAT, "chat_template_kwargs", "%s"),
        ("/v1/responses", "input", '[{"type": "function_call_output", "output": [%s]}]'),
        ("/v1/embeddings", "input", "[%s]"),
    ):
        rest = {"messages": TALK, "max_tokens": 1} if path == CHAT else {}
        data = f'{json.dumps(rest)[:-1]}{", " if rest else ""}"{field}": {value % deep}}}'
        reply = httpx.post(server.url + path, content=data, headers=sent, timeout=60)
        assert reply.status_code in (200, 400), (field, reply.text)
    many = {"prompt": "x", "stop": ["a"] * 10**6}
    assert httpx.post(f"{server.url}/v1/completions", json=many, timeout=60).json()["error"]["param"] == "stop"
    assert httpx.post(f"{server.url}/tokenize", json={"prompt": "a" * 2_000_000}).status_code == 413
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_connections_and_requests_are_limited(server):
    there = server.server.server_state.connections
    until(lambda: not there)
    opened = [connect(server) for _ in range(20)]
    until(lambda: len(there) == 20)
    with connect(server) as one_more:
        assert answer(one_more)[0] == 503
    for connection in opened:
        connection.close()
    until(lambda: not there)
    with connect(server) as first, connect(server) as second:
        for connection in (first, second):
            connection.sendall(BODY)
        until(lambda: server.app.state.service.active == 2)
        refused = httpx.post(server.url + CHAT, json=LONG)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "server_busy")
        assert httpx.get(f"{server.url}/health").status_code == 200, "probes are always answered"


def test_other_sites_are_answered_if_they_are_named(server):
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    named = httpx.options(server.url + CHAT, headers={**ask, "origin": "https://page.example"})
    assert named.headers["access-control-allow-origin"] == "https://page.example"
    other = httpx.options(server.url + CHAT, headers={**ask, "origin": "https://evil.example"})
    assert (other.status_code, "access-control-allow-origin" in other.headers) == (400, False)


def test_a_request_has_its_time():
    server = Server(policy=Policy(request_seconds=0.05))
    try:
        reply = httpx.post(server.url + CHAT, json={**LONG, "n": 16}, timeout=60)
        assert (reply.status_code, reply.headers["x-should-retry"]) == (504, "false")
        lines = httpx.post(server.url + CHAT, json={**LONG, "n": 16, "stream": True}, timeout=60).text.split("\n\n")
        assert "longer than 0.05 s" in json.loads(lines[-2][6:])["error"]["message"]
        until(lambda: not (server.engine.active or server.engine.waiting))
    finally:
        server.close()


def test_a_server_that_is_stopped_ends_its_replies(tmp_path):
    """And encrypts: the certificate is its own."""
    cert, key = certificate(tmp_path)
    server = Server(tls=(cert, key))
    trust = ssl.create_default_context(cafile=cert)
    with httpx.Client(verify=trust, timeout=60) as client:
        assert client.get(f"{server.url}/ready").status_code == 200
        asked = {"messages": TALK, "max_tokens": 150}
        unread = client.post(f"{server.url}/page/replies", json=asked).json()["id"]
        live = server.app.state.service.live.find(unread, "")
        with client.stream("POST", server.url + CHAT, json={**LONG, "stream": True}) as reply:
            lines = reply.iter_lines()
            next(lines)
            server.server.handle_exit(signal.SIGTERM, None)
            statuses = [client.get(f"{server.url}{path}").status_code for path in ("/ready", "/v1/models", "/health")]
            assert statuses == [503, 503, 200]
            assert [*lines][-2] == "data: [DONE]"
    server.thread.join(20)
    assert not server.thread.is_alive()
    assert live.generation.finish in ("stop", "length"), "one of the page's, which nobody reads, ends too"


def test_a_server_does_not_wait_for_ever():
    server = Server(drain=0.3)
    found = []
    body = {**LONG, "n": 60}
    thread = threading.Thread(target=lambda: found.append(httpx.post(server.url + CHAT, json=body, timeout=60)))
    thread.start()
    until(lambda: server.engine.active)
    server.server.handle_exit(signal.SIGTERM, None)
    server.thread.join(20)
    thread.join(20)
    assert (found[0].status_code, found[0].json()["error"]["message"]) == (503, "the server is stopping")


def certificate(folder) -> tuple[str, str]:
    """Files of a certificate for 127.0.0.1 and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    tomorrow = now + datetime.timedelta(days=1)
    alternative = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, tomorrow)
    built = builder.add_extension(alternative, False)
    cert = built.add_extension(x509.BasicConstraints(ca=True, path_length=None), True).sign(key, hashes.SHA256())
    files = folder / "cert.pem", folder / "key.pem"
    files[0].write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    private = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    files[1].write_bytes(key.private_bytes(*private))
    return str(files[0]), str(files[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "--host: got 0.0.0.0, which others can reach, without API keys"),
        (["--tls-cert", "nowhere"], "--tls-cert: got one file, must be given with tls_key"),
        (
            ["--tls-cert", "nowhere", "--tls-key", "nowhere"],
            "--tls-cert: got nowhere and nowhere, which cannot",
        ),
        (["--cors-origin", "*"], "--cors-origin: got *, must be a scheme and a host"),
        (["--requests", "0"], "--requests: got 0, must be at least 1"),
        (["--keys", "nowhere.json"], "--keys: got nowhere.json, which cannot be read"),
        (["--port", "65536"], "--port: got 65536, must be 1 to 65535"),
        (["--host", "nowhere.invalid", "--without-keys"], "--host: got nowhere.invalid, where nothing can listen"),
    ],
)
def test_mistakes_are_named_before_a_model_is_loaded(arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("GPTJAX_API_KEY", raising=False)
    assert main(["serve", "nowhere", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken_is_named_before_a_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "nowhere", "--port", str(port)]) == 2
    assert f"--port: got {port}, where nothing can listen (Address already in use)" in capsys.readouterr().err
