"""The laws of the input pipeline: nothing lost, nothing leaked, the same order whatever happens."""

import contextlib
import dataclasses
import itertools
import json
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from letters import BYTES, END, Letters, Talks, assert_equal, join, segments_of, stored, take

from gptjax.data.chat import Chat, Message, render
from gptjax.data.dataset import Pretrain
from gptjax.data.mix import Mix, Phase, Reweight, epochs, longest_epoch, order, permute
from gptjax.data.packing import BestFit, Concatenate
from gptjax.data.shards import tokenize
from gptjax.data.sources import Text
from gptjax.data.store import Tokens
from gptjax.types import UserError

PACKINGS = pytest.mark.parametrize("packing", [Concatenate(), BestFit()], ids=["concatenate", "best_fit"])


@pytest.mark.sampled
@PACKINGS
@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize("length", [5, 16, 64, 4096])
def test_an_epoch_holds_every_token_once_and_predicts_within_documents(tmp_path, packing, length, epoch):
    source = Letters()
    store = tokenize(source, BYTES, "train", tmp_path)
    rows = len(packing.plan(store.offsets, length))
    data = Pretrain(source, length=length, batch=rows, packing=packing)
    batches = data.batches(BYTES, "train", 0, tmp_path)
    batches.restore({"sequence": epoch * rows})
    batch = next(batches)
    batches.close()

    documents = [stored(text) for text in source.documents("train")]
    seen, pairs = [], []
    for tokens, targets, weights, positions in segments_of(batch):
        np.testing.assert_array_equal(positions, np.arange(len(tokens)))
        assert (weights[:-1] == 1).all()
        np.testing.assert_array_equal(tokens[1:], targets[:-1])  # so it is part of one document, or the next is wrong
        assert any(contains(document, list(tokens)) for document in documents)
        assert weights[-1] == (tokens[-1] != END)
        assert weights[-1] or targets[-1] == 0
        seen += list(tokens)
        pairs += [(a, b) for a, b, w in zip(tokens, targets, weights, strict=True) if w]
    assert sorted(seen) == sorted(itertools.chain(*documents))
    assert sorted(pairs) == sorted(itertools.chain(*(itertools.pairwise(d) for d in documents)))
    padding = batch.segments == 0
    for field in (batch.tokens, batch.targets, batch.weights, batch.positions):
        assert not np.asarray(field)[padding].any()
    assert (np.diff(padding.astype(int), axis=1) >= 0).all()  # on the right


def contains(document, part):
    return any(document[i : i + len(part)] == part for i in range(len(document) - len(part) + 1))


def test_concatenate_has_no_padding_and_best_fit_keeps_documents_whole(tmp_path):
    source, count = Letters(), {}
    for packing in (Concatenate(), BestFit()):
        batches = Pretrain(source, 48, 7, packing=packing).evaluation(BYTES, "train", tmp_path)
        count[packing] = sum((batch.segments == 0).sum() for batch in batches)
        pieces = [list(tokens) for batch in batches for tokens, *_ in segments_of(batch)]
        whole = sorted(pieces) == sorted(stored(text) for text in source.documents("train"))
        assert whole == (packing == BestFit())
    assert count[Concatenate()] < 7 * 48
    assert count[BestFit()] < 8 * 48


def test_windows_are_cut_at_other_places_in_another_epoch(tmp_path):
    data = Pretrain(Letters(), length=16, batch=1, shuffle=False)
    rows = len(data.packing.plan(tokenize(data.source, BYTES, "train", tmp_path).offsets, 16))
    batches = data.batches(BYTES, "train", 0, tmp_path)
    made = take(batches, 2 * rows)
    batches.close()
    first, second = ({x.tokens.tobytes() for x in part} for part in (made[:rows], made[rows:]))
    assert len(first & second) < len(first) / 2  # some windows hold but one letter


def test_chat_weights_are_those_of_the_rendering(tmp_path):
    batches = Chat(Talks(), length=128, batch=4).evaluation(BYTES, "train", tmp_path)
    got = [segment for batch in batches for segment in segments_of(batch)]
    expected = {tuple(ids): weights for ids, weights in (render(talk, BYTES) for talk in Talks().documents("train"))}
    assert len(got) == len(expected) == 9
    for tokens, _, weights, _ in got:
        np.testing.assert_array_equal(weights, [*expected[tuple(tokens)][1:], 0])


