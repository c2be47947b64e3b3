"""`gptjax scaling`: the scaling law of a series of runs, and the best run for a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

Runs = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]


def scaling(
    runs: Runs, budget: tuple[float, ...] = (), out: Path = Path("scaling.png"), figure: str = "validation_loss"
) -> None:
    """Fit a scaling law to the losses of a series of runs, with intervals, and plot it.

    Args:
        runs: Run folders, or folders with runs in them, such as a sweep of depth.
        budget: Training FLOPs, forward and backward, to choose size and tokens for. None: ten times the largest run.
        out: Plot to write, as a PNG.
        figure: Loss to fit, in nats: STAGE/validation_loss, or an ending of it that no other figure has.
    """
    import numpy as np

    from gptjax.experiment import scaling as law
    from gptjax.experiment.report import find_figure
    from gptjax.experiment.summary import find_runs, summarise
    from gptjax.types import UserError

    rows = []
    for folder in find_runs(runs):
        run = summarise(folder, folder.name)
        name = find_figure(run.figures, figure)
        stage = run.stages[name.partition("/")[0]]
        if run.parameters is None or stage.flops is None:
            raise UserError(f"runs: got {folder}, whose model is of a file that is not loaded; must be one of gptjax")
        rows.append((run.parameters, stage.tokens, stage.flops, run.figures[name]))
    found = law.fit(law.Series(*np.array(rows, float).T))
    budgets = budget or (10 * float(found.series.flops.max()),)
    for flops in budgets:
        if not flops > 0:
            raise UserError(f"budget: got {flops}, must be more than 0")
    law.plot(found, budgets, out)
    print(f"{law.report(found, budgets)}\nplot: {out}")
