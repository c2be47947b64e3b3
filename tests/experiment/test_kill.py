"""A run that is killed at any moment ends with the bits of one that was left alone."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_experiment import equal, params

from gptjax.monitor import metrics
from gptjax.monitor.times import WallTime

ROOT = Path(__file__).resolve().parents[2]


TINY = """
import dataclasses
from gptjax import data, objectives, optim
from gptjax.experiment import run_folder
from gptjax.experiment.experiment import Experiment, Stage
from gptjax.nn import TransformerConfig

@dataclasses.dataclass(frozen=True)
class Counting:
    first: int

    def documents(self, split):
        for i in range(200):
            yield str(self.first + i * i)

    def fingerprint(self):
        return repr(self)

experiment = Experiment(
    model=TransformerConfig(vocab=16, layers=2, width=16, heads=2),
    tokenizer=data.TrainCharacters(specials=()),
    stages={
        "pretrain": Stage(
            data=data.Pretrain(data.Mix((Counting(1), Counting(2)), (2, 1)), length=16, batch=8),
            objective=objectives.NextToken(),
            optimizer=optim.AdamW(schedule=optim.Cosine(warmup=1)),
            steps=16,
            ema=0.9,
            evaluate_every=100,
            eval_sequences=8,
            save_every=1,
            log_every=1,
            prompts=(),
        )
    },
)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "local"), [(20, False), (10, True)], ids=["shared", "local"])
def test_kill_9_at_any_moment_changes_nothing(tmp_path, kills, local):
    """Killed at random, every other time amid a checkpoint, a run ends with the bits of one left alone."""
    steps, hosts = 40, tmp_path / "local"
    (tmp_path / "tiny.py").write_text(TINY)
    (tmp_path / "torch.py").write_text("raise ImportError")  # TensorBoard's writer would import it, for seconds
    environment = {
        **os.environ,
        "GPTJAX_CACHE": str(tmp_path / "cache"),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compilation"),
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
    }

    def start(folder: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "experiments", str(tmp_path / "tiny.py"), "--out", str(folder)]
        command += ["--pretrain.steps", str(steps), "--pretrain.save_every", "15" if local else "1"]
        command += ["--local_checkpoints", str(hosts), "--save_local_every", "1"] if local and folder == killed else []
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)

    def recorded(folder: Path) -> int:
        return sum("loss" in line for line in metrics.read(folder))

    def writing(folder: Path) -> bool:
        found = hosts.glob("*/*-*.partial") if local else folder.glob("checkpoints/*/*tmp*")
        return any(found)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    moments = sorted(random.sample(range(1, steps - 2), kills))
    print(f"kills after steps {moments}")
    for number, step in enumerate(moments):
        run = start(killed)
        while run.poll() is None and not (recorded(killed) >= step and (number % 2 or writing(killed))):
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.02))
        run.kill()
        assert run.wait() == -signal.SIGKILL, moments
    runs = start(killed), start(whole)
    assert [run.wait() for run in runs] == [0, 0], moments

    for ema in (False, True):
        assert equal(params(killed, "pretrain", ema), params(whole, "pretrain", ema)), moments
    measured = re.compile("time|tokens_per_second|memory|goodput")
    lines = [
        [{name: value for name, value in line.items() if not measured.match(name)} for line in metrics.read(folder)]
        for folder in (killed, whole)
    ]
    assert lines[0] == lines[1], moments
    assert [line["step"] for line in lines[0] if "loss" in line] == [*range(1, steps + 1)]
    spent = metrics.read_wall(killed)
    wall = WallTime(spent)
    assert wall.total == pytest.approx(spent[-1]["time"] - spent[0]["time"], abs=0.1)
    assert 0 < wall.counts["down"] <= kills
    assert wall.goodput < WallTime(metrics.read_wall(whole)).goodput
