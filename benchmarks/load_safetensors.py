"""Loading a safetensors folder into jax arrays, compared with reading its bytes, as a markdown table.

    python benchmarks/load_safetensors.py                    # 1 GB, float32 and bfloat16
    python benchmarks/load_safetensors.py --gigabytes 4 --folder /mnt/disk --turns 5

The folder has two files, with random weights under Llama's names. Reading takes the bytes in order, 4 MB at a time;
loading makes stacked leaves and transposes the matrices. Both start with a cold page cache as far as `posix_fadvise`
can empty it, and take turns; loading runs in its own process; medians. Ratio: bytes per second of loading over those of
reading. Memory: the loading process's peak, minus its memory before (Python, jax), over the files' size. Both need a
processor: on a busy machine the ratio says little.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WIDTH, HIDDEN, VOCAB = 2048, 5632, 32_000
MATRICES = {
    **{f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"},
    "mlp.gate_proj": (HIDDEN, WIDTH),
    "mlp.up_proj": (HIDDEN, WIDTH),
    "mlp.down_proj": (WIDTH, HIDDEN),
}
"""Name -> [out, in], PyTorch's layout."""


def make(folder: Path, dtype: str, gigabytes: float) -> None:
    import ml_dtypes
    import numpy as np

    from gptjax.interop.safetensors import write

    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    ends = {
        "model.embed_tokens.weight": (VOCAB, WIDTH),
        "lm_head.weight": (VOCAB, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    layer = {f"{name}.weight": shape for name, shape in MATRICES.items()}
    size = kind.itemsize * sum(a * b for a, b in layer.values())
    layers = round((gigabytes * 1e9 - 2 * kind.itemsize * VOCAB * WIDTH) / size)
    shapes = ends | {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
    block = np.random.default_rng(0).standard_normal(1 << 20, np.float32).astype(kind)
    structs = {name: np.broadcast_to(block[0], shape) for name, shape in shapes.items()}
    write(folder, structs, lambda name: np.resize(block, shapes[name]), max_shard=int(gigabytes * 0.6e9))


def chill(folder: Path) -> None:
    """Empty the page cache of the folder's files."""
    os.sync()
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read(folder: Path) -> float:
    """Seconds to read the bytes."""
    buffer = bytearray(1 << 22)
    start = time.perf_counter()
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def peak() -> int:
    """Peak memory of this process in bytes."""  # not ru_maxrss, which includes the parent's
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def load(folder: Path) -> tuple[float, float, float]:
    """Seconds to load, CPU seconds of it, and the peak of the memory that it took in bytes."""
    import jax
    import jax.numpy as jnp

    from gptjax.interop.safetensors import Tensors, place

    jnp.zeros(1).block_until_ready()
    before = peak()
    start, worked = time.perf_counter(), time.process_time()
    tensors = Tensors(folder)
    shapes = tensors.shapes
    names = [name for name in tensors if ".layers." not in name]
    leaves = {name: place(shapes[name], lambda _, name=name: tensors[name]) for name in names}
    L = (len(tensors) - len(names)) // len(MATRICES)
    for name in MATRICES:
        out, into = shapes[f"model.layers.0.{name}.weight"].shape
        leaf = jax.ShapeDtypeStruct((L, into, out), shapes["model.norm.weight"].dtype)
        leaves[name] = place(leaf, lambda i, name=name: tensors[f"model.layers.{i}.{name}.weight"].T)
    seconds, worked = time.perf_counter() - start, time.process_time() - worked
    return seconds, worked, peak() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="folder on the disk to measure (default: the temporary folder)")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size (default 1)")
    parser.add_argument("--turns", type=int, default=5, help="turns of each (default 5)")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)  # the inner process
    arguments = parser.parse_args()
    if arguments.load:
        print(*load(arguments.load))
        return
    print("| dtype | GB | reading, GB/s | loading, GB/s | ratio, median | range | processor, s/GB | memory / files |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for dtype in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            folder = Path(name)
            make(folder, dtype, arguments.gigabytes)
            size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            rounds = []
            for _ in range(arguments.turns):
                chill(folder)
                plain = read(folder)
                chill(folder)
                run = [sys.executable, __file__, "--load", name]
                seconds, worked, memory = map(float, subprocess.check_output(run, text=True).split())
                rounds.append(
                    (size / plain / 1e9, size / seconds / 1e9, plain / seconds, 1e9 * worked / size, memory / size)
                )
            reading, loading, ratio, worked, memory = map(statistics.median, zip(*rounds, strict=True))
            ratios = sorted(r[2] for r in rounds)
            print(
                f"| {dtype} | {size / 1e9:.2f} | {reading:.2f} | {loading:.2f} | {ratio:.2f} "
                f"| {ratios[0]:.2f} to {ratios[-1]:.2f} | {worked:.2f} | {memory:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
