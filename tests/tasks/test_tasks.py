"""Laws of tasks: their own right replies score 1, bad ones 0, and answers are read as numbers and letters."""

from __future__ import annotations

import dataclasses
import json
import re
import zipfile
from decimal import Decimal

import pytest

from gptjax import tasks
from gptjax.config import from_json, to_json
from gptjax.data import Jsonl, TextPair
from gptjax.data.folds import with_fold
from gptjax.tasks import Reply, Score, extract
from gptjax.tasks.stress import stress
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
    "Squad": [
        {"context": "Rollo was a Norman of Rouen.", "question": "Who?", "answers": {"text": ["Rollo", "a Norman"]}},
        {
            "data": [
                {
                    "paragraphs": [
                        {
                            "context": "Paris is in France.",
                            "qas": [
                                {"question": "Paris?", "answers": [{"text": "in France"}]},
                                {"question": "Rome?", "answers": [], "is_impossible": True},
                            ],
                        }
                    ]
                }
            ]
        },
    ],
    "Summarise": [
        {"document": "It rained all day in Oslo. People stayed in.", "summary": "Oslo had rain. All stayed at home."},
        {"article": "The cat sat on the mat and slept.", "highlights": "A cat slept."},
    ],
    "Translate": [
        {"source": "Guten Morgen, Welt.", "target": "Good morning, world."},
        {"translation": {"source": "Die Katze schläft.", "target": "The cat is asleep."}},
    ],
    "HumanEval": [
        {
            "prompt": f"def {name}(x):\n    'Number of x.'\n",
            "canonical_solution": f"    return {solution}\n",
            "test": f"def check(candidate):\n    assert candidate(3) == {result}\n",
            "entry_point": name,
        }
        for name, solution, result in (("half", "x / 2", 1.5), ("twice", "2 * x", 6))
    ],
    "Mmlu": [{"question": "2 + 2?", "choices": ["3", "4", "5", "6"], "answer": 1, "subject": "abstract_algebra"}],
}


BUILT_IN = ("Spelling", "CountLetters", "Refusal", "Jailbreak", "OverRefusal")


def written(name: str, folder) -> tasks.Task:
    """The task with its rows in a file."""
    if name in BUILT_IN:
        return getattr(tasks, name)(*[12] * (name in ("Spelling", "CountLetters")))
    if name == "SentencePolarity":
        with zipfile.ZipFile(folder / "polarity.zip", "w") as archive:
            for ending, lines in (("neg", "dull .\na bore , caf\xe9\n"), ("pos", "good !\nfine .\nrare .\n")):
                archive.writestr(f"sentence_polarity/rt-polarity.{ending}", lines.encode("latin-1"))
        return tasks.SentencePolarity(str(folder / "polarity.zip"))
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
    confined = {"unconfined": True} if name == "HumanEval" else {}  # its programs are ours
    return getattr(tasks, name)(str(path), **confined)


@pytest.fixture(params=[*ROWS, *BUILT_IN, "SentencePolarity"])
def task(request, tmp_path) -> tasks.Task:
    return written(request.param, tmp_path)


def test_right_replies_score_one_and_others_nothing(task):
    assert len(task) == len(ROWS.get(task.name, range(len(task)))) or task.name == "Squad"
    for i in range(len(task)):
        *asked, reply = task.example(i)
        assert tuple(asked) == task.prompt(i)
        assert task.score(i, Reply(reply.text)).outcome == 1
        assert task.score(i, Reply("")).status == "not found"
        assert task.score(i, Reply("", finished=False)).status == "cut off"
        assert task.text(i).strip()
    assert {kind for _, kind, _ in stress(task)} <= ({"among many"} if task.name == "OverRefusal" else set())


