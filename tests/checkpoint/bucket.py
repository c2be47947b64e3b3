"""A stand-in for a Cloud Storage bucket, in memory: for etils, which reads gs:// through fsspec, and for TensorStore,
which speaks HTTP (https://cloud.google.com/storage/docs/json_api/v1), as far as it does."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator

import fsspec
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem


class Bucket(MemoryFileSystem):
    """In place of gcsfs."""

    protocol = ("gcs", "gs")
    store = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("gs:/").removeprefix("gcs:/"))


def register() -> None:
    """gs:// is an empty stand-in from now on."""
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    Bucket.store.clear()
    Bucket.pseudo_dirs[:] = [""]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """/storage/v1/b/BUCKET/o/NAME?alt=media"""
        url = urllib.parse.urlsplit(self.path)
        _, _, _, _, bucket, _, name = url.path.split("/")
        file = Bucket.store.get(f"/{bucket}/{urllib.parse.unquote(name)}")
        if file is None:
            return self._answer(404)
        content, generation = file.getvalue(), {"x-goog-generation": "1"}
        if "ifGenerationNotMatch=1" in url.query:
            return self._answer(304)
        if (asked := self.headers.get("Range")) is None:
            return self._answer(200, content, generation)
        first, last = map(int, asked.removeprefix("bytes=").split("-"))
        part = content[first : last + 1]
        place = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
        return self._answer(206, part, {"Content-Range": place} | generation)

    def do_POST(self) -> None:
        """/upload/storage/v1/b/BUCKET/o?name=NAME"""
        url = urllib.parse.urlsplit(self.path)
        bucket, asked = url.path.split("/")[5], urllib.parse.parse_qs(url.query)
        name, content = asked["name"][0], self.rfile.read(int(self.headers["Content-Length"]))
        path = f"/{bucket}/{name}"
        if "ifGenerationMatch" in asked and path in Bucket.store:  # only where there is none is asked for
            return self._answer(412)
        Bucket.store[path] = MemoryFile(Bucket(), path, content)
        return self._answer(200, json.dumps({"name": name, "generation": "1"}).encode())

    def _answer(self, code: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args) -> None:
        pass


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """Context in which the stand-in answers at the address that it gives."""
    with http.server.ThreadingHTTPServer(("localhost", 0), _Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}"
        server.shutdown()
