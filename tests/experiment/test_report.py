"""The report says what the records say, in the order of the stages, and links to what lies beside it."""

from __future__ import annotations

import re
import struct
from urllib.parse import unquote

import numpy as np
import pytest

from gptjax.evals import Result
from gptjax.experiment import report
from gptjax.monitor.metrics import MetricsLogger


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "my run"
    with MetricsLogger(folder) as records:
        for stage in ("chat", "pre train"):  # as after a stage was done again
            for step in range(10, 101, 10):
                records.log(step, stage, loss=5 / step, cross_entropy=5 / step)
            for step, loss in ((50, 1.25), (100, 1.5)):
                records.log(step, stage, validation_loss=loss)
                records.text(step, f"{stage}/sample", f"Once\n```\n{stage} {step}")
    return folder


def test_the_report_says_what_the_records_say(run):
    report.write(
        run, {"pre train": [Result("Held-out text", {}, "**1.234 bits per byte**")], "chat": [], "more": []}, {}
    )
    text = (run / "report" / "report.md").read_text()
    titles = re.findall(r"^#+ .*", text, re.MULTILINE)
    expected = ["# my run", "## pre train", "### Held-out text", "### Samples", "## chat", "### Samples"]
    assert titles == [*expected, "## more"]
    assert "100 steps. Validation loss **1.5000** nats a token at the end; the lowest was 1.2500, at step 50." in text
    assert "**1.234 bits per byte**" in text
    assert "After 50 steps:\n\n    Once\n    ```\n    chat 50\n\nAfter 100 steps:\n\n    Once\n" in text
    assert text.count("No validation loss.") == 1
    links = re.findall(r"\]\((.*?)\)", text)
    assert len(links) == 3
    for link in links:
        assert " " not in link
        picture = (run / "report" / unquote(link)).read_bytes()
        assert picture.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", picture[16:24])
        assert width > height > 500


def test_the_report_says_how_fast_it_went(tmp_path):
    """40 steps of 200 tokens: the first ten take 0.3 s after 1 s of input wait each, the others 0.1 s."""
    with MetricsLogger(tmp_path) as records:
        for step, seconds, wait in ((10, 1.3, 1.0), (40, 0.1, 0.0)):
            parts = {"time_step": seconds, "time_input": wait, "time_device": seconds - wait, "time_host": 0.0}
            records.log(step, "main", loss=1.0, tokens_per_second=200 / seconds, memory_process=2**30, **parts)
    report.write(tmp_path, {"main": []}, {})
    text = (tmp_path / "report" / "report.md").read_text()
    assert "Speed: 500 tokens a second; time: input 62.5%, device 37.5%; at most 1.00 GiB in the process." in text


def test_smoothing_keeps_the_mean_and_the_length():
    values = np.random.default_rng(0).normal(3, 1, 400)
    smooth = report._smooth(values)
    assert smooth.shape == values.shape
    assert abs(smooth.mean() - values.mean()) < 0.05
    assert smooth.std() < values.std() / 3
    np.testing.assert_allclose(report._smooth(np.full(41, 2.0)), 2.0)
    assert report._smooth(np.zeros(0)).shape == (0,)
    np.testing.assert_allclose(report._smooth(np.array([1.0])), 1.0)
