"""Extractive question answering: data, loss, answers, and an experiment."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest

import gptjax
from gptjax import data, evals, optim
from gptjax.data.questions import Windows, answer_tokens
from gptjax.data.show import as_text
from gptjax.experiment.experiment import Experiment, Stage
from gptjax.interop.tokenizer_json import from_pieces
from gptjax.nn import ClassifierConfig, EncoderConfig, SpanExtractorConfig, TransformerConfig
from gptjax.objectives import Classification, SpanExtraction
from gptjax.types import UserError

BYTES = data.Bytes().build(iter(()))
PASSAGE = "Ada lived in London. Carl lived in Bonn."
ROW = {"context": PASSAGE, "question": "Where is Carl?", "answers": {"text": ["Bonn"], "answer_start": [35]}}


def source(path, rows, **changes) -> data.QuestionsJsonl:
    path.write_text("\n".join(map(json.dumps, rows)))
    return data.QuestionsJsonl(str(path), **{"validation": 0.0, **changes})


def squad(*asked: dict) -> dict:
    return {"data": [{"title": "x", "paragraphs": [{"context": PASSAGE, "qas": [*asked]}]}]}


def test_both_forms_of_squad_are_read_and_wrong_ones_named(tmp_path):
    at = [{"text": "Bonn", "answer_start": 35}, {"text": "in Bonn", "answer_start": 32}]
    file = squad(
        {"id": "a", "question": "Where is Carl?", "answers": at},
        {"id": "b", "question": "Where is Eve?", "answers": [], "is_impossible": True},
    )
    found = list(source(tmp_path / "squad.json", [file]).documents("train"))
    assert found == [
        data.Question(PASSAGE, "Where is Carl?", ("Bonn", "in Bonn"), (35, 32)),
        data.Question(PASSAGE, "Where is Eve?", (), ()),
    ]
    rows = source(tmp_path / "rows.jsonl", [ROW, {**ROW, "answers": {"text": [], "answer_start": []}}])
    assert [question.starts for question in rows.documents("train")] == [(35,), ()]
    halves = [list(source(tmp_path / "squad.json", [file], validation=1 - 1e-9).documents("validation"))]
    assert len(halves[0]) == 2, "all questions about a passage are in one split"

    wrong = {"text": ["Bonn"], "answer_start": [34]}
    for answers, line in (
        (wrong, "question 'Where is Carl.': answer_start: got 34, where the context has ' Bon', must be at 'Bonn'"),
        ({"text": ["Bonn"], "answer_start": []}, "got 1 texts and 0 offsets, must be as many"),
        ({"text": ["Bonn"], "answer_start": ["35"]}, "got 'Bonn' at '35', must be a text at a character"),
        ("Bonn", "answers: got 'Bonn' .str., must be list or Mapping"),
    ):
        with pytest.raises(UserError, match=rf"bad\.jsonl:2: .*{line}"):
            list(source(tmp_path / "bad.jsonl", [ROW, {**ROW, "answers": answers}]).documents("train"))
    asked = {"id": "a", "question": "?", "answers": [{"text": "Bonn", "answer_start": 3}]}
    with pytest.raises(UserError, match=r"bad\.json:1: question 'a': answer_start: got 3, where"):
        list(source(tmp_path / "bad.json", [squad(asked)]).documents("train"))


@pytest.mark.parametrize("name", ["bytes", "characters", "sentencepiece"])
def test_tokens_know_their_characters(name):
    """Each token's span has its own text; together they cover the text."""
    texts = [PASSAGE, "née — 数学 😀", "  two\n\nlines "]
    tokenizer = {
        "bytes": data.Bytes(),
        "characters": data.TrainCharacters(),
        "sentencepiece": data.TrainSentencePiece(vocab=300),
    }[name].build(iter([*texts * 5]))
    for text in texts:
        ids, spans = tokenizer.encode_spans(text)
        assert ids == tokenizer.encode(text)
        assert (spans[0][0], spans[-1][1]) == (0, len(text))
        for i, (start, stop) in zip(ids, spans, strict=True):
            assert i in tokenizer.fallback or tokenizer.decode_bytes([i]).decode() == text[start:stop]
        assert all(after[0] in before for before, after in itertools.pairwise(spans))


