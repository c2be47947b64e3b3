"""`gptjax eval`: tasks by name and file, models beside one another, and what is refused."""

from __future__ import annotations

import json

import jax
import pytest

from gptjax.cli.eval import _report, parse_task
from gptjax.cli.main import main
from gptjax.data import Bytes
from gptjax.evals import intervals
from gptjax.models.language_model import LanguageModel
from gptjax.nn import TransformerConfig
from gptjax.tasks import ArcEasy, CountLetters, Gsm8k
from gptjax.types import Result, UserError


def test_tasks_are_named_by_their_classes(tmp_path, monkeypatch):
    assert parse_task("gsm8k=a.jsonl") == Gsm8k("a.jsonl")
    assert parse_task("ARC_Easy=b=c.json") == ArcEasy("b=c.json")
    assert parse_task("count-letters") == CountLetters()
    (tmp_path / "mine_of_eval.py").write_text("from gptjax.tasks import CountLetters as Mine\nother = 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert parse_task("mine_of_eval:Mine") == CountLetters()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gsm9k=a", "got 'gsm9k', must be one of arc, "),
        ("gsm8k", "got gsm8k, must be gsm8k=FILE"),
        ("spelling=a", "got spelling=a, must be spelling"),
        ("mixture", "which needs tasks; use it from Python"),
        ("no_module_of_this_name:A", "cannot be imported"),
        ("gptjax.tasks:Reply", "must be a dataclass that is a gptjax.tasks.Task"),
    ],
)
def test_other_names_are_refused(text, said):
    with pytest.raises(UserError, match=r"^tasks: ") as error:
        parse_task(text)
    assert said in str(error.value)


def test_two_models_are_compared_item_by_item():
    def result(outcomes):
        items = tuple({"outcome": outcome, "cluster": str(i // 2)} for i, outcome in enumerate(outcomes))
        return Result("T", {}, "", items)

    a, b = (1, 1, 1, 0, 1, 1), (0, 1, 0, 0, 1, 0)
    found = intervals.difference(a, b, [0, 0, 1, 1, 2, 2])
    text = _report({"a": [result(a)], "b": [result(b)]})
    assert (
        f"# a minus b\n\n| task | difference of the means, 95 % interval | p |\n|---|---|---|\n| T | {found:+.1%} |"
        in text
    )


def test_a_model_is_evaluated_and_the_command_resumes(tmp_path, capsys):
    tokenizer = Bytes().build([])
    config = TransformerConfig(vocab=tokenizer.vocab, layers=1, width=16, heads=2)
    params = jax.jit(config.build().init)(jax.random.key(1), jax.numpy.zeros((1, 2), int))["params"]
    LanguageModel(config, params, tokenizer, context=256).save(tmp_path / "model")
    command = ["eval", str(tmp_path / "model"), "--tasks", "spelling", "--limit", "3", "--max_tokens", "4"]
    command += ["--out", str(tmp_path / "out")]
    assert main(command) == 0
    first, file = capsys.readouterr().out, tmp_path / "out" / "model" / "0-Spelling.jsonl"
    lines = file.read_text().splitlines()
    assert len(lines) == 4
    assert json.loads((tmp_path / "out" / "report.json").read_text())["model"][0]["values"]["replies"] == 3
    file.write_text("".join(line + "\n" for line in lines[:3]))
    assert main(command) == 0
    assert capsys.readouterr().out == first
    assert file.read_text().splitlines() == lines
    assert main([*command, "--seed", "1"]) == 2
    assert "choose another folder" in capsys.readouterr().err
    red = ["eval", str(tmp_path / "model"), "--red_team", "--limit", "2", "--max_tokens", "2"]
    assert main(red) == 0
    out = capsys.readouterr().out
    assert [line[2:] for line in out.splitlines() if line.startswith("# ")] == [
        "Refusal",
        "Jailbreak",
        "OverRefusal",
        "Bias by names",
    ]
    assert out.count("| abusive |") == 3
    assert main([*red, "--form", "likelihood"]) == 2
    assert "got likelihood with --red_team" in capsys.readouterr().err


def test_likelihoods_of_options_and_of_documents(tmp_path, capsys):
    tokenizer = Bytes().build([])
    config = TransformerConfig(vocab=tokenizer.vocab, layers=1, width=16, heads=2)
    params = jax.jit(config.build().init)(jax.random.key(1), jax.numpy.zeros((1, 2), int))["params"]
    LanguageModel(config, params, tokenizer, context=256).save(tmp_path / "model")
    choices = {"text": ["red", "blue"], "label": ["A", "B"]}
    rows = [{"question": f"sky {i}?", "choices": choices, "answerKey": "AB"[i % 2]} for i in range(6)]
    (tmp_path / "arc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "texts.jsonl").write_text('{"text": "a b"}\n{"text": "c d e"}\n{"text": "f"}\n')
    command = ["eval", str(tmp_path / "model"), "--tasks", f"arc_easy={tmp_path / 'arc.jsonl'}", "--shots", "1"]
    command += ["--form", "likelihood", "--on", str(tmp_path / "texts.jsonl"), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "**accuracy_per_character**" in shown
    assert "on 3 held-out documents" in shown
    items = (tmp_path / "out" / "model" / "0-ArcEasy.jsonl").read_text().splitlines()
    assert [json.loads(item)["answer"] for item in items] == [0, 1, 0, 1, 0, 1]
    command[command.index("--tasks") + 1] = "spelling"
    assert main(command) == 2
    assert "form: got likelihood for Spelling" in capsys.readouterr().err
