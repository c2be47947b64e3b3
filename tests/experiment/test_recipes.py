"""Tasks of the experiments: right replies score 1, bad ones 0, and what is promised of their data holds."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from gptjax import LanguageModel, data, nn, tasks
from gptjax.experiment import catalogue
from gptjax.protocols import Reward
from gptjax.tasks import Reply
from gptjax.tasks.stress import stress
from gptjax.types import UserError


def module(name: str) -> Any:
    return importlib.import_module(f"experiments.{name}")


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("customer_service", "Service"),
        ("translation", "Sentences"),
        ("questions", "Facts"),
        ("summarisation", "Reports"),
    ],
)
def test_right_replies_score_one_and_bad_ones_nothing(name, task):
    found = getattr(module(name), task)(400)
    held_out = tasks.HeldOut(found)
    assert 0 < len(held_out) < len(found) / 2
    for i in range(8):
        assert held_out.score(i, Reply(held_out.example(i)[-1].text)).outcome == 1
        assert held_out.score(i, Reply("")).status == "not found"
    assert stress(found) == []


def test_validation_while_training_costs_at_most_two_percent():
    """A forward pass is a third of a step. The last evaluation is the result, not overhead."""
    curves = {"polarity", "speedrun", "shakespeare_char"}  # the whole held-out text, often: the curve is the result
    costs: dict[str, float] = {}
    for name in catalogue.names():
        found = catalogue.load(name)
        for experiment in (found.experiment, *getattr(found, "variants", {}).values()):
            for stage in experiment.stages.values():
                read = stage.eval_sequences * sum(map(stage.evaluates, range(1, stage.last_step)))
                cost = read / (3 * stage.last_step * stage.data.batch)
                costs[name] = max(costs.get(name, 0.0), cost)
    assert {name for name, cost in costs.items() if cost > 0.02} == curves


def test_small_talk_is_divided_by_its_first_question(tmp_path):
    """Each conversation once, a last question without a reply left out, all replies to a question in one split."""
    recipe = module("customer_service")
    folder = tmp_path / "chinese"
    folder.mkdir()
    for name in recipe.FILES["chinese"].split():
        rows = [f"- - {name} {i}?\n  - Yes.\n  - Sure?\n" for i in range(4)] + [f"- - {name.upper()} 1?\n  - No.\n"] * 2
        (folder / f"{name}.yml").write_text("conversations:\n" + "".join(rows))
    source = recipe.Chatterbot(str(tmp_path), ("chinese",), validation=0.3)
    train, held_out = ([*source.documents(split)] for split in ("train", "validation"))
    assert len(train) + len(held_out) == 5 * len(recipe.FILES["chinese"].split())
    assert {len(conversation) for conversation in (*train, *held_out)} == {2}
    assert not {c[0].text.lower() for c in train} & {c[0].text.lower() for c in held_out}
    (folder / "ai.yml").write_text("- nothing")
    with pytest.raises(UserError, match="got no conversations"):
        list(source.documents("train"))


def test_a_case_without_history_cannot_be_answered():
    recipe = module("customer_service")
    case, forgotten = recipe.Service(), recipe.Service(forget=True)
    for i in range(20):
        order = case.facts(i)["order"]
        assert any(order in message.text for message in case.prompt(i))
        assert not any(order in message.text for message in forgotten.prompt(i))


@dataclasses.dataclass(frozen=True)
class Letters(Reward):
    """A reward that is known: the letters of a reply."""

    def __call__(self, conversations):
        return [float(sum(letter.isalpha() for letter in messages[-1].text)) for messages in conversations]

    def fingerprint(self) -> str:
        return "letters"


def test_reward_is_shown_against_the_divergence_from_the_policy_at_the_start(tmp_path):
    recipe, tokenizer = module("reward_kl"), data.Bytes().build(iter(()))
    config = nn.TransformerConfig(vocab=tokenizer.vocab, layers=1, width=16, heads=2)
    params = jax.jit(config.build().init)(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    policy = LanguageModel(config, params, tokenizer, context=128)
    policy.save(tmp_path / "policy")
    start = recipe.RewardAndDivergence(None, Letters(), count=64)(policy).values
    best = [start["reward"], *(start[f"reward_best_of_{n}"] for n in recipe.BEST)]
    assert best == sorted(best)
    assert best[0] < best[-1]
    measure = recipe.RewardAndDivergence(str(tmp_path / "policy"), Letters(), count=64)
    assert measure(policy).values["kl"] == pytest.approx(0, abs=1e-4)
    sharper = dataclasses.replace(policy, params={**params, "embedding": 3 * params["embedding"]})
    assert measure(sharper).values["kl_low"] > 0
    source = recipe.RewardedPairs(str(tmp_path / "policy"), Letters(), count=40)
    pairs = [*source.documents("train"), *source.documents("validation")]
    gaps = [Letters()([(pair.chosen,)])[0] - Letters()([(pair.rejected,)])[0] for pair in pairs]
    assert sum(gap > 0 for gap in gaps) > 2 * sum(gap < 0 for gap in gaps)


def test_a_question_has_its_answer_in_the_passage_or_none_for_both_kinds_of_models():
    """A quarter has none, and what looks right first is often wrong. Both kinds of models are held out the same."""
    recipe = module("questions")
    task, without, guessed = recipe.Facts(400), 0, 0
    for i in range(400):
        asked, guess = recipe.drawn(0, i)
        for answer, start in zip(asked.answers, asked.starts, strict=True):
            assert asked.context[start : start + len(answer)] == answer
            assert asked.context.count(answer) == 1
        without += not asked.answers
        guessed += guess in asked.answers
    assert 70 < without < 130
    assert 120 < guessed < 260
    of_split = {question.context for question in recipe.Asked(task).documents("validation")}
    assert of_split == {task.passage(i).context for i in tasks.HeldOut(task).items}


def test_a_summary_needs_three_sentences():
    recipe = module("summarisation")
    for i in range(100):
        report, summary, _ = recipe.drawn(0, i)
        sentences, words = report.split(". "), summary.rstrip(".").split()
        winner, _, loser, _, goals, _, against, _, city = words
        assert any(f"of {winner} lifted" in each and loser in each for each in sentences)
        assert any(f"whistle came at {goals} to {against}" in each for each in sentences)
        assert any(f"met in {city}" in each and winner in each and loser in each for each in sentences)
        assert int(goals) > int(against)


def test_sentences_are_german():
    """Case, gender and the three places of the verb, in sentences that were checked by hand."""
    pairs = dict(module("translation").Sentences(count=40).pair(i) for i in range(40))
    for english, german in (
        ("The friend needs the strange table often.", "Der Freund braucht oft den seltsamen Tisch."),
        ("Often a cat looks at the animal.", "Oft sieht eine Katze das Tier an."),
        ("Yesterday the queen collected the young king.", "Gestern hat die Königin den jungen König abgeholt."),
        (
            "I know that the doctor will get to know a small key tomorrow.",
            "Ich weiß, dass die Ärztin morgen einen kleinen Schlüssel kennenlernen wird.",
        ),
    ):
        assert pairs[english] == german
