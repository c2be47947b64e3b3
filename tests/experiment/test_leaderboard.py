"""Laws of the leaderboard: what it says of a run is what the run's files say, and the page needs nothing else."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import jax
import pytest
from tiny_experiment import EXPERIMENT

from gptjax.cli import main
from gptjax.config import to_json
from gptjax.experiment.leaderboard import page
from gptjax.experiment.summary import find_runs, summarise
from gptjax.train.state import parameter_count
from gptjax.types import UserError

STAGES = ("pretrain", "chat")


def run(folder: Path, layers: int, loss: float, **model) -> None:
    """The files of a run of 30 steps per stage."""
    changed = dataclasses.replace(EXPERIMENT, model=dataclasses.replace(EXPERIMENT.model, layers=layers))
    config = to_json(changed)
    config["model"] |= model
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"experiment": config}))
    lines = [
        {"step": step, "stage": stage, "loss": 3.0, "time_step": 0.5, "time_device": 0.5}
        | ({"validation_loss": loss + 9 / step} if step > 10 else {})
        for stage in STAGES
        for step in (10, 20, 30)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def runs(tmp_path) -> Path:
    for name, layers, loss in (("b<i>", 2, 2.0), ("a", 1, 3.0), ("c", 3, 1.0)):
        run(tmp_path / "runs" / name, layers, loss)
    return tmp_path / "runs"


def test_a_run_is_summarised_from_its_files(runs):
    summary = summarise(runs / "a", "a")
    model = dataclasses.replace(EXPERIMENT.model, layers=1)
    shapes = jax.eval_shape(lambda: model.build().init(jax.random.key(0), jax.numpy.zeros((1, 4), int))["params"])
    assert summary.parameters == parameter_count(shapes)
    assert summary.total("tokens") == 2 * 30 * 8 * 32
    assert summary.total("flops") == 2 * 30 * 8 * 32 * model.flops(32)
    assert summary.total("seconds") == pytest.approx(2 * 30 * 0.5)
    assert summary.stages["chat"].curve == [(20, 3.0 + 9 / 20), (30, 3.3)]
    run(runs / "foreign", 1, 1.0, **{"class": "mine.Model"})
    assert summarise(runs / "foreign", "foreign").parameters is None
    assert find_runs([runs / "a", runs]) == [runs / "a", runs / "b<i>", runs / "c", runs / "foreign"]
    with pytest.raises(UserError, match=r"^runs: got .*, must be a run folder"):
        find_runs([runs / "absent"])


class Rows(HTMLParser):
    """The first cell of each row, and the tags of the page."""

    def __init__(self, text: str):
        super().__init__()
        self.names, self.tags = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "tr":
            self.fresh = True
        elif tag == "td" and self.fresh:
            self.names.append(dict(attrs)["data-value"])
            self.fresh = False


def test_the_page_is_sorted_and_needs_nothing_else(runs, tmp_path, capsys):
    assert main.main(["leaderboard", str(runs), "--out", str(tmp_path / "page.html")]) == 0
    assert "3 runs in" in capsys.readouterr().out
    text = (tmp_path / "page.html").read_text()
    assert Rows(text).names == ["c", "b<i>", "a"]  # escaped, or there would be a tag
    assert "i" not in Rows(text).tags
    assert not re.search(r"https?:|\bsrc=|\bhref=|@import|url\(", text)
    assert "default-src &#x27;none&#x27;" in text or "default-src 'none'" in text
    assert text.count("<polyline") == 3
    with pytest.raises(UserError, match=r"^figure: got bits, must be one of: pretrain/validation_loss"):
        page([summarise(runs / "a", "a")], "bits")


def test_the_scaling_of_runs_is_printed_and_drawn(tmp_path, capsys):
    """Runs of one number of tokens have a law of compute."""
    for layers in (1, 2, 4, 8, 16):
        run(tmp_path / "runs" / str(layers), layers, 2.0 + layers**-0.5)
    command = ["scaling", str(tmp_path / "runs"), "--figure", "chat/validation_loss"]
    assert main.main([*command, "--out", str(tmp_path / "s.png"), "--budget", "1e9", "1e10"]) == 0
    said = capsys.readouterr().out
    assert "fitted to 5 runs" in said
    assert said.count(" FLOPs: ") == 2
    assert (tmp_path / "s.png").exists()
    assert main.main([*command[:2], "--figure", "validation_loss"]) == 2
    assert "could be pretrain/validation_loss or chat/validation_loss" in capsys.readouterr().err


@pytest.mark.slow
def test_a_click_on_a_column_sorts_by_it(runs, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    path = next((p for p in ("/usr/bin/chromium", "/usr/bin/chromium-browser") if Path(p).exists()), None)
    if path is None:
        pytest.skip("no Chromium")
    run(runs / "foreign", 1, 0.5, **{"class": "mine.Model"})
    names = ["foreign", "c", "b<i>", "a"]
    (tmp_path / "page.html").write_text(page([summarise(runs / name, name) for name in names]))
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        tab = browser.new_page()
        errors: list[str] = []
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto((tmp_path / "page.html").as_uri())
        for column, wanted in (("parameters", ["a", "b<i>", "c", "foreign"]), ("run", ["a", "b<i>", "c", "foreign"])):
            tab.get_by_role("button", name=column).click()
            assert tab.locator("tbody td:first-child").all_inner_texts() == wanted
        tab.get_by_role("button", name="parameters").click(click_count=2)
        assert tab.locator("tbody td:first-child").all_inner_texts() == ["c", "b<i>", "a", "foreign"]  # unknown: last
        browser.close()
    assert errors == []
