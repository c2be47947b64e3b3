"""Laws of a cleaning as a whole: a source like any other, the same for any number of processes, resumed where it
broke."""

import dataclasses
import gzip
import json
import random
from pathlib import Path

import pytest

from gptjax import data
from gptjax.cli.main import main
from gptjax.config import from_json, to_json
from gptjax.data import prepare
from gptjax.data.prepare import parts
from gptjax.data.prepare.report import EXAMPLES
from gptjax.types import UserError

STEPS = (prepare.Normalise(), prepare.Length(20), prepare.ExactDuplicates(), prepare.NearDuplicates())
OWN = '''
import dataclasses
from pathlib import Path
from gptjax.data.prepare import ExactDuplicates, Drop, Normalise, Step

@dataclasses.dataclass(frozen=True)
class NoNumbers(Step):
    """Drops texts with a seven."""
    log: str = "{log}"

    def __call__(self, text):
        with open(self.log, "a") as file:
            file.write("x")
        if "stop" in text and not Path(self.log).with_name("go").exists():
            raise KeyboardInterrupt
        return Drop("seven") if "seven" in text else text.upper()

STEPS = (Normalise(), NoNumbers(), ExactDuplicates())
'''


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))


def corpus(path: Path, count: int = 60) -> list[dict]:
    """Rows of short, repeated and different texts."""
    draw = random.Random(0)
    rows = []
    for i in range(count):
        text = "tiny" if i % 10 == 3 else " ".join(draw.choices("abcdefghijklmnop", k=80))
        rows.append({"id": i, "text": rows[i - 5]["text"].upper() if i % 10 == 7 else text, "tags": [{"é": i}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl.gz")) for line in gzip.open(file, "rt")]


def test_files_are_cleaned_with_their_metadata_and_counted(tmp_path, monkeypatch):
    rows = corpus(tmp_path / "a.jsonl")
    report = prepare.clean_files([str(tmp_path / "a.jsonl")], tmp_path / "one", STEPS)
    kept = read(tmp_path / "one")
    assert kept == [row for row in rows if row["id"] % 10 not in (3, 7)]
    counts = [(step.name, step.kept, step.dropped) for step in report.steps]
    assert counts == [
        ("Normalise", 60, {}),
        ("Length", 54, {"too_short": 6}),
        ("ExactDuplicates", 48, {"exact_duplicate": 6}),
        ("NearDuplicates", 48, {}),
    ]
    assert len(report.steps[1].examples["too_short"]) == EXAMPLES
    saved = json.loads((tmp_path / "one" / "report.json").read_text())
    assert saved == json.loads(json.dumps(report.to_json()))
    assert "| Length | 54 | 6 | 0 |" in (tmp_path / "one" / "report.md").read_text()
    assert not (tmp_path / "one" / "unfinished").exists()

    monkeypatch.setattr(parts, "DOCUMENTS", 7)
    prepare.clean_files([str(tmp_path / "a.jsonl")], tmp_path / "two", STEPS, format="parquet")
    (shard,) = (tmp_path / "two").glob("*.parquet")
    assert [*data.Parquet(str(shard), validation=0.0).documents("train")] == [row["text"] for row in kept]

    (tmp_path / "b.jsonl").write_text('{"text": "one", "x": [1, {}]}\n{"text": "two", "x": 2}\n')
    with pytest.raises(UserError, match=r"^format: parquet cannot hold the column 'x'.* choose jsonl"):
        prepare.clean_files([str(tmp_path / "b.jsonl")], tmp_path / "three", STEPS[:1], format="parquet")
    assert prepare.clean_files([str(tmp_path / "b.jsonl")], tmp_path / "three", STEPS[:1]).kept == 2


def test_any_number_of_processes_gives_the_same_bytes(tmp_path, monkeypatch):
    """With steps of a file of one's own, which each process loads."""
    corpus(tmp_path / "a.jsonl")
    (tmp_path / "go").touch()
    (tmp_path / "own.py").write_text(OWN.replace("{log}", str(tmp_path / "log")))
    monkeypatch.setattr(parts, "DOCUMENTS", 9)
    made = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        arguments = ["data", "clean", str(tmp_path / "a.jsonl"), str(out), "--recipe", str(tmp_path / "own.py")]
        assert main([*arguments, "--processes", str(processes)]) == 0
        made.append({file.name: file.read_bytes() for file in out.iterdir()})
    assert made[0] == made[1]
    assert made[0].keys() == {"00000.jsonl.gz", "report.md", "report.json"}


def test_an_interrupted_cleaning_is_resumed(tmp_path, monkeypatch):
    texts = [f"text number {i}" for i in range(40)]
    texts[25] = "stop here"
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    log = tmp_path / "log"
    (tmp_path / "own2.py").write_text(OWN.replace("{log}", str(log)))
    monkeypatch.setattr(parts, "DOCUMENTS", 10)
    command = ["data", "clean", str(tmp_path / "a.jsonl"), str(tmp_path / "out"), "--processes", "1", "--recipe"]
    assert main([*command, str(tmp_path / "own2.py")]) == 130
    assert len(log.read_text()) == 26
    assert main([*command, "unique"]) == 2  # the work of other steps
    (tmp_path / "go").touch()
    (tmp_path / "out" / "00007.jsonl.gz").touch()  # a shard of a smaller size, written before an interruption
    assert main([*command, str(tmp_path / "own2.py")]) == 0
    assert len(log.read_text()) == 26 + 20  # the first two parts are not made again
    assert [row["text"] for row in read(tmp_path / "out")] == [text.upper() for text in texts]
    assert main([*command, str(tmp_path / "own2.py")]) == 2  # it is complete


def test_a_pipeline_is_a_source_and_keeps_the_splits_apart(tmp_path):
    corpus(tmp_path / "a.jsonl")
    table = data.Jsonl(str(tmp_path / "a.jsonl"), validation=0.3)
    pipeline = prepare.Pipeline(table, STEPS)
    train, validation = ([*pipeline.documents(split)] for split in ("train", "validation"))
    assert {text.lower() for text in train}.isdisjoint(text.lower() for text in validation)
    raw = [{text.lower() for text in table.documents(split)} for split in ("train", "validation")]
    assert raw[0] & raw[1]  # duplicates are on both sides of the raw source
    assert len(train) + len(validation) == 48
    assert set(train) <= set(table.documents("train"))
    assert "54" in pipeline.report().read_text()

    assert from_json(json.loads(json.dumps(to_json(pipeline)))) == pipeline
    other = dataclasses.replace(pipeline, steps=(prepare.Length(30), *STEPS[2:]))
    assert pipeline.fingerprint() == dataclasses.replace(pipeline, processes=2).fingerprint() != other.fingerprint()

    dataset = data.Pretrain(pipeline, length=32, batch=2)
    batches = dataset.batches(data.Bytes().build(iter([])), "train", seed=0, cache_dir=tmp_path / "cache")
    assert next(batches).tokens.shape == (2, 32)
    batches.close()


def test_the_report_does_not_have_what_is_masked(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "Write to jane@mail.example.com, please."}) + "\n")
    report = prepare.clean_files([str(tmp_path / "a.jsonl")], tmp_path / "out", (prepare.MaskPersonal(),))
    assert report.steps[0].edits == {"e-mail": 1}
    for name in ("report.md", "report.json"):
        text = (tmp_path / "out" / name).read_text()
        assert "jane" not in text
        assert "Write to [e-mail], please." in text


def test_a_list_that_changes_is_another_cleaning(tmp_path):
    corpus(tmp_path / "a.jsonl")
    words = tmp_path / "words.txt"
    words.write_text("a b c\n")
    pipeline = prepare.Pipeline(data.Jsonl(str(tmp_path / "a.jsonl")), (prepare.WordList(str(words)),))
    before = pipeline.fingerprint()
    words.write_text("a b c d\n")
    assert pipeline.fingerprint() != before


def test_mistakes_are_one_line(tmp_path, capsys):
    corpus(tmp_path / "a.jsonl")
    file, out = str(tmp_path / "a.jsonl"), str(tmp_path / "out")
    (tmp_path / "bad.py").write_text("STEPS = [1]")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "00000.jsonl").touch()
    for arguments, words in [
        ([file], "files: got fewer than two"),
        (["a.pdf", out], "files: got a.pdf, must end in"),
        ([file, str(tmp_path / "full")], "which holds other files; choose another folder"),
        ([file, out, "--recipe", "fine"], "recipe: got fine, must be one of fineweb,"),
        ([file, out, "--recipe", str(tmp_path / "bad.py")], "must define STEPS"),
        ([file, out, "--text", "body"], 'must have a text in "body"'),
        ([file, out, "--processes", "-1"], "processes: got -1"),
        ([file, out, "--recipe", "chinese", "--processes", "1"], "recipe: keeps none of 60 documents"),
    ]:
        assert main(["data", "clean", *arguments]) == 2
        error = capsys.readouterr().err.strip()
        assert words in error
        assert len(error.splitlines()) == 1
    empty = prepare.Pipeline(data.Jsonl(file, validation=0.0), (prepare.Length(10_000),))
    with pytest.raises(UserError, match=r"^steps: keep no document of "):
        next(empty.documents("train"))
