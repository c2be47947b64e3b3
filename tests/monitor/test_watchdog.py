"""Signs of life: a step that hangs is reported once, with what every thread does; what is slow for a reason is not."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from gptjax.monitor import watchdog
from gptjax.monitor.watchdog import Watchdog


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(watchdog, "EVERY", 0.05)


def a_step_that_hangs(path: Path) -> None:
    """Until it is reported, and for some time in which it could be reported again."""
    until(path.exists)
    time.sleep(0.3)


def until(condition) -> None:
    limit = time.monotonic() + 10
    while not condition() and time.monotonic() < limit:
        time.sleep(0.01)
    assert condition()


def test_a_step_that_hangs_is_reported_once_with_every_thread(tmp_path, capfd):
    def another_thread(end: threading.Event) -> None:
        end.wait()

    end, path = threading.Event(), tmp_path / "hang" / "0.txt"
    other = threading.Thread(target=another_thread, args=(end,))
    other.start()
    with Watchdog(tmp_path, "pretrain", seconds=0.2) as dog:
        for step in range(1, 5):
            dog.beat(step)
        a_step_that_hangs(path)
        dog.beat(5)
    end.set()
    other.join()
    text, error = path.read_text(), capfd.readouterr().err
    assert text.count("process 0 on ") == text.count("pretrain has not advanced beyond step 4 for ") == 1
    for name in ("a_step_that_hangs", "another_thread"):
        assert name in text
        assert name in error


def test_slow_steps_and_pauses_are_not_hangs(tmp_path, capfd):
    with Watchdog(tmp_path, "pretrain", seconds=0.5) as dog:
        time.sleep(0.7)  # compilation
        dog.beat(1)
        time.sleep(0.3)
        dog.beat(2)  # steps of 0.3 s: one of 0.6 s is none that hangs
        time.sleep(0.6)
        dog.beat(3, pause=True)
        time.sleep(0.7)  # evaluation
    assert not (tmp_path / "hang").exists()
    assert capfd.readouterr().err == ""


def test_the_heartbeat_is_where_the_process_is(tmp_path):
    path = tmp_path / "heartbeat" / "0.json"
    with Watchdog(tmp_path, "pretrain", seconds=100, step=7) as dog:
        assert dog._thread.daemon  # a crash must not wait for it
    first = json.loads(path.read_text())
    assert first["step"] == 7
    with Watchdog(tmp_path, "pretrain", seconds=0.2, step=7) as dog:
        dog.beat(8)
        dog.set_figures({"time_step": 0.5, "time_input": 0.25})
        until(lambda: json.loads(path.read_text())["step"] == 8)
        found = json.loads(path.read_text())
    assert abs(found["time"] - time.time()) < 10
    assert found["host"]
    assert {"process": 0, "stage": "pretrain", "time_step": 0.5, "time_input": 0.25}.items() <= found.items()


def test_a_disk_that_is_full_does_not_matter(tmp_path):
    (tmp_path / "heartbeat").write_text("a file")
    with Watchdog(tmp_path, "pretrain", seconds=0.2):
        time.sleep(0.2)
