"""The slow host of a job is found from each host's own time, and named."""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax.monitor.stragglers import slowest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("own", "step", "slow"),
    [
        ([0.1, 0.1, 0.1, 0.1], 1.0, None),
        ([0.1, 0.1, 0.6, 0.1], 1.0, 2),
        ([0.1, 0.1, 0.14, 0.1], 1.0, None),  # less than half as much again
        ([0.001, 0.001, 0.02, 0.001], 1.0, None),  # nobody waits for that
        ([0.0, 0.5], 0.5, 1),  # of two the faster is right
        ([0.5, 0.0], 0.5, 0),
        ([0.4, 0.4, 0.4, 0.0], 1.0, None),  # a fast one is none that is slow
        ([0.3, 0.8, 0.1, 0.1], 1.0, 1),
        ([0.5], 0.5, None),
    ],
)
def test_the_slowest(own, step, slow):
    assert slowest(own, step) == slow


SLEEPY = """
import dataclasses
import time

import jax

from gptjax import data, objectives, optim
from gptjax.experiment.experiment import Experiment
from gptjax.nn import TransformerConfig
from gptjax.distributed.sharding import MeshConfig
from gptjax.train.stage import Stage


@dataclasses.dataclass(frozen=True)
class Sleepy(data.Pretrain):
    def batches(self, *args, **options):
        batches = super().batches(*args, **options)

        class Slow(type(batches)):
            def __next__(self):
                if jax.process_index() == 1:
                    time.sleep(0.15)
                return super().__next__()

        batches.__class__ = Slow
        return batches


experiment = Experiment(
    model=TransformerConfig(vocab=64, layers=1, width=16, heads=2),
    tokenizer=data.TrainCharacters(),
    stages={
        "main": Stage(
            data=Sleepy(data.Text("{text}"), length=16, batch=8),
            objective=objectives.NextToken(),
            optimizer=optim.AdamW(learning_rate=1e-2),
            steps=24,
            evaluate_every=100,
            eval_sequences=8,
            save_every=100,
            log_every=4,
            prompts=(),
        )
    },
    mesh=MeshConfig(data=-1),
)
"""


@pytest.mark.slow
def test_a_process_that_sleeps_over_its_input_is_named(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    (tmp_path / "sleepy.py").write_text(SLEEPY.replace("{text}", str(tmp_path / "text.txt")))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    common = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "XLA_FLAGS": flags}
    common |= {"PYTHONPATH": str(ROOT), "GPTJAX_CACHE": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "experiments", "sleepy.py"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": tmp_path}
    processes = [
        subprocess.Popen(command, env={**os.environ, **common, "JAX_PROCESS_ID": str(number)}, **streams)
        for number in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    name = f"process 1 on {socket.gethostname()} is slow: "
    assert outputs[0].count(name) == 1
    assert name not in outputs[1]  # the first process tells
    assert "is slow: its input takes" in outputs[0]
    lines = [json.loads(line) for line in (tmp_path / "runs/sleepy/metrics.jsonl").read_text().splitlines()]
    slow = [line for line in lines if "slow_process" in line]
    assert len(slow) >= 3
    assert {line["slow_process"] for line in slow} == {1}
    # Of the sleep, what the devices were still at work for is theirs: on a machine that is busy, some of it.
    assert statistics.median(line["slow_seconds"] for line in slow) > 0.05
    beats = [json.loads((tmp_path / f"runs/sleepy/heartbeat/{number}.json").read_text()) for number in range(2)]
    assert [beat["step"] for beat in beats] == [24, 24]
    assert beats[1]["time_input"] > 2 * beats[0]["time_input"]
    assert beats[0]["time_step"] == pytest.approx(beats[1]["time_step"], rel=0.5)
