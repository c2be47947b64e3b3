"""`gptjax data clean FILE... OUT`: clean files of texts into a folder of shards, with a report.

    gptjax data clean "web/*.jsonl.gz" cleaned                      the steps of FineWeb
    gptjax data clean zh.parquet cleaned --recipe chinese           of another recipe
    gptjax data clean a.jsonl b.txt cleaned --recipe steps.py       of one's own: STEPS of a Python file
    gptjax data clean a.jsonl cleaned --text body --format parquet
    gptjax data clean chat.jsonl cleaned --text messages --recipe chat        conversations
    gptjax data clean a.jsonl cleaned --decontaminate gsm8k.jsonl arc.jsonl

Files are .jsonl, .json, .parquet, .csv, .tsv, .txt or .md, gzipped (.gz) or not; the other columns are kept. The
report, OUT/report.md and OUT/report.json, has what each step dropped and changed, with examples. Start an interrupted
cleaning again: what is done is kept.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

# Nothing heavier up here: --help must not wait for jax.


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the command."""

    recipe: str = "fineweb"
    """Steps: fineweb, c4, gopher, chinese, unique, chat, or a Python file that defines STEPS."""
    decontaminate: tuple[str, ...] = ()
    """Files of evaluation items: documents that hold one are dropped, after the other steps."""
    text: str = "text"
    """Column with the text, or with the messages of a conversation, in the form of OpenAI or ShareGPT."""
    format: Literal["jsonl", "jsonl.gz", "parquet"] = "jsonl.gz"
    """Format of the shards."""
    shard: int = 256
    """Megabytes of text per shard."""
    processes: int | None = None
    """Number of processes; the result is the same for any. None: one per processor."""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit code. Raises UserError."""
    from gptjax.cli.options import describe_options, parse_options

    if not arguments or {"-h", "--help"} & {*arguments}:
        print(f"{__doc__}\n{describe_options(Options())}")
        return 0
    options, files = parse_options(Options(), arguments)

    from gptjax.data.prepare.decontaminate import Decontaminate
    from gptjax.data.prepare.output import clean_files
    from gptjax.data.prepare.recipes import load_recipe
    from gptjax.types import UserError

    if unknown := [word for word in files if word.startswith("--")]:
        raise UserError(f"no option {unknown[0].partition('=')[0]}; see gptjax data clean --help")
    if len(files) < 2:
        raise UserError("files: got fewer than two, must be files to read, then the folder to write")
    *paths, out = files
    steps, module = load_recipe(options.recipe)
    if options.decontaminate:
        steps = (*steps, Decontaminate(options.decontaminate))
    processes = os.cpu_count() or 1 if options.processes is None else options.processes
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    report = clean_files(paths, Path(out), steps, options.text, options.format, options.shard, processes, module)
    print(f"{report.kept:,} of {report.documents:,} documents are in {out}; see {Path(out) / 'report.md'}")
    return 0
