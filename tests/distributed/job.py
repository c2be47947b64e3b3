"""A job of several processes on this machine, which trains a tiny model."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from gptjax.monitor import metrics

ROOT = Path(__file__).resolve().parents[2]
HEARTBEAT = 20  # seconds

TINY = """
import json, os, sys, time
import jax, numpy as np
from gptjax import data, objectives, optim
from gptjax.distributed import sharding
from gptjax.experiment.experiment import Experiment
from gptjax.nn import TransformerConfig
from gptjax.distributed.sharding import MeshConfig
from gptjax.train.stage import Stage

experiment = Experiment(
    model=TransformerConfig(vocab=64, layers=1, width=16, heads=2),
    tokenizer=data.TrainCharacters(),
    stages={
        "main": Stage(
            data=data.Pretrain(data.Text("TEXT"), length=16, batch=8),
            objective=objectives.NextToken(),
            optimizer=optim.AdamW(learning_rate=1e-2, schedule=optim.Cosine(warmup=2)),
            steps=60,
            evaluate_every=60,
            eval_sequences=8,
            save_every=5,
            log_every=1,
        )
    },
    mesh=MeshConfig(data=-1),
)

place = sharding.global_array


def noted(batch, rules):
    # Rows that this process reads to train on; and take a while, so that there is time to be stopped.
    if sys._getframe(1).f_code.co_name != "validation_losses":
        with open(os.environ["ROWS"] + str(jax.process_index()), "a") as file:
            file.write(json.dumps(np.asarray(batch.tokens).tolist()) + "\\n")
    time.sleep(0.05 if jax.process_count() > 1 else 0)
    return place(batch, rules=rules)


sharding.global_array = noted
"""


class Job:
    """The experiment on so many processes of one device each. PROCESS in an option is the number of the process."""

    def __init__(
        self,
        file: Path,
        processes: int,
        out: str = "runs/tiny",
        options: tuple[str, ...] = (),
        heartbeat: int = HEARTBEAT,
    ):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
        common = {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "ROWS": f"{file}.{processes}."}
        common |= {"GPTJAX_CACHE": str(file.parent / "cache")}
        if processes > 1:
            common |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
            common |= {"GPTJAX_HEARTBEAT": str(heartbeat)}
        self.rows = [Path(f"{file}.{processes}.{number}") for number in range(processes)]
        for rows in self.rows:
            rows.unlink(missing_ok=True)
        self.processes = [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "experiments", file.name, "--out", out),
                    *(option.replace("PROCESS", str(number)) for option in options),
                ],
                cwd=file.parent,
                env={**os.environ, **common, "JAX_PROCESS_ID": str(number)},
                stderr=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(processes)
        ]

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def reach(self, folder: Path, step: int) -> None:
        """Waits until that step is recorded. Fails after five minutes."""
        limit = time.monotonic() + 300
        while max(losses(folder), default=0) < step:
            assert time.monotonic() < limit, f"step {step} is not reached"
            assert all(process.poll() is None for process in self.processes), self.end()
            time.sleep(0.02)

    def end(self) -> list[tuple[int, str]]:
        """Exit code and standard error of all."""
        errors = [process.communicate(timeout=300)[1] for process in self.processes]
        return [(process.returncode, error) for process, error in zip(self.processes, errors, strict=True)]

    def read(self) -> list[list[list[int]]]:
        """The rows of each batch, whichever process read them. A process that was killed may have read one more."""
        files = [[json.loads(line) for line in path.read_text().splitlines()] for path in self.rows]
        return [sorted(row for rows in step for row in rows) for step in zip(*files, strict=False)]


def losses(folder: Path) -> dict[int, float]:
    """The losses of the run so far: of whole lines, since the last may be seen while it is written."""
    found = [(line["step"], line["loss"]) for line in metrics.read(folder) if "loss" in line]
    assert len(dict(found)) == len(found), "a step was written twice"
    return dict(found)
