"""Ctrl-C is answered at once, in a real process whose devices are busy; the first saves, the second does not wait."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SLOW = """
import dataclasses

import jax
import jax.numpy as jnp
from gptjax import Experiment, Stage, data, objectives, optim
from gptjax.nn import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Slow(objectives.NextToken):
    rounds: int = 1

    def __call__(self, apply, params, batch, key=None):
        metrics = super().__call__(apply, params, batch, key)
        total, weight = metrics["loss"]
        x = jnp.full((512, 512), jnp.where(jnp.isnan(total), 1.0, 0.0))
        x = jax.lax.fori_loop(0, self.rounds, lambda _, x: jnp.tanh(x @ x), jax.lax.stop_gradient(x))
        return metrics | {"loss": (total + x.sum(), weight)}


@dataclasses.dataclass(frozen=True)
class Letters:
    def documents(self, split):
        return iter(["abcdefghijklmnopqrstuvwxyz"] * 40)

    def fingerprint(self):
        return repr(self)


experiment = Experiment(
    model=TransformerConfig(vocab=64, layers=1, width=16, heads=2),
    tokenizer=data.TrainCharacters(),
    stages={
        "pretrain": Stage(
            data=data.Pretrain(Letters(), length=16, batch=8),
            objective=Slow(),
            optimizer=optim.AdamW(schedule=optim.Cosine(warmup=1)),
            steps=1000,
            log_every=1,
            evaluate_every=1000,
            prompts=(),
        )
    },
)
"""


@pytest.mark.slow
@pytest.mark.parametrize("interrupts", [1, 2])
def test_an_interrupt_is_answered_while_the_devices_are_busy(tmp_path, interrupts):
    """A step lasts some seconds, or hours where there are two interrupts; an answer comes within 1 s. The process is
    blocked outside of Python."""
    (tmp_path / "slow.py").write_text(SLOW)
    command = [sys.executable, "-m", "experiments", str(tmp_path / "slow.py"), "--out", str(tmp_path / "run")]
    command += ["--pretrain.objective.rounds", "100" if interrupts == 1 else "10_000_000"]
    environment = os.environ | {
        "GPTJAX_CACHE": str(tmp_path / "cache"),
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
        "PYTHONUNBUFFERED": "1",
    }
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        lines = iter(run.stdout.readline, "")
        assert any(line.startswith("  start    new parameters") for line in lines)
        heartbeat = tmp_path / "run" / "heartbeat" / "0.json"
        while '"step": 1' not in (heartbeat.read_text() if heartbeat.exists() else ""):
            time.sleep(0.1)  # until the first step has been dispatched
        for message in ("stopping after this step; again: at once\n", "stopping at once\n")[:interrupts]:
            sent = time.monotonic()
            run.send_signal(signal.SIGINT)
            assert next(line for line in lines if line.startswith("stopping")) == message
            assert time.monotonic() - sent < 1
        sent, rest = time.monotonic(), list(lines)
        assert run.wait() == 130
        assert time.monotonic() - sent < 20
        if interrupts == 1:
            assert any(line.startswith("stopped and saved at step") for line in rest)
            assert f"stopped; to go on: python -m experiments {tmp_path}" in run.stderr.read()
        else:
            assert "stopped without saving; the same command resumes from the last checkpoint\n" in rest
