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

from gptjax.data import encoding, shards
from gptjax.data.chat import Chat
from gptjax.data.dataset import Pretrain
from gptjax.data.shards import tokenize
from gptjax.data.store import Tokens
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


@pytest.mark.sampled
@pytest.mark.parametrize("damage", [*DAMAGES, "missing"])
@pytest.mark.parametrize("large", [False, True])
def test_a_damaged_store_is_made_again(tmp_path, damage, large, caplog, monkeypatch):
    """Whichever file it is. Of large stores some shards are verified, the first and the last always, and all sizes."""
    if large:
        monkeypatch.setattr("gptjax.data.shards.SHARD", 20)
        monkeypatch.setattr("gptjax.data.encoding.CHUNK", 20)
        monkeypatch.setattr("gptjax.data.store.VERIFIED", 0)

    def read():
        with contextlib.closing(Chat(Talks(), length=96, batch=4).batches(BYTES, "train", 0, tmp_path)) as batches:
            return take(batches, 8)

    expected = read()
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    names = sorted(name.removeprefix("00000-") for name in files)
    assert (len(files) > 14) == large
    assert names[:4] == ["00000.json", "00000.sizes.bin", "00000.tokens.bin", "00000.weights.bin"]
    resizing = damage in ("shorter", "longer", "empty", "missing")
    last = max(files.keys() - {"header.json", "offsets.bin"})[:11]
    for name, content in files.items():
        if name.endswith("sizes.bin") or (name.endswith(".json") and name != "header.json"):
            continue  # read when shards are gathered
        if large and not resizing and not name.startswith(("00000-00000", last, "header", "offsets")):
            continue
        caplog.clear()
        (folder / name).unlink()  # a thread may still be reading it, and must not find it shorter
        if damage != "missing":
            (folder / name).write_bytes(DAMAGES[damage](content))
        assert_equal(read(), expected)
        if damage != "missing" or name != "header.json":  # without a header it is an unfinished store
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
    (path,) = tmp_path.glob("*/*.tokens.bin")
    content = bytearray(path.read_bytes())
    content[7] = 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path}: damaged: got token 65\d\d\d, must be below {BYTES.vocab}; "):
        next(batches)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_cannot_be_written_to_is_named(tmp_path, monkeypatch, code):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("gptjax.data.store.LocalFolder.write", fail)
    with pytest.raises(UserError, match=rf"^cache: cannot use {tmp_path} \({os.strerror(code)}\); .*GPTJAX_CACHE"):
        tokenize(Letters(), BYTES, "train", tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


class Interrupted(Letters):
    def documents(self, split):
        yield from itertools.islice(super().documents(split), 3)
        raise KeyboardInterrupt


class Slow(Letters):
    def documents(self, split):
        for number, text in enumerate(super().documents(split)):
            time.sleep(60 if number == 20 else 0)
            yield text


class Counting(type(BYTES)):
    encoded = 0

    def encode_batch(self, texts):
        found = super().encode_batch(texts)
        Counting.encoded += len(found)
        return found


def small_shards(folder):
    shards.SHARD, encoding.CHUNK = 100, 50
    tokenize(Slow(), BYTES, "train", folder)


def test_what_was_killed_goes_on_after_its_last_shard(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        tokenize(Interrupted(), BYTES, "train", tmp_path)
    assert not list(tmp_path.glob("*/header.json"))

    killed = multiprocessing.get_context("spawn").Process(target=small_shards, args=(tmp_path,))
    killed.start()
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*/*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.kill()
    killed.join()
    assert len(list(tmp_path.glob("*/*.json"))) >= 2
    assert not list(tmp_path.glob("*/header.json"))
    (left,) = (path.with_suffix(".partial") for path in list(tmp_path.glob("*/*.json"))[:1])
    left.write_text("of a write that was killed")

    monkeypatch.setattr(shards, "SHARD", 100)
    monkeypatch.setattr(encoding, "CHUNK", 50)
    store = tokenize(Letters(), Counting(b"", BYTES.specials), "train", tmp_path)
    assert 0 < Counting.encoded < 37
    np.testing.assert_array_equal(store.tokens(), tokenize(Letters(), BYTES, "train", tmp_path / "other").tokens())
    assert not list(tmp_path.glob("*/*.partial"))


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
