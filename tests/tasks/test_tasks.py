"""Laws of tasks: their own right replies score 1, bad ones 0, and answers are read as numbers and letters."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest

from gptjax import tasks
from gptjax.tasks import Reply, extract
from gptjax.types import UserError

ROWS = {
    "Gsm8k": [
        {"question": "48 and half of it?", "answer": "48/2 = <<48/2=24>>24\nThe answer is 24 + 48 = 72\n#### 72"},
        {"question": "Much?", "answer": "It is $1,000.\n#### 1,000"},
        {"question": "Cold?", "answer": "#### -5"},
    ],
    "MultiArith": [
        {"instruction": " 13 + 17 - 15? ", "output": "\nA: The answer is 15.", "answer": "15.0"},
        {"instruction": "12 / 2?", "output": "\nA: The answer is 20.", "answer": "6.0"},
    ],
    "ArcEasy": [
        {
            "instruction": "Please choose the correct answer to the question: Hot?\n\nAnswer1: ice Answer2: "
            "fire: a big one Answer3: snow\n\nAnswer format: answer1/answer2/answer3",
            "answer": "answer2",
        },
        {"question": "Q?", "choices": {"text": ["w", "x", "y", "z"], "label": ["1", "2", "3", "4"]}, "answerKey": "3"},
        {
            "question": {"stem": "Q?", "choices": [{"text": "no", "label": "A"}, {"text": "yes", "label": "B"}]},
            "answerKey": "B",
        },
    ],
    "Piqa": [
        {"goal": "Cut", "sol1": "with a knife", "sol2": "with a spoon", "label": 0},
        {
            "instruction": "Please answer the following question with true or false, question: is it so?\n\n"
            "Answer format: true/false",
            "answer": "false",
        },
    ],
    "Mmlu": [{"question": "2 + 2?", "choices": ["3", "4", "5", "6"], "answer": 1, "subject": "abstract_algebra"}],
}


def written(name: str, folder) -> tasks.Task:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
    return getattr(tasks, name)(str(path))


@pytest.fixture(params=ROWS)
def task(request, tmp_path) -> tasks.Task:
    return written(request.param, tmp_path)


def test_right_replies_score_one_and_others_nothing(task):
    assert len(task) == len(ROWS[task.name])
    for i in range(len(task)):
        *asked, reply = task.example(i)
        assert tuple(asked) == task.prompt(i)
        assert task.score(i, Reply(reply.text)).outcome == 1
        assert task.score(i, Reply("")).status == "not found"
        assert task.score(i, Reply("I am still", finished=False)).status == "cut off"
        assert task.score(i, Reply(asked[-1].text)).outcome == 0


def test_options_of_other_files_are_read_and_compared(tmp_path):
    arc, piqa, mmlu = (written(name, tmp_path) for name in ("ArcEasy", "Piqa", "Mmlu"))
    assert arc.questions[0].options == ("ice", "fire: a big one", "snow")
    assert [item.answer for item in arc.questions] == [1, 2, 1]
    assert piqa.questions[1].options == ("true", "false")
    assert arc.choices(0).options[1] == ("Question: Hot?\nAnswer:", " fire: a big one")
    assert mmlu.choices(0).options[1][1] == " B"
    assert "about abstract algebra" in mmlu.text(0)
    table = tmp_path / "abstract_algebra_test.csv"
    table.write_text('"2, 2?",3,4,5,6,B\n')
    assert tasks.Mmlu(str(table)).questions[0] == tasks.choice.Question(
        "2, 2?", ("3", "4", "5", "6"), 1, "abstract algebra"
    )


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("#### 72", "72", "72"),
        ("so\n#### $1,000.50", "1000.5", "1000.5"),
        ("The answer is 15. It is 3*5.", "15", "5"),
        ("#### -5", "-5", "-5"),
        ("#### 72\n#### 72.0", "72", "72"),
        ("the answer is **12**.", "12", "12"),
        ("The final answer is 15 * 8 = 120\n#### 120", "120", "120"),
        ("I get 1,234.", None, "1234"),
        ("#### 1 2 72", None, "72"),
        ("#### 1\n#### 72", None, "72"),
        ("#### 72 or 71", None, "71"),
        ("none", None, None),
    ],
)
def test_numbers_are_found_and_compared_as_numbers(text, strict, flexible):
    assert extract.strict_number(text) == (None if strict is None else Decimal(strict))
    assert extract.last_number(text) == (None if flexible is None else Decimal(flexible))


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("B", "B", "B"),
        ("(b)", "B", "B"),
        ("B. a cat", "B", "B"),
        ("The answer is C.", "C", "C"),
        ("I think it is B.", None, "B"),
        ("It is the sun!", None, "D"),
        ("A cat is nice", None, None),
        ("A B C D", None, None),
        ("A. a dog\nB. a cat\nC. A\nD. the sun", None, None),
        ("The answer is A. The answer is B.", None, None),
        ("answer is B or C", None, None),
    ],
)
def test_letters_are_found_unless_several_are_named(text, strict, flexible):
    options = list(zip("ABCD", ("a dog", "a cat", "A", "the sun"), strict=True))
    assert extract.strict_label(text, "ABCD") == strict
    assert extract.flexible_label(text, options) == flexible


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("Gsm8k", {"question": "?", "answer": "72"}, 'must end with "#### " and a number'),
        ("MultiArith", {"instruction": "?", "answer": "six"}, "answer: got 'six', must be a number"),
        (
            "ArcEasy",
            {"question": "?", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "B"},
            "must be one of A",
        ),
        ("Piqa", {"goal": "?", "sol1": "a", "sol2": "b", "label": 2}, "must be 1 to 2"),
        ("Mmlu", {"question": "?"}, "must have 'choices'"),
    ],
)
def test_a_bad_row_names_file_and_line(tmp_path, name, row, said):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in [ROWS[name][0], row]))
    with pytest.raises(UserError, match=f"path: {path}:2: ") as error:
        len(getattr(tasks, name)(str(path)))
    assert said in str(error.value)


def test_combinations_keep_their_items(tmp_path):
    gsm8k, arc = written("Gsm8k", tmp_path), written("ArcEasy", tmp_path)
    part = tasks.Slice(gsm8k, 1, None, 2)
    assert [part.example(i) for i in range(len(part))] == [gsm8k.example(1)]
    mixture = tasks.Mixture((gsm8k, arc))
    assert [mixture.example(i) for i in (2, 3)] == [gsm8k.example(2), arc.example(0)]
    assert mixture.score(2, Reply("#### -5")).outcome == mixture.score(3, Reply("B")).outcome == 1
    few = tasks.FewShot(gsm8k, shots=2, seed=1)
    for i in range(3):
        assert few.example(i)[-2:] == gsm8k.example(i)
        assert {m.text for m in few.prompt(i)[:-1:2]} == {gsm8k.prompt(j)[0].text for j in range(3) if j != i}
        assert few.text(i).endswith(gsm8k.text(i))
    with pytest.raises(UserError, match="at most 2"):
        tasks.FewShot(gsm8k, shots=3).prompt(0)
