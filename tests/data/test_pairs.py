"""Laws of sequence-to-sequence data: pairs are whole, each target beside its own source, whatever shares the row."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from gptjax import data
from gptjax.data.packing import NoPacking
from gptjax.types import Pair, UserError

BYTES = data.Bytes().build(iter(()))


@dataclasses.dataclass(frozen=True)
class Reversed:
    """Strings of 1 to 7 letters, and each backwards three times."""

    def documents(self, split):
        rng = np.random.default_rng(split == "train")
        for _ in range(40):
            text = "".join(rng.choice(list("abcdef"), rng.integers(1, 8)))
            yield data.TextPair(text, text[::-1] * 3)

    def fingerprint(self):
        return "reversed"


@pytest.mark.parametrize("packing", [data.BestFit(), NoPacking()])
def test_each_target_stands_beside_its_own_source(packing, tmp_path):
    read = data.Pairs(Reversed(), length=48, batch=4, packing=packing, source_length=16)
    found = []
    for batch in read.evaluation(BYTES, "validation", tmp_path):
        assert isinstance(batch, Pair)
        assert (batch.tokens.shape, batch.source.shape) == ((4, 48), (4, 16))
        for row in range(4):
            for segment in range(1, batch.segments[row].max(initial=0) + 1):
                mine, its = batch.segments[row] == segment, batch.source_segments[row] == segment
                source, target = batch.source[row][its], batch.targets[row][mine]
                found.append((BYTES.decode(source), BYTES.decode(target)))
                assert source.tolist() == [BYTES.bos, *BYTES.encode(found[-1][0]), BYTES.eos]
                assert target.tolist() == [*BYTES.encode(found[-1][1]), BYTES.eos]
                assert batch.tokens[row][mine].tolist() == [BYTES.bos, *target[:-1]]
                assert batch.weights[row][mine].tolist() == [1] * len(target)
                np.testing.assert_array_equal(batch.positions[row][mine], np.arange(len(target)))
                np.testing.assert_array_equal(batch.source_positions[row][its], np.arange(len(source)))
        padding = batch.segments == 0
        assert not any(np.asarray(x)[padding].any() for x in (batch.tokens, batch.targets, batch.weights))
        assert not np.asarray(batch.source)[batch.source_segments == 0].any()
    assert sorted(found) == sorted((pair.source, pair.target) for pair in Reversed().documents("validation"))
    assert (batch.segments.max() > 1) == (packing != NoPacking())


def test_what_is_longer_than_a_row_is_truncated(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"en": "abcdefgh", "de": "ijklmnop"}')
    source = data.PairsJsonl(str(path), source="en", target="de", validation=0.0)
    batch = next(data.Pairs(source, length=4, batch=1, source_length=5).batches(BYTES, "train", 0, tmp_path))
    assert (batch.source[0].tolist(), batch.targets[0].tolist()) == (
        [BYTES.bos, *BYTES.encode("abcd")],
        BYTES.encode("ijkl"),
    )
    assert batch.weights.tolist() == [[1] * 4]


def test_what_has_no_pairs_is_refused(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"source": "a", "text": "b"}))
    for build, message in (
        (lambda: data.Pairs(Reversed(), packing=data.Concatenate()), "packing: got Concatenate"),
        (lambda: data.Pairs(Reversed(), source_length=0), "source_length: got 0"),
        (lambda: list(data.PairsJsonl(str(path)).documents("train")), 'got the fields source, text, must .* "target"'),
        (
            lambda: data.Pairs(data.Jsonl(str(path), validation=0.0)).batches(BYTES, "train", 0, tmp_path),
            r"source: got Jsonl\(.*whose documents are str, must be TextPair",
        ),
        (
            lambda: data.Pairs(data.Tokens("a", "b")).batches(BYTES, "train", 0, tmp_path),
            r"source: got Tokens\(.*must be TextPair",
        ),
    ):
        with pytest.raises(UserError, match=message):
            build()
