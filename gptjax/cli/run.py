"""The launcher: `python -m experiments NAME [options] [overrides]` trains the experiment of that name; the same command
again resumes it. Outside a checkout it is `gptjax run NAME`.

python -m experiments                                   the experiments there are
python -m experiments quickstart                        train it in runs/quickstart, or go on
python -m experiments quickstart --help                 what it is, and the sections of what can be overridden
python -m experiments quickstart --help pretrain        the options of a section; all: of all sections
python -m experiments quickstart --model.layers 12 --out runs/deep
python -m experiments quickstart --model.positions ALiBi --out runs/alibi
python -m experiments quickstart --print                show the configuration and stop
python -m experiments path/to/mine.py                   an experiment outside this folder, in runs/mine
python -m experiments quickstart --folds 10             cross-validate, in runs/quickstart-folds
python -m experiments quickstart --sweep pretrain.optimizer.learning_rate=1e-3,5e-3 --seeds 3
python -m experiments check quickstart                  train it anew, and compare with what it promises
python -m experiments check preferences --variant ipo   the same of one of its variants
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Literal, Self

import tyro

from gptjax.experiment import catalogue

# Nothing heavy up here: listing the experiments and --help must not wait for jax.
if TYPE_CHECKING:
    from gptjax.experiment.experiment import Experiment

PROGRAM = "gptjax run"


Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the launcher; every other option overrides a value of the experiment."""

    out: Annotated[str, tyro.conf.arg(metavar="FOLDER")]
    """Run folder, created or resumed."""
    mirror: Annotated[str | None, tyro.conf.arg(metavar="gs://BUCKET/NAME")] = None
    """Copy the run folder there, behind the training, and resume from there what is newer than here."""
    local_checkpoints: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder of each host, in memory (/dev/shm/gptjax) or on a local disk, where every process often saves its share of
    the state beside the checkpoints in the run folder."""
    save_local_every: int | None = None
    """Steps between local checkpoints. None: 50."""
    tokens: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder or bucket of tokenised data, as gptjax data prepare --out makes. None: $GPTJAX_CACHE/tokens."""
    print: Flag = False
    """Show the configuration, overrides applied, and stop."""
    coordinates: Flag = False
    """Show how activations grow with width, without and with muP, draw it in FOLDER-coordinates.png and stop."""
    accept_changes: Flag = False
    """Resume a run folder that was made with another configuration."""
    profile: Annotated[str | None, tyro.conf.arg(metavar="FIRST:LAST")] = None
    """Trace these steps of each stage, counted from where this run begins or resumes, into FOLDER/profile."""
    distributed: bool = False
    """Be one of several processes: jax.distributed.initialize(). The default is True in a TPU slice of several hosts,
    under srun and mpirun, and where JAX_COORDINATOR_ADDRESS is set."""

    depth: int | None = None
    """Number of layers, from which sizes, tokens, batch and rates follow; of an experiment with `at_depth`."""
    variant: str | None = None
    """One of the experiment's `variants`, by name."""
    folds: int | None = None
    """Cross-validate: train one run per fold, in FOLDER/folds, and report all of them."""
    fold: Annotated[str | None, tyro.conf.arg(metavar="I:K")] = None
    """Hold out fold I of K, from 0, in place of the sources' validation splits."""
    sweep: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="OPTION=VALUE,...")] = ()
    """Train one run per value, in FOLDER/runs, and report all of them; LOW:HIGH is a range to search. May be repeated:
    then of all combinations."""
    seeds: int | None = None
    """Train each of these runs with so many seeds."""
    search: Literal["grid", "random", "optuna"] = "grid"
    """Settings of a sweep: all combinations, or so many trials, drawn at random or suggested by Optuna."""
    trials: int = 20
    """Number of settings to draw."""
    figure: str | None = None
    """Figure to compare runs by, such as bits_per_byte. None: the validation loss of the last stage."""
    maximise: Flag = False
    """The figure is the better the higher it is."""
    worker: Annotated[str | None, tyro.conf.arg(metavar="I:N")] = None
    """Train every N-th run, from the I-th (1 to N): one of N machines with a common folder."""
    stop_on_failure: Flag = False
    """End a study at the first run that fails. The default goes on with the others."""

    @property
    def is_study(self) -> bool:
        """True if there is more than one run."""
        return bool(self.folds is not None or self.sweep or self.seeds is not None)

    @property
    def folder(self) -> Path:
        """`out`. Raises UserError for a bucket."""
        from gptjax.types import UserError

        if "://" in self.out:
            raise UserError(f"out: got {self.out}, must be a folder here; docs/cloud.md says how to use a bucket")
        return Path(self.out)

    @property
    def steps(self) -> range | None:
        """`profile`, from FIRST to LAST. Raises UserError."""
        from gptjax.types import UserError

        if self.profile is None:
            return None
        first, _, last = self.profile.partition(":")
        if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
            raise UserError(
                f"profile: got {self.profile}, must be two steps counted from 1, the later last, such as 10:15"
            )
        return range(int(first), int(last) + 1)


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Runs the command line and returns the exit code: 0 done, 1 an error of the program or the machine (Python's
    own code), 2 a mistake in the input, 3 the training diverged, 130 interrupted, 134 another process of the job was
    lost, or what the experiment's `run` returned."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    with Outcome(arguments) as outcome:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(f"{__doc__}\n{_listing(program)}" if arguments else _listing(program))
            return 0
        name, *rest = arguments
        if name != "check" and (mistake := catalogue.load_error(name)) is not None:
            return fail(mistake)
        command = f"{program} {shlex.join(arguments)}"

        from gptjax.distributed import processes

        processes.configure()
        from gptjax.train.divergence import Diverged

        try:
            if name == "check":
                from gptjax.cli import check

                return check.main(rest, program)
            default = Options(str(Path("runs") / Path(name).stem), distributed=processes.is_multi_process())
            options, experiment = _parse(name, rest, default, program)
            if options.is_study and not options.print:
                from gptjax.cli import study

                if all(word.partition("=")[0] != "--out" for word in rest):
                    kind = "folds" if options.folds is not None and not options.sweep else "sweep"
                    options = dataclasses.replace(options, out=f"{options.out}-{kind}")
                return study.run(name, rest, options, experiment)
            if options.print:
                return _print(experiment)
            if options.coordinates:
                return _coordinates(experiment, options.folder)
            if options.distributed:
                processes.initialize()
            given = {"profile": options.steps, "mirror": options.mirror, "tokens": options.tokens}
            given |= {name: getattr(options, name) for name in ("local_checkpoints", "save_local_every")}
            given = {name: value for name, value in given.items() if value is not None}
            return experiment.run(options.folder, accept_changes=options.accept_changes, **given) or 0
        except Diverged as error:
            return fail(str(error), code=3)
        except Exception as error:
            if processes.process_lost(error):
                processes.exit_after_loss(command, error)
            raise
        except KeyboardInterrupt:
            print(f"\nstopped; to go on: {command}", file=sys.stderr)
            return 130
    return outcome.code


