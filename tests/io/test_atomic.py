"""A file or a folder is written whole or not at all."""

from __future__ import annotations

import ast
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from etils import epath

from gptjax.io import atomic

ROOT = Path(__file__).resolve().parents[2]


def test_a_file_replaces_the_old_one(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    for text in ("old", "new"):
        atomic.write_text(path, text)
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_has_its_name_once_it_is_whole(tmp_path):
    path = tmp_path / "folder"
    with atomic.new(path) as partial:
        (partial / "in").mkdir(parents=True)
        (partial / "in" / "file").write_text("x")
        assert not path.exists()
    assert (path / "in" / "file").read_text() == "x"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")

    def write() -> None:
        with atomic.new(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_kill_leaves_is_replaced(tmp_path):
    path = tmp_path / "file"
    (tmp_path / "file.partial").mkdir()
    (tmp_path / "file.partial" / "half").write_text("x")
    atomic.write_text(path, "whole")
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_on_disk_before_the_name(tmp_path, monkeypatch):
    """After a power cut no file of that name is empty: its content is synced, then renamed, then the folder synced."""
    done = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(Path, "replace", lambda one, other: (done.append("rename"), replace(one, other))[1])
    with atomic.new(tmp_path / "new") as partial:
        partial.mkdir()
        (partial / "file").write_text("x")
    assert done == [str(partial / "file"), str(partial), "rename", str(tmp_path)]


def test_an_object_in_a_bucket_is_written_in_place():
    path = epath.Path("gs://bucket/object")
    with atomic.new(path) as partial:
        assert partial is path


def test_writers_at_once_do_not_meet(tmp_path):
    path = tmp_path / "file"
    with atomic.new(path, shared=True) as one, atomic.new(path, shared=True) as other:
        one.write_text("first")
        other.write_text("second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_lines_are_appended_whole(tmp_path):
    path = tmp_path / "lines"
    atomic.append_line(path, "你好")
    with path.open("ab") as half:
        half.write("你".encode()[:2])
    atomic.drop_partial_line(path)
    atomic.append_line(path, "b")
    assert path.read_text(encoding="utf-8") == "你好\nb\n"


def test_this_is_the_only_way():
    others = {"rename", "fsync", "mkstemp", "NamedTemporaryFile"}
    for path in ROOT.glob("gptjax/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and (node.attr in others or ast.unparse(node) == "os.replace"):
                assert path.name == "atomic.py", f"{path}:{node.lineno}: {ast.unparse(node)}"


HOLD = """
import sys, time
from gptjax.io import atomic

with atomic.lock(sys.argv[1]):
    print(flush=True)
    time.sleep(99)
"""


def test_a_lock_is_held_by_one_process_and_lost_with_it(tmp_path):
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline()
        with pytest.raises(BlockingIOError), atomic.lock(path, wait=False):
            pass
        holder.kill()
    with atomic.lock(path, wait=False), pytest.raises(BlockingIOError), atomic.lock(path, wait=False):
        pass
    with atomic.lock(path):
        pass


def test_without_locks_there_is_a_warning(tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", fail)
    with atomic.lock(tmp_path / "lock"):
        assert "this file system has no locks" in caplog.text