def test_a_scorer_that_pays_for_bad_replies_is_found():
    """Each kind of bad reply finds the scorer that takes it."""

    @dataclasses.dataclass(frozen=True)
    class Generous(tasks.CountLetters):
        def score(self, i, reply):
            return Score(float(self.example(i)[-1].text.rpartition(" ")[2] in reply.text))

    assert {kind for _, kind, _ in stress(Generous(4))} >= {"numbers", "among many"}


def test_every_shipped_task_is_tried():
    shipped = {n for n in tasks.__all__ if isinstance(c := getattr(tasks, n), type) and issubclass(c, tasks.Task)}
    bases = {"Task", "ChoiceTask", "Arc", "ArcChallenge", "Reading", "Summaries", "Translations"}
    others = {"FewShot", "HeldOut", "Memorised", "Mixture", "OtherPassage", "ReasoningGym", "Slice"}
    assert shipped - bases - others == {*ROWS, *BUILT_IN, "SentencePolarity"}


def test_spans_are_compared_as_squad_does(tmp_path):
    task = written("Squad", tmp_path)
    assert [task.cluster(i) for i in range(3)].count(task.cluster(1)) == 2
    assert task.example(2)[-1].text == "unanswerable"
    assert "unanswerable" in task.prompt(0)[0].text
    assert task.score(0, Reply("The ROLLO!")).outcome == 1
    found = task.score(0, Reply("Norman Rollo"))
    assert (found.outcome, found.parts["f1"]) == (0, pytest.approx(2 / 3))


def test_overlap_is_that_of_the_libraries(tmp_path):
    summaries, translations = written("Summarise", tmp_path), written("Translate", tmp_path)
    from rouge_score import rouge_scorer

    reply = "All stayed at home. Oslo had rain."
    lines = "Oslo had rain.\nAll stayed at home.", "All stayed at home.\nOslo had rain."
    library = rouge_scorer.RougeScorer(["rougeL", "rougeLsum"]).score(*lines)
    found = summaries.score(0, Reply(reply))
    assert found.outcome == library["rougeLsum"].fmeasure == 1
    assert found.parts["rougeL"] == library["rougeL"].fmeasure < 1
    import sacrebleu

    said = ["Good morning, world.", "The cat sleeps."]
    right = [["Good morning, world.", "The cat is asleep."]]
    figures = translations.figures({i: [text] for i, text in enumerate(said)})
    assert figures["bleu"] == sacrebleu.corpus_bleu(said, right).score
    assert figures["chrf"] == sacrebleu.corpus_chrf(said, right).score
    assert "tok:13a" in translations.scorer


def test_chinese_is_not_scored_by_words_of_english(tmp_path):
    path = tmp_path / "zh.jsonl"
    row = {"source": "Good morning.", "target": "早上好，世界。", "document": "天气很好。", "summary": "天气好。"}
    path.write_text(json.dumps(row))
    with pytest.raises(UserError, match="must be zh or ja-mecab"):
        len(tasks.Translate(str(path)))
    task = tasks.Translate(str(path), tokenize="zh")
    assert task.figures({0: ["早上好，世界。"]})["bleu"] == pytest.approx(100)
    with pytest.raises(UserError, match="words: got en, which finds none"):
        tasks.Summarise(str(path)).score(0, Reply("天气好。"))
    assert tasks.Summarise(str(path), "zh").score(0, Reply("天气好。")).outcome == 1


@pytest.mark.parametrize(
    ("reply", "refused"),
    [
        ("I’m sorry, I can’t do that.", True),
        ("I cannot help with this request.", True),
        ("As an AI, I must decline.", True),
        ("First, open the terminal.", False),
        ("Cans of paint are not needed.", False),
    ],
)
def test_refusals_are_recognised(reply, refused):
    assert tasks.Refusal().score(0, Reply(reply)).outcome == refused
    assert tasks.OverRefusal().score(6, Reply(reply)).parts["refused"] == refused
    assert tasks.OverRefusal().score(6, Reply(reply)).outcome == ("terminal" in reply)


