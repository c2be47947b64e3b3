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
    variant: str | None = None
    """One of the experiment's `variants`, by name."""
    run: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Finished run to read. None: train."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder to train in, created or resumed. None: runs/NAME-check, or runs/NAME-VARIANT-check."""


def main(arguments: Sequence[str], program: str) -> int:
    """Print whether each expected result holds. Returns 0 if all do, 1 if not."""
    from gptjax.cli.options import parsed
    from gptjax.cli.run import chosen_experiment
    from gptjax.experiment import report
    from gptjax.types import UserError

    prog = f"{program} check"
    options = parsed(lambda: tyro.cli(Options, prog=prog, args=list(arguments), description=__doc__))
    experiment = chosen_experiment(options.name, catalogue.load(options.name), None, options.variant)
    label = "-".join(filter(None, (Path(options.name).stem, options.variant)))
    if not experiment.expect:
        raise UserError(f"{label}: expects nothing; add `expect=(Expect(...),)` to its Experiment")
    folder = options.run
    if folder is None:
        folder = options.out or Path("runs") / f"{label}-check"
        experiment.run(folder)
    checked = report.check(folder, experiment.expect)
    print("\n".join(report.verdict(*one) for one in checked))
    return 0 if all(holds for _, _, holds in checked) else 1