@pytest.mark.parametrize("marks", ["BERT", "RoBERTa"])
def test_a_question_and_its_passage_are_read_as_transformers_does(marks):
    tokenizers = pytest.importorskip("tokenizers")
    specials, words = "[PAD] [UNK] [CLS] [SEP] [MASK]", "where is carl ada lived in london bo ##nn . ?"
    pieces = f"{specials} {words}".split()
    tokenizer = from_pieces({piece: i for i, piece in enumerate(pieces)}, {})
    if marks == "RoBERTa":
        spec = json.loads(tokenizer.data)
        spec["post_processor"] = {"type": "RobertaProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}
        spec["post_processor"] |= {"trim_offsets": True, "add_prefix_space": False}
        tokenizer = dataclasses.replace(tokenizer, data=json.dumps(spec).encode())
    theirs = tokenizers.Tokenizer.from_str(tokenizer.data.decode()).encode("Where is Carl?", PASSAGE)
    passage, spans = tokenizer.encode_spans(PASSAGE)
    (window,) = Windows(384, 128, 64)(tokenizer.encode("Where is Carl?"), passage, tokenizer)
    assert window.ids == theirs.ids
    of_passage = [i for i, text in enumerate(theirs.sequence_ids) if text == 1]
    assert [*window.passage] == of_passage
    assert spans == [theirs.offsets[i] for i in of_passage]
    assert marks == "RoBERTa" or window.types == theirs.type_ids
    assert answer_tokens(PASSAGE, spans, 35, 39) == (8, 9), "Bonn is two pieces"


def test_windows_cover_a_passage_and_have_the_answer_where_it_is(tmp_path):
    read = data.ExtractAnswers(
        source(tmp_path / "a.jsonl", [ROW]), length=30, batch=1, stride=8, question_length=10, shuffle=False
    )
    batches = list(read.evaluation(BYTES, "train", tmp_path))
    seen, with_answer = set(), 0
    for batch in batches:
        begin, first, last = batch.labels[0]
        size = int(batch.segments[0].sum())
        assert BYTES.decode(batch.tokens[0, 1 : begin - 1]) == "Where is C"
        assert batch.tokens[0, [0, begin - 1, size - 1]].tolist() == [BYTES.bos, BYTES.eos, BYTES.eos]
        part = BYTES.decode(batch.tokens[0, begin : size - 1])
        at = PASSAGE.index(part)
        seen |= {*range(at, at + len(part))}
        if first:
            assert BYTES.decode(batch.tokens[0, first : last + 1]) == "Bonn"
            assert "⟦Bonn⟧" in as_text(batch, BYTES)
            with_answer += 1
        else:
            assert "Bonn" not in part
            assert last == 0
    assert seen == {*range(len(PASSAGE))}
    assert 1 <= with_answer < len(batches)
    assert answer_tokens("a bc", [(0, 1), (1, 3), (3, 4)], 2, 4) == (1, 2)  # the space of " b" does not count
    assert answer_tokens("a bc", [(0, 2), (2, 4)], 0, 1) == (0, 0)
    for changes, line in (
        ({"length": 14}, "length: got 14, must be more than 14, question_length and the special tokens"),
        ({"stride": 0}, "stride: got 0, must be at least 1"),
    ):
        with pytest.raises(UserError, match=line):
            Windows(**{"length": 30, "stride": 8, "question_length": 10, **changes})


@pytest.mark.alone
def test_answers_are_found(tmp_path, monkeypatch):
    """The digits, the capitals or the letters of a text; of those that it has not, nothing."""
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    rng, rows = np.random.default_rng(0), []
    kinds = {"1": "123456789", "A": "ABCDEFGH", "a": "abcdefgh"}
    for _ in range(400):
        parts = {kind: "".join(rng.choice(list(kinds[kind]), 2)) for kind in rng.permutation([*kinds])[:2]}
        context, asked = " ".join(parts.values()), str(rng.choice([*kinds]))
        text = [parts[asked]] if asked in parts else []
        answers = {"text": text, "answer_start": [context.index(each) for each in text]}
        rows.append({"context": context, "question": asked, "answers": answers})
    questions = source(tmp_path / "q.jsonl", rows, validation=0.1)
    read = data.ExtractAnswers(questions, length=12, batch=32, stride=3, question_length=2)
    adam = optim.AdamW(learning_rate=3e-3, schedule=optim.Linear(warmup=10), weight_decay=0.0)
    found = evals.ExtractedAnswers(questions)
    stage = Stage(read, SpanExtraction(), adam, steps=220, evaluate_every=1000, prompts=(), evaluations=(found,))
    model = SpanExtractorConfig(EncoderConfig(vocab=BYTES.vocab, layers=2, width=32, heads=2, token_types=2))
    Experiment(model, data.Bytes(), {"read": stage}).run(tmp_path / "run")
    values = json.loads((tmp_path / "run" / "report" / "read.json").read_text())["results"][0]["values"]
    assert values["exact_match"] > 0.9
    assert values["low"] < values["exact_match"] <= values["f1"]

    reader = gptjax.load(tmp_path / "run", kind=gptjax.Model)
    assert isinstance(reader, gptjax.SpanExtractorModel)
    assert (reader.length, reader.stride, reader.question_length) == (12, 3, 2)
    answer = reader.answer("1", "ab 57", unanswerable=True)
    assert (answer.text, answer.start, answer.end) == ("57", 3, 5)
    assert 0.5 < answer.score <= 1
    assert reader.answer("A", "ab 57", unanswerable=True).text == ""
    assert reader.answer("A", "ab 57").text != ""
    long = "ab cd ab cd ab cd ab 57"
    assert reader.answer("1", long).text == "57", "the last of several windows"
    assert len(reader.answer("1", "ab 57", max_tokens=1).text) == 1
    with pytest.raises(UserError, match="questions: 1: got an empty passage, must have text"):
        reader.answers([("a", "a12"), ("a", "")])
    reader.save(tmp_path / "saved")
    again = gptjax.load(tmp_path / "saved", kind=gptjax.SpanExtractorModel)
    assert again.answer("1", long) == reader.answer("1", long)
    assert again.stride == 3


def test_data_and_model_must_fit(tmp_path):
    read = data.ExtractAnswers(source(tmp_path / "a.jsonl", [ROW]), length=70, batch=1)
    backbone = TransformerConfig(vocab=BYTES.vocab, layers=1, width=32, heads=2)
    adam = optim.AdamW(learning_rate=1e-2)
    stage = Stage(read, Classification(), adam, steps=1, prompts=())
    with pytest.raises(UserError, match="data: got ExtractAnswers, which makes AnswerSpans batches, must make Label"):
        Experiment(ClassifierConfig(backbone, 2), data.Bytes(), {"x": stage})
