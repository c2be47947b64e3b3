"""`gptjax data show`: sequences as the model will read them, with the trained tokens marked, and statistics.

    gptjax data show quickstart                                  the first sequences of each stage of an experiment
    gptjax data show quickstart --stage chat --row 7 --rows 1    one of them
    gptjax data show quickstart --chat.data.length 128           overrides, as for python -m experiments
    gptjax data show runs/quickstart --split validation          the data of a run
    gptjax data show chats.jsonl --tokenizer models/qwen3        a file, with a model's tokenizer and chat template
    gptjax data show chats.jsonl --length 64 --too_long drop     overrides of the file's data set

Trained tokens stand on a green ground or, where the output is no terminal, between ⟦ and ⟧.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

# Nothing heavier up here: --help must not wait for jax.
if TYPE_CHECKING:
    from gptjax.data import Dataset
    from gptjax.protocols import Tokenizer
    from gptjax.types import Batch


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the command; every other option overrides a value of the experiment or of the file's data set."""

    stage: str | None = None
    """Stage to show. None: all."""
    split: Literal["train", "validation"] = "train"
    """Split to show."""
    row: int = 0
    """First sequence to print, counted from 0: in training in the shuffled order of the seed, else in their own."""
    rows: int = 2
    """Number of sequences to print. 0: statistics alone."""
    tokens: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print a line for each token: index, segment, position, id, weight and text."""
    tokenizer: str | None = None
    """Tokenizer to use: a folder, a file, or a published name such as gpt2; of a Hugging Face folder its chat template
    too. None: the experiment's; for a file, bytes."""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit code. Raises UserError."""
    from gptjax.cli.options import describe_options, parse_options

    if not arguments or {"-h", "--help"} & {*arguments}:
        print(f"{__doc__}\n{describe_options(Options())}")
        return 0
    path, *rest = arguments
    options, overrides = parse_options(Options(), rest)

    from gptjax.cli.data_target import load_target
    from gptjax.types import UserError

    for field, least in (("row", 0), ("rows", 0)):
        if getattr(options, field) < least:
            raise UserError(f"{field}: got {getattr(options, field)}, must not be negative")
    target = load_target(path, options.tokenizer, overrides, "gptjax data show")
    if options.stage is not None and options.stage not in target.datasets:
        raise UserError(f"stage: got {options.stage!r}, must be one of {', '.join(target.datasets)}")
    for name, dataset in target.datasets.items():
        if options.stage not in (None, name):
            continue
        with _without_warnings("gptjax.data.shards"):  # its counts are among the statistics
            _show(name, dataset, target.tokenizer, target.seed, options)
    return 0


def _show(name: str, dataset: Dataset, tokenizer: Tokenizer, seed: int, options: Options) -> None:
    from gptjax.data.files import cache_dir
    from gptjax.data.show import as_table, as_text, statistics

    cache = str(cache_dir() / "tokens")
    print(f"# {name}")
    lines = list(statistics(dataset, tokenizer, options.split, cache))
    print("\n".join(lines) if lines else "no validation split")
    for number in range(options.row, options.row + options.rows if lines else 0):
        batch = _row(dataset, tokenizer, seed, options, number, cache)
        if batch is None:
            break
        print(f"\n=== {name}, {options.split}, row {number} ===")
        print(as_table(batch, tokenizer) if options.tokens else as_text(batch, tokenizer, colour=sys.stdout.isatty()))


@contextlib.contextmanager
def _without_warnings(name: str) -> Iterator[None]:
    """Context in which a logger says errors alone."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _row(dataset: Dataset, tokenizer: Tokenizer, seed: int, options: Options, number: int, cache: str) -> Batch | None:
    """A batch of the sequence of this number. None: the split has fewer."""
    one = dataclasses.replace(dataset, batch=1)
    if options.split == "train":
        with contextlib.closing(one.batches(tokenizer, "train", seed, cache)) as batches:
            batches.restore({"sequence": number})
            return next(batches)
    rows = one.evaluation(tokenizer, "validation", cache)
    return None if rows is None or number >= len(rows) else rows[number]
