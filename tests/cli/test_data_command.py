"""`gptjax data show`: rows as the model reads them, trained tokens marked, for every kind of data."""

from __future__ import annotations

import json

import pytest

from gptjax.cli import main


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path


TALK = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4\n"}]
ROWS = {
    "chat.jsonl": {"messages": TALK},
    "pairs.jsonl": {"source": "two", "target": "zwei"},
    "labels.jsonl": {"text": "two", "label": "b"},
    "text.jsonl": {"text": "two"},
}
SHOWN = {
    "chat.jsonl": ("<|bos|><|user|>2+2?<|end|><|assistant|>⟦4\n<|end|>⟧", "27.3% of the tokens"),
    "pairs.jsonl": ("<|bos|>two<|end|>⟦zwei<|end|>⟧", "(targets): "),
    "labels.jsonl": ("<|bos|>two<|end|>\n⟦class 1⟧", "the label of each"),
    "text.jsonl": ("<|bos|>⟦two<|end|>⟧", "80.0% of the tokens"),
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", ROWS)
def test_each_kind_of_data_is_shown_with_its_targets(folder, capsys, name):
    rows = [ROWS[name]] * 3
    rows += [ROWS[name] | {"label": "a"}] if name == "labels.jsonl" else []
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    assert main.main(["data", "show", name, "--length", "16", "--rows", "1", "--row", "2"]) == 0
    out = capsys.readouterr().out
    for part in (*SHOWN[name], f"=== {name}, train, row 2 ===", "--- document 1 ---", "padding"):
        assert part in out
    assert main.main(["data", "show", name, "--length", "16", "--rows", "1", "--tokens"]) == 0
    line = capsys.readouterr().out.splitlines()[-1].split()
    assert line[5] in ("'<|end|>'", "'w'", "'o'"), line


def test_an_experiment_is_shown_with_overrides_and_a_mistake_is_one_line(folder, capsys):
    (folder / "lines.txt").write_text("\n".join(f"line {i}" for i in range(200)))
    (folder / "shown.py").write_text(
        "from gptjax import Experiment, Stage, data, objectives, optim\n"
        "from gptjax.nn import TransformerConfig\n"
        "source = data.Text('lines.txt', separator='\\n')\n"
        "stage = Stage(data.Pretrain(source, 64, 2), objectives.NextToken(), optim.AdamW(), steps=2)\n"
        "model = TransformerConfig(vocab=264, layers=1, width=16, heads=2)\n"
        "experiment = Experiment(model, data.Bytes(), {'text': stage})\n"
    )
    arguments = ["data", "show", "shown.py", "--split", "validation", "--rows", "1", "--text.data.length", "20"]
    assert main.main(arguments) == 0
    out = capsys.readouterr().out
    assert "sequences of 20" in out
    assert "# text\n" in out
    for extra, says in (
        (["--stage", "chat"], "stage: got 'chat', must be one of text"),
        (["--rows", "-1"], "rows: got -1"),
        (["--text.data.lenth", "3"], "nearest: --text.data.length"),
    ):
        assert main.main([*arguments, *extra]) == 2
        assert says in capsys.readouterr().err
    assert main.main(["data", "show", "quickstrat"]) == 2
    assert "the nearest: quickstart" in capsys.readouterr().err
    assert main.main(["data", "sho"]) == 2
    assert "the nearest: show" in capsys.readouterr().err


EXPERIMENT = (
    "from gptjax import Experiment, Stage, data, objectives, optim\n"
    "from gptjax.nn import TransformerConfig\n"
    "source = data.Text('lines.txt', separator='\\n')\n"
    "stage = Stage(data.Pretrain(source, 16, 8), objectives.NextToken(), optim.AdamW(), steps=1)\n"
    "model = TransformerConfig(vocab=300, layers=1, width=16, heads=2)\n"
    "experiment = Experiment(model, data.TrainCharacters(), {'text': stage})\n"
)


def test_a_run_finds_what_was_prepared(folder, capsys, monkeypatch):
    """The tokenizer too. Workers that are not the last say so."""
    (folder / "lines.txt").write_text("\n".join(f"line {i}" for i in range(200)))
    (folder / "prepared_here.py").write_text(EXPERIMENT)
    arguments = ["data", "prepare", "prepared_here.py", "--out", "tokens", "--processes", "1"]
    assert main.main([*arguments, "--worker", "1/2"]) == 0
    assert "other workers have shards to make\nworker 1/2 has done its part" in capsys.readouterr().out
    assert main.main([*arguments, "--worker", "0/2"]) == 0
    assert "183 documents of 1,728 tokens in 1 shard" in capsys.readouterr().out
    assert main.main(arguments) == 0
    assert capsys.readouterr().out.count("found in tokens") == 2

    def fail(*_):
        raise AssertionError("tokenised, or trained a tokenizer, once more")

    monkeypatch.setattr("gptjax.data.shards._Making.run", fail)
    monkeypatch.setattr("gptjax.data.tokenizers.characters.TrainCharacters.build", fail)
    assert main.main(["run", "prepared_here.py", "--tokens", "tokens", "--out", "run"]) == 0
    assert "tokens, found in tokens" in capsys.readouterr().out
    for worker in ("2/2", "1", "a/b"):
        assert main.main([*arguments, "--worker", worker]) == 2
        assert "worker: got" in capsys.readouterr().err
