"""Laws of rollouts: what was drawn is trained on, and however a run is stopped, it goes on to the same bits."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import data, optim
from gptjax.checkpoint.checkpoint import Checkpoints
from gptjax.config import allow, from_json, to_json
from gptjax.data.chat import Conversation, Message
from gptjax.distributed import sharding
from gptjax.distributed.sharding import DEFAULT_RULES, MeshConfig
from gptjax.models.regressor_model import RegressorModel
from gptjax.models.reward import RewardModel
from gptjax.monitor import metrics
from gptjax.monitor.metrics import MetricsLogger
from gptjax.nn import Last, RegressorConfig, TransformerConfig
from gptjax.objectives import GRPO
from gptjax.tasks import Generation, Reply, Score, Task, Tool
from gptjax.train.loop import train
from gptjax.train.program import program
from gptjax.train.rollouts import Rollouts
from gptjax.train.rounds import Policy, Rounds
from gptjax.train.stage import Stage
from gptjax.types import UserError

MODEL = TransformerConfig(vocab=40, layers=1, width=16, heads=2).build()
TOKENIZER = data.TrainCharacters().build(iter(["abcdefghijklmnopqrstuvwxyz"]))


allow(sys.modules[__name__])


@dataclasses.dataclass(frozen=True)
class Vowels(Task):
    """Replies are rewarded by their share of vowels."""

    constant: bool = False
    broken: str = ""
    """Replies that begin so raise an error or have no reward."""

    def __len__(self) -> int:
        return 12

    def example(self, i: int) -> Conversation:
        return Message("user", "abc"[i % 3] * (1 + i)), Message("assistant", "aeiou")

    def score(self, i: int, reply: Reply) -> Score:
        if self.broken == "nan" and reply.text != "aeiou":
            return Score(0.0, value=math.nan)
        if self.broken == "raise" and reply.text not in ("aeiou", ""):
            raise ValueError("I cannot read this")
        share = sum(c in "aeiou" for c in reply.text) / max(len(reply.text), 1)
        return Score(0.0 if self.constant else share)

    @property
    def generation(self) -> Generation:
        return Generation(max_tokens=5)


ROLLOUTS = Rollouts(Vowels(), length=24, batch=8, group=4, temperature=0.7, rows=4, workers=1, validation=0.2)
STAGE = Stage(
    data=ROLLOUTS,
    objective=GRPO(kl=0.0),
    optimizer=optim.AdamW(learning_rate=1e-2),
    steps=6,
    evaluate_every=4,
    save_every=100,
    log_every=1,
    prompts=(),
)


def run(folder: Path, stage: Stage = STAGE, records: MetricsLogger | None = None, module=MODEL) -> None:
    with records or MetricsLogger(folder) as writer:
        train(stage, "rl", module, TOKENIZER, folder / "checkpoints", writer, cache=folder / "cache")


def outcome(folder: Path, stage: Stage):
    """All that a run leaves: the bits of its state, its position, its records but for times, its replies."""
    functions = program(stage, MODEL)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        restored = checkpoints.restore(jax.eval_shape(functions.init_state))
    state = dataclasses.replace(restored.state, key=jax.random.key_data(restored.state.key))
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]
    timed = "time", "tokens_per_second", "memory", "goodput", "rollout_"
    lines = [{k: v for k, v in line.items() if not k.startswith(timed)} for line in metrics.read(folder)]
    extra = json.loads(json.dumps(restored.extra["input"]))
    if extra["ahead"] is not None:
        extra["ahead"].pop("seconds")
    return leaves, extra, lines, (folder / "rollouts" / "rl.jsonl").read_text()


class StopAt(MetricsLogger):
    """A logger that sends a signal at a step."""

    step = 3

    def log(self, step: int, stage: str, **values) -> None:
        super().log(step, stage, **values)
        if step == self.step and "loss" in values:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="one after the other"),
        pytest.param({"ahead": 1}, id="ahead", marks=pytest.mark.slow),
        pytest.param(
            {"minibatches": 2, "ahead": 1, "equal_groups": "drop", "refill": 1},
            id="rounds of two steps",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, fields):
    stage = dataclasses.replace(STAGE, data=dataclasses.replace(ROLLOUTS, **fields))
    run(tmp_path / "whole", stage)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", stage, StopAt(tmp_path / "stopped"))
    with Checkpoints(tmp_path / "stopped" / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() in (2, 3, 4)
    run(tmp_path / "stopped", stage)
    assert outcome(tmp_path / "whole", stage) == outcome(tmp_path / "stopped", stage)
    replies = [json.loads(line) for line in (tmp_path / "whole" / "rollouts" / "rl.jsonl").read_text().splitlines()]
    assert {reply["train_step"] for reply in replies} == set(range(1, 7, stage.round))
    if not fields:
        assert len({reply["reply"] for reply in replies}) > 30


@functools.cache
def start():
    """Program of the stage, and initial parameters."""
    functions = program(STAGE, MODEL)
    return functions, jax.jit(functions.init_params)()


def policy(rounds: Rounds) -> Policy:
    functions, params = start()
    return Policy(MODEL, lambda: params, lambda batch: functions.prepare(params, batch), 0, rounds)


@pytest.fixture
def rounds():
    found = ROLLOUTS.batches(TOKENIZER, "train", 0, "")
    yield found
    found.close()


def test_tokens_are_those_that_were_drawn_with_the_probabilities_of_the_trainer(rounds):
    """Log-probabilities are sums of some 100 products in float32, of size 10, at a temperature of 0.7."""
    batch = jax.device_get(rounds.next_batch(policy(rounds)))
    drawn = batch.weights > 0
    assert 8 <= drawn.sum() <= 40
    np.testing.assert_allclose(batch.logprobs[drawn], batch.old_logprobs[drawn], rtol=0, atol=1e-4)
    assert rounds.figures["mismatch_max"] < 1e-4
    assert rounds.figures["mismatch_outside"] == 0
    np.testing.assert_array_equal(batch.logprobs[~drawn], 0)
    np.testing.assert_array_equal(batch.versions, np.where(drawn, 0, -1))
    np.testing.assert_array_equal(batch.groups, [0] * 4 + [1] * 4)
    for row, record in enumerate(rounds.records):
        ids = batch.targets[row][drawn[row]].tolist()
        assert TOKENIZER.decode(ids) == record["reply"], "text of the ids, without the end"
        assert record["finished"] == (ids[-1] in TOKENIZER.specials.values()) == bool(batch.finished[row])
        assert len(ids) == record["tokens"] <= 5
        assert batch.rewards[row] == np.float32(Vowels().score(0, Reply(record["reply"])).value)


def test_every_prompt_is_asked_once_an_epoch_and_draws_differ(rounds):
    asked = [rounds._asked(group, sample) for group in range(2 * len(rounds._items)) for sample in range(2)]
    items = [one.item for one in asked[::2]]
    assert sorted(items[: len(items) // 2]) == sorted(items[len(items) // 2 :]) == rounds._items
    assert items[: len(items) // 2] != items[len(items) // 2 :]
    assert len({one.seed for one in asked}) == len(items)


def test_a_reward_is_learnt(tmp_path):
    """Replies come to consist of vowels."""
    stage = dataclasses.replace(
        STAGE,
        data=dataclasses.replace(ROLLOUTS, batch=32, group=8, rows=32, temperature=1.0, validation=0.0),
        optimizer=optim.AdamW(learning_rate=2e-2),
        steps=30,
        evaluate_every=100,
    )
    run(tmp_path, stage)
    outcomes = [line["outcome"] for line in metrics.read(tmp_path) if "outcome" in line]
    assert np.mean(outcomes[-3:]) > 0.6 > 0.3 > np.mean(outcomes[:2]), outcomes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"constant": True}, "one reward for right and for empty replies to Vowels, 0"),
        ({"broken": "nan"}, "reward: got nan for .* must be finite"),
        ({"broken": "raise"}, "failed to score"),
    ],
)
def test_a_bad_reward_names_the_item(fields, message):
    task = Vowels(**fields)

    def write() -> None:
        with contextlib.closing(dataclasses.replace(ROLLOUTS, task=task).batches(TOKENIZER, "train", 0, "")) as made:
            made.next_batch(policy(made))

    with pytest.raises(UserError, match=message):
        write()


def test_a_reward_model_rewards_in_place_of_the_task(tmp_path):
    """Its rewards are those of the conversations; outcomes stay the task's."""
    config = RegressorConfig(TransformerConfig(vocab=40, layers=1, width=16, heads=2), pooling=Last())
    params = jax.jit(config.build().init)(jax.random.key(1), jnp.zeros((1, 4), jnp.int32))["params"]
    judge = RegressorModel(config, params, TOKENIZER)
    judge.save(tmp_path / "reward")
    made = dataclasses.replace(ROLLOUTS, reward=RewardModel(str(tmp_path / "reward")))
    assert from_json(to_json(made)) == made
    with contextlib.closing(made.batches(TOKENIZER, "train", 0, "")) as rounds:
        batch = jax.device_get(rounds.next_batch(policy(rounds)))
        prompts = [Vowels().prompt(record["item"]) for record in rounds.records]
        said = [
            (*prompt, Message("assistant", record["reply"]))
            for prompt, record in zip(prompts, rounds.records, strict=True)
        ]
        np.testing.assert_allclose(batch.rewards, judge.scores(said), rtol=0, atol=1e-5)
        shares = [Vowels().score(0, Reply(record["reply"])).outcome for record in rounds.records]
        assert [record["outcome"] for record in rounds.records] == shares
    assert made.prompts(TOKENIZER, "train").fingerprint != ROLLOUTS.prompts(TOKENIZER, "train").fingerprint


