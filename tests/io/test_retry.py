"""Laws of reading again: what breaks on the way goes on where it broke, and what lasts is said."""

from __future__ import annotations

import logging
import urllib.error
from collections.abc import Iterator
from email.message import Message
from pathlib import Path

import numpy as np
import pytest

from gptjax.data import TrainCharacters
from gptjax.data.shards import tokenize
from gptjax.io import retry
from gptjax.types import UserError

TOKENIZER = TrainCharacters(specials=()).build(iter(["abcdefghij"]))


class Failing:
    """Ten documents of a letter each; reading the seventh fails with each of these errors in turn."""

    def __init__(self, *errors: Exception):
        self.errors = list(errors)

    def __repr__(self) -> str:
        return "Failing()"

    def documents(self, split: str) -> Iterator[str]:
        for number, letter in enumerate("abcdefghij"):
            if number == 6 and self.errors:
                raise self.errors.pop(0)
            yield letter

    def fingerprint(self) -> str:
        return "failing"


def http(code: int) -> urllib.error.HTTPError:
    return urllib.error.HTTPError("http://x", code, "no", Message(), None)


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(retry, "PAUSE", 0.001)


def test_goes_on_at_the_document_where_it_broke(tmp_path: Path, caplog):
    whole = tokenize(Failing(), TOKENIZER, "train", tmp_path / "whole").tokens()
    source = Failing(ConnectionError("reset by peer"), TimeoutError(), http(503), OSError(5, "Input/output error"))
    with caplog.at_level(logging.WARNING):
        broken = tokenize(source, TOKENIZER, "train", tmp_path / "broken").tokens()
    np.testing.assert_array_equal(whole, broken)
    assert [record.message.partition(" (")[0] for record in caplog.records] == ["Failing(), document 6: failed"] * 4
    assert [float(record.message.split()[-2]) for record in caplog.records] == [0.001, 0.002, 0.004, 0.008]


def test_gives_up_with_the_source_the_place_and_the_reason(tmp_path: Path):
    said = r"^source: got Failing\(\), which could not be read at document 6 \(5 times: reset by peer\)"
    with pytest.raises(UserError, match=said):
        tokenize(Failing(*[ConnectionError("reset by peer")] * 9), TOKENIZER, "train", tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.parametrize("error", [FileNotFoundError("x"), PermissionError("x"), http(404), ValueError("x")])
def test_what_lasts_is_raised_at_once(tmp_path: Path, error):
    source = Failing(error, ConnectionError())
    with pytest.raises(type(error)):
        tokenize(source, TOKENIZER, "train", tmp_path)
    assert len(source.errors) == 1


def test_pauses_double_up_to_a_minute(monkeypatch):
    monkeypatch.undo()
    assert [retry.pause(failures) for failures in (1, 2, 3, 6, 7, 8, 10_000)] == [1, 2, 4, 32, 60, 60, 60]


def test_a_call_is_repeated_until_it_succeeds_or_attempts_are_spent():
    errors = [ConnectionError("reset")] * (retry.ATTEMPTS - 1)

    def function() -> int:
        if errors:
            raise errors.pop()
        return 1

    assert retry.call(function, "task") == 1
    errors += [ConnectionError("reset")] * retry.ATTEMPTS
    with pytest.raises(ConnectionError):
        retry.call(function, "task")
    assert not errors
    errors.append(FileNotFoundError("x"))
    with pytest.raises(FileNotFoundError):
        retry.call(function, "task")
