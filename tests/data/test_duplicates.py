"""Laws of exact and near duplicates, over any corpus in memory."""

import random

import numpy as np
import pytest

from gptjax.data.prepare import ExactDuplicates, NearDuplicates
from gptjax.data.prepare.words import n_grams, normal_words


class InMemory:
    """A corpus whose signatures come in parts of seven."""

    def __init__(self, texts, step):
        self.texts, self.step = texts, step

    def __len__(self):
        return len(self.texts)

    def signatures(self):
        for start in range(0, len(self.texts), 7):
            yield self.step.signature(self.texts[start : start + 7])

    def text(self, document):
        return self.texts[document]


def found(step, texts, tmp_path):
    return {one.document: one.kept for one in step.find(InMemory(texts, step), tmp_path)}


def grams(text, n=5):
    return set(n_grams(normal_words(text), n))


def similarity(a, b):
    a, b = grams(a), grams(b)
    return len(a & b) / len(a | b)


def article(draw, words=200, alphabet="abcdefghij"):
    return " ".join("".join(draw.choices(alphabet, k=4)) for _ in range(words))


def test_exact_duplicates_ignore_case_punctuation_and_space(tmp_path):
    texts = ["A cat, a dog.", "other", "a CAT\n a dog!", "Other…", "a cat dog", "???", "???", "!!!"]
    assert found(ExactDuplicates(), texts, tmp_path) == {2: 0, 3: 1, 6: 5}
    assert found(ExactDuplicates(), [], tmp_path) == {}


def test_a_dropped_document_is_near_one_that_is_kept_and_no_two_kept_ones_are_near(tmp_path):
    draw, step = random.Random(0), NearDuplicates(threshold=0.8)
    texts = []
    for _ in range(15):
        original = article(draw).split()
        for _ in range(3):
            copy = [*original]
            for at in draw.sample(range(len(copy)), draw.choice([0, 1, 1, 60])):
                copy[at] = "new"
            texts.append(" ".join(copy))
    draw.shuffle(texts)
    dropped = found(step, texts, tmp_path)
    assert 5 < len(dropped) < 30
    for document, kept in dropped.items():
        assert kept < document
        assert kept not in dropped
        assert similarity(texts[document], texts[kept]) >= step.threshold
    kept = [text for i, text in enumerate(texts) if i not in dropped]
    assert max(similarity(a, b) for i, a in enumerate(kept) for b in kept[:i]) < step.threshold


def test_documents_that_share_a_frame_are_not_joined(tmp_path):
    """A footer in common is a shared band for some of the pairs, and no duplicate."""
    draw = random.Random(1)
    footer = article(draw, 60)
    texts = [f"{article(draw, 90)} {footer}" for _ in range(100)]
    step = NearDuplicates(bands=100, rows=1)  # nearly all are candidates
    assert found(step, texts, tmp_path) == {}


def test_a_chain_of_small_changes_does_not_drop_all_links(tmp_path):
    draw = random.Random(2)
    text = article(draw).split()
    chain = [" ".join(text)]
    for at in range(0, 200, 4):
        text[at : at + 4] = article(draw, 4).split()
        chain.append(" ".join(text))
    dropped = found(NearDuplicates(), chain, tmp_path)
    assert len(dropped) >= len(chain) // 2
    assert all(similarity(chain[document], chain[kept]) >= 0.8 for document, kept in dropped.items())
    assert len(chain) - len(dropped) > 8


def test_chinese_is_compared_by_characters(tmp_path):
    draw = random.Random(3)
    text = "".join(chr(0x4E00 + draw.randrange(2000)) for _ in range(300))
    changed = text[:150] + "新" + text[151:]
    other = "".join(draw.sample(text, len(text)))
    assert found(NearDuplicates(), [text, other, changed], tmp_path) == {2: 0}


@pytest.mark.parametrize(("similar", "share"), [(0.9, 0.99), (0.8, 0.9), (0.5, 0.06)])
def test_candidates_have_the_share_of_the_equation(similar, share):
    """1 - (1 - s^8)^14, of sets of numbers with this similarity."""
    draw, step = random.Random(4), NearDuplicates(n=1)
    common = round(400 * similar / (1 + similar))
    pairs = []
    for pair in range(150):
        words = [f"w{pair}x{i}" for i in range(400)]
        draw.shuffle(words)
        rest = (400 - 2 * common) // 2
        pairs += [" ".join(words[: common + rest]), " ".join([*words[:common], *words[common + rest :][:rest]])]
    hashes = step.signature(pairs)
    candidates = np.mean((hashes[0::2] == hashes[1::2]).any(1))
    expected = 1 - (1 - similar**8) ** 14
    assert expected == pytest.approx(share, abs=0.03)
    assert candidates == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 150) ** 0.5 + 0.01)
