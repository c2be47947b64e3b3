"""Fine-tuning, then a stage of preferences: it begins at log 2, learns what was planted, and resumes bit for bit."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from gptjax import data, load, optim
from gptjax.checkpoint.checkpoint import Checkpoints
from gptjax.distributed.sharding import MeshConfig
from gptjax.experiment.experiment import Experiment, Stage
from gptjax.nn import LoRA, TransformerConfig
from gptjax.objectives import DPO, KTO, NextToken
from gptjax.types import UserError

WORDS = ("sun", "moon", "star", "tree")


def pairs(split: str):
    """A word in capitals is preferred to one in small letters."""
    for i in range(12 if split == "validation" else 60):
        asked, word = f"{split[0]}{i}", WORDS[i % 4]
        yield data.Preference(
            (data.Message("user", asked),), data.Message("assistant", word.upper()), data.Message("assistant", word)
        )


@dataclasses.dataclass(frozen=True)
class Shouted:
    """Pairs of replies."""

    documents = staticmethod(pairs)

    def fingerprint(self) -> str:
        return "shouted"


@dataclasses.dataclass(frozen=True)
class Both:
    """Conversations with either reply."""

    def documents(self, split: str):
        for pair in pairs(split):
            yield from ((*pair.prompt, reply) for reply in (pair.chosen, pair.rejected))

    def fingerprint(self) -> str:
        return "both"


TUNE = Stage(
    data=data.Chat(Both(), length=32, batch=8),
    objective=NextToken(),
    optimizer=optim.AdamW(learning_rate=1e-2),
    steps=20,
    save_every=20,
    eval_sequences=8,
    prompts=(),
)
PREFER = dataclasses.replace(
    TUNE,
    data=data.Preferences(Shouted(), length=32, batch=8),
    objective=DPO(beta=0.5),
    optimizer=optim.AdamW(learning_rate=2e-3),
    steps=12,
    save_every=6,
)
MODEL = TransformerConfig(vocab=264, layers=2, width=16, heads=2, dropout=0.1)


def run(folder, mesh=MeshConfig(), **changes):
    stages = {"tune": TUNE, "prefer": dataclasses.replace(PREFER, **changes)}
    Experiment(MODEL, data.Bytes(), stages, mesh=mesh).run(folder)
    with Checkpoints(folder / "checkpoints" / "prefer") as checkpoints:
        return jax.device_get(checkpoints.restore_params().state)


def records(folder, name):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row[name] for row in rows if row.get("stage") == "prefer" and name in row}


def test_what_is_preferred_becomes_more_likely_and_a_run_resumes(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "run"
    trained = run(folder, MeshConfig(data=2, fsdp=2, tensor=2), log_every=1)
    assert records(folder, "loss")[1] == pytest.approx(np.log(2), rel=1e-6)
    assert records(folder, "accuracy")[1] == 0.5
    assert records(folder, "validation_accuracy")[12] == 1
    lm = load(folder)
    for pair in pairs("validation"):
        ids = lm.encode_chat(pair.prompt)
        shouted, spoken = (
            lm.logprobs([*ids, *lm.tokenizer.encode(reply.text)])[-len(reply.text) :].sum()
            for reply in (pair.chosen, pair.rejected)
        )
        assert shouted > spoken

    before = records(folder, "loss")
    shutil.rmtree(folder / "checkpoints" / "prefer" / "12")
    again = run(folder, MeshConfig(data=2, fsdp=2, tensor=2), log_every=1)
    jax.tree.map(np.testing.assert_array_equal, again, trained)
    assert records(folder, "loss") == before


@pytest.mark.slow
def test_adapters_learn_preferences_over_the_same_reference(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    adapter = LoRA(rank=4, match=("q", "v", "up", "down"))
    adapters = run(tmp_path / "run", adapter=adapter, log_every=1, optimizer=optim.AdamW(learning_rate=1e-2))
    assert "a" in adapters["blocks"]["attention"]["q"]
    assert records(tmp_path / "run", "loss")[1] == pytest.approx(np.log(2), rel=1e-6)
    assert records(tmp_path / "run", "validation_accuracy")[12] > 0.9


@pytest.mark.alone
def test_kto_learns_from_replies_without_pairs(tmp_path, monkeypatch):
    """With its baseline from the whole step, in microbatches and on a mesh."""
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    single = data.UnpairedPreferences(Shouted(), length=32, batch=8)
    changes = {"data": single, "objective": KTO(beta=0.5), "accumulate": 2, "log_every": 1}
    run(tmp_path / "run", MeshConfig(data=2, fsdp=2, tensor=2), **changes)
    assert records(tmp_path / "run", "loss")[1] == pytest.approx(0.5, rel=1e-6)
    assert records(tmp_path / "run", "kl")[1] == 0
    assert min(records(tmp_path / "run", "kl").values()) == 0, "an estimate below 0 is 0"
    assert records(tmp_path / "run", "validation_accuracy")[12] > 0.9


def test_a_first_stage_has_no_reference():
    with pytest.raises(UserError, match=r"prefer.objective: got DPO"):
        Experiment(MODEL, data.Bytes(), {"prefer": PREFER}).check(8)
