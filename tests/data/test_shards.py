"""Stores of tokens are the same, bit for bit, however many processes and workers make them, and wherever they lie."""

import contextlib
import dataclasses
import itertools
import json

import numpy as np
import pytest
from letters import BYTES, Letters, Talks, assert_equal, take

from gptjax.data import encoding, shards
from gptjax.data.chat import Chat, Message
from gptjax.data.dataset import Pretrain
from gptjax.data.encoding import encode_texts
from gptjax.data.shards import Workers, make_store
from gptjax.data.sources import Text
from gptjax.data.tables import Jsonl
from gptjax.types import UserError


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 120)
    monkeypatch.setattr(encoding, "CHUNK", 50)
    monkeypatch.setattr(shards, "PART", 400)


@pytest.fixture
def source(request, tmp_path):
    if request.param == "one stream":
        return Letters()
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(6):
        texts = [f"{number} {i} {'x' * i}" for i in range(12 * (number != 3) + 1)]
        lines = texts if request.param == "lines" else [json.dumps({"text": text}) for text in texts]
        (folder / f"[{number}].x").write_text("\n".join(lines))
    return Text(f"{folder}/*.x", separator="\n") if request.param == "lines" else Jsonl(f"{folder}/*.x")


def made(source, folder, processes=1, count=1):
    """Files of the store that these workers make, each when the others are done."""
    for index in reversed(range(count)):
        store = make_store(source, BYTES, "train", folder, encode_texts, str, Workers(processes, index, count))
        assert (store is None) == (index > 0), "the last worker finishes the store"
    (path,) = (path for path in folder.iterdir() if path.is_dir())
    return store, {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.sampled
@pytest.mark.parametrize("source", ["one stream", "lines", "rows"], indirect=True)
def test_workers_change_nothing(source, tmp_path):
    store, expected = made(source, tmp_path / "one")
    assert len(expected) > 8
    parts = {name[:5] for name in expected if name.endswith("tokens.bin")}
    assert (len(parts) > 1) == (not isinstance(source, Letters))
    for processes, count in ((1, 2), (1, 3), (1, 9), (2, 1)):
        _, files = made(source, tmp_path / f"{processes} {count}", processes, count)
        assert files == expected
    stored = encode_texts(source.documents("train"), BYTES)
    assert store.tokens().tolist() == list(itertools.chain.from_iterable(document.ids for document in stored))
    rng = np.random.default_rng(0)
    start = rng.integers(0, store.offsets[-1] - 50, 30)
    size = rng.integers(1, 50, 30)
    found, weights = store.read(start, size)
    everything = store.tokens()
    assert found.tolist() == [t for s, n in zip(start, size, strict=True) for t in everything[s : s + n]]
    assert weights is None


def test_a_bucket_is_read_in_ranges_and_never_written_by_a_run(tmp_path):
    data, bucket = Chat(Talks(), length=32, batch=4), f"memory://{tmp_path.name}/tokens"
    with pytest.raises(UserError, match=r"^tokens: got memory://.*, which has no train tokens .* gptjax data prepare"):
        data.batches(BYTES, "train", 0, bucket)
    (encode,) = data.encodings()
    for index in (1, 0):
        make_store(data.source, BYTES, "train", bucket, encode, data.document_type, Workers(1, index, 2))
    for shard in range(2):
        with (
            contextlib.closing(data.batches(BYTES, "train", 0, bucket, shard, 2)) as theirs,
            contextlib.closing(data.batches(BYTES, "train", 0, tmp_path, shard, 2)) as ours,
        ):
            assert theirs.fingerprint == ours.fingerprint
            assert_equal(take(theirs, 5), take(ours, 5))


def test_weights_of_turns_are_kept(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Weighted(Talks):
        def documents(self, split):
            for i in range(9):
                talk = [Message("user", "q"), Message("assistant", "a" * i, weight=0.25 if i % 3 else 1.0)]
                yield (*talk, Message("user", "r"), Message("assistant", "b", weight=0.0 if i == 4 else 0.5))

    with contextlib.closing(Chat(Weighted(), length=64, batch=4).batches(BYTES, "train", 0, tmp_path)) as batches:
        found = np.concatenate([batch.weights for batch in take(batches, 3)])
    assert set(np.unique(found).tolist()) == {0.0, 0.25, 0.5, 1.0}


def test_a_worker_that_there_is_not_is_refused():
    for index, count in ((3, 3), (-1, 2)):
        with pytest.raises(UserError, match=rf"^worker: got {index}/{count}, must be from 0/{count}"):
            Workers(1, index, count)
    assert Pretrain(Letters()).encodings() == (encode_texts,)
