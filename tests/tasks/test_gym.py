"""Laws of reasoning-gym's puzzles as tasks."""

from __future__ import annotations

import builtins
import dataclasses
import json
import subprocess
import sys

import pytest

from gptjax import tasks
from gptjax.config import from_json, to_json
from gptjax.data import Bytes
from gptjax.tasks import HeldOut, Reply, gym
from gptjax.tasks.scorers import Scorers
from gptjax.tasks.stress import stress
from gptjax.train.rollouts import Rollouts
from gptjax.types import UserError

pytest.importorskip("reasoning_gym", reason="needs pip install 'gptjax[gym]'")
SUMS = tasks.ReasoningGym("chain_sum", seed=3, size=200, config={"max_terms": 2, "max_digits": 1})


@pytest.mark.parametrize("tagged", [False, True])
@pytest.mark.parametrize("name", ["chain_sum", "gcd", "countdown", "number_sorting"])
def test_right_replies_score_one_and_others_nothing(name, tagged):
    task = tasks.ReasoningGym(name, size=12, tagged=tagged)
    for i in range(len(task)):
        asked, reply = task.example(i)
        assert (asked,) == task.prompt(i)
        score = task.score(i, Reply(reply.text))
        assert (score.outcome, score.value, score.parts) == (1, 1, {"score": 1})
        assert task.score(i, Reply("")).status == "not found"
        assert task.score(i, Reply("", finished=False)).status == "cut off"
    assert stress(task) == []
    if tagged:
        said = f"<answer>?</answer> No: <answer> {task.example(0)[-1].text[8:-9]} </answer>."
        assert task.score(0, Reply(said)).outcome == 1
        assert task.score(0, Reply(said.replace("answer>", "b>"))).status == "not found"


@pytest.mark.alone
def test_items_are_those_of_the_seed_in_every_process():
    program = (
        "import json, sys; from gptjax import tasks; from gptjax.config import from_json\n"
        "task = from_json(json.loads(sys.argv[1]))\n"
        "print(json.dumps([message.text for i in range(20) for message in task.example(i)]))"
    )
    saved = json.dumps(to_json(SUMS))
    assert from_json(json.loads(saved)) == SUMS
    found = subprocess.run([sys.executable, "-c", program, saved], capture_output=True, text=True, check=True).stdout
    assert json.loads(found) == [message.text for i in range(20) for message in SUMS.example(i)]
    other = tasks.ReasoningGym("chain_sum", seed=4, size=200, config=SUMS.config)
    assert other.fingerprint() != SUMS.fingerprint()


def test_no_held_out_question_is_trained_on():
    """There are 162 one-digit sums of two numbers, so that some of 200 items are the same."""
    questions = [SUMS.prompt(i)[0].text for i in range(len(SUMS))]
    assert len(set(questions)) < len(questions)
    rollouts = Rollouts(SUMS, length=128)
    tokenizer = Bytes().build(iter(()))
    asked = {split: {questions[i] for i in rollouts.prompts(tokenizer, split).ids} for split in ("train", "validation")}
    assert asked["train"] | asked["validation"] == set(questions)
    assert len(asked["validation"]) >= 5
    assert not asked["train"] & asked["validation"]


def test_the_librarys_score_is_a_figure_and_by_choice_the_reward():
    right = SUMS.example(0)[-1].text
    said = Reply(f"It is {right}, I think.")
    score = SUMS.score(0, said)
    assert (score.outcome, score.value) == (0, 0)
    assert 0 < score.parts["score"] < 0.5
    paid = tasks.ReasoningGym(SUMS.dataset, SUMS.seed, SUMS.size, SUMS.config, partial=True).score(0, said)
    assert (paid.outcome, paid.value) == (0, score.parts["score"])


@pytest.mark.alone
def test_a_verifier_that_hangs_or_fails_gives_nothing(monkeypatch):
    with Scorers(SUMS, 1, timeout=30.0) as scorers:
        assert scorers.submit(0, Reply(SUMS.example(0)[-1].text)).result().outcome == 1

    class Broken:
        def score_answer(self, answer, entry):
            raise IndexError("list index\nout of range")

    monkeypatch.setattr(gym, "_dataset", lambda *settings: Broken())
    score = SUMS.score(0, Reply("7"))
    assert (score.outcome, score.status, score.note) == (0, "not found", "IndexError: list index out of range")


def test_wrong_settings_are_one_line(monkeypatch):
    made = tasks.ReasoningGym
    for task, error in (
        (lambda: made("chain_sums").example(0), "^dataset: got 'chain_sums', must be .* such as chain_sum, "),
        (lambda: made("rubiks_cube").example(0), "^dataset: got rubiks_cube, which has no right answer to item 0"),
        (lambda: made("chain_sum", config={"terms": 2}).example(0), '^config: got {"terms": 2}, which chain_sum'),
        (lambda: made("chain_sum", config={"min_terms": 0}).example(0), "^config: .* does not take: min_terms"),
        (lambda: made("chain_sum", config={"seed": 2}), "^config: got seed, must be set beside config"),
        (lambda: made("chain_sum", size=0), "^size: got 0, must be at least 1"),
    ):
        with pytest.raises(UserError, match=error) as raised:
            task()
        assert "\n" not in str(raised.value)
    imported = builtins.__import__

    def without(name, *arguments):
        if name.startswith("reasoning_gym"):
            raise ImportError(name)
        return imported(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        UserError, match=r"^task: ReasoningGym needs the reasoning-gym library; pip install 'gptjax\[gym\]'"
    ):
        made("chain_sum", size=7).example(0)


def test_the_experiment_is_warmed_up_on_mostly_wrong_answers_to_words_that_are_not_asked():
    from experiments import gym as warm

    few = dataclasses.replace(warm.WORDS, size=300)
    source = warm.Misspelled(few)
    chats = {split: list(source.documents(split)) for split in ("train", "validation")}
    asked = {split: {chat[0].text for chat in found} for split, found in chats.items()}
    assert not asked["train"] & asked["validation"]
    held = HeldOut(few)
    assert asked["validation"] == {held.example(i)[0].text for i in range(len(held))}
    answers = {few.cluster(i): (i, few.example(i)[-1].text) for i in range(len(few))}
    said = [(*answers[chat[0].text], chat[1].text) for found in chats.values() for chat in found]
    assert all(sorted(answer) == sorted(spelled) for _, answer, spelled in said)
    right = sum(few.score(i, Reply(spelled)).outcome for i, _, spelled in said)
    assert abs(right / len(said) - source.right) < 4 * (0.15 * 0.85 / len(said)) ** 0.5 + 0.02  # and words like "eve"
