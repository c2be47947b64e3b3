"""The store of tokens on disk: made once, whole or not at all, verified, named where it fails."""

import contextlib
import dataclasses
import errno
import itertools
import multiprocessing
import os
import time

import numpy as np
import pytest
from letters import BYTES, Letters, Talks, assert_equal, take

from gptjax.data.chat import Chat
from gptjax.data.pretrain import Pretrain
from gptjax.data.store import Tokens, tokenize
from gptjax.types import UserError


def test_a_source_is_tokenised_once(tmp_path):
    source = Letters()
    first = tokenize(source, BYTES, "train", tmp_path)
    again = tokenize(source, BYTES, "train", tmp_path)
    assert source.reads == ["train"]
    np.testing.assert_array_equal(first.tokens(), again.tokens())
    tokenize(dataclasses.replace(source, count=2), BYTES, "train", tmp_path)
    tokenize(source, BYTES.with_specials(["<|new|>"]), "train", tmp_path)
    tokenize(source, BYTES, "validation", tmp_path)
    assert source.reads == ["train", "train", "train", "validation"]


DAMAGES = {
    "shorter": lambda content: content[:-5],
    "longer": lambda content: content + b"\0",
    "zeros": lambda content: bytes(len(content)),  # what some file systems leave after a power cut
    "last bit": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "first bit": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "empty": lambda _: b"",
}


@pytest.mark.parametrize("damage", [*DAMAGES, "missing"])
@pytest.mark.parametrize("large", [False, True])
def test_a_damaged_store_is_made_again(tmp_path, damage, large, caplog, monkeypatch):
    """Whichever file it is. Of large files blocks are verified, the first and the last always."""
    if large:
        monkeypatch.setattr("gptjax.data.files.BLOCK", 16)
        monkeypatch.setattr("gptjax.data.files.BLOCKS", 3)

    def read():
        with contextlib.closing(Chat(Talks(), length=96, batch=4).batches(BYTES, "train", 0, tmp_path)) as batches:
            return take(batches, 8)

    expected = read()
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files.keys() == {"tokens.bin", "offsets.bin", "weights.bin", "header.json"}
    for name, content in files.items():
        caplog.clear()
        (folder / name).unlink()  # a thread may still be reading it, and must not find it shorter
        if damage != "missing":
            (folder / name).write_bytes(DAMAGES[damage](content))
        assert_equal(read(), expected)
        assert f"{folder}: damaged (" in caplog.text
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    caplog.clear()
    assert_equal(read(), expected)
    assert not caplog.text


def test_ids_beyond_the_vocabulary_are_refused(tmp_path):
    """Those that a tokenizer gives, and those that damage makes in a file that is being read."""

    class Beyond(type(BYTES)):
        def encode_batch(self, texts):
            return [[0, 256] for _ in texts]

    with pytest.raises(UserError, match=r"tokenizer: got the ids 0 to 256 .*, must be from 0 to 255"):
        tokenize(Letters(), Beyond(b"", {}), "train", tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]

    data = Pretrain(Letters(), length=16, batch=4, shuffle=False)
    batches = data.batches(BYTES, "train", 0, tmp_path)
    (path,) = tmp_path.glob("*/tokens.bin")
    content = bytearray(path.read_bytes())
    content[7] = 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path}: damaged: got token 65\d\d\d, must be below {BYTES.vocab}; "):
        next(batches)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_cannot_be_written_to_is_named(tmp_path, monkeypatch, code):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("gptjax.data.store._write", fail)
    with pytest.raises(UserError, match=rf"^cache: cannot use {tmp_path} \({os.strerror(code)}\); .*GPTJAX_CACHE"):
        tokenize(Letters(), BYTES, "train", tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


class Interrupted(Letters):
    def documents(self, split):
        yield from itertools.islice(super().documents(split), 3)
        raise KeyboardInterrupt


class Slow(Letters):
    def documents(self, split):
        for text in super().documents(split):
            time.sleep(60)
            yield text


def test_an_interrupted_tokenisation_leaves_nothing_that_counts(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        tokenize(Interrupted(), BYTES, "train", tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]

    killed = multiprocessing.get_context("spawn").Process(target=tokenize, args=(Slow(), BYTES, "train", tmp_path))
    killed.start()
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*.partial/tokens.bin")) and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.kill()
    killed.join()
    assert len(list(tmp_path.glob("*.partial"))) == 1

    source = Letters()
    tokenize(source, BYTES, "train", tmp_path)
    assert source.reads == ["train"]
    assert not list(tmp_path.glob("*.partial"))


def test_memory_mapped_tokens_are_read_where_they_are(tmp_path):
    tokens = np.arange(100, dtype=np.uint16)
    tokens[[9, 39, 99]] = 7
    tokens.tofile(tmp_path / "train.bin")
    source = Tokens(str(tmp_path / "train.bin"), str(tmp_path / "none.bin"))
    (batch,) = Pretrain(source, length=50, batch=2).evaluation(BYTES, "train", tmp_path)
    np.testing.assert_array_equal(batch.tokens.reshape(-1), tokens)
    np.testing.assert_array_equal(batch.targets.reshape(-1)[:-1], tokens[1:])
    np.testing.assert_array_equal(batch.weights.reshape(-1), [1] * 99 + [0])
    divided = dataclasses.replace(source, separator=7)
    assert tokenize(divided, BYTES, "train", tmp_path).offsets.tolist() == [0, 8, 10, 40, 100]
    with pytest.raises(UserError, match=r"validation: got .*none.bin, which does not exist"):
        tokenize(source, BYTES, "validation", tmp_path)
    np.full(9, 60_000, np.uint16).tofile(tmp_path / "none.bin")
    with pytest.raises(UserError, match="token 60000, but the tokenizer's are below"):
        tokenize(source, BYTES, "validation", tmp_path)


@pytest.mark.parametrize(("separator", "cut"), [(None, 75), (7, 80)])
def test_the_end_of_a_token_file_is_held_out(tmp_path, separator, cut):
    tokens = np.arange(100, dtype=np.uint16)
    tokens[[9, 39, 79, 99]] = 7
    tokens.tofile(tmp_path / "train.bin")
    made = Pretrain(Tokens(str(tmp_path / "train.bin"), 0.25, separator=separator), length=100, batch=1)
    for split, expected in (("train", tokens[:cut]), ("validation", tokens[cut:])):
        (batch,) = made.evaluation(BYTES, split, tmp_path)
        np.testing.assert_array_equal(batch.tokens[0, : len(expected)], expected)
        assert not batch.segments[0, len(expected) :].any()
        assert batch.weights.sum() == len(expected) - len(np.unique(batch.segments[batch.segments > 0]))
    assert (
        dataclasses.replace(made, source=Tokens(str(tmp_path / "train.bin"), 0)).evaluation(
            BYTES, "validation", tmp_path
        )
        is None
    )
    with pytest.raises(UserError, match=r"validation: got 0\.001, which leaves no document of .* for validation"):
        tokenize(Tokens(str(tmp_path / "train.bin"), 0.001, separator=7), BYTES, "validation", tmp_path)
