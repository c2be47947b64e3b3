"""A repository of the hub is downloaded once, in spite of a network that fails; each refusal says what to do."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gptjax.interop import hub
from gptjax.types import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights" * 1000,
    "tokenizer.model": b"pieces",
    "merges.txt": b"a b",
    "chat_template.jinja": b"{{ messages }}",
    "pytorch_model.bin": b"a pickle",
    "original/model.safetensors": b"another form",
    "consolidated.safetensors": b"another form",
}
WANTED = {"config.json", "model.safetensors", "tokenizer.model", "merges.txt", "chat_template.jinja"}


class Hub(http.server.ThreadingHTTPServer):
    """As much of the hub as a download needs: one repository, "owner/name"."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: Counter[str] = Counter()
        self.fault: Callable[[str], tuple[int, str] | None] = lambda path: None
        """Path of a request -> (status, hub error code) of the error to answer with. None: no error."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.requests[path] += 1
        files = [{"type": "file", "path": name, "size": len(data), "oid": name} for name, data in FILES.items()]
        prefix = f"/owner/name/resolve/{COMMIT}/"
        if fault := self.server.fault(path):
            self.answer(fault[0], b"{}", {"X-Error-Code": fault[1]})
        elif path == "/api/models/owner/name/revision/main":
            self.answer(200, {"id": "owner/name", "sha": COMMIT, "siblings": []})
        elif path == f"/api/models/owner/name/tree/{COMMIT}":
            self.answer(200, files)
        elif path.startswith(prefix) and (name := path.removeprefix(prefix)) in FILES:
            self.answer(200, FILES[name], {"X-Repo-Commit": COMMIT, "ETag": f'"{name.replace("/", "-")}"'})
        elif path.startswith("/api/models/owner/name/revision/"):
            self.answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
        else:
            self.answer(404, {}, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    constants = pytest.importorskip("huggingface_hub.constants")
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        # What HF_ENDPOINT and HF_HOME set when the library is imported.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        where = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", where)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield server
        server.shutdown()
        thread.join()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert hub.folder(tmp_path) == tmp_path
    (tmp_path / "owner/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.folder("owner/name") == Path("owner/name")
    (tmp_path / "file").touch()
    for path in ("file", "gpt2", "./no/such", "/no/such", "a/b/c", "~/no/such", "../up"):
        with pytest.raises(UserError, match="must be a folder or a hub repository"):
            hub.folder(path)


def test_a_mistyped_folder_is_not_looked_for_on_the_hub(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "runs/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="path: got runs/nmae, must be a folder; runs exists but has no nmae"):
        hub.folder("runs/nmae")
    assert not server.requests


def test_downloaded_once(server: Hub):
    folder = hub.folder("owner/name")
    assert contents(folder) == {name: FILES[name] for name in WANTED}
    weights = f"/owner/name/resolve/{COMMIT}/model.safetensors"
    before = server.requests[weights]
    assert hub.folder("owner/name") == folder
    assert server.requests[weights] == before
    server.fault = lambda path: (503, "")  # without the network, what was downloaded is still there
    assert hub.folder("owner/name") == folder


def test_tried_again(server: Hub):
    weights = f"/owner/name/resolve/{COMMIT}/model.safetensors"
    server.fault = lambda path: (503, "") if path == weights and server.requests[path] <= 3 else None
    assert contents(hub.folder("owner/name")) == {name: FILES[name] for name in WANTED}


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ((404, "RepoNotFound"), "neither a local folder nor a public repository.*HF_TOKEN"),
        ((401, "RepoNotFound"), "neither a local folder nor a public repository.*HF_TOKEN"),
        ((403, "GatedRepo"), "is gated; request access"),
        ((500, ""), "cannot be downloaded .*500"),
    ],
)
def test_refusals(fault: tuple[int, str], says: str, server: Hub):
    server.fault = lambda path: fault
    with pytest.raises(UserError, match=f"path: got owner/name, .*{says}") as error:
        hub.folder("owner/name")
    assert "\n" not in str(error.value)
    assert sum(server.requests.values()) <= 2, "not tried again"


def test_tries_come_to_an_end(server: Hub):
    """One layer repeats what fails: the library, at most as often as it says."""
    server.fault = lambda path: (503, "") if "/resolve/" in path else None
    with pytest.raises(UserError, match=r"cannot be downloaded .*503"):
        hub.folder("owner/name")
    assert max(server.requests.values()) <= 7


def test_other_mistakes(server: Hub, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="revision: got v9, must be"):
        hub.folder("owner/name", "v9")
    with pytest.raises(UserError, match="must be a folder or a hub repository"):
        hub.folder("owner/name--x..y")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UserError, match=r"cannot be downloaded .ConnectError.*check the network"):
        hub.folder("owner/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'gptjax.hf.'"):
        hub.folder("owner/name")


def test_the_environment_says_where(server: Hub, tmp_path: Path):
    program = "from gptjax.interop import hub; print(hub.folder('owner/name'))"
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    folder = Path(run.stdout.strip())
    assert folder.is_relative_to(tmp_path / "home")
    assert contents(folder).keys() == WANTED
