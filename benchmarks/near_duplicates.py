"""Time and peak memory of removing exact and near duplicates, and the speed of two MinHash libraries.

    python benchmarks/near_duplicates.py --megabytes 200 1000

Each corpus is a file of random words with the frequencies of English, in documents of 2.5 kB on average, of which 5 %
are copies and 10 % copies with one word of a hundred changed. Each is cleaned in its own process, by one worker.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

POOL = 20_000
"""Documents that copies are made of."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[20, 200], help="sizes of the corpora")
    parser.add_argument("--folder", default=None, help="folder of the corpora (default: the temporary folder)")
    arguments = parser.parse_args()
    print("| library | 5-grams/s, 112 values |\n|---|---:|")
    for name, speed in libraries().items():
        print(f"| {name} | {speed:,.0f} |")
    print("\n| corpus | documents | copies, changed copies | dropped exact, near | wall s | CPU s | peak RSS, MB |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for megabytes in arguments.megabytes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            file = Path(folder) / "corpus.jsonl"
            documents, copies, changed = in_process(write, file, megabytes)
            dropped, wall, cpu, peak = in_process(clean, file, Path(folder) / "out")
            print(
                f"| {megabytes} MB | {documents:,} | {copies:,}, {changed:,} | {dropped[0]:,}, {dropped[1]:,} "
                f"| {wall:.0f} | {cpu:.0f} | {peak:.0f} |",
                flush=True,
            )


def in_process(function, *arguments):
    """The result of the function in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def write(file: Path, megabytes: int) -> tuple[int, int, int]:
    """Write a corpus. Returns the numbers of documents, of copies, and of copies with changes."""
    rng, draw = np.random.default_rng(0), random.Random(0)
    vocabulary = np.array(["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(50_000)])
    pool: list[str] = []
    documents = copies = changed = size = 0
    with open(file, "w") as out:
        while size < megabytes * 1_000_000:
            kind = draw.random()
            if kind < 0.05 and pool:
                text, copies = draw.choice(pool), copies + 1
            elif kind < 0.15 and pool:
                words = draw.choice(pool).split()
                for at in draw.sample(range(len(words)), max(1, len(words) // 100)):
                    words[at] = "changed"
                text, changed = " ".join(words), changed + 1
            else:
                length = int(np.clip(rng.lognormal(5.7, 0.8), 30, 4000))
                text = " ".join(vocabulary[(rng.zipf(1.3, length) - 1) % len(vocabulary)])
                if len(pool) < POOL:
                    pool.append(text)
                else:
                    pool[draw.randrange(POOL)] = text
            out.write(json.dumps({"text": text, "id": documents}) + "\n")
            documents, size = documents + 1, size + len(text)
    return documents, copies, changed


def clean(file: Path, out: Path) -> tuple[list[int], float, float, float]:
    """Remove the duplicates. Returns the numbers of exact and near ones, wall and CPU seconds and peak MB."""
    from gptjax.data.prepare import ExactDuplicates, NearDuplicates, clean_files

    start = time.monotonic()
    report = clean_files([str(file)], out, (ExactDuplicates(), NearDuplicates()), format="jsonl")
    usage = resource.getrusage(resource.RUSAGE_SELF)
    dropped = [sum(step.dropped.values()) for step in report.steps]
    return dropped, time.monotonic() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000


def libraries() -> dict[str, float]:
    """5-grams a second of CPU time, by library; those that are installed."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=5)) for _ in range(20_000)]
    texts = [draw.choices(words, k=400) for _ in range(100)]
    grams = [[" ".join(text[i : i + 5]) for i in range(396)] for text in texts]
    speeds = {}
    for name, function in (("rensa", of_rensa), ("datasketch", of_datasketch)):
        try:
            function(grams[:1])  # imports
        except ImportError:
            continue
        start = time.process_time()
        function(grams)
        speeds[name] = 396 * 100 / (time.process_time() - start)
    return speeds


def of_rensa(grams: list[list[str]]) -> None:
    from rensa import RMinHash

    RMinHash.digests_from_token_sets(grams, 112, 1)


def of_datasketch(grams: list[list[str]]) -> None:
    from datasketch import MinHash

    for one in grams:
        MinHash(num_perm=112, seed=1).update_batch([gram.encode() for gram in one])


if __name__ == "__main__":
    main()