def test_the_evaluation_covers_the_split_in_batches_of_one_shape(tmp_path):
    data = Pretrain(Letters(), length=8, batch=4)
    batches = data.evaluation(BYTES, "validation", tmp_path)
    assert len(batches) == len(list(batches)) == 2  # 13 + 32 tokens are 6 rows
    assert {x.tokens.shape for x in batches} == {(4, 8)}
    texts = list(data.source.documents("validation"))
    everything = np.concatenate([x.tokens[x.segments > 0] for x in batches])
    assert list(everything) == stored(texts[0]) + stored(texts[1])
    assert not batches[1].segments[2:].any()
    assert not batches[1].weights[2:].any()
    assert_equal(list(batches), list(data.evaluation(BYTES, "validation", tmp_path)))
    (few,) = data.evaluation(BYTES, "validation", tmp_path, sequences=3)
    np.testing.assert_array_equal(few.tokens[:3], np.concatenate([x.tokens for x in batches])[[0, 2, 4]])
    assert not few.segments[3:].any()
    parts = [data.evaluation(BYTES, "validation", tmp_path, shard, 2) for shard in (0, 1)]
    assert_equal([join(pair) for pair in zip(*parts, strict=True)], list(batches))


@PACKINGS
def test_the_order_is_a_function_of_the_seed_and_differs_between_epochs(tmp_path, packing):
    data = Pretrain(Letters(), length=48, batch=1, packing=packing)
    rows = len(data.evaluation(BYTES, "train", tmp_path))

    def order(data, seed):
        batches = data.batches(BYTES, "train", seed, tmp_path)
        made = [batch.tokens.tobytes() for batch in take(batches, 2 * rows)]
        batches.close()
        return made[:rows], made[rows:]

    first, second = order(data, 1)
    assert (first, second) == order(data, 1)
    assert first != second
    other, _ = order(data, 2)
    assert first != other
    unshuffled, _ = order(dataclasses.replace(data, shuffle=False), 1)
    assert first != unshuffled == [x.tokens.tobytes() for x in data.evaluation(BYTES, "train", tmp_path)]
    assert sorted(first) == sorted(other) == sorted(unshuffled)
    assert (sorted(first) == sorted(second)) == (packing == BestFit())  # the windows are others, whole documents stay


@pytest.mark.sampled
@pytest.mark.parametrize("step", [0, 7, 505])
@pytest.mark.parametrize("source", [Letters(), Mix((Letters(), Letters(5, "b")), (3, 1))], ids=["one", "mixed"])
def test_a_restored_position_goes_on_exactly_there_on_any_number_of_processes(tmp_path, source, step):
    data = Pretrain(source, length=16, batch=4)  # 256 steps are made at a time by one process, 512 by each of two
    batches = data.batches(BYTES, "train", 3, tmp_path)
    take(batches, step)
    state = json.loads(json.dumps(batches.state()))
    assert state["sequence"] == step * data.batch
    expected = take(batches, 10)
    batches.close()

    for num_shards in (4, 2, 1):
        parts = []
        for shard in range(num_shards):
            part = data.batches(BYTES, "train", 3, tmp_path, shard, num_shards)
            next(part)
            part.restore(state)
            parts.append(take(part, 10))
            assert part.state() == batches.state()
            part.close()
        assert_equal([join(pair) for pair in zip(*parts, strict=True)], expected)


@pytest.mark.parametrize("source", [Letters(), Mix((Letters(), Letters(5, "b")), (3, 1))], ids=["one", "mixed"])
def test_another_batch_size_skips_and_repeats_no_sequence(tmp_path, source):
    """Over the end of an epoch, and where the position is no multiple of the new batch size."""
    sizes = [4, 6, 1, 16, 3, 8, 5, 40, 7, 2]
    position, found = {"sequence": 0}, []
    for size in sizes:
        data = Pretrain(source, length=16, batch=size)
        with contextlib.closing(data.batches(BYTES, "train", 3, tmp_path)) as batches:
            batches.restore(position)
            found += take(batches, 5)
            position = batches.state()
    with contextlib.closing(Pretrain(source, length=16, batch=1).batches(BYTES, "train", 3, tmp_path)) as batches:
        assert_equal(join(found), join(take(batches, 5 * sum(sizes))))
        assert position == batches.state()


