"""Experiment: model, tokenizer and training stages as data. Run, stop and resume it.

An experiment is a Python file with `experiment = Experiment(...)`; `python -m experiments NAME` runs it in a folder:

    runs/NAME/  config.json         resolved configuration, package versions
                tokenizer/
                checkpoints/STAGE/  Orbax: state and input position
                metrics.jsonl  tensorboard/
                heartbeat/          state of each process; hang/ and profile/ as needed
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
"""Sampling of text samples during training."""
LOCK = "run.lock"
PACKAGES = ("gptjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "sentencepiece")

CHANGEABLE = ("mesh", "rules", "wandb")
"""Fields that do not affect training, except for the rounding of sums: a run may be resumed with other values."""
CHANGEABLE_OF_STAGES = ("max_to_keep", "evaluate_every", "log_every", "hang_timeout", "prompts")
"""The same, of a stage."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Complete configuration of a run."""

    model: ModelConfig
    """Model architecture."""
    tokenizer: TokenizerConfig
    """Tokenizer to build: `data.TrainSentencePiece`, `data.LoadTokenizer`, ..."""
    stages: dict[str, Stage]
    """Training stages, in order. Each starts from the parameters of the previous one. Names consist of letters, digits,
    _, - and dots, and do not start with a dot."""
    mesh: MeshConfig = MeshConfig()
    """Mesh of the devices."""
    rules: ShardingRules = DEFAULT_RULES
    """Mesh axes of the arrays' logical axes."""
    seed: int = 0
    """Seed of initialisation, data order and dropout."""
    wandb: WandB | None = None
    """Weights & Biases run to log to as well. None: metrics.jsonl and TensorBoard files alone."""
    init_from: str | None = None
    """Model to initialise the first stage from, as for `gptjax.load`, with the same architecture and tokenizer; a
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
        """Raise UserError, naming the field, if the experiment does not fit this number of devices."""
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
                raise UserError(f"{field}: got {size}, must be a multiple of {parts}, its number of shards on the mesh")

    def run(self, folder: str | Path, accept_changes: bool = False, profile: range | None = None) -> int:
        """Train every stage, or resume the folder's run; evaluate; write the report.

        A resumed run continues bit for bit as if it had not been interrupted. On another mesh, or with another number
        of processes, it continues with the same data and, except for rounding, the same losses. A folder with a
        different configuration is an error that lists the differences, unless `accept_changes`. Returns 0.

        profile  steps of each stage to trace, counted from 1 at the start of this process
        """
        folder = Path(folder).absolute()
        # Paths are neither wrapped nor parsed as markup, so that they can be copied.
        console = Console(soft_wrap=True, highlight=False, markup=False, quiet=jax.process_index() != 0)
        self.check(jax.device_count())
        with _locked(folder):
            changed = self._open(folder, accept_changes)
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
            with MetricsLogger(folder, self.wandb, to_json(self)) as records:
                init = pretrained  # abstract parameters -> initial ones of the next stage
                for name, stage in self.stages.items():
                    checkpoints = folder / "checkpoints" / name
                    restore = functools.partial(self._restore_stage, folder, name, pretrained)
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
                                sample=functools.partial(_sample, model, stage, tokenizer) if self._generates else None,
                                description={"configuration": to_json(self)},
                                profile=profile,
                                accept_changes=accept_changes,
                            )
                    init = restore if params is None else functools.partial(_given, params)
                    results[name] = self._evaluate(folder, name, stage, tokenizer, model, mesh, init, console)
            if jax.process_index() == 0:
                report.write(folder, results, {name: stage.objective.unit for name, stage in self.stages.items()})
                console.print(f"\nDone. Report: {_short(folder / 'report' / 'report.md')}")
                if self.model.architecture == "decoder":
                    console.print(f"\nNow try:\n  gptjax chat {_short(folder)}")
                    console.print(f'  gptjax generate {_short(folder)} --prompt "..."')
            processes.barrier("the report is written")
            return 0

    @property
    def _generates(self) -> bool:
        """True if the model generates text."""
        return self.model.architecture in ("decoder", "encoder-decoder")

    def _pretrained(self, model: Module, tokenizer: Tokenizer) -> Callable[[Params | None], Params] | None:
        """Abstract parameters -> those of `init_from`. None: initialise from `seed`."""
        path = self.init_from
        return None if path is None else lambda _: init_from_pretrained(path, model, tokenizer, self.seed)

    def _restore_stage(
        self,
        folder: Path,
        name: str,
        pretrained: Callable[[Params | None], Params] | None,
        abstract: Params | None = None,
    ) -> Params:
        """Trained parameters of a stage, sharded as the abstract ones."""
        adapters = {name: stage.adapter for name, stage in self.stages.items()}
        model = self.model.build(self.rules)
        return restore_stage_params(folder / "checkpoints", adapters, name, model, abstract, pretrained).state

    def _open(self, folder: Path, accept_changes: bool) -> list[str]:
        """Create or check the run folder. Returns the differences from its configuration."""
        allow(*modules(self))
        path = folder / "config.json"
        changed = []
        if path.exists():
            try:
                before = from_json(json.loads(path.read_text())["experiment"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}: is damaged ({error}); restore it, or choose another --out") from error
            changed, relevant = differences(before, self), differences(self._with_changeable(before), self)
            if relevant and (folder / "checkpoints").exists() and not accept_changes:
                raise UserError(
                    f"{folder} has another configuration: {'; '.join(relevant)}. "
                    "Resume anyway with --accept_changes, or choose another folder with --out"
                )
        elif _foreign(folder):
            raise UserError(f"{folder} is not empty and not a run folder; choose another one with --out")
        processes.barrier("all have read the folder")
        if jax.process_index() == 0 and (changed or not path.exists()):
            if changed and not (folder / "checkpoints").exists():
                # A run that failed before training, such as on a wrong path, does not occupy the folder.
                shutil.rmtree(folder / "tokenizer", ignore_errors=True)
            content = {
                "experiment": to_json(self),
                "versions": {package: _version(package) for package in PACKAGES},
                "python": sys.version.split()[0],
                "git": _git_revision(),
            }
            atomic.write_text(path, json.dumps(content, indent=2) + "\n")
        processes.barrier("the run folder is open")
        return changed

    def _with_changeable(self, before: Experiment) -> Experiment:
        """The previous configuration, with this one's values of the fields that may change."""

        def free(stage: Stage, now: Stage | None) -> Stage:
            return stage if now is None else _with(stage, now, CHANGEABLE_OF_STAGES)

        stages = {name: free(stage, self.stages.get(name)) for name, stage in before.stages.items()}
        return dataclasses.replace(_with(before, self, CHANGEABLE), stages=stages)

    def _tokenizer(self, folder: Path, console: Console) -> Tokenizer:
        """The run's tokenizer: loaded from its folder, or built from the first stage's training text."""
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
        if not self._generates:
            return
        read = "max_source_positions" if self.model.architecture == "encoder-decoder" else "max_positions"
        limit = getattr(self.model, read) or sys.maxsize
        for name, stage in self.stages.items():
            for prompt in stage.prompts:
                size = len(stage.data.prompt(tokenizer, prompt))
                if not 0 < size < limit:
                    raise UserError(
                        f"{name}.prompts: got {prompt!r} of {size} tokens, must be at least 1 "
                        "and less than the maximum of model.positions"
                    )

    def _check_evaluations(self, folder: Path, tokenizer: Tokenizer) -> None:
        """Raise UserError for an evaluation that cannot be run, before training."""
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
        """Results of a stage's evaluations, from the folder or computed now, on the mesh.

        params  abstract parameters -> the stage's
        """
        path = folder / "report" / f"{name}.json"
        found = processes.allgather(json.loads(path.read_text()) if path.exists() else None)[0]
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
    """Return `params`, which have the shardings of the abstract ones."""
    return params


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Context in which no other job trains in the folder. Raises UserError if one does, or on an unwritable disk."""
    unwritable = f"out: cannot write to {folder} ({{}}); free some space, make it writable or choose another --out"
    with contextlib.ExitStack() as stack:
        wrong = None
        if jax.process_index() == 0 and not _foreign(folder):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(atomic.lock(folder / LOCK, wait=False))
            except BlockingIOError:
                wrong = f"{folder} is in use by another run; wait for its end, or choose another folder with --out"
            except OSError as error:
                wrong = unwritable.format(error.strerror)
        if (wrong := processes.allgather(wrong)[0]) is not None:
            raise UserError(wrong)
        try:
            yield
        except OSError as error:
            if atomic.unwritable(error, folder):
                raise UserError(unwritable.format(error.strerror)) from error
            raise


def _foreign(folder: Path) -> bool:
    """True for a folder that has something in it, but no run."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return "config.json" not in names and not names <= {atomic.partial_of("config.json").name, LOCK}


@contextlib.contextmanager
def _naming(where: str) -> Iterator[None]:
    """Context in which a UserError's field is prefixed with this path."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}.{error}") from None


def _with(config: Any, other: Any, fields: Sequence[str]) -> Any:
    """The configuration with the other's values of these fields."""
    return dataclasses.replace(config, **{field: getattr(other, field) for field in fields})


def _sample(model: Module, stage: Stage, tokenizer: Tokenizer, params: Params, prompt: str) -> str:
    """A short text after `prompt`, generated with the current parameters, on their mesh."""
    ids = stage.data.prompt(tokenizer, prompt)
    if model.config.architecture == "encoder-decoder":
        ends = [] if tokenizer.eos is None else [tokenizer.eos]
        from gptjax.inference.sequence_to_sequence import generate_targets

        done = generate_targets(model, params, tokenizer, [ids], decoder_start(tokenizer), ends, 64, SAMPLING)
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
    """Commit of the working directory, with "+" if there are changes. None: not in a git repository."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _short(path: Path) -> str:
    """The path relative to the current directory, if it is inside."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
