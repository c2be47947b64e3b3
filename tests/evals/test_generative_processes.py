"""Generative evaluation in a job of several processes: scores are those of one process, and tools are asked once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import dataclasses, json, sys

import jax
import jax.numpy as jnp

from gptjax import data, evals, tasks
from gptjax.distributed import processes, sharding
from gptjax.inference import Sampling
from gptjax.models.language_model import LanguageModel
from gptjax.nn import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Repeat(tasks.Task):
    def __len__(self):
        return 12

    def example(self, i):
        return data.Message("user", f"{i} times " * (i % 4 + 1)), data.Message("assistant", f"{i} times")

    def score(self, i, reply):
        return tasks.Score(1.0 if reply.text == f"{i} times" else len(reply.text) % 2 / 2)


@dataclasses.dataclass(frozen=True)
class Differs(tasks.Tool):
    mark = "e"

    def answer(self, text):
        return f"<{jax.process_index()}>"


if __name__ == "__main__":
    if processes.is_multi_process():
        processes.initialize()
    tokenizer = data.TrainCharacters().build(iter(["Question: times\\nAnswer: 0123456789"]))
    config = TransformerConfig(vocab=40, layers=1, width=16, heads=2)
    model = config.build(sharding.DEFAULT_RULES)
    with sharding.use(sharding.MeshConfig(data=1, fsdp=4, tensor=2).make()):
        params = jax.jit(model.init)(jax.random.key(1), jnp.zeros((8, 2), int))["params"]
    lm = LanguageModel(config, params, tokenizer, context=80)
    evaluation = evals.Generative(
        Repeat(), samples=2, sampling=Sampling(), max_tokens=12, form="text", tools=(Differs(),), rows=4, workers=1
    )
    evaluation.check(tokenizer)
    print(json.dumps(dataclasses.asdict(evaluation.run(lm, sys.argv[1]))))
"""


def run(folder: Path, file: Path, processes: int) -> list[dict]:
    """The result that each process prints; all have 8 devices together."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={8 // processes}")
    common = {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    if processes > 1:
        common |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    (folder / "job.py").write_text(PROGRAM)
    started = [
        subprocess.Popen(
            [sys.executable, "job.py", file],
            cwd=folder,
            env={**os.environ, **common, "JAX_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]
    try:
        ended = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(process.returncode for process in started), ended
    return [json.loads(out.splitlines()[-1]) for out, _ in ended]


@pytest.mark.slow
def test_two_processes_score_as_one_does_and_go_on_where_it_was_stopped(tmp_path):
    (whole,) = run(tmp_path, tmp_path / "one.jsonl", 1)
    assert sum(item["tool_calls"] for item in whole["items"]) > 0
    lines = (tmp_path / "one.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "two.jsonl").write_text("".join(lines[:8]))
    assert run(tmp_path, tmp_path / "two.jsonl", 2) == [whole, whole]
    again = (tmp_path / "two.jsonl").read_text().splitlines(keepends=True)
    assert again[:8] == lines[:8]
    assert sorted(again[1:]) == sorted(lines[1:])