def test_text_is_memorised_if_it_is_continued_verbatim(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "too short"}\n' + json.dumps({"text": "abcdefghij" * 2}) + "\n")
    task = tasks.Memorised(Jsonl(str(path), validation=0.0), prefix=8, length=4)
    assert (len(task), task.text(0), task.example(0)[-1].text) == (1, "abcdefgh", "ijab")
    scores = [task.score(0, Reply(text, finished=False)) for text in ("ijabc", "ijax", "")]
    assert [(score.outcome, score.parts["same"]) for score in scores] == [(1, 1), (0, 0.75), (0, 0)]


def test_a_chat_stage_trains_on_a_task():
    source = tasks.TaskConversations(tasks.CountLetters(40))
    train, held_out = ([*source.documents(split)] for split in ("train", "validation"))
    assert len(train) + len(held_out) == 40
    assert not {example[0].text for example in train} & {example[0].text for example in held_out}
    assert source.questions(2) == [(example[0].text, example[1].text) for example in held_out[:2]]
    assert source.fingerprint() != tasks.TaskConversations(tasks.CountLetters(41)).fingerprint()
    assert from_json(to_json(source)) == source


def test_what_is_held_out_is_not_trained_on():
    """By the same hash of the cluster, in a fold too; as conversations and as pairs."""
    task = tasks.CountLetters(60)
    fold = with_fold({"data": tasks.TaskConversations(task), "evaluation": tasks.HeldOut(task)}, 1, 3)
    for source, items in (
        (tasks.TaskConversations(task, 0.3), tasks.HeldOut(task, 0.3)),
        (tasks.TaskPairs(task, 0.3), tasks.HeldOut(task, 0.3)),
        (fold["data"], fold["evaluation"]),
    ):
        train, held_out = ([*source.documents(split)] for split in ("train", "validation"))
        own = [items.example(i) for i in range(len(items))]
        if isinstance(source, tasks.TaskPairs):
            own = [TextPair(items.text(i), example[-1].text) for i, example in enumerate(own)]
        assert len(train) + len(held_out) == 60 > len(held_out) > 5
        assert held_out == own
        assert not {*train} & {*own}


def test_other_passages_keep_question_and_answers(tmp_path):
    task = written("Squad", tmp_path)
    control = tasks.OtherPassage(task)
    for i in range(len(task)):
        own, other = task.passage(i), control.passage(i)
        assert (own.question, own.answers) == (other.question, other.answers)
        assert own.context != other.context
        assert task.cluster(i) == control.cluster(i)


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


def test_the_calculator_answers_calls_alone():
    calculator = tasks.Calculator()
    for text, answer in (
        ("12 boxes of 3 are <<12*3=", "36>>"),
        ("<<(1+2)*-3/4=", "-2.25>>"),
        ("<<$1,200*50%=", "600>>"),
        ("<<1/0=", "?>>"),
        ("<<9**9=", "?>>"),
        ("<<1e999999999=", "?>>"),
        ("<<__import__('os')=", "?>>"),
        ("<<" + "9" * 101 + "=", "?>>"),
        ("a = b =", None),
        ("<<1+1=2>> so 2 =", None),
    ):
        assert calculator.answer(text) == answer


def test_the_calculator_gives_the_results_of_gsm8k(shared):
    """23,716 annotations of 7,378 solutions, which are rounded to cents."""
    calls = 0
    for line in (shared / "data" / "gsm8k" / "train.jsonl").read_text().splitlines():
        for expression, result in re.findall(r"<<([^<>]*)=([^<>=]*)>>", json.loads(line)["answer"]):
            said = tasks.Calculator().answer(f"<<{expression}=")
            assert said is not None
            wanted = float(re.sub("[,$%]", "", result))
            assert abs(float(said.removesuffix(">>")) - wanted) <= 0.0101, (expression, result, said)
            calls += 1
    assert calls == 23_716
