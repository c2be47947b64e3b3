"""Losses of data are said: answers without questions, conversations without answers, text that is none."""

import json
import logging

import numpy as np
import pytest

from gptjax import data
from gptjax.data.chat import ConversationEncoder, Message, render
from gptjax.data.files import read_json, read_lines
from gptjax.data.tokenizers.bytes import Bytes
from gptjax.types import UserError

TOKENIZER = Bytes().build(iter(()))
SYSTEM, USER, ASSISTANT = (TOKENIZER.specials[f"<|{role}|>"] for role in ("system", "user", "assistant"))


def conversations(seed: int, count: int):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        turns = [Message("system", "s" * int(rng.integers(8)))] if rng.random() < 0.5 else []
        for _ in range(rng.integers(1, 6)):
            turns += [Message(role, "x" * int(rng.integers(1, 12))) for role in ("user", "assistant")]
        yield tuple(turns[: len(turns) - rng.integers(2)])


@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_every_answer_is_trained_with_its_question(too_long):
    length = 40
    sources = list(conversations(0, 300))
    encoded = list(ConversationEncoder(length, too_long)(iter(sources), TOKENIZER))
    assert {e.note for e in encoded} == {None, "dropped as too long"} | (
        {"truncated to the sequence length"} if too_long == "truncate" else set()
    )
    for source, (ids, weights, _, note) in zip(sources, encoded, strict=True):
        whole = render(source, TOKENIZER)
        if note is None:
            assert (ids, weights) == whole
            assert len(ids) <= length
        elif note.startswith("truncated"):
            start = 1 if source[0].role != "system" else 3 + len(source[0].content)
            assert len(ids) <= length < len(whole[0])
            assert ids[:start] == whole[0][:start], "the system message stays"
            assert ids[start] == USER
            assert ids[start:] == whole[0][len(whole[0]) - len(ids) + start :], "the newest turns stay"
            assert any(weights)
        else:
            assert not ids
            assert len(whole[0]) > length
            newest = [i for i, m in enumerate(source) if m.role == "user" and i + 1 < len(source)][-1:]
            if too_long == "truncate" and newest:
                kept = tuple(m for m in source if m.role == "system") + source[newest[0] :]
                assert len(render(kept, TOKENIZER)[0]) > length, "not even the last question fits"


def chat(tmp_path, lines, **options) -> data.Chat:
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps({"messages": [m.__dict__ for m in line]}) for line in lines))
    return data.Chat(data.ChatJsonl(str(path), validation=0.0), length=32, batch=2, **options)


def asks(answer: bool, size: int = 3):
    return [Message("user", "q" * size)] + [Message("assistant", "a")] * answer


def test_losses_are_counted_each_time(tmp_path, caplog):
    read = chat(tmp_path, [asks(True), asks(False), asks(True, 60), asks(True, 5) + asks(True, 20)])
    for _ in range(2):  # stored, and read again
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            read.batches(TOKENIZER, "train", 0, tmp_path / "cache").close()
        (message,) = caplog.messages
        assert "of 4 documents" in message
        for part in ("1 without a target", "1 dropped as too long", "1 truncated to the sequence length"):
            assert part in message


def test_nothing_to_learn_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nothing to learn for train: of 2 documents, 2 without a target"):
        chat(tmp_path, [asks(False)] * 2).batches(TOKENIZER, "train", 0, tmp_path / "a")
    with pytest.raises(UserError, match=r"no documents for train \(2 dropped as too long; a larger length"):
        chat(tmp_path, [asks(True, 60)] * 2).batches(TOKENIZER, "train", 0, tmp_path / "b")


def test_half_a_character_is_named_or_skipped(tmp_path, caplog):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "whole \\ud83d\\ude00"}\n{"text": "half \\ud83d"}\n')
    with pytest.raises(UserError, match=r"text.jsonl:2: has half of a surrogate pair \(\\ud83d\)"):
        list(read_json(path))
    assert [value["text"] for _, value in read_json(path, "skip")] == ["whole \U0001f600"]
    assert "skipped 1 lines with half" in caplog.text


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("invalid", ["error", "skip"])
def test_utf_16_is_refused(tmp_path, encoding, invalid):
    path = tmp_path / "text"
    path.write_bytes("\ufeffone\ntwo".encode(encoding))
    with pytest.raises(UserError, match="got UTF-16, must be UTF-8"):
        list(read_lines(path, invalid))


def test_a_separator_that_divides_nothing_is_said(tmp_path, caplog):
    for i in range(9):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    list(data.Text(str(tmp_path / "*.txt"), separator="<|end|>", validation=0.5).documents("train"))
    assert "separator: '<|end|>' is nowhere in" in caplog.text
    caplog.clear()
    list(data.Text(str(tmp_path / "*.txt"), separator=" ", validation=0.5).documents("train"))
    assert not caplog.messages