def test_batches_say_which_data_they_are_made_of(tmp_path):
    """By their content: a source that was copied or touched is the same, one that was changed is not."""

    def fingerprint(data, cache="cache"):
        return data.batches(BYTES, "train", 0, tmp_path / cache).fingerprint

    class Touched(Letters):
        def fingerprint(self):
            return "another"

    data = Pretrain(Letters(), length=16, batch=4)
    same = [data, dataclasses.replace(data, batch=8, length=32), dataclasses.replace(data, source=Touched())]
    mixed = Mix((Letters(), Letters(5)), (1, 1))
    others = [Letters(38), Letters(letter="b"), mixed, dataclasses.replace(mixed, sources=mixed.sources[::-1])]
    assert fingerprint(data) != data.evaluation(BYTES, "validation", tmp_path).fingerprint
    assert fingerprint(data) == data.evaluation(BYTES, "train", tmp_path).fingerprint
    assert {fingerprint(data) for data in same} == {fingerprint(data, "elsewhere")}
    assert len({fingerprint(dataclasses.replace(data, source=source)) for source in (Letters(), *others)}) == 5
    np.arange(99, dtype=np.uint16).tofile(tmp_path / "a")
    np.arange(99, dtype=np.uint16).tofile(tmp_path / "b")
    np.arange(98, dtype=np.uint16).tofile(tmp_path / "c")
    a, b, c = (fingerprint(Pretrain(Tokens(str(tmp_path / name), ""), length=8)) for name in "abc")
    assert a == b != c


def test_a_mix_keeps_its_proportions_and_repeats_what_runs_out(tmp_path):
    source = Mix((Letters(30, "a"), Letters(4, "b"), Letters(30, "c")), (0.6, 0.3, 0.1))
    batches = Pretrain(source, length=16, batch=10, packing=BestFit()).batches(BYTES, "train", 0, tmp_path)
    rows = np.concatenate([x.tokens for x in take(batches, 100)])
    batches.close()
    letters = [max("abc", key=lambda letter, row=row: (row == BYTES.encode(letter)[0]).sum()) for row in rows]
    named = np.array([(row[:, None] == [BYTES.encode(x)[0] for x in "abc"]).any() for row in rows])
    for letter, share in zip("abc", (0.6, 0.3, 0.1), strict=True):
        got = np.cumsum(np.array(letters)[named] == letter) / np.arange(1, named.sum() + 1)
        assert abs(got[-1] - share) < 0.03
        assert abs(got[200] - share) < 0.06


