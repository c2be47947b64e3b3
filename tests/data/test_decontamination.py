"""Laws of decontamination: what is injected is found, by every kind of injection, and nothing else."""

import json
import random

import pytest

from gptjax.data.prepare import Decontaminate, Drop, clean_files
from gptjax.data.prepare.decontaminate import injections, probe, read_items
from gptjax.types import UserError

FRAME = "Please answer the following question with one of the letters:"


def texts(draw, count, words):
    return [" ".join("".join(draw.choices("bcdfghklmn", k=5)) for _ in range(words)) for _ in range(count)]


@pytest.fixture
def items(tmp_path):
    """Multiple choice, of questions of 5 to 24 words within a frame, and options of one to three."""
    draw = random.Random(0)
    rows = []
    for words in range(5, 25):
        for question in texts(draw, 3, words):
            options = {"text": texts(draw, 4, words % 3 + 1), "label": ["A", "B", "C", "D"]}
            rows.append({"question": f"{FRAME} {question}?", "choices": options, "answerKey": "B", "id": 7})
    path = tmp_path / "choice.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, rows


def test_every_kind_of_injection_is_found(items):
    path, rows = items
    step = Decontaminate((str(path),))
    recall = probe(step, [*read_items(path, ())])
    found, of = recall.pop("the first field alone")
    assert found == sum(
        len(row["question"].split()) - 10 >= 8 for row in rows
    )  # shorter questions are no evidence alone
    assert of == len(rows)
    assert set(recall.values()) == {(len(rows), len(rows))}
    assert len(recall) == 4
    table = step.appendix()
    assert table.title == "Decontaminate: injected items found, of 60"
    assert ("verbatim", 60, 60, 1.0) in table.rows


def test_lines_of_eight_words_do_not_escape(tmp_path):
    """As they do from 13-grams."""
    lines = texts(random.Random(1), 20, 8)
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    step = Decontaminate((str(tmp_path / "lines.txt"),))
    for line in lines:
        for text in injections(((line,),), "Some filler, before and after.").values():
            assert step(text) == Drop("contaminated: lines.txt")
        assert not isinstance(step(" ".join(line.split()[:7])), Drop)
    blunt = Decontaminate((str(tmp_path / "lines.txt"),), shortest=9)
    assert not isinstance(blunt(lines[0]), Drop)
    assert blunt.appendix().title.endswith("; 20 have no sequence of 9 words")


def test_of_a_long_text_the_longest_n_gram_is_evidence_and_one_word_less_is_not(tmp_path):
    (text,) = texts(random.Random(2), 1, 60)
    (tmp_path / "one.txt").write_text(text)
    for longest in (10, 13):
        step = Decontaminate((str(tmp_path / "one.txt"),), longest=longest)
        for start in range(60 - longest + 1):
            words = text.split()[start : start + longest]
            assert step("Said: " + " ".join(words) + " or so").reason == "contaminated: one.txt"
            assert not isinstance(step("Said: " + " ".join(words[:-1]) + " or so"), Drop)


def test_frames_and_other_texts_are_kept(items):
    path, _ = items
    step = Decontaminate((str(path),))
    others = texts(random.Random(3), 100, 100)
    for text in [FRAME, f"{FRAME} who is it? {FRAME}", "", *others]:
        assert step(text) == text


def test_chinese_items_are_found_by_characters(tmp_path):
    draw = random.Random(4)
    question = "".join(chr(0x4E00 + draw.randrange(3000)) for _ in range(20))
    (tmp_path / "zh.jsonl").write_text(json.dumps({"问题": question}, ensure_ascii=False))
    step = Decontaminate((str(tmp_path / "zh.jsonl"),))
    assert isinstance(step(f"前面的话，{question[:9]}\n{question[9:]}，后面的话。"), Drop)
    assert not isinstance(step(question[:12]), Drop)


def test_the_report_has_recall_and_counts(items, tmp_path):
    path, rows = items
    pages = [*texts(random.Random(5), 5, 50), f"see {rows[40]['question']}"]
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps({"text": page}) + "\n" for page in pages))
    step = Decontaminate((str(path),), fields=("question", "choices"))
    report = clean_files([str(tmp_path / "pages.jsonl")], tmp_path / "out", (step,))
    assert report.steps[0].dropped == {"contaminated: choice.jsonl": 1}
    assert "| short options with other labels | 60 | 60 | 1 |" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.real
def test_published_items_are_found(shared):
    for name in ("arc_easy/train.json", "multiarith/test.json"):
        table = Decontaminate((str(shared / "data" / name),)).appendix()
        assert all(recall == 1 for *_, recall in table.rows)


def test_mistakes_are_named(items):
    path, _ = items
    with pytest.raises(UserError, match=r"^fields: .*choice.jsonl:1: got question, choices, .*, must have text"):
        Decontaminate((str(path),), fields=("text",))("some words")
    with pytest.raises(UserError, match=r"^shortest: got 14"):
        Decontaminate((str(path),), shortest=14)
