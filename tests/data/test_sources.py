"""Sources: every document once and on one side, and for every kind of bad input a line that says where and what."""

import gzip
import http.server
import json
import logging
import os
import threading
import tracemalloc

import pytest

from gptjax.data import TFDS, ChatJsonl, Jsonl, Text
from gptjax.data.chat import Message
from gptjax.io import retry
from gptjax.types import UserError


def both(source):
    return [list(source.documents(split)) for split in ("train", "validation")]


def refusal(source, split="train"):
    with pytest.raises(UserError) as caught:
        list(source.documents(split))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_one_text_is_cut_where_its_end_begins(tmp_path):
    path = write(tmp_path / "a.txt", "\ufeff0123456789\r\né")
    assert both(Text(path, validation=0.25)) == [["012345678"], ["9\né"]]


@pytest.mark.parametrize("separator", ["\n", "\n\n", "<|endoftext|>\n"])
def test_a_separator_may_stand_anywhere(tmp_path, separator):
    documents = [f"document {n}" + "\nsecond <|line|>" * (n % 2 and separator != "\n") for n in range(200)]
    source = Text(write(tmp_path / "a.txt", separator.join(documents) + separator), separator, validation=0.25)
    train, validation = both(source)
    assert sorted(train + validation) == sorted(documents)
    assert 25 < len(validation) < 75
    assert train == [d for d in documents if d in set(train)]


def test_equal_documents_are_on_one_side_whatever_the_source(tmp_path):
    documents = [f"number {n % 50}" for n in range(200)]
    text = Text(write(tmp_path / "a.txt", "\n".join(documents)), "\n", 0.5)
    lines = "\n\n".join(json.dumps({"id": 1, "body": d}) for d in documents)
    zipped = Jsonl(write(tmp_path / "a.jsonl.gz", gzip.compress(lines.encode())), "body", 0.5)
    for n in range(50):
        write(tmp_path / f"part-{n}.md", f"number {n}")
    train, validation = both(text)
    assert not set(train) & set(validation)
    assert [train, validation] == both(zipped)
    assert [sorted(set(train)), sorted(set(validation))] == [
        sorted(part) for part in both(Text(str(tmp_path / "part-*.md"), validation=0.5))
    ]


def test_memory_stays_flat(tmp_path):
    path = write(tmp_path / "a.jsonl", (json.dumps({"text": "word " * 200}) + "\n") * 16_000)
    tracemalloc.start()
    for source in (Jsonl(path), Text(path, "\n")):
        assert sum(len(d) for d in source.documents("train")) > 15_600_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000  # a few kB of its own; the rest is of other threads in the process, up to 0.6 MB


def test_conversations(tmp_path):
    messages = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes"}] for n in range(40)]
    lines = [json.dumps({"messages": m} if n % 2 else m) for n, m in enumerate(messages)]
    train, validation = both(ChatJsonl(write(tmp_path / "chat.jsonl", "\n".join(lines)), validation=0.5))
    expected = [(Message("user", f"{n}?"), Message("assistant", "yes")) for n in range(40)]
    assert [c for c in expected if c in train] == train
    assert set(train) | set(validation) == set(expected)
    assert train
    assert validation


@pytest.mark.parametrize(
    ("source", "content", "said"),
    [
        (Jsonl, '{"text": "a"}\n{"text": "b"\n', ":2: not JSON"),
        (Jsonl, '{"text": "a"}\n\n{"body": "b"}\n', ":3: got the fields body"),
        (Jsonl, "[1]\n", ":1: got list"),
        (Jsonl, b'{"text": "a"}\n{"text": "\xff"}\n', ":2: got invalid UTF-8 (byte 0xff at column 11)"),
        (Text, b"fine\nfine\nna\xefve\n", ":3: got invalid UTF-8 (byte 0xef at column 3)"),
        (Text, "", "empty"),
        (Text, "  \n\n", "no document"),
        (ChatJsonl, '{"messages": []}\n', ":1: got no messages"),
        (
            ChatJsonl,
            '[{"role": "user", "content": "a"}]\n[{"role": "robot", "content": "a"}]\n',
            ":2: role: got 'robot'",
        ),
        (ChatJsonl, '[{"role": "user", "content": "a"}]\n[{"role": "user"}]\n', ":2: "),
    ],
)
def test_errors_name_file_and_line(tmp_path, source, content, said):
    path = write(tmp_path / "bad.file", content)
    message = refusal(source(path, validation=0.0))
    assert said in message
    assert path in message


def test_lines_of_invalid_utf8_are_skipped_and_counted_when_asked(tmp_path, caplog):
    path = write(tmp_path / "a.txt", b"one\nt\xffwo\nthree\n\xfe\nfour\n")
    with caplog.at_level(logging.WARNING):
        assert list(Text(path, "\n", 0.0, invalid="skip").documents("train")) == ["one", "three", "four"]
    assert "skipped 2 lines" in caplog.text


def test_paths_that_lead_nowhere(tmp_path):
    assert "does not exist" in refusal(Text(str(tmp_path / "none.txt")))
    assert "does not exist" in refusal(Jsonl(str(tmp_path / "*.jsonl")))
    assert "folder" in refusal(Text(str(tmp_path)))
    assert "damaged gzip" in refusal(Text(write(tmp_path / "a.gz", gzip.compress(b"text" * 999)[:-9])))
    assert "for validation" in refusal(Text(write(tmp_path / "a.txt", "text"), "\n", 0.0), "validation")
    with pytest.raises(UserError, match=r"validation: got 1\.5"):
        Jsonl("a", validation=1.5)
    with pytest.raises(UserError, match="separator"):
        Text("a", separator="")