def _parse(name: str, arguments: list[str], default: Options, program: str) -> tuple[Options, Experiment]:
    """The launcher's options, and the experiment of that name with the overrides applied."""
    from gptjax.cli.options import describe_options, override, parse_options

    options, overrides = parse_options(default, arguments)
    _ = options.folder, options.steps  # mistakes in them are shown before an experiment is loaded
    module = catalogue.load(name)
    about = f"{(module.__doc__ or '').strip()}\n\n{describe_options(default)}"
    chosen = chosen_experiment(name, module, options.depth, options.variant)
    experiment = override(chosen, overrides, f"{program} {name}", about)
    if options.fold is not None:
        from gptjax.data.folds import with_fold

        index, count = pair("fold", options.fold)
        stages = with_fold(experiment.stages, index, count)
        experiment = dataclasses.replace(experiment, stages=stages)
    return options, _without_promises(experiment, chosen)


def _without_promises(experiment: Experiment, shipped: Experiment) -> Experiment:
    """The experiment, without the expected results of the shipped one if it is trained in another way."""
    from gptjax.experiment.run_folder import CHANGEABLE

    if not getattr(experiment, "expect", ()):  # an experiment may be another object with a `run`
        return experiment
    free = {name: getattr(shipped, name) for name in CHANGEABLE}
    return (
        experiment if dataclasses.replace(experiment, **free) == shipped else dataclasses.replace(experiment, expect=())
    )


