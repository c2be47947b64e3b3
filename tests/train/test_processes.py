"""Two processes of one job: a signal to either stops both after the same step; the same command goes on."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

TINY = """
from gptjax import data, objectives, optim
from gptjax.experiment import Experiment
from gptjax.nn import TransformerConfig
from gptjax.sharding import Mesh
from gptjax.train.stage import Stage

experiment = Experiment(
    model=TransformerConfig(vocab=64, layers=1, width=16, heads=2),
    tokenizer=data.TrainCharacters(),
    stages={
        "main": Stage(
            data=data.Pretrain(data.Text("{text}"), length=16, batch=8),
            objective=objectives.NextToken(),
            optimizer=optim.AdamW(peak=1e-2, schedule=optim.Cosine(warmup=2)),
            steps=100_000,
            evaluate_every=100_000,
            evaluate_rows=8,
            save_every=100_000,
            log_every=1,
        )
    },
    mesh=Mesh(data=-1),
)
"""


class Job:
    """The experiment on two processes of two devices each."""

    def __init__(self, file: Path):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
        common = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "XLA_FLAGS": flags}
        common |= {"PYTHONPATH": str(ROOT), "GPTJAX_CACHE": str(file.parent / "cache"), "JAX_PLATFORMS": "cpu"}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "experiments", file.name],
                cwd=file.parent,
                env={**os.environ, **common, "JAX_PROCESS_ID": str(number)},
                stderr=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(2)
        ]

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def end(self) -> list[tuple[int, str]]:
        """Exit code and standard error of both."""
        errors = [process.communicate(timeout=60)[1] for process in self.processes]
        return [(process.returncode, error) for process, error in zip(self.processes, errors, strict=True)]


def recorded(folder: Path) -> list[int]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line["step"] for line in map(json.loads, lines) if "loss" in line]


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    """SIGTERM to the second, and Ctrl-C to the first of the job that goes on."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    file, folder = tmp_path / "tiny.py", tmp_path / "runs" / "tiny"
    file.write_text(TINY.replace("{text}", str(tmp_path / "text.txt")))
    for process, number in ((1, signal.SIGTERM), (0, signal.SIGINT)):
        before = len(recorded(folder))
        with Job(file) as job:
            limit = time.monotonic() + 60
            while len(recorded(folder)) < before + 3 and time.monotonic() < limit:
                assert all(process.poll() is None for process in job.processes), job.end()
                time.sleep(0.1)
            job.processes[process].send_signal(number)
            for code, errors in job.end():
                assert code == 130, errors
                assert "stopped; to go on" in errors
        steps = recorded(folder)
        assert steps == list(range(1, steps[-1] + 1))
        assert (folder / "checkpoints" / "main" / str(steps[-1]) / "manifest.json").exists()
    assert len(list((folder / "checkpoints" / "main").iterdir())) == 2
