"""The launcher: `python -m experiments NAME [options] [overrides]` trains the experiment of that name; the same command
again resumes it. Outside a checkout it is `gptjax run NAME`.

python -m experiments                                   the experiments there are
python -m experiments quickstart                        train it in runs/quickstart, or go on
python -m experiments quickstart --help                 what it is and everything that can be overridden
python -m experiments quickstart --model.layers 12 --out runs/deep
python -m experiments quickstart --print                show the configuration and stop
python -m experiments path/to/mine.py                   an experiment outside this folder, in runs/mine
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from gptjax.experiment import catalogue

# Nothing heavy up here: listing the experiments and --help must not wait for jax.

PROGRAM = "gptjax run"


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Runs the command line and returns the exit code: 0 done, 1 an error of the program or the machine (Python's
    own code), 2 a mistake in the input, 3 the training diverged, 130 interrupted, 134 another process of the job was
    lost, or what the experiment's `run` returned."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{__doc__}\n{_listing(program)}" if arguments else _listing(program))
        return 0
    name, *rest = arguments
    if (mistake := catalogue.mistake(name)) is not None:
        return _fail(mistake)

    from gptjax.distributed import processes

    processes.prepare()
    from gptjax.types import UserError

    try:
        return _launch(name, rest, program)
    except Exception as error:
        if processes.process_lost(error):
            processes.leave(f"{program} {shlex.join(arguments)}", error)
        if isinstance(error, (UserError, argparse.ArgumentError)):
            return _fail(str(error))
        raise
    except KeyboardInterrupt:
        print(f"\nstopped; to go on: {program} {shlex.join(arguments)}", file=sys.stderr)
        return 130


def _launch(name: str, arguments: list[str], program: str) -> int:
    from gptjax.config import override
    from gptjax.distributed import processes

    parser = _options(name)
    options, overrides = parser.parse_known_args(arguments)
    module = catalogue.load(name)
    description = (
        f"{(module.__doc__ or '').strip()}\n\n{parser.format_help().strip()}\n\nEvery value of the experiment:"
    )
    experiment = override(module.experiment, overrides, f"{program} {name}", description)
    if options.print:
        from rich.pretty import pretty_repr

        print(pretty_repr(experiment, max_width=100))
        return 0
    if options.coordinates:
        from gptjax.experiment.coordinates import check

        stage = next(iter(experiment.stages.values()))
        print(check(experiment.model, stage.optimizer, options.out.with_name(f"{options.out.name}-coordinates.png")))
        return 0
    if options.distributed:
        processes.join()
    from gptjax.checkpoint.mirror import Mirror
    from gptjax.train.loop import Diverged

    try:
        with Mirror(options.mirror, options.out) if options.mirror else contextlib.nullcontext():
            more = {"profile": options.profile} if options.profile else {}
            return experiment.run(options.out, accept_changes=options.accept_changes, **more) or 0
    except Diverged as error:
        return _fail(str(error), code=3)


def _options(name: str) -> argparse.ArgumentParser:
    """The launcher's own options; whatever else is on the command line is an override."""
    from gptjax.distributed import processes

    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(
        "--out",
        type=_folder,
        default=Path("runs") / Path(name).stem,
        metavar="FOLDER",
        help="the run folder, made new or gone on with (default: %(default)s)",
    )
    parser.add_argument(
        "--mirror",
        metavar="gs://BUCKET/NAME",
        help="keep a copy of the run folder there, behind the training, and go on from it where it has more",
    )
    parser.add_argument("--print", action="store_true", help="show the configuration, overrides applied, and stop")
    parser.add_argument(
        "--coordinates",
        action="store_true",
        help="show how activations grow with width, without and with muP, draw it in FOLDER-coordinates.png and stop",
    )
    parser.add_argument(
        "--accept_changes",
        "--accept-changes",
        action="store_true",
        help="go on in a run folder that was made with another configuration",
    )
    parser.add_argument(
        "--profile",
        type=_steps,
        metavar="FIRST:LAST",
        help="trace these steps of each stage, counted from where this run begins or goes on, into FOLDER/profile",
    )
    parser.add_argument(
        "--distributed",
        action=argparse.BooleanOptionalAction,
        default=processes.several(),
        help="be one of several processes: jax.distributed.initialize(); the default in a TPU slice of several hosts, "
        "under srun and mpirun, and where JAX_COORDINATOR_ADDRESS is set",
    )
    return parser


def _steps(text: str) -> range:
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"got {text}, must be two steps counted from 1, the later last, such as 10:15")
    return range(int(first), int(last) + 1)


def _folder(path: str) -> Path:
    if "://" in path:
        raise argparse.ArgumentTypeError(f"got {path}, must be a folder here; docs/cloud.md says how to use a bucket")
    return Path(path)


def _listing(program: str) -> str:
    names = catalogue.names()
    width = max(map(len, names), default=0)
    lines = [f"  {name:{width}}  {catalogue.headline(path)}" for name, path in names.items()]
    return "\n".join([f"Experiments; {program} NAME runs one, {program} NAME --help tells about it:", *lines])


def _fail(message: str, code: int = 2) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
