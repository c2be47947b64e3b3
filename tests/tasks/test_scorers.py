"""Laws of scoring in other processes: time, errors, death and a score of zero are told apart, and nothing hangs."""

from __future__ import annotations

import dataclasses
import os
import time

import pytest

from gptjax.data import Message
from gptjax.tasks import Reply, Score, Task
from gptjax.tasks.scorers import Scorers
from gptjax.types import UserError


@dataclasses.dataclass(frozen=True)
class Odd(Task):
    """A task whose scorer does as the reply says."""

    def __len__(self):
        return 1

    def example(self, i):
        return ()

    def score(self, i, reply):
        if reply.text == "hang":
            while True:
                pass
        if reply.text == "die":
            os._exit(3)
        if reply.text == "raise":
            raise ZeroDivisionError("by nothing")
        print("noise" * 100_000)
        return Score(float(reply.text))


def test_time_errors_death_and_zero_are_told_apart():
    with Scorers(Odd(), workers=1, timeout=1) as scorers:
        said = ["1", "0", "raise", "1", "die", "1", "hang", "1"]
        scores = [future.result() for future in [scorers.submit(0, Reply(text)) for text in said]]
    failed, timed_out = "failed", "timed out"
    expected = ["scored", "scored", failed, "scored", failed, "scored", timed_out, "scored"]
    assert [score.status for score in scores] == expected
    assert [score.outcome for score in scores] == [1, 0, 0, 1, 0, 1, 0, 1]
    assert scores[2].note.startswith("ZeroDivisionError: by nothing (test_scorers.py:")
    assert scores[4].note == "the process ended with exit code 3"


@dataclasses.dataclass(frozen=True)
class Slow(Odd):
    """A task that takes two seconds to be ready in a new process, as imports do on a busy machine."""

    def example(self, i):
        return (Message("assistant", "1"),)

    def score(self, i, reply):
        if not _ready:
            time.sleep(2)
            _ready.append(True)
        return super().score(i, reply)


_ready: list[bool] = []


@pytest.mark.alone
def test_the_time_to_get_ready_is_no_reply_s():
    with Scorers(Slow(), workers=1, timeout=1) as scorers:
        said = ["1", "hang", "0"]
        scores = [future.result() for future in [scorers.submit(0, Reply(text)) for text in said]]
    assert [score.status for score in scores] == ["scored", "timed out", "scored"]


def test_a_task_that_cannot_be_sent_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Local(Odd):
        pass

    with pytest.raises(UserError, match="task: Local cannot be sent to another process"):
        Scorers(Local())
