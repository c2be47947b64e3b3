"""A stage that trains adapters: its checkpoints hold nothing else, and what is loaded has them merged."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from gptjax import data, load, optim
from gptjax.checkpoint.checkpoint import Checkpoints
from gptjax.distributed.parameters import parameter_info
from gptjax.distributed.sharding import MeshConfig
from gptjax.experiment.experiment import Experiment, Stage
from gptjax.monitor.metrics import read as read_metrics
from gptjax.nn import LoRA, TransformerConfig
from gptjax.objectives import NextToken
from gptjax.types import UserError


@dataclasses.dataclass(frozen=True)
class Words:
    """A source: documents of a few letters."""

    def documents(self, split: str) -> Iterator[str]:
        for i in range(40):
            yield "ab cd"[i % 4 :] * 8

    def fingerprint(self) -> str:
        return "words"


BASE = Stage(
    data=data.Pretrain(Words(), length=16, batch=8),
    objective=NextToken(),
    optimizer=optim.AdamW(learning_rate=1e-2),
    steps=2,
    save_every=2,
    eval_sequences=8,
    prompts=(),
)
LORA = LoRA(rank=2, match=("q", "down"))
EXPERIMENT = Experiment(
    model=TransformerConfig(vocab=16, layers=2, width=16, heads=2),
    tokenizer=data.TrainCharacters(),
    stages={"base": BASE, "adapt": dataclasses.replace(BASE, adapter=LORA, steps=4)},
    mesh=MeshConfig(data=2, fsdp=2, tensor=2),
)


def params(folder, stage):
    with Checkpoints(folder / "checkpoints" / stage) as checkpoints:
        return jax.device_get(checkpoints.restore_params().state)


@pytest.mark.sampled
@pytest.mark.parametrize("lora", [LORA, dataclasses.replace(LORA, bits=4, group=8)], ids=["LoRA", "QLoRA"])
def test_a_stage_of_adapters(tmp_path, monkeypatch, lora):
    """The loaded model is the validated one: the merged one, in QLoRA over the dequantised base."""
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "run"
    adapt = dataclasses.replace(EXPERIMENT.stages["adapt"], adapter=lora)
    experiment = dataclasses.replace(EXPERIMENT, stages={"base": BASE, "adapt": adapt})
    experiment.run(folder)
    base, adapters = params(folder, "base"), params(folder, "adapt")
    assert set(adapters["blocks"]["attention"]["q"]) == {"a", "b"}
    assert set(adapters["blocks"]) == {"attention", "mlp"}
    assert np.any(adapters["blocks"]["mlp"]["down"]["b"])
    loaded, info = load(folder), parameter_info(EXPERIMENT.model.build())
    frozen = jax.jit(functools.partial(lora.freeze, info=info))(base)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, jax.jit(lora.merge)(frozen, adapters))
    half = jax.tree.map(lambda x: x.astype("bfloat16"), loaded.params)
    if lora.bits:  # rounded from float32, as in training
        jax.tree.map(np.testing.assert_array_equal, load(folder, dtype="bfloat16").params, half)
    losses = [line["validation_loss"] for line in read_metrics(folder) if "validation_loss" in line]
    validation = adapt.data.evaluation(loaded.tokenizer, "validation", tmp_path / "cache" / "tokens", sequences=8)
    loss = jax.jit(functools.partial(adapt.objective, EXPERIMENT.model.build().apply))
    metrics = [loss(loaded.params, batch) for batch in validation]
    total, weight = (sum(float(m["loss"][i]) for m in metrics) for i in (0, 1))
    assert losses[-1] == pytest.approx(total / weight, rel=1e-5)

    shutil.rmtree(folder / "checkpoints" / "adapt" / "4")
    experiment.run(folder)
    jax.tree.map(np.testing.assert_array_equal, params(folder, "adapt"), adapters)
    jax.tree.map(np.testing.assert_array_equal, params(folder, "base"), base)


@pytest.mark.alone
def test_adapters_of_a_pretrained_model(tmp_path, monkeypatch):
    """A first stage adapts the model that the run starts from, the next what it made; loaded, both are merged."""
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    base, folder = tmp_path / "base", tmp_path / "run"
    adapt = EXPERIMENT.stages["adapt"]
    dataclasses.replace(EXPERIMENT, stages={"base": BASE}).run(base)
    started = dataclasses.replace(EXPERIMENT, tokenizer=data.LoadTokenizer(str(base)), init_from=str(base))
    dataclasses.replace(started, stages={"adapt": adapt, "again": adapt}).run(folder)
    merged = LORA.merge(LORA.merge(params(base, "base"), params(folder, "adapt")), params(folder, "again"))
    jax.tree.map(np.testing.assert_array_equal, load(folder).params, merged)


def test_adapters_need_something_to_adapt():
    with pytest.raises(UserError, match=r"first.adapter: got LoRA, must be of a later stage"):
        dataclasses.replace(EXPERIMENT, stages={"first": EXPERIMENT.stages["adapt"]})
