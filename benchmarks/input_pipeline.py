"""Tokens per second and peak memory of the input pipeline alone, as a markdown table.

    python benchmarks/input_pipeline.py

Each corpus is a temporary file of random uint16 tokens, in documents of 500 tokens on average. Each is read in its own
process, so that peaks are independent. Memory is flat if the peaks do not grow with the corpus. A little memory grows
with the number of documents: 8 bytes for the start of each, and 17 for each piece in BestFit's plan (a document longer
than T has several).
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

SEPARATOR = 0
SHAPES = ((64, 12), (256, 16), (1024, 64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--megabytes", type=int, nargs="+", default=[10, 1000], help="sizes of the corpora (2 bytes per token)"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="duration of each measurement")
    parser.add_argument("--folder", default=None, help="folder of the corpora (default: the temporary folder)")
    arguments = parser.parse_args()
    print("| corpus | packing | T | B | start, s | tokens/s | CPU us/batch | peak RSS, MB |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for megabytes in arguments.megabytes:
            file = Path(folder) / "corpus.bin"
            in_process(write, file, megabytes)
            for packing in ("Concatenate", "BestFit", "Concatenate, mix of 2"):
                for length, batch in SHAPES:
                    row = in_process(measure, file, packing, length, batch, arguments.seconds)
                    print(f"| {megabytes} MB | {packing} | {length} | {batch} | {row} |", flush=True)


def in_process(function, *arguments):
    """Call the function in a new process and return its value."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def write(file: Path, megabytes: int) -> None:
    import numpy as np

    random = np.random.default_rng(0)
    with open(file, "wb") as out:
        for _ in range(megabytes):
            tokens = random.integers(1, 50_000, 500_000).astype(np.uint16)
            tokens[random.integers(0, len(tokens), len(tokens) // 500)] = SEPARATOR
            tokens.tofile(out)


def measure(file: Path, packing: str, length: int, batch: int, seconds: float) -> str:
    from gptjax.data import Mix, Pretrain
    from gptjax.data import packing as packings
    from gptjax.data.store import Tokens
    from gptjax.data.tokenizers import Bytes

    tokenizer = Bytes().build(iter(())).with_specials(f"<|{i}|>" for i in range(50_000))
    source = Tokens(str(file), str(file), separator=SEPARATOR)
    name, _, mixed = packing.partition(",")
    data = Pretrain(Mix((source, source), (3, 1)) if mixed else source, length, batch, getattr(packings, name)())

    start = time.perf_counter()
    batches = data.batches(tokenizer, "train", 0, file.parent)
    next(batches)
    started = time.perf_counter() - start

    count, wall, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < seconds:
        next(batches)
        count += 1
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    batches.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return f"{started:.2f} | {count * length * batch / wall / 1e6:.1f}M | {cpu / count * 1e6:.0f} | {peak:.0f}"


if __name__ == "__main__":
    main()