def test_a_stage_is_saved_between_rounds():
    made = dataclasses.replace(ROLLOUTS, minibatches=2, passes=2)
    with pytest.raises(UserError, match="save_every: got 3, must be a multiple of 4, the steps of a round"):
        dataclasses.replace(STAGE, data=made, steps=8, save_every=3)


@dataclasses.dataclass(frozen=True)
class Shout(Tool):
    """A tool that repeats the letter before each "="."""

    @property
    def mark(self) -> str:
        return "="

    def answer(self, text: str) -> str | None:
        return None if text[-2:-1] in ("", "=") else f"{text[-2]}!"


def test_answers_of_tools_stand_between_what_was_drawn_and_are_not_trained():
    """An untrained model draws each of 15 tokens about as often, so there are some calls."""
    letters = data.TrainCharacters().build(iter(["abceiou=!"]))
    made = dataclasses.replace(ROLLOUTS, tools=(Shout(),), max_tokens=12, batch=64, rows=64)
    with contextlib.closing(made.batches(letters, "train", 0, "")) as rounds:
        batch = jax.device_get(rounds.next_batch(policy(rounds)))
        called = [record for record in rounds.records if "!" in record["reply"]]
        for row, record in enumerate(rounds.records):
            real = (batch.segments[row] > 0) & (np.arange(24) >= np.argmax(batch.weights[row] > 0))
            ids, drawn = batch.targets[row][real], batch.weights[row][real] > 0
            text = letters.decode(ids.tolist())
            assert text == record["reply"]
            assert record["tokens"] == len(ids) <= 12
            expected = np.ones(len(ids), bool)
            for at in range(1, len(text)):
                if text[at] == "=" and expected[at] and text[at - 1] != "=" and at + 1 < len(text):
                    assert text[at + 1 : at + 3] == f"{text[at - 1]}!"
                    expected[at + 1 : at + 3] = False
            np.testing.assert_array_equal(drawn, expected)
    assert len(called) >= 3


@pytest.mark.slow
def test_a_mesh_writes_the_same_replies_and_trains_on_them(tmp_path):
    """Losses are sums of some hundred float32 products, in another order."""
    stage = dataclasses.replace(STAGE, steps=2, evaluate_every=2)
    run(tmp_path / "one", stage)
    with sharding.use(MeshConfig(data=2, fsdp=2, tensor=2).make()):
        run(tmp_path / "mesh", stage, module=MODEL.clone(rules=DEFAULT_RULES))
    one, mesh = (
        [json.loads(line) for line in (tmp_path / name / "rollouts" / "rl.jsonl").read_text().splitlines()]
        for name in ("one", "mesh")
    )
    assert [line["reply"] for line in one] == [line["reply"] for line in mesh]
    losses = [[line["loss"] for line in metrics.read(tmp_path / name) if "loss" in line] for name in ("one", "mesh")]
    np.testing.assert_allclose(losses[0], losses[1], rtol=0, atol=1e-4)
    assert all(line["mismatch_max"] < 1e-4 for line in metrics.read(tmp_path / "mesh") if "mismatch_max" in line)
