"""Bytes sent per device and training step as devices are added: compiled for 8 to 512 virtual CPU devices, not run.

    python benchmarks/communication.py                       # a table: data parallel, FSDP, and FSDP in groups of 8

Each device has one sequence of the batch. In a ring, each of n devices sends (n - 1) / n of what is reduced or
gathered, so the figures approach a constant; a figure that grows with n is a fault. The CPU backend all-reduces
gradients where the TPU backend reduce-scatters them, which sends less with FSDP than shown here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys

COUNTS = (8, 16, 32, 64, 128, 256, 512)


def measure(devices: int) -> dict[str, list[float]]:
    """Mesh -> bytes of all parameters, bytes sent by all-gathers, bytes sent by all-reduces."""
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    from gptjax import data, objectives, optim
    from gptjax.distributed.sharding import MeshConfig
    from gptjax.experiment.experiment import Experiment, Stage
    from gptjax.nn import TransformerConfig
    from gptjax.plan.collectives import sent
    from gptjax.plan.compiled import compile_step
    from gptjax.plan.topology import Target

    experiment = Experiment(
        model=TransformerConfig(vocab=512, layers=2, width=512, heads=8, hidden=1_024, tie_embeddings=False),
        tokenizer=data.LoadTokenizer("gpt2"),
        stages={
            "pretrain": Stage(
                data=data.Pretrain(data.PyDocs(), length=16, batch=devices),
                objective=objectives.NextToken(),
                optimizer=optim.AdamW(learning_rate=1e-3, clip=1.0),
                steps=1,
            )
        },
    )
    target = Target.parse(f"cpu:{devices}")
    found = {}
    for name, mesh in {"data": MeshConfig(), "fsdp": MeshConfig(data=1, fsdp=-1), "hybrid": MeshConfig(fsdp=8)}.items():
        step = compile_step(dataclasses.replace(experiment, mesh=mesh), "pretrain", target.devices())
        bytes_sent = sent(step.collectives)
        found[name] = [4.0 * step.count, bytes_sent.get("all-gather", 0.0), bytes_sent.get("all-reduce", 0.0)]
        assert set(bytes_sent) <= {"all-gather", "all-reduce"}, bytes_sent
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, help="measure only this number of devices, as JSON")
    devices = parser.parse_args().devices
    if devices is not None:
        print(json.dumps(measure(devices)))
        return
    print("| devices | data: all-reduce | FSDP: all-gather | all-reduce | FSDP of 8: all-gather | all-reduce |")
    print("|---:|---:|---:|---:|---:|---:|")
    for count in COUNTS:
        run = subprocess.run([sys.executable, __file__, "--devices", str(count)], capture_output=True, text=True)
        found = json.loads(run.stdout.splitlines()[-1]) if run.returncode == 0 else sys.exit(run.stderr)
        ratios = [size / values[0] for values in found.values() for size in values[1:]]
        print(f"| {count} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios[1:]) + " |")
    print("\nIn multiples of the bytes of all parameters.")


if __name__ == "__main__":
    main()
