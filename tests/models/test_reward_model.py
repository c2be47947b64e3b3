"""Reward models as experiments: from a file of pairs, over a language model, to a `RegressorModel`."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

import gptjax
from gptjax import data, evals, optim
from gptjax.data import chat
from gptjax.experiment.experiment import Experiment, Stage
from gptjax.nn import RegressorConfig, TransformerConfig
from gptjax.objectives import BradleyTerry, NextToken
from gptjax.types import UserError

BACKBONE = TransformerConfig(vocab=264, layers=1, width=32, heads=2)
WORDS = ("sun", "moon", "star", "tree")


def stage(read, objective, steps: int) -> Stage:
    adam = optim.AdamW(learning_rate=5e-3, schedule=optim.Constant(), weight_decay=0.0)
    return Stage(read, objective, adam, steps=steps, evaluate_every=1000, prompts=())


@pytest.mark.alone
def test_a_reward_model_is_made_of_a_language_model(tmp_path, monkeypatch):
    """A word in capitals is preferred to one in small letters, by a margin."""
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"q{i}", "chosen": WORDS[i % 4].upper(), "rejected": WORDS[i % 4], "margin": 0.5} for i in range(80)
    ]
    pairs.write_text("\n".join(map(json.dumps, rows)))
    conversations = tmp_path / "chats.jsonl"
    conversations.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}')
    chats = data.Chat(data.ChatJsonl(str(conversations), validation=0.0), length=32, batch=8)
    Experiment(BACKBONE, data.Bytes(), {"tune": stage(chats, NextToken(), 1)}).run(tmp_path / "lm")

    read = data.Preferences(data.PreferencesJsonl(str(pairs)), length=64, batch=16)
    stages = {"reward": stage(read, BradleyTerry(centering=0.01), 40)}
    experiment = Experiment(RegressorConfig(BACKBONE), data.Bytes(), stages, init_from=str(tmp_path / "lm"))
    experiment.run(tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["validation_accuracy"] for line in lines if "validation_accuracy" in line][-1] == 1

    judge = gptjax.load(tmp_path / "run", kind=gptjax.Model)
    assert isinstance(judge, gptjax.RegressorModel)
    said = [[data.Message("user", f"x{i}"), data.Message("assistant", word)] for i, word in enumerate(["SUN", "sun"])]
    found = evals.RewardAccuracy(read.source)(judge)
    assert found.values["reward_accuracy"] == 1
    assert found.values["pairs"] == len(found.items) > 2
    high, low = judge.scores(said)
    assert high > low + 0.5
    assert judge.scores(said, batch=1) == pytest.approx([high, low], rel=1e-5), "padding changes nothing"
    assert judge.score("x0", "SUN") == pytest.approx(high, rel=1e-5)
    assert judge.scores([]) == []
    for wrong, line in (
        ([said[0][:1]], "conversations: 0: got the user's message last, must end with the assistant's reply"),
        ([said[0], [said[0][0], data.Message("assistant", "a" * 99)]], "conversations: 1: got 10. tokens, must be at"),
    ):
        with pytest.raises(UserError, match=line):
            judge.scores(wrong)

    judge.save(tmp_path / "saved")
    again = gptjax.load(tmp_path / "saved", kind=gptjax.RegressorModel)
    assert (again.scores(said), again.context) == ([high, low], 64)
    judge.save_hf(tmp_path / "hf")
    again = gptjax.load(tmp_path / "hf", kind=gptjax.RegressorModel)
    assert again.scores(said) == [high, low]
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        import torch
        import transformers

        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
        assert theirs.config.num_labels == 1
        words = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
        texts = [[{"role": message.role, "content": message.text} for message in one] for one in said]
        for conversation, expected in zip(texts, (high, low), strict=True):
            ids = words.apply_chat_template(conversation, return_dict=False)
            ours = chat.render(chat.conversation(conversation), judge.tokenizer)[0]
            assert list(ids) == ours
            with torch.inference_mode():
                found = theirs(torch.tensor([ours])).logits.item()
            np.testing.assert_allclose(found, expected, rtol=1e-4)
