"""`python -m experiments check NAME`: train an experiment and compare its figures with the results that it promises."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from gptjax.experiment import catalogue


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the check."""

    name: Annotated[str, tyro.conf.Positional]
    """Experiment: a name or the path of a file."""
    run: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Finished run to read. None: train."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder to train in, created or resumed. None: runs/NAME-check."""


def main(arguments: Sequence[str], program: str) -> int:
    """Print whether each expected result holds. Returns 0 if all do, 1 if not."""
    from gptjax.cli.options import parsed
    from gptjax.experiment import report
    from gptjax.types import UserError

    prog = f"{program} check"
    options = parsed(lambda: tyro.cli(Options, prog=prog, args=list(arguments), description=__doc__))
    experiment = catalogue.load(options.name).experiment
    if not experiment.expect:
        raise UserError(f"{options.name}: expects nothing; add `expect=(Expect(...),)` to its Experiment")
    folder = options.run
    if folder is None:
        folder = options.out or Path("runs") / f"{Path(options.name).stem}-check"
        experiment.run(folder)
    checked = report.check(folder, experiment.expect)
    print("\n".join(report.verdict(*one) for one in checked))
    return 0 if all(holds for _, _, holds in checked) else 1