def test_a_curriculum_changes_the_weights_at_its_steps_and_repeats_no_sequence_before_an_epoch_ends():
    sizes, batch = [500, 40, 300], 10
    source = Mix(
        (Letters(),) * 3, (3, 1, 0), (Reweight(20, (1, 1, 2)), Reweight(50, (0, 0, 1)), Reweight(60, (1, 0, 1)))
    )
    phases = source.phases(batch)
    which, index = order(sizes, phases, 0)(np.arange(900))
    for start, end, weights in [
        (0, 200, (3, 1, 0)),
        (200, 500, (1, 1, 2)),
        (500, 600, (0, 0, 1)),
        (600, 900, (1, 0, 1)),
    ]:
        counts = np.bincount(which[start:end], minlength=3)
        assert np.abs(counts - (end - start) * np.array(weights) / sum(weights)).max() <= 1
    for source_number, size in enumerate(sizes):
        read = index[which == source_number]
        for epoch in range(len(read) // size + 1):
            part = read[epoch * size : (epoch + 1) * size]
            assert len({*part}) == len(part)
            assert set(part // size) <= {epoch}
    shuffled = np.random.default_rng(0).permutation(900)
    again = order(sizes, phases, 0)(shuffled)
    assert all(np.array_equal(a, b[shuffled]) for a, b in zip(again, (which, index), strict=True))
    assert np.allclose(epochs(sizes, phases, 900), np.bincount(which) / sizes, atol=3 / 40)
    until = int(longest_epoch(sizes, phases))
    assert min(epochs(sizes, phases, until - 1)) < 1 <= min(epochs(sizes, phases, until))
    assert longest_epoch(sizes, [*phases, Phase(900, (0.0, 1.0, 1.0))]) == float("inf")
    plain, later = ([Phase(0, (3, 2, 1)), *more] for more in ([], [Phase(900, (1, 1, 1))]))
    same = zip(order(sizes, plain, 0)(shuffled), order(sizes, later, 0)(shuffled), strict=True)
    assert all(np.array_equal(a, b) for a, b in same)


def test_a_curriculum_resumes(tmp_path):
    source = Mix((Letters(30, "a"), Letters(30, "b")), (1, 0), (Reweight(3, (1, 3)),))
    data = Pretrain(source, length=16, batch=4)
    whole = data.batches(BYTES, "train", 0, tmp_path)
    expected = take(whole, 6)
    b = BYTES.encode("b")[0]
    assert [(batch.tokens == b).any() for batch in expected] == [False] * 3 + [True] * 3
    whole.restore({"sequence": 8})
    assert all(np.array_equal(x.tokens, y.tokens) for x, y in zip(take(whole, 4), expected[2:], strict=True))
    whole.close()


def test_permute_is_a_permutation_that_looks_random():
    for size in (1, 2, 3, 10, 97, 1000):
        assert sorted(permute(np.arange(size), size, (0, 1))) == list(range(size))
    index = np.arange(5)
    orders = {tuple(permute(index, 5, (seed,))) for seed in range(1000)}
    assert len(orders) == 120
    places = np.stack([permute(np.arange(16), 16, (7, seed)) for seed in range(1600)])
    counts = np.stack([np.bincount(places[:, i], minlength=16) for i in range(16)])
    chi_squared = ((counts - 100) ** 2 / 100).sum()  # of 225 degrees of freedom
    assert 225 - 5 * 450**0.5 < chi_squared < 225 + 5 * 450**0.5
    big = permute(np.arange(10_000), 10_000, (0,))
    assert abs(np.corrcoef(big[:-1], big[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(np.arange(10_000), big)[0, 1]) < 0.05


def test_a_mix_is_evaluated_on_the_sources_that_hold_out(tmp_path, caplog):
    for name in "ab":
        (tmp_path / name).write_text("\n".join(f"{name}{i}" for i in range(99)))
    a, b = (Text(str(tmp_path / name), "\n", validation) for name, validation in (("a", 0.3), ("b", 0.0)))
    mixed = Pretrain(Mix((a, b), (1, 1)), length=16, batch=4)
    of_a = list(Pretrain(a, length=16, batch=4).evaluation(BYTES, "validation", tmp_path))
    found = list(mixed.evaluation(BYTES, "validation", tmp_path))
    assert all(np.array_equal(x.tokens, y.tokens) for x, y in zip(found, of_a, strict=True))
    assert "no validation split, and no part in the validation loss: Text(" in caplog.text
    assert Pretrain(b, length=16, batch=4).evaluation(BYTES, "validation", tmp_path) is None


def test_an_exception_keeps_the_position_and_close_ends_the_thread(tmp_path, monkeypatch):
    before = set(threading.enumerate())
    batches = Pretrain(Letters(), length=16, batch=4).batches(BYTES, "train", 0, tmp_path)
    expected = take(batches, 6)
    batches.restore({"sequence": 8})
    next(batches)
    interrupted = KeyboardInterrupt()

    def interrupt(*_):
        monkeypatch.undo()
        raise interrupted

    monkeypatch.setattr(jax.tree, "map", interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(batches)
    assert batches.state()["sequence"] == 12
    assert_equal(take(batches, 3), expected[3:])
    batches.close()
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


def test_a_prompt_begins_what_was_trained_on():
    assert stored("Once upon")[:5] == Pretrain(Letters()).prompt(BYTES, "Once")
    talk = (Message("user", "Hi"), Message("assistant", "Hello"))
    ids, weights = render(talk, BYTES)
    assert Chat(Talks()).prompt(BYTES, "Hi") == ids[: weights.index(1)]


def test_bad_input_is_named(tmp_path):
    class Empty(Letters):
        def documents(self, split):
            return iter(())

    data = Pretrain(Letters(), length=16, batch=6)
    with pytest.raises(UserError, match="batch: got 6, must be a multiple of the number of data shards, 4"):
        data.batches(BYTES, "train", 0, tmp_path, 0, 4)
    with pytest.raises(UserError, match=r"source: .*Empty.* has no documents for train"):
        Pretrain(Empty()).batches(BYTES, "train", 0, tmp_path)
    with pytest.raises(UserError, match="length: got 0"):
        Pretrain(Letters(), length=0)
    with pytest.raises(UserError, match="seed: got -1"):
        data.batches(BYTES, "train", -1, tmp_path)
    with pytest.raises(UserError, match="weights: got"):
        Mix((Letters(),), (1.0, 2.0))
    with pytest.raises(UserError, match=r"^weights: got 0 for source 1"):
        Mix((Letters(), Letters(5)), (1.0, 0.0))
    with pytest.raises(UserError, match=r"^schedule: got the steps \[5, 5\]"):
        Mix((Letters(),), (1.0,), (Reweight(5, (1.0,)), Reweight(5, (2.0,))))
    assert not list(Path(tmp_path).glob("*.partial"))
