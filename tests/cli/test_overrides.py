"""Overrides of the command line are typed; mistakes get one line that names them; help shows what there is."""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
from pathlib import Path

import pytest
from small_config import CONFIG, Adam, Data, Learned, Model, RoPE, Sheet, Stage, Text, apply, roundtrip

from gptjax.cli.options import override
from gptjax.cli.parts import Choices, annotation
from gptjax.config import allow, differences, paths
from gptjax.nn import ALiBi
from gptjax.optim import AdamW, Constant
from gptjax.types import UserError


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", {}),
        ("--seed 3", {"seed": 3}),
        ("--model.kv_heads 1", {"model": Model(kv_heads=1)}),
        ("--model.kv-heads=1", {"model": Model(kv_heads=1)}),
        ("--model.remat dots --model.tie_embeddings False", {"model": Model(remat="dots", tie_embeddings=False)}),
        ("--model.positions.theta 5e5", {"model": Model(positions=RoPE(5e5))}),
        ("--axis data", {"axis": "data"}),
        ("--axis None", {"axis": None}),
        ("--model.positions Learned", {"model": Model(positions=Learned())}),
        ("--model.positions.length 7 --model.positions=Learned", {"model": Model(positions=Learned(7))}),
        (
            "--chat.data Data --pretrain.data None",
            {"stages": {"pretrain": Stage(), "chat": Stage(Adam(1e-4), 5, Data())}},
        ),
        (
            "--chat.data.source.column 1 --chat.data.source Sheet --chat.data Data --chat.data.mixture.1.0 Text",
            {
                "stages": {
                    **CONFIG.stages,
                    "chat": Stage(
                        Adam(1e-4), 5, Data(source=Sheet(column="1"), mixture=((Text(), 0.25), (Text(), 0.75)))
                    ),
                }
            },
        ),
        ("--chat.steps 7", {"stages": {**CONFIG.stages, "chat": Stage(Adam(1e-4), 7)}}),
        ("--chat.optimizer.betas 0.5 -1", {"stages": {**CONFIG.stages, "chat": Stage(Adam(1e-4, (0.5, -1.0)), 5)}}),
        (
            "--pretrain.data.source.path c --pretrain.data.mixture.0.0.names x y --pretrain.data.shares.code 1",
            {
                "stages": {
                    **CONFIG.stages,
                    "pretrain": Stage(
                        data=Data(
                            Text(Path("c")),
                            ((Text(names=("x", "y")), 0.25), (Text(Path("b.txt")), 0.75)),
                            {"code": 1.0},
                        )
                    ),
                }
            },
        ),
    ],
)
def test_overrides_are_typed(arguments, expected):
    config = apply(*arguments.split())
    assert config == dataclasses.replace(CONFIG, **expected)
    assert roundtrip(config) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model.layesr 3", "no option --model.layesr; nearest: --model.layers; see all with prog --help all"),
        ("--steps=3", "no option --steps; nearest: --chat.steps, --pretrain.steps; see all with prog --help all"),
        ("--zzzzzz 3", "no option --zzzzzz; see all with prog --help all"),
        ("3", "got '3', which is not an option; give values as --name value"),
        ("--extra.x 3", "no option --extra.x; nearest: --extra; see all with prog --help all"),
        ("--model.layers many", "--model.layers: got 'many', must be an integer of at most 64 bits"),
        ("--model.kv_heads 1.5", "--model.kv_heads: got '1.5', must be an integer of at most 64 bits"),
        ("--model.layers", "Missing value for argument '--model.layers'. Expected 1 values"),
        ("--model.positions.theta inf", "--model.positions.theta: got 'inf', must be a finite number"),
        ("--model.heads 3", "model.heads: got 3, must divide width 8"),
        ("--model.positions rope", "--model.positions: got 'rope', must be one of Learned, RoPE"),
        ("--model.positions None", "--model.positions: got 'None', must be one of Learned, RoPE"),
        (
            "--model.position RoPE",
            "no option --model.position; nearest: --model.positions; see all with prog --help all",
        ),
        ("--chat.data Text", "--chat.data: got 'Text', must be one of Data, None"),
        ("--pretrain.data.source Adam", "--pretrain.data.source: got 'Adam', must be one of Sheet, Text"),
        ("--pretrain.data.source Sheet", "--pretrain.data.source Sheet: needs --pretrain.data.source.column"),
        ("--pretrain.data.source=Sheet", "--pretrain.data.source Sheet: needs --pretrain.data.source.column"),
        ("--pretrain.optimizer Adam", "--pretrain.optimizer: cannot be set from the command line; change it in Python"),
        (
            "--model.positions Learned --model.positions.theta 3",
            "no option --model.positions.theta; nearest: --model.heads, --chat.optimizer.betas, "
            "--pretrain.optimizer.betas; see all with prog --help all",
        ),
    ],
)
def test_a_mistake_gets_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")  # tyro wraps its lines at the terminal's width
    with pytest.raises(UserError) as error:
        apply(*arguments.split())
    assert str(error.value) == message
    assert capsys.readouterr() == ("", "")