def test_fingerprint_follows_content_and_fields(tmp_path):
    path = write(tmp_path / "a.txt", "first")
    first = Text(path).fingerprint()
    assert first == Text(path).fingerprint()
    assert len({first, Text(path, "\n").fingerprint(), Jsonl(path).fingerprint()}) == 3
    before = os.stat(path)
    write(tmp_path / "a.txt", "other")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy that keeps times
    second = Text(path).fingerprint()
    write(tmp_path / "a.txt", "longer")
    assert len({first, second, Text(path).fingerprint()}) == 3


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on this machine that fails as told before it serves, and counts."""

    class Handler(http.server.BaseHTTPRequestHandler):
        failures: list = []  # noqa: RUF012
        requests = 0

        def do_GET(self):
            Handler.requests += 1
            failure = Handler.failures.pop(0) if Handler.failures else None
            if isinstance(failure, int):
                return self.send_error(failure)
            self.send_response(200)
            self.send_header("Content-Length", "4000")
            self.end_headers()
            self.wfile.write(b"text" * (10 if failure == "cut short" else 1_000))

        def log_message(self, *_):
            pass

    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(retry, "PAUSE", 0.001)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        Handler.address = f"http://127.0.0.1:{httpd.server_port}/data/a.txt"
        yield Handler
        httpd.shutdown()


def test_a_download_survives_failures_and_is_kept(server, tmp_path):
    server.failures = [503, "cut short"]
    source = Text(server.address)
    assert both(source) == [["text" * 900], ["text" * 100]]
    assert source.fingerprint() == source.fingerprint()
    assert server.requests == 3
    assert len(list((tmp_path / "cache" / "downloads").iterdir())) == 1


@pytest.mark.parametrize(("failures", "requests"), [([404] * 9, 1), ([500] * 9, 5), (["cut short"] * 9, 5)])
def test_a_download_that_fails_says_so_and_leaves_nothing(server, tmp_path, failures, requests):
    server.failures = list(failures)
    message = refusal(Text(server.address))
    assert server.address in message
    assert str(failures[0]) in message or "3960 bytes before the end" in message
    assert server.requests == requests
    assert not list((tmp_path / "cache" / "downloads").iterdir())


def test_no_such_tfds_data_set(tmp_path):
    for name in ("no_such_set", "no/such/folder", "lm1b"):
        message = refusal(TFDS(name, str(tmp_path)))
        assert name in message
        assert str(tmp_path) in message
        assert "download_and_prepare" in message


def test_a_data_set_runs_no_code(tmp_path, monkeypatch):
    """TFDS imports the module of any feature that a data set's files name."""
    (tmp_path / "brought.py").write_text("raise SystemExit('was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for folder in (tmp_path / "direct", tmp_path / "prepared" / "1.0.0"):
        folder.mkdir(parents=True)
        info = {"name": folder.name, "version": "1.0.0", "fileFormat": "array_record", "splits": []}
        (folder / "dataset_info.json").write_text(json.dumps(info))
        (folder / "features.json").write_text(json.dumps({"pythonClassName": "brought.Thing", "featuresDict": {}}))
    for name in ("direct", "prepared"):
        with pytest.raises(UserError, match=r"^name: got a data set with the feature brought\.Thing, must be"):
            list(TFDS(name, data_dir=str(tmp_path)).documents("train"))


@pytest.mark.real
def test_tiny_shakespeare_is_cut_as_nanogpt_cuts_it(shared):
    (train,), (validation,) = both(Text(str(shared / "data/tinyshakespeare.txt")))
    assert (len(train), len(validation), len(set(train + validation))) == (1_003_854, 111_540, 65)


@pytest.mark.real
def test_c4_as_array_records_beside_an_info_that_says_tfrecord(shared):
    root = shared / "data/c4_minimal"
    named, folder = TFDS("c4/en:3.0.1", str(root)), TFDS(str(root / "c4/en/3.0.1"), train="train[:50%]")
    train, validation = both(named)
    assert (len(train), len(validation)) == (1_000, 200)
    assert sum(map(len, train)) == 2_016_641
    assert list(folder.documents("train")) == train[:500]
    assert named.fingerprint() != folder.fingerprint()
    parts = both(TFDS("c4/en:3.0.1", str(root), train="validation", validation=0.25))
    assert sorted(parts[0] + parts[1]) == sorted(validation)
    assert 25 < len(parts[1]) < 75
    assert "train: got trian" in refusal(TFDS("c4/en", str(root), train="trian"))
    assert "text: got body" in refusal(TFDS("c4/en", str(root), text="body"))


def test_a_file_of_conversations_has_questions(tmp_path):
    path = tmp_path / "chats.jsonl"
    talks = [[("system", "Be brief."), ("user", f"{i}?"), ("assistant", f"{i}!"), ("user", "Why?")] for i in range(60)]
    lines = [json.dumps([{"role": role, "content": content} for role, content in talk]) for talk in talks]
    path.write_text("\n".join(lines))
    source = ChatJsonl(str(path), validation=0.5)
    held_out = [talk[1].content for talk in source.documents("validation")]
    assert source.questions(3) == [(question, question.replace("?", "!")) for question in held_out[:3]]
