"""A run folder's copy in a bucket: a run can be resumed from what it holds at any moment."""

from __future__ import annotations

import shutil
from pathlib import Path

import bucket
import pytest
from etils import epath

from gptjax.checkpoint import manifest, mirror
from gptjax.checkpoint.mirror import Mirror
from gptjax.io import retry
from gptjax.types import UserError


@pytest.fixture(params=["folder", "gs"])
def address(request, tmp_path):
    if request.param == "folder":
        return str(tmp_path / "bucket" / "run")
    bucket.register()
    return "gs://bucket/run"


def checkpoint(folder: Path, step: int, content: str = "weights") -> Path:
    path = folder / "checkpoints" / "main" / str(step)
    (path / "d").mkdir(parents=True)
    (path / "d" / "0").write_text(f"{content} {step}")
    manifest.write(epath.Path(path), {"step": step})
    return path


def run(folder: Path) -> Path:
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "vocab").write_text("a b")
    (folder / "config.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("1\n")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_fresh_machine_gets_the_run_back(tmp_path, address):
    here = run(tmp_path / "here")
    for step in (1, 2):
        checkpoint(here, step)
    with Mirror(address, here, period=0.01):
        checkpoint(here, 3)
    (here / "checkpoints" / "main" / "4").mkdir()  # unfinished
    manifest.delete(epath.Path(here / "checkpoints" / "main" / "1"))
    (here / "metrics.jsonl").write_text("1\n2\n")
    with Mirror(address, here):
        checkpoint(here, 5)
    steps = epath.Path(address) / "checkpoints" / "main"
    assert {path.name for path in steps.iterdir()} == {"2", "3", "5"}
    (here / "checkpoints" / "main" / "4").rmdir()

    with Mirror(address, tmp_path / "fresh"):
        pass
    for old in ("2", "3"):
        shutil.rmtree(here / "checkpoints" / "main" / old)  # the newest is enough
    assert files(tmp_path / "fresh") == files(here)


def test_old_copies_stay_until_there_is_a_new_one(tmp_path, address):
    """Those of a machine that is gone too, which the fresh one did not bring back."""
    here, fresh = run(tmp_path / "here"), tmp_path / "fresh"
    steps = epath.Path(address) / "checkpoints" / "main"
    for step in (1, 2):
        checkpoint(here, step)
    with Mirror(address, here):
        pass
    for name in ("3/d/0", "4/d/0", "4/d/more"):  # copies cut short, as the machine went
        (steps / name).parent.mkdir(parents=True, exist_ok=True)
        (steps / name).write_text("wei")
    with Mirror(address, fresh):
        pass
    assert {path.name for path in steps.iterdir()} == {"1", "2", "3", "4"}
    with Mirror(address, fresh):
        checkpoint(fresh, 4)
    assert {path.name for path in steps.iterdir()} == {"2", "4"}
    assert {path.name for path in (steps / "4" / "d").iterdir()} == {"0"}


def test_what_is_said_of_a_checkpoint_later_is_copied_alone(tmp_path, monkeypatch):
    here, there = run(tmp_path / "here"), tmp_path / "bucket"
    path = checkpoint(here, 1)
    with Mirror(there, here):
        pass
    manifest.amend(epath.Path(path), loss=1.5)
    copied, copy = [], mirror._copy
    monkeypatch.setattr(mirror, "_copy", lambda source, target: copied.append(source.name) or copy(source, target))
    with Mirror(there, here):
        pass
    assert copied.count(manifest.NAME) == 1
    assert "0" not in copied
    assert files(there) == files(here)


def test_what_is_damaged_there_is_passed_over(tmp_path, caplog):
    here, there = run(tmp_path / "here"), tmp_path / "bucket"
    for step in (1, 2):
        checkpoint(here, step)
    with Mirror(there, here):
        pass
    (there / "checkpoints" / "main" / "2" / "d" / "0").write_text("weighty 2")
    with Mirror(there, tmp_path / "fresh"):
        pass
    assert [path.name for path in (tmp_path / "fresh" / "checkpoints" / "main").iterdir()] == ["1"]
    assert "d/0 is not as it was written" in caplog.text or "d/0 has" in caplog.text


def test_copies_that_fail_are_tried_again_and_then_named(tmp_path, monkeypatch, caplog):
    here, there = run(tmp_path / "here"), tmp_path / "bucket"
    copy, failures = mirror._copy, [OSError("the network is down")] * 3

    def failing(source, target):
        if failures:
            raise failures.pop()
        copy(source, target)

    monkeypatch.setattr(mirror, "_copy", failing)
    monkeypatch.setattr(retry, "PAUSE", 0.001)
    with Mirror(there, here):
        checkpoint(here, 1)
    assert "the network is down" in caplog.text
    assert files(there) == files(here)

    checkpoint(here, 2)
    failures += [OSError("the network is down")] * 100
    down = pytest.raises(UserError, match=r"mirror: .*bucket is not up to date \(the network is down\)")
    with down, Mirror(there, here):
        pass
    assert not (there / "checkpoints" / "main" / "2" / manifest.NAME).exists()


def test_another_run_is_not_overwritten(tmp_path):
    with Mirror(tmp_path / "bucket", run(tmp_path / "here")):
        pass
    other = run(tmp_path / "other")
    (other / "config.json").write_text('{"experiment": 2}')
    with pytest.raises(UserError, match="holds another run"):
        Mirror(tmp_path / "bucket", other).__enter__()
