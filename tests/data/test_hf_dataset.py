"""Data sets of the `datasets` library, from small folders of every kind that it writes."""

import json
import logging

import pytest

from gptjax import data
from gptjax.data import HFDataset, Message
from gptjax.io import retry
from gptjax.types import UserError

datasets = pytest.importorskip("datasets")
TRAIN, TEST = [f"train {n}" for n in range(80)], [f"held out {n}" for n in range(20)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The library's cache, in the test's folder, and no progress bars."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def both(source):
    return [list(source.documents(split)) for split in ("train", "validation")]


def rows(texts):
    return datasets.Dataset.from_list([{"n": n, "text": text} for n, text in enumerate(texts)])


def saved(folder, name):
    datasets.DatasetDict({"train": rows(TRAIN), name: rows(TEST)}).save_to_disk(folder)


def parquet(folder, name):
    (folder / "data").mkdir(parents=True)
    rows(TRAIN[:50]).to_parquet(folder / "data" / "train-00000-of-00002.parquet")
    rows(TRAIN[50:]).to_parquet(folder / "data" / "train-00001-of-00002.parquet")
    rows(TEST).to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")


def jsonl(folder, name):
    folder.mkdir()
    for split, texts in (("train", TRAIN), (name, TEST)):
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))


@pytest.mark.parametrize("make", [saved, parquet, jsonl])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_folder_has_its_own_splits(tmp_path, make, streaming):
    make(tmp_path / "set", "validation")
    source = HFDataset(str(tmp_path / "set"), streaming=streaming)
    assert both(source) == [TRAIN, TEST]
    assert both(HFDataset(str(tmp_path / "set"), streaming=streaming, limit=7)) == [TRAIN[:7], TEST[:7]]
    assert source.fingerprint() == HFDataset(str(tmp_path / "set"), streaming=streaming).fingerprint()
    before = source.fingerprint()
    next(path for path in (tmp_path / "set").rglob("*") if path.is_file()).touch()
    assert source.fingerprint() != before


@pytest.mark.parametrize("make", [saved, parquet, jsonl])
def test_without_a_validation_split_a_part_is_held_out_and_said(tmp_path, make, caplog):
    make(tmp_path / "set", "test")
    folder = str(tmp_path / "set")
    with caplog.at_level(logging.WARNING):
        train, validation = both(HFDataset(folder))
    assert (
        "has no split named validation, but train, test; a tenth of train, chosen by a hash, is held out" in caplog.text
    )
    assert sorted(train + validation) == sorted(TRAIN)
    assert 2 <= len(validation) < 20
    assert both(HFDataset(folder, validation="test")) == [TRAIN, TEST]
    assert len(both(HFDataset(folder, validation=0.5))[1]) > 30
    assert list(HFDataset(folder, validation=0).documents("train")) == TRAIN
    with pytest.raises(UserError, match=r"^validation: got dev, must be a split of \S+: train, test$"):
        list(HFDataset(folder, validation="dev").documents("validation"))
    with pytest.raises(UserError, match=r"^train: got all, must be a split of \S+: train, test$"):
        list(HFDataset(folder, train="all").documents("train"))


def test_slices_of_splits(tmp_path):
    parquet(tmp_path / "set", "test")
    folder = str(tmp_path / "set")
    assert both(HFDataset(folder, train="train[:75%]", validation="train[75%:]")) == [TRAIN[:60], TRAIN[60:]]
    with pytest.raises(UserError, match=r"^train: got train\[:9\], must be a whole split here.*limit"):
        list(HFDataset(folder, train="train[:9]", streaming=True).documents("train"))


def test_conversations_with_fields_that_only_some_rows_have(tmp_path):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    other = {"type": "function", "function": {"name": "sine", "arguments": {"x": 2.0}}}
    talks = [
        [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": None, "tool_calls": [call]}],
        [{"role": "user", "content": "sin 2?"}, {"role": "assistant", "content": None, "tool_calls": [other]}],
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}],
    ]
    datasets.Dataset.from_list([{"messages": talk} for talk in talks]).save_to_disk(tmp_path / "set")
    source = data.Conversations(HFDataset(str(tmp_path / "set"), validation=0))
    assert list(source.documents("train")) == [
        (Message("user", "1+1?"), Message("assistant", None, tool_calls=(call,))),
        (Message("user", "sin 2?"), Message("assistant", None, tool_calls=(other,))),
        (Message("user", "Hi"), Message("assistant", "Hello!")),
    ]


def test_folders_that_are_none(tmp_path):
    saved(tmp_path / "set", "test")
    with pytest.raises(UserError, match=r'^text: \S+, train:1: got the fields n, text, must have a text in "body"'):
        list(HFDataset(str(tmp_path / "set"), "body").documents("train"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "code.py").write_text("raise SystemExit('was run')")
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "train.tar").write_bytes(b"\0" * 1024)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "train.parquet").write_text("PAR1")
    (tmp_path / "file").write_text("text")
    for name in ("empty", "code", "pickles", "damaged", "file"):
        with pytest.raises(UserError, match=rf"^path: got .*{name}.*[,;] must be ") as caught:
            list(HFDataset(str(tmp_path / name)).documents("train"))
        assert "\n" not in str(caught.value)


def test_a_stream_that_breaks_is_read_on(tmp_path, monkeypatch):
    """As of the hub: the library's own errors, in the middle of a split."""
    parquet(tmp_path / "set", "validation")
    original, breaks = datasets.IterableDataset.__iter__, [9, 30]

    def broken(self):
        for number, row in enumerate(original(self)):
            if breaks and number == breaks[0]:
                breaks.pop(0)
                raise ConnectionError("the hub is away")
            yield row

    monkeypatch.setattr(datasets.IterableDataset, "__iter__", broken)
    monkeypatch.setattr(retry, "PAUSE", 0.001)
    source = HFDataset(str(tmp_path / "set"), streaming=True)
    assert list(retry.stream(lambda: source.documents("train"), source)) == TRAIN
    assert not breaks


def test_a_name_that_cannot_be_reached_is_said(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    for call in (lambda s: list(s.documents("train")), lambda s: s.fingerprint()):
        with pytest.raises(UserError, match=r"^path: got owner/name, which cannot be read \(Couldn't reach"):
            call(HFDataset("owner/name"))
