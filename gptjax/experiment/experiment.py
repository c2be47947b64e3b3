"""Experiment: model, tokenizer and training stages put together as data; run it, stop it, run it again.

An experiment is a Python file with `experiment = Experiment(...)`; `python -m experiments NAME` runs it in a folder:

    runs/NAME/  config.json         what it is, resolved, with package versions
                tokenizer/
                checkpoints/STAGE/  Orbax: state and input position
                metrics.jsonl  tensorboard/
                heartbeat/          where each process is; hang/ and profile/ when there is something in them
                run.lock            held by the job that trains here
                report/             report.md, curves as PNG, results of the evaluations

`gptjax chat runs/NAME` and `gptjax.load("runs/NAME")` need nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from gptjax.checkpoint.checkpoint import Checkpoints
from gptjax.config import allow, check_name, differences, from_json, modules, to_json
from gptjax.data.files import cache_dir
from gptjax.data.tokenizers import Tokenizer, TokenizerConfig, load_tokenizer
from gptjax.data.tokenizers.tokenizer import decoder_start
from gptjax.distributed import processes, sharding
from gptjax.distributed.parameters import declared, nested
from gptjax.distributed.sharding import DEFAULT_RULES, MeshConfig, ShardingRules
from gptjax.experiment import report
from gptjax.inference.generate import generate
from gptjax.inference.sampling import Sampling
from gptjax.io import atomic
from gptjax.models.loading import init_from_pretrained, model_class, restore_stage_params
from gptjax.monitor.metrics import MetricsLogger, WandB
from gptjax.protocols import ModelConfig, Module
from gptjax.train.loop import train
from gptjax.train.stage import Stage
from gptjax.types import Params, Result, UserError

SAMPLING = Sampling(temperature=0.8, top_p=0.95)
"""How samples are drawn during training."""
LOCK = "run.lock"
PACKAGES = ("gptjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "sentencepiece")

FREE = ("mesh", "rules", "records")
"""Fields that do not change what is learnt, but for the rounding of sums: a run may go on with others."""
FREE_OF_STAGES = ("max_to_keep", "evaluate_every", "log_every", "hang_timeout", "prompts")
"""And those of a stage."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that decides what a run does."""

    model: ModelConfig
    """The model."""
    tokenizer: TokenizerConfig
    """Tokenizer to build: `data.TrainSentencePiece`, `data.LoadTokenizer`, ..."""
    stages: dict[str, Stage]
    """The training runs, in order; each goes on from the parameters of the one before. Names are letters, digits, _, -
    and dots, the first not a dot."""
    mesh: MeshConfig = MeshConfig()
    """How the devices are arranged."""
    rules: ShardingRules = DEFAULT_RULES
    """Which axes of the arrays lie on which axes of the mesh."""
    seed: int = 0
    """Of initialisation, data order and dropout."""
    records: WandB | None = None
    """Weights & Biases run to log to as well. None: metrics.jsonl and TensorBoard files alone."""
    init_from: str | None = None
    """Model to initialise the first stage from, as `gptjax.load` takes it, with the same shape and tokenizer; a
    classifier's head is initialised from `seed`. None: initialise everything from `seed`."""

    def __post_init__(self):
        if not self.stages:
            raise UserError("stages: got none, must be at least one")
        for name in self.stages:
            check_name(name, "stages")
        if (first := next(iter(self.stages))) and self.stages[first].adapter is not None and self.init_from is None:
            raise UserError(f"{first}.adapter: got one, must be none: without `init_from` there is nothing to adapt")
        for name, stage in self.stages.items():
            with _naming(name):
                stage.check(self.model)

    def check(self, devices: int) -> None:
        """Raises UserError, naming the field, where the experiment does not fit that many devices."""
        sizes = self.mesh.sizes(devices)
        self.rules.check(tuple(sizes))
        axes = [
            *self.model.axes,
            *(("batch", f"{name}.data.batch", s.data.batch // s.accumulate) for name, s in self.stages.items()),
            *(("sequence", f"{name}.data.length", s.data.length) for name, s in self.stages.items()),
        ]
        for axis, field, size in axes:
            parts = self.rules.num_shards(axis, sizes)
            if size % parts:
                raise UserError(f"{field}: got {size}, must be a multiple of {parts}, the parts that mesh cuts it into")

    def run(self, folder: str | Path, accept_changes: bool = False, profile: range | None = None) -> int:
        """Train every stage, or go on where the folder's run stopped; evaluate; write the report.

        Run again, it does what is left to do, to the same bits as if it had never been stopped; on another mesh or with
        another number of processes, with the same data and, but for rounding, the same losses. A folder of a
        configuration that learns something else is refused with the differences, unless `accept_changes`. Returns 0.

        profile: steps of each stage to trace, counted from 1 where this run begins or goes on with it
        """
        folder = Path(folder).absolute()
        # Paths to copy are not cut into lines, nor read as markup.
        console = Console(soft_wrap=True, highlight=False, markup=False, quiet=jax.process_index() != 0)
        self.check(jax.device_count())
        with _alone(folder):
            changed = self._claim(folder, accept_changes)
            for line in changed:
                console.print(f"changed: {line}")
            tokenizer = self._tokenizer(folder, console)
            self._check_prompts(tokenizer)
            self._check_evaluations(folder, tokenizer)
            cache = cache_dir() / "tokens"
            mesh = self.mesh.make()
            model = self.model.build(self.rules)
            pretrained = self._pretrained(model, tokenizer)
            results: dict[str, list[Result]] = {}
            with MetricsLogger(folder, self.records, to_json(self)) as records:
                init = pretrained  # abstract parameters -> those that the next stage starts from
                for name, stage in self.stages.items():
                    checkpoints = folder / "checkpoints" / name
                    restore = functools.partial(self._trained, folder, name, pretrained)
                    params = None
                    with Checkpoints(checkpoints) as saved:
                        done = saved.complete(stage.steps)
                    if not done:
                        (folder / "report" / f"{name}.json").unlink(missing_ok=True)
                        with sharding.use(mesh):
                            params = train(
                                stage,
                                name,
                                model,
                                tokenizer,
                                checkpoints,
                                records,
                                cache=cache,
                                seed=self.seed,
                                init=init,
                                sample=functools.partial(_sample, model, stage, tokenizer) if self._writes else None,
                                description={"configuration": to_json(self)},
                                profile=profile,
                                accept_changes=accept_changes,
                            )
                    init = restore if params is None else functools.partial(_given, params)
                    results[name] = self._evaluate(folder, name, stage, tokenizer, model, mesh, init, console)
            if jax.process_index() == 0:
                report.write(folder, results, {name: stage.objective.unit for name, stage in self.stages.items()})
                console.print(f"\nDone. The report: {_short(folder / 'report' / 'report.md')}")
                if self.model.architecture == "decoder":
                    console.print(f"\nNow try:\n  gptjax chat {_short(folder)}")
                    console.print(f'  gptjax generate {_short(folder)} --prompt "..."')
            processes.meet("the report is written")
            return 0

    @property
    def _writes(self) -> bool:
        """Whether the model writes text."""
        return self.model.architecture in ("decoder", "encoder-decoder")

    def _pretrained(self, model: Module, tokenizer: Tokenizer) -> Callable[[Params | None], Params] | None:
        """Abstract parameters -> those of the model that the first stage starts from. None: they are drawn."""
        path = self.init_from
        return None if path is None else lambda _: init_from_pretrained(path, model, tokenizer, self.seed)

    def _trained(
        self,
        folder: Path,
        name: str,
        pretrained: Callable[[Params | None], Params] | None,
        abstract: Params | None = None,
    ) -> Params:
        """What a stage has made, placed as the abstract parameters."""
        adapters = {name: stage.adapter for name, stage in self.stages.items()}
        model = self.model.build(self.rules)
        return restore_stage_params(folder / "checkpoints", adapters, name, model, abstract, pretrained).state

    def _claim(self, folder: Path, accept_changes: bool) -> list[str]:
        """Make the folder this experiment's. Returns how it differs from the configuration that was there."""
        allow(*modules(self))
        path = folder / "config.json"
        changed = []
        if path.exists():
            try:
                before = from_json(json.loads(path.read_text())["experiment"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}: is damaged ({error}); restore it, or choose another --out") from error
            changed, learnt = differences(before, self), differences(self._freed(before), self)
            if learnt and (folder / "checkpoints").exists() and not accept_changes:
                raise UserError(
                    f"{folder} was made with another configuration: {'; '.join(learnt)}. "
                    "Go on all the same with --accept_changes, or choose another folder with --out"
                )
        elif _foreign(folder):
            raise UserError(f"{folder} is not empty and not a run folder; choose another one with --out")
        processes.meet("all have read the folder")
        if jax.process_index() == 0 and (changed or not path.exists()):
            if changed and not (folder / "checkpoints").exists():
                # A run that failed before it trained, on a mistaken path say, does not hold the folder.
                shutil.rmtree(folder / "tokenizer", ignore_errors=True)
            content = {
                "experiment": to_json(self),
                "versions": {package: _version(package) for package in PACKAGES},
                "python": sys.version.split()[0],
                "git": _git_revision(),
            }
            atomic.write_text(path, json.dumps(content, indent=2) + "\n")
        processes.meet("the folder is claimed")
        return changed

    def _freed(self, before: Experiment) -> Experiment:
        """The experiment before with what this one has in the fields that a run may go on with."""

        def free(stage: Stage, now: Stage | None) -> Stage:
            return stage if now is None else _with(stage, now, FREE_OF_STAGES)

        stages = {name: free(stage, self.stages.get(name)) for name, stage in before.stages.items()}
        return dataclasses.replace(_with(before, self, FREE), stages=stages)

    def _tokenizer(self, folder: Path, console: Console) -> Tokenizer:
        """The run's tokenizer: the one in its folder, or built now from the first stage's training text."""
        path = folder / "tokenizer"
        if path.exists():
            tokenizer = load_tokenizer(path)
        else:
            with console.status("building the tokenizer ..."):
                first = next(iter(self.stages.values()))
                tokenizer = self.tokenizer.build(first.data.texts())
            if jax.process_index() == 0:
                with atomic.new(path) as partial:
                    tokenizer.save(partial)
            console.print(f"tokenizer: {tokenizer.vocab:,} tokens")
        if tokenizer.vocab > self.model.vocab:
            raise UserError(
                f"model.vocab: got {self.model.vocab}, but the tokenizer has {tokenizer.vocab} ids; "
                f"set --model.vocab {tokenizer.vocab}"
            )
        return tokenizer

    def _check_prompts(self, tokenizer: Tokenizer) -> None:
        if not self._writes:
            return
        read = "max_source_positions" if self.model.architecture == "encoder-decoder" else "max_positions"
        limit = getattr(self.model, read) or sys.maxsize
        for name, stage in self.stages.items():
            for prompt in stage.prompts:
                size = len(stage.data.prompt(tokenizer, prompt))
                if not 0 < size < limit:
                    raise UserError(
                        f"{name}.prompts: got {prompt!r} of {size} tokens, must be at least 1 "
                        "and fewer than model.positions can tell apart"
                    )

    def _check_evaluations(self, folder: Path, tokenizer: Tokenizer) -> None:
        """Raise UserError for an evaluation that could not be run, before anything is trained."""
        for name, stage in self.stages.items():
            if (folder / "report" / f"{name}.json").exists():
                continue
            for number, evaluation in enumerate(stage.evaluations):
                with _naming(f"{name}.evaluations.{number}"):
                    evaluation.check(tokenizer)

    def _evaluate(
        self,
        folder: Path,
        name: str,
        stage: Stage,
        tokenizer: Tokenizer,
        model: Module,
        mesh: jax.sharding.Mesh,
        params: Callable[[Params], Params],
        console: Console,
    ) -> list[Result]:
        """The results of a stage's evaluations: those in the folder, or found now, on the mesh.

        params  abstract parameters -> the stage's
        """
        path = folder / "report" / f"{name}.json"
        found = processes.gather(json.loads(path.read_text()) if path.exists() else None)[0]
        if found is not None:
            return [Result(**result) for result in found]
        if not stage.evaluations:
            return []
        with sharding.use(mesh):
            trained = params(nested(declared(model)))
        evaluated = model_class(type(self.model))(self.model, trained, tokenizer, rules=self.rules)
        results = []
        for evaluation in stage.evaluations:
            with console.status(f"{name}: evaluating {type(evaluation).__name__} ..."):
                results.append(evaluation(evaluated))
            values = ", ".join(f"{key} {value:.6g}" for key, value in results[-1].values.items())
            console.print(f"{name}: {results[-1].title}: {values}")
        if jax.process_index() == 0:
            atomic.write_text(path, json.dumps([dataclasses.asdict(result) for result in results], indent=2) + "\n")
        return results


def _given(params: Params, abstract: Params) -> Params:
    """Parameters that are in memory, in the place of the abstract ones."""
    return params


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Context in which no other job trains in the folder. Raises UserError if one does."""
    with contextlib.ExitStack() as stack:
        wrong = None
        if jax.process_index() == 0 and not _foreign(folder):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(atomic.lock(folder / LOCK, wait=False))
            except BlockingIOError:
                wrong = f"{folder} is in use by another run; wait for its end, or choose another folder with --out"
            except OSError as error:
                wrong = f"out: cannot write to {folder} ({error.strerror}); choose another folder with --out"
        if (wrong := processes.gather(wrong)[0]) is not None:
            raise UserError(wrong)
        yield


def _foreign(folder: Path) -> bool:
    """True for a folder that has something in it, but no run."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return "config.json" not in names and not names <= {atomic.partial_of("config.json").name, LOCK}


@contextlib.contextmanager
def _naming(where: str) -> Iterator[None]:
    """Context in which a UserError names its field by this path."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}.{error}") from None


def _with(config: Any, other: Any, fields: Sequence[str]) -> Any:
    """The configuration with those fields of the other."""
    return dataclasses.replace(config, **{field: getattr(other, field) for field in fields})


def _sample(model: Module, stage: Stage, tokenizer: Tokenizer, params: Params, prompt: str) -> str:
    """A short text after `prompt`, with parameters that are in the middle of training, where they lie."""
    ids = stage.data.prompt(tokenizer, prompt)
    if model.config.architecture == "encoder-decoder":
        ends = [] if tokenizer.eos is None else [tokenizer.eos]
        from gptjax.inference.sequence_to_sequence import respond

        done = respond(model, params, tokenizer, [ids], decoder_start(tokenizer), ends, 64, SAMPLING)
    else:
        length = min(64, (model.config.max_positions or sys.maxsize) - len(ids))
        done = generate(model, params, tokenizer, [ids], length, SAMPLING)
    return stage.data.separator + done[0].text


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The commit of the working directory, with "+" when there are changes; None outside git."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _short(path: Path) -> str:
    """The path as one would type it here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