def chosen_experiment(name: str, module: ModuleType, depth: int | None, variant: str | None) -> Experiment:
    """The experiment, or its variant, or the one at a depth. Raises UserError if it has none."""
    from gptjax.types import UserError

    if variant is not None:
        known = getattr(module, "variants", {})
        if depth is not None or variant not in known:
            must = f"one of: {', '.join(known)}" if known else f"None: {name} has no `variants`, as polarity has"
            raise UserError(f"variant: got {variant}, must be {must if depth is None else 'None with --depth'}")
        return known[variant]
    if depth is None:
        return module.experiment
    if not hasattr(module, "at_depth"):
        raise UserError(f"depth: got {depth}, but {name} has no function at_depth, as nanochat_d4 has")
    return module.at_depth(depth)


def pair(field: str, text: str) -> tuple[int, int]:
    """Two numbers, as in 3:10. Raises UserError."""
    from gptjax.types import UserError

    first, _, second = text.partition(":")
    if not (first.isdecimal() and second.isdecimal()):
        raise UserError(f"{field}: got {text}, must be two numbers, such as 3:10")
    return int(first), int(second)


def _print(experiment: Experiment) -> int:
    from rich.pretty import pretty_repr

    print(pretty_repr(experiment, max_width=100))
    return 0


def _coordinates(experiment: Experiment, folder: Path) -> int:
    from gptjax.experiment.coordinates import check
    from gptjax.nn import TransformerConfig
    from gptjax.types import UserError

    if not isinstance(experiment.model, TransformerConfig):
        raise UserError(f"coordinates: got a {type(experiment.model).__name__}, must be of a TransformerConfig")
    stage = next(iter(experiment.stages.values()))
    print(check(experiment.model, stage.optimizer, folder.with_name(f"{folder.name}-coordinates.png")))
    return 0


def _listing(program: str) -> str:
    names = catalogue.names()
    width = max(map(len, names), default=0)
    lines = [f"  {name:{width}}  {catalogue.headline(path)}" for name, path in names.items()]
    return "\n".join([f"Experiments; {program} NAME runs one, {program} NAME --help tells about it:", *lines])


class Outcome:
    """Context of a command that turns an error into an exit code: 2, with a line that names the option as typed, for a
    mistake of the user and for a file or disk that cannot be used; 1 if the reader of the output is gone, as in
    `gptjax ... | head`."""

    def __init__(self, arguments: Sequence[str]):
        self.arguments, self.code = arguments, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        try:
            sys.stdout.flush()
        except OSError as unwritten:
            error = unwritten
        code = None if error is None else self._code(error)
        self.code = code or 0
        return code is not None

    def _code(self, error: BaseException) -> int | None:
        """Exit code of an error, after its message. None: a fault of the program."""
        if isinstance(error, BrokenPipeError):
            with contextlib.suppress(OSError):  # no file descriptor under a test
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        if isinstance(error, UnicodeDecodeError):
            return fail("standard input: got bytes that are not UTF-8, must be text")
        if isinstance(error, OSError):
            from gptjax.io.atomic import FULL_OR_READ_ONLY

            if error.filename is None and error.errno not in FULL_OR_READ_ONLY:
                return None
            return fail(f"{error.filename or 'the disk or standard output'}: cannot be used ({error.strerror})")
        if isinstance(error, ValueError):
            from gptjax.types import UserError

            return fail(_as_typed(str(error), self.arguments)) if isinstance(error, UserError) else None
        return None


def fail(message: str, code: int = 2) -> int:
    """Print a message on one line of standard error and return the exit code."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _as_typed(message: str, arguments: Sequence[str]) -> str:
    """The message, with its field spelled as the option that was typed: `--pretrain.data.batch: ...` for
    `batch: ...`."""
    field, colon, rest = message.partition(":")
    options = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
    found = [option for option in options if f".{option[2:]}".replace("-", "_").endswith(f".{field}")]
    return f"{found[0]}:{rest}" if colon and len(found) == 1 else message
