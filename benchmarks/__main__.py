"""gptjax beside its peers and floors, as one markdown table; or beside another revision of itself.

    python -m benchmarks                              # the whole table: about five minutes on an idle machine
    python -m benchmarks training decoding            # rows whose names contain these words
    python -m benchmarks --against main               # this tree beside that revision; fails if it is slower

Both of a pair run on one core, each in its own process, in turns, so that other load affects them alike. A ratio is the
other's time over gptjax's in the same turn (above 1: gptjax is faster); its median over the turns is given. Times are
CPU times, fair on a busy machine, and wall times where a disk is waited for.

`--against` fails where the median ratio is below 0.8 (gptjax takes more than 1.25 times as long as at that revision) in
two measurements, the second with twice as many turns.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 1 / 1.25
"""Smallest ratio that `--against` accepts."""
sys.path.insert(0, str(ROOT / "benchmarks"))

from pairs import PAIRS  # noqa: E402


@contextlib.contextmanager
def worker(tree: Path, pair: str, side: str) -> Iterator[subprocess.Popen[str]]:
    """One side of a pair, of the gptjax in `tree`, warmed up."""
    command = [sys.executable, str(tree / "benchmarks" / "pairs.py"), pair, side]
    environment = {**os.environ, "PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        command, cwd=tree, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        line = ""
        while process.poll() is None and line.strip() != "ready":
            line = process.stdout.readline() if process.stdout else ""
        if process.poll() is not None:
            sys.exit(f"benchmarks: {side} of {pair!r} ended with {process.returncode}, see its error above")
        yield process
    finally:
        process.kill()
        process.wait()


def turn(process: subprocess.Popen[str], seconds: float, clock: str) -> float:
    """Milliseconds per call over so many seconds."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{seconds}\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())[clock]


def measure(pair: str, other: tuple[Path, str], turns: int, seconds: float) -> tuple[list[float], list[float]]:
    """Milliseconds of gptjax in this tree and of the other (tree, side), one per turn."""
    clock = PAIRS[pair].clock
    with worker(ROOT, pair, "gptjax") as ours, worker(other[0], pair, other[1]) as theirs:
        times = [(turn(ours, seconds, clock), turn(theirs, seconds, clock)) for _ in range(turns)]
    return [a for a, _ in times], [b for _, b in times]


def row(pair: str, beside: str, ours: list[float], theirs: list[float]) -> tuple[str, float]:
    """A line of the table, and its ratio."""
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    ratio = statistics.median(ratios)
    cells = (f"{statistics.median(ours):,.1f}", beside, f"{statistics.median(theirs):,.1f}", f"**{ratio:.2f}**")
    return f"| {pair} | {' | '.join(cells)} | {ratios[0]:.2f} to {ratios[-1]:.2f} | {PAIRS[pair].clock} |", ratio


def machine() -> str:
    """Processor, versions, revision and date."""
    names = ("jax", "flax", "optax", "orbax-checkpoint", "torch", "transformers", "numpy")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names]
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    processor = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    load = f"load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores"
    first = f"{processor}, {load}, Python {platform.python_version()}, {datetime.date.today()}, {revision.strip()}"
    return f"{first}\n{', '.join(versions)}"


@contextlib.contextmanager
def tree_of(revision: str) -> Iterator[Path]:
    """Files of another revision."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True)
        if archive.returncode:
            sys.exit(f"--against: got {revision!r}, must be a revision of this repository")
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        if not (Path(folder) / "benchmarks" / "pairs.py").exists():
            sys.exit(f"--against: got {revision!r}, must be a revision that has benchmarks/pairs.py")
        yield Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="rows to measure: those whose names contain a word (default: all)")
    parser.add_argument("--against", metavar="REVISION", help="compare with this revision instead of with peers")
    parser.add_argument("--turns", type=int, default=5, help="turns of each (default 5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a turn (default 1)")
    arguments = parser.parse_args()
    chosen = [name for name in PAIRS if not arguments.words or any(word in name for word in arguments.words)]
    if not chosen:
        sys.exit(f"words: got {' '.join(arguments.words)}, must be in one of: {'; '.join(PAIRS)}")
    print(f"{machine()}\n\n| what | gptjax, ms | beside | its ms | ratio, median | range | clock |", flush=True)
    print("|---|---:|---|---:|---:|---:|---|", flush=True)
    if arguments.against is None:
        for name in chosen:
            times = measure(name, (ROOT, PAIRS[name].peer), arguments.turns, arguments.seconds)
            print(row(name, PAIRS[name].peer, *times)[0], flush=True)
        return
    slower = []
    with tree_of(arguments.against) as tree:
        for name in [name for name in chosen if PAIRS[name].guarded]:
            for turns in (arguments.turns, 2 * arguments.turns):
                line, ratio = row(name, arguments.against, *measure(name, (tree, "gptjax"), turns, arguments.seconds))
                print(line, flush=True)
                if ratio >= LIMIT:
                    break
            else:
                slower.append(f"{name}: {1 / ratio:.2f} times the time at {arguments.against}, must be at most 1.25")
    if slower:
        sys.exit("\n".join(slower))


if __name__ == "__main__":
    main()
