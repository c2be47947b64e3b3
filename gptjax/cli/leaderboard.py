"""`gptjax leaderboard`: a static page of runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import tyro

Runs = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]


def leaderboard(runs: Runs, out: Path = Path("leaderboard.html"), figure: str | None = None) -> None:
    """Write a page of runs with their sizes, tokens, times, figures and curves: one HTML file, which needs no network.

    Args:
        runs: Run folders, or folders with runs in them.
        out: File to write.
        figure: Figure to sort by, such as bits_per_byte. None: the validation loss of the last stage.
    """
    from gptjax.experiment.leaderboard import page
    from gptjax.experiment.summary import find_runs, summarise
    from gptjax.io import atomic

    found = [folder.absolute() for folder in find_runs(runs)]
    common = os.path.commonpath([folder.parent for folder in found]) if found else ""
    names = [os.path.relpath(folder, common) for folder in found]
    summaries = [summarise(folder, name) for folder, name in zip(found, names, strict=True)]
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(out, page(summaries, figure))
    print(f"{len(found)} run{'s' * (len(found) != 1)} in {out}")
