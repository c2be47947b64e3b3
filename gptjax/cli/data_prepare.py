"""`gptjax data prepare`: tokenise an experiment's data, or a file, before accelerators are paid for.

    gptjax data prepare gpt2_124m                                   into $GPTJAX_CACHE/tokens, where a run here looks
    gptjax data prepare gpt2_124m --out gs://bucket/tokens          into a bucket, for gptjax run --tokens gs://...
    gptjax data prepare gpt2_124m --out /nfs/tokens --worker 3/16   the fourth of 16 machines
    gptjax data prepare "corpus/*.jsonl" --tokenizer gpt2           files, as gptjax data show reads them

What was stopped, however it was, goes on after its last shard. The tokens are the same, bit for bit, for any number of
processes and workers. The worker that finishes last completes them; give the ones that failed once more.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

# Nothing heavier up here: --help must not wait for jax.


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the command; every other option overrides a value of the experiment or of the file's data set."""

    out: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder or bucket (gs://, s3://) of the tokens. None: $GPTJAX_CACHE/tokens."""
    processes: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    """Processes on this machine. The default is the number of its CPUs."""
    worker: str = "0/1"
    """This worker, I/N: the I-th of N, counted from 0, on as many machines."""
    stage: str | None = None
    """Stage whose data are tokenised. None: all."""
    split: Literal["train", "validation"] | None = None
    """Split to tokenise. None: both."""
    tokenizer: str | None = None
    """Tokenizer to use, as for gptjax data show. None: the experiment's; for a file, bytes."""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit code. Raises UserError."""
    from gptjax.cli.options import describe_options, parse_options

    if not arguments or {"-h", "--help"} & {*arguments}:
        print(f"{__doc__}\n{describe_options(Options())}")
        return 0
    path, *rest = arguments
    options, overrides = parse_options(Options(), rest)
    index, slash, count = options.worker.partition("/")

    from gptjax.cli.data_target import load_target
    from gptjax.data.files import cache_dir
    from gptjax.data.shards import Workers
    from gptjax.types import UserError

    if not slash or not index.isdecimal() or not count.isdecimal():
        raise UserError(f"worker: got {options.worker}, must be I/N, such as 0/16")
    workers = Workers(options.processes, int(index), int(count))
    out = options.out or str(cache_dir() / "tokens")
    target = load_target(path, options.tokenizer, overrides, "gptjax data prepare", tokens=out)
    if options.stage is not None and options.stage not in target.datasets:
        raise UserError(f"stage: got {options.stage!r}, must be one of {', '.join(target.datasets)}")
    from gptjax.data.prepared import prepare

    unfinished = False
    for name, dataset in target.datasets.items():
        if options.stage not in (None, name):
            continue
        for split in ("train", "validation"):
            if options.split in (None, split):
                for line, done in prepare(dataset, target.tokenizer, split, out, workers):
                    print(f"{name}: {line}", flush=True)
                    unfinished |= not done
    if unfinished:
        print(f"worker {options.worker} has done its part; the last worker to finish completes the tokens")
    return 0
