"""Configurations survive JSON and say how they differ."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import small_config
from small_config import CONFIG, Adam, Data, Learned, Model, Run, Stage, Text, apply, roundtrip

from gptjax.config import EXPORTS, differences, from_json, modules, to_json
from gptjax.types import UserError


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        Run(Model(positions=Learned(), kv_heads=1, remat="dots"), {}, axis=None),
        Stage(optimizer=(), data=Data(Text(Path("/x"), ("é", "\n")), mixture=(), shares={})),
        Adam(1e-7, (float("inf"), 1.0)),
    ],
)
def test_json_roundtrip_is_exact(config):
    back = roundtrip(config)
    assert back == config
    assert repr(back) == repr(config)  # 1 and 1.0, a list and a tuple, are told apart


def test_json_is_readable():
    assert to_json(Model())["positions"] == {"class": "small_config.RoPE", "theta": 10_000.0}


@pytest.mark.parametrize("value", [[1], {1: 2}, {"class": "x"}, len, {1}, b"x", Path])
def test_what_would_not_come_back_is_refused(value):
    with pytest.raises(UserError, match=r"configuration\.extra: got "):
        to_json(dataclasses.replace(CONFIG, extra=value))


def test_a_class_that_has_no_importable_name_is_refused():
    @dataclass(frozen=True)
    class Local:
        pass

    with pytest.raises(UserError, match="top level"):
        to_json(Local())


def test_a_file_names_what_gptjax_exports_and_what_the_program_allows(monkeypatch, tmp_path):
    """Nothing that it names is imported, and no other class is called, however harmless it looks."""
    from gptjax.distributed.sharding import MeshConfig
    from gptjax.nn import RoPE, Transformer

    assert to_json(MeshConfig(data=2))["class"] == "gptjax.MeshConfig"
    assert roundtrip(MeshConfig(data=2)) == MeshConfig(data=2)
    assert from_json({"class": "gptjax.nn.RoPE", "theta": 5.0}) == RoPE(theta=5.0)
    (tmp_path / "brought.py").write_text("raise SystemExit('was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    refused = [
        "brought.Thing",
        "etils.epy.lazy_imports_utils.LazyModule",  # a dataclass that imports what one of its fields names
        f"{subprocess.__name__}.Popen",
        "small_config.RoPE.Inside",
        "gptjax.nn.positions.rope.RoPE",
        f"gptjax.nn.{Transformer.__name__}",
        "gptjax.nn.Mask",
        "gptjax.LanguageModel",
        "gptjax.data.tokenizers.Tokenizer",
        "gptjax.no_such_room.Thing",
        "Thing",
        None,
        ["gptjax.nn.RoPE"],
    ]
    importlib.import_module("etils.epy.lazy_imports_utils")
    for path in refused:
        with pytest.raises(UserError, match=r"configuration\.extra: got class .*, must be a configuration that gptjax"):
            from_json({**to_json(CONFIG), "extra": {"class": path}})
    monkeypatch.setattr("gptjax.config.allowed_modules", set())
    with pytest.raises(UserError, match=r"got class small_config\.Text, must"):
        roundtrip(Text())
    assert modules(CONFIG) == {small_config}


def test_every_configuration_of_ours_can_be_saved():
    """Each frozen dataclass that a package exports, and each default of its fields."""
    for package, names in EXPORTS.items():
        module = importlib.import_module(package)
        for name in names or module.__all__:
            cls = getattr(module, name)
            if not dataclasses.is_dataclass(cls) or name == "Context":  # which holds a batch's mask
                continue
            for at in dataclasses.fields(cls):
                if dataclasses.is_dataclass(at.default) and cls.__module__.startswith(package):
                    assert roundtrip(at.default) == at.default, f"{package}.{name}.{at.name}"
                    assert to_json(at.default)["class"].rpartition(".")[0] in EXPORTS


def test_json_of_another_version():
    data = to_json(CONFIG)
    data["model"]["rotations"] = 3
    with pytest.raises(UserError, match=r"model\.rotations: not a field of .*\.Model, which has layers, "):
        from_json(data)
    data = to_json(CONFIG)
    del data["model"]
    with pytest.raises(UserError, match=r"configuration\.model: missing"):
        from_json(data)
    data = to_json(CONFIG)
    del data["seed"]
    assert from_json(data) == CONFIG


def test_differences():
    assert differences(CONFIG, roundtrip(CONFIG)) == []
    changed = apply(
        "--model.layers", "12", "--chat.optimizer.learning_rate", "1e-3", "--pretrain.data.mixture.1.1", "0.5"
    )
    changed = dataclasses.replace(changed, axis=None)
    assert differences(CONFIG, changed) == [
        "model.layers: 4 → 12",
        "pretrain.data.mixture.1.1: 0.75 → 0.5",
        "chat.optimizer.learning_rate: 0.0001 → 0.001",
        "axis: ('data', 'fsdp') → None",
    ]
    assert differences(Model(), Model(positions=Learned())) == ["positions: RoPE(theta=10000.0) → Learned(length=64)"]
    one_stage = dataclasses.replace(CONFIG, stages={"chat": Stage(Adam(1e-4), 5)})
    (removed,), (added,) = differences(CONFIG, one_stage), differences(one_stage, CONFIG)
    assert removed.startswith("pretrain: Stage(")
    assert removed.endswith(" → nothing")
    assert added.startswith("pretrain: nothing → Stage(")