def test_a_mistake_in_the_root_gets_one_line_too():
    with pytest.raises(UserError, match=r"^model\.heads: got 3, must divide width 8$"):
        apply("--heads", "3", config=Model())


def test_a_stage_cannot_have_the_name_of_a_field():
    for name in ("model", "seed"):
        with pytest.raises(UserError, match=f"the name '{name}' is taken by a field of Run"):
            apply(config=dataclasses.replace(CONFIG, stages={name: Stage()}))


def test_a_choice_outside_the_literal_names_the_choices():
    with pytest.raises(UserError, match=r"'some'.*--model\.remat.*'(full|dots)', "):
        apply("--model.remat", "some")


def help_of(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        apply(*arguments)
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_begins_with_the_sections(capsys):
    text = help_of(capsys, "--help")
    for part in (
        "A description.",
        "  model     Model: RoPE\n",
        "  pretrain  Stage: Adam, Data\n",
        "  chat      Stage: Adam\n",
        "--seed INT",
    ):
        assert part in text
    assert "--model" not in text
    assert len(text.splitlines()) < 20


def test_help_of_a_section_is_of_what_is_chosen(capsys):
    text = help_of(capsys, "--help", "pretrain.data")
    assert text.startswith("pretrain.data: Data: Text\n\nParts, with the class of each")
    assert "  --pretrain.data.source Text\n        Sheet, Text\n" in text
    assert "--pretrain.data.shares.code" in text
    assert "--pretrain.steps" not in text
    assert "--help" not in text
    text = help_of(capsys, "--model.positions", "Learned", "-h", "model")
    assert "--model.positions.length" in text
    assert "theta" not in text
    with pytest.raises(
        UserError, match=r"^--help: no section 'model.layers'; must be all or a section, such as positions$"
    ):
        apply("--help", "model.layers")


@pytest.mark.parametrize("name", ["quickstart", "moe_30b_a3b", "nanochat_d4", "t5_numbers"])
def test_every_part_of_an_experiment_may_be_chosen_as_what_it_is(name):
    """Stages and the values of dicts are no parts."""
    experiment = importlib.import_module(f"gptjax.experiments.{name}").experiment
    allow(sys.modules[f"gptjax.experiments.{name}"])
    parts = {path: value for path, value in paths(experiment) if dataclasses.is_dataclass(value)}
    without = {path for path in parts if path in experiment.stages or ".groups." in path or re.search(r"\.\d+$", path)}
    found = {path: Choices(annotation(experiment, path)).names() for path in parts.keys() - without}
    assert {path: type(parts[path]).__name__ in names for path, names in found.items()} == dict.fromkeys(found, True)
    assert len(found) > 15


def test_what_is_chosen_is_what_a_run_is_resumed_with():
    experiment = importlib.import_module("gptjax.experiments.quickstart").experiment
    arguments = "--model.positions ALiBi --pretrain.optimizer AdamW --pretrain.optimizer.b1 0.8 --chat.divergence Skip"
    arguments += (
        " --pretrain.optimizer.schedule Constant --wandb WandB --tokenizer Bytes --pretrain.evaluations.0 Answers"
    )
    arguments += " --pretrain.evaluations.0.source PyDocsChat --model.mlp MixtureOfExperts --model.mlp.router Sigmoid"
    chosen = override(experiment, arguments.split(), "prog", "")
    assert chosen.model.positions == ALiBi()
    assert chosen.stages["pretrain"].optimizer == AdamW(b1=0.8, schedule=Constant())
    assert differences(chosen, roundtrip(chosen)) == []
    assert override(experiment, arguments.split(), "prog", "") == chosen
    assert override(chosen, ["--wandb", "None"], "prog", "") == dataclasses.replace(chosen, wandb=None)


def test_help_shows_every_option_with_its_docstring(capsys):
    text = help_of(capsys, "--help", "all")
    for part in (
        "A description.",
        "--model.layers INT",
        "Number of blocks. (default: 4)",
        "--model.positions.theta",
        "--pretrain.optimizer.learning_rate",
        "--chat.steps",
        "Seed of all randomness.",
    ):
        assert part in text
    assert "stages." not in text
