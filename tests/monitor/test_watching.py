"""Monitoring of a real run: times next to the loss, a profile that can be opened, a report of a hanging step."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from gptjax import data, optim
from gptjax.monitor import metrics
from gptjax.nn import Transformer, TransformerConfig
from gptjax.objectives import NextToken
from gptjax.train.loop import train
from gptjax.train.stage import Stage
from gptjax.types import UserError

LETTERS = "abcdefghijklmnopqrstuvwxyz ."
MODEL = Transformer(TransformerConfig(vocab=64, layers=1, width=16, heads=2))
TOKENIZER = data.TrainCharacters().build(iter([LETTERS]))


@dataclasses.dataclass(frozen=True)
class Alphabet:
    def documents(self, split: str) -> Iterator[str]:
        return iter([LETTERS] * 40)

    def fingerprint(self) -> str:
        return "alphabet"


@dataclasses.dataclass(frozen=True)
class Slow(data.Pretrain):
    """Batches that take longer than the rest of a step, from some step on, however slow the machine is: the first of
    them until a file says that its step hangs."""

    hang: str = ""
    first: int = 3

    def batches(self, *args, **options):
        batches = super().batches(*args, **options)

        class Sleepy(type(batches)):
            returned = 0.0

            def __next__(self) -> Any:
                rest = time.monotonic() - self.returned
                batch = super().__next__()
                step = self.state()["sequence"] // slow.batch
                if slow.hang and step >= slow.first:
                    time.sleep(max(0.25, 3 * rest))
                    deadline = time.monotonic() + 60
                    while step == slow.first and time.monotonic() < deadline and f"step {step - 1} " not in said():
                        time.sleep(0.05)
                self.returned = time.monotonic()
                return batch

        def said() -> str:
            return Path(slow.hang).read_text() if Path(slow.hang).exists() else ""

        slow = self
        batches.__class__ = Sleepy
        return batches


STAGE = Stage(
    data=Slow(Alphabet(), length=16, batch=8),
    objective=NextToken(),
    optimizer=optim.AdamW(learning_rate=1e-3, schedule=optim.Cosine(warmup=2)),
    steps=8,
    evaluate_every=100,
    eval_sequences=8,
    save_every=4,
    log_every=2,
    prompts=(),
)


def run(folder: Path, stage: Stage = STAGE, **options) -> list[dict[str, Any]]:
    with metrics.MetricsLogger(folder) as writer:
        cache = folder.parent / "tokens"
        train(stage, "main", MODEL, TOKENIZER, folder / "checkpoints", writer, cache=cache, **options)
    return metrics.read(folder)


def traced(folder: Path) -> list[int]:
    """The steps that a trace marks; both of its forms must say the same."""
    (planes,), (events,) = (list(folder.rglob(pattern)) for pattern in ("*.xplane.pb", "*.trace.json.gz"))
    profile = jax.profiler.ProfileData.from_file(str(planes))
    marks = [
        event for plane in profile.planes for line in plane.lines for event in line.events if event.name == "train"
    ]
    steps = sorted(dict(event.stats)["step_num"] for event in marks)
    content = json.loads(gzip.decompress(events.read_bytes()))["traceEvents"]
    assert sorted(int(event["args"]["step_num"]) for event in content if event.get("name") == "train") == steps
    return steps


def test_a_profile_is_of_the_steps_asked_for(tmp_path, capsys):
    run(tmp_path / "run", profile=range(3, 6))
    assert traced(tmp_path / "run" / "profile" / "main") == [3, 4, 5]
    assert "xprof --logdir" in capsys.readouterr().out


@pytest.mark.alone
def test_a_profile_ends_with_the_run_and_counts_from_where_it_goes_on(tmp_path, capsys):
    run(tmp_path / "run")
    longer = dataclasses.replace(STAGE, steps=11)
    run(tmp_path / "run", longer, profile=range(2, 100))
    assert traced(tmp_path / "run" / "profile" / "main") == [10, 11]
    run(tmp_path / "run", dataclasses.replace(longer, steps=12), profile=range(5, 8))
    assert "profile: nothing written, the run ended before step 16" in capsys.readouterr().out
    jax.profiler.start_trace(tmp_path)  # none is under way
    jax.profiler.stop_trace()


def test_what_waits_for_input_is_seen_and_a_step_that_hangs_is_reported(tmp_path, capfd):
    folder = tmp_path / "run"
    hang = folder / "hang" / "0.txt"
    slow = dataclasses.replace(
        STAGE, data=dataclasses.replace(STAGE.data, hang=str(hang)), hang_timeout=0.1, save_every=100
    )
    lines = [line for line in run(folder, slow) if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    for line in lines[2:]:  # the first two have what happens once
        parts = sum(line[f"time_{part}"] for part in ("input", "host", "device"))
        assert parts == pytest.approx(line["time_step"])
        assert max(0.1, 0.5 * line["time_step"]) < line["time_input"] <= line["time_step"]
        assert line["tokens_per_second"] == pytest.approx(8 * 16 / line["time_step"])
        assert line["memory_process"] > 2**20
    assert lines[0]["time_start"] > 0
    assert "input wait" in capfd.readouterr().out
    beat = json.loads((folder / "heartbeat" / "0.json").read_text())
    assert beat["step"] == 8
    assert beat["time_input"] == lines[-1]["time_input"]
    text = hang.read_text()
    assert re.search(r"main has not advanced beyond step 2 for \d+ s", text)
    assert "__next__" in text


def test_what_is_trained_is_shown_before_the_first_step(tmp_path, capsys):
    """The memory is that of the arrays; a mixture has the epochs of each of its sources."""

    @dataclasses.dataclass(frozen=True)
    class Longer(Alphabet):
        def documents(self, split: str) -> Iterator[str]:
            return iter([LETTERS * 2] * 40)

        def fingerprint(self) -> str:
            return "longer"

    mixed = dataclasses.replace(
        STAGE, ema=0.9, data=data.Pretrain(data.Mix((Alphabet(), Longer()), (3, 1)), length=16, batch=8)
    )
    run(tmp_path / "run", mixed, start="somewhere")
    count = sum(x.size for x in jax.tree.leaves(jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 8), int))))
    tokens = (30 + 58) * 40  # with the marks of each document
    expected = [
        f"main: TransformerConfig, {count:,} parameters in 1 layers",
        "  devices  1 x cpu",
        f"  memory   0.1 MiB per device, without activations: parameters {4 * count / 2**20:.1f}, "
        f"gradients {4 * count / 2**20:.1f}, optimizer {8 * count / 2**20:.1f}, average {4 * count / 2**20:.1f}",
        f"  data     8 steps of 128 tokens: {16 / 145:.2g} to {48 / 75:.2g} epochs of {tokens:,} tokens, "
        f"tokenised now in {tmp_path / 'tokens'}",
        "  start    somewhere",
    ]
    lines = capsys.readouterr().out.splitlines()
    first = lines.index(expected[0])
    assert lines[first : first + 5] == expected
    assert all("reading the data" in line for line in lines[:first])  # its clock, on a slow machine
    run(tmp_path / "run", dataclasses.replace(mixed, steps=10))
    assert f"  start    step 8 of {tmp_path / 'run' / 'checkpoints'}\n" in capsys.readouterr().out


def test_the_time_before_a_hang_is_checked():
    with pytest.raises(UserError, match=r"^hang_timeout: got 0, must be more than 0$"):
        dataclasses.replace(STAGE, hang_timeout=0)
