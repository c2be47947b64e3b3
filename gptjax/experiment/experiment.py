"""Experiment: model, tokenizer and training stages as data. Run, stop and resume it.

An experiment is a Python file with `experiment = Experiment(...)`; `python -m experiments NAME` runs it in a folder:

    runs/NAME/  config.json         resolved configuration, package versions
                tokenizer/
                checkpoints/STAGE/  Orbax: state and input position
                metrics.jsonl  wall.jsonl  tensorboard/
                heartbeat/          state of each process; hang/ and profile/ as needed
                run.lock            held by the job that trains here
                report/             report.md, curves as PNG, results of the evaluations
                stale/              checkpoints of stages that were trained again, after an earlier one was

`gptjax chat runs/NAME` and `gptjax.load("runs/NAME")` need nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
from rich.console import Console

from gptjax.checkpoint.checkpoint import Checkpoints
from gptjax.config import check_name, to_json
from gptjax.data.chat import Chat
from gptjax.data.files import cache_dir
from gptjax.data.tokenizers import Tokenizer, TokenizerConfig, load_tokenizer
from gptjax.data.tokenizers.tokenizer import decoder_start
from gptjax.distributed import processes, sharding, xla
from gptjax.distributed.parameters import declared, nested, parameter_info
from gptjax.distributed.sharding import DEFAULT_RULES, MeshConfig, ShardingRules
from gptjax.experiment import report, run_folder
from gptjax.experiment.preparation import GENERATING, check_stages, load_frozen_models, naming, read_data
from gptjax.inference.generate import generate
from gptjax.inference.sampling import Sampling
from gptjax.io import atomic
from gptjax.models.loading import init_from_pretrained, model_class, restore_stage_params
from gptjax.models.model import Model
from gptjax.monitor.metrics import MetricsLogger, WandB
from gptjax.protocols import ModelConfig, Module
from gptjax.train.loop import train
from gptjax.train.stage import Stage
from gptjax.types import Params, Result, UserError

SAMPLING, SAMPLE_TOKENS = Sampling(temperature=0.8, top_p=0.95), 64
"""Sampling of text samples during training, and their length in tokens."""


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
    xla: tuple[str, ...] = ()
    """Options of XLA's compiler, NAME=VALUE, beside and in place of those for the device in `distributed/xla.py`."""
    seed: int = 0
    """Seed of initialisation, data order and dropout."""
    wandb: WandB | None = None
    """Weights & Biases run to log to as well. None: metrics.jsonl and TensorBoard files alone."""
    init_from: str | None = None
    """Model to initialise the first stage from, as for `gptjax.load`, with the same architecture and tokenizer; a
    classifier's head is initialised from `seed`. None: initialise everything from `seed`."""
    expect: tuple[report.Expect, ...] = ()
    """Expected results, which the report and `python -m experiments check NAME` compare with the measured ones."""

    def __post_init__(self):
        if not self.stages:
            raise UserError("stages: got none, must be at least one")
        for name, stage in self.stages.items():
            check_name(name, "stages")
            if not isinstance(stage, Stage):
                raise UserError(f"stages: got a value of type {type(stage).__name__} for {name}, must be a Stage")
        if (first := next(iter(self.stages))) and self.stages[first].has_frozen and self.init_from is None:
            field = "objective" if self.stages[first].adapter is None else "adapter"
            raise UserError(
                f"{first}.{field}: got {type(getattr(self.stages[first], field)).__name__}, must be of a later stage, "
                "or `init_from` be given: there is no trained model to begin with"
            )
        for name, stage in self.stages.items():
            with naming(name):
                stage.check(self.model)
                if stage.init_from != "latest" and name == first:
                    raise UserError(f"init_from: got {stage.init_from}, must be latest: no stage is before the first")

    def check(self, devices: int) -> None:
        """Raise UserError, naming the field, if the experiment does not fit this number of devices."""
        sizes = self.mesh.sizes(devices)
        self.rules.check(tuple(sizes))
        axes = [*self.model.axes]
        for name, stage in self.stages.items():
            batch, parts = f"{name}.data.batch", stage.accumulate
            field = batch if parts == 1 else f"{batch} / {name}.accumulate"
            axes += [
                ("batch", field, stage.data.batch // parts),
                ("sequence", f"{name}.data.length", stage.data.length),
            ]
        self.rules.check_sizes(axes, sizes)

    def run(
        self,
        folder: str | Path,
        accept_changes: bool = False,
        profile: range | None = None,
        mirror: str | None = None,
        tokens: str | None = None,
        local_checkpoints: str | None = None,
        save_local_every: int | None = None,
    ) -> int:
        """Train every stage, or resume the folder's run; evaluate; write the report.

        A resumed run continues bit for bit as if it had not been interrupted. On another mesh, or with another number
        of processes, it continues with the same data and, except for rounding, the same losses. A folder with a
        different configuration is an error that lists the differences, unless `accept_changes`. Returns 0.

        profile  steps of each stage to trace, counted from 1 at the start of this process
        mirror   bucket, gs:// or a path, that the folder is copied to, and first copied back from if that is newer
        tokens   folder or bucket of tokenised data, made by `gptjax data prepare`; what a folder lacks is tokenised.
                 None: `$GPTJAX_CACHE/tokens`
        local_checkpoints  folder of each host for further checkpoints, from which the run is resumed if they are newer
                 than those in `folder`. None: none
        save_local_every  steps between them. None: 50
        """
        cache, started = tokens or str(cache_dir() / "tokens"), time.time()
        folder = Path(folder).absolute()
        # Paths are neither wrapped nor parsed as markup, so that they can be copied.
        console = Console(soft_wrap=True, highlight=False, markup=False, quiet=jax.process_index() != 0)
        self.check(jax.device_count())
        every = run_folder.check_local(self.stages, local_checkpoints, save_local_every)
        options = xla.options(jax.local_devices()[0], self.xla)
        with contextlib.ExitStack() as ending:
            ending.enter_context(run_folder.lock(folder))
            ending.enter_context(_mirrored(folder, mirror))  # nothing is copied while another run has the folder
            for line in run_folder.prepare(folder, self, accept_changes, options):
                console.print(f"changed: {line}")
            if options:
                console.print(f"XLA's options: {' '.join(xla.described(options))}")
            tokenizer = self._tokenizer(folder, cache, console)
            check_stages(self.model, self.stages, folder, tokenizer)
            model, mesh = self.model.build(self.rules), self.mesh.make()
            with sharding.use(mesh):
                stages, readings = read_data(
                    *(self.stages, folder, cache, tokenizer, model, self.seed, console, ending)
                )
            pretrained = self._pretrained(model, tokenizer)
            init, origin = pretrained, run_folder.pretrained_identity(folder, next(iter(self.stages)), self.init_from)
            previous, params = None, None  # stage, and its trained parameters if they are at hand
            results: dict[str, list[Result]] = {}
            with MetricsLogger(folder, self.wandb, to_json(self), started) as records:
                for name, stage in stages.items():
                    if previous is not None:
                        origin = run_folder.identity(folder, previous, stage.init_from)
                        init = self._trained(folder, previous, pretrained, origin["step"], params)
                    previous, params, checkpoints = name, None, folder / "checkpoints" / name
                    origin = run_folder.with_frozen(folder, name, origin, stage.frozen_models)
                    run_folder.set_stale_aside(folder, name, origin, accept_changes, console)
                    with Checkpoints(checkpoints) as saved:
                        last = run_folder.ended(stage, saved)
                        done = last is not None and saved.complete(last)
                    if done and profile is not None:
                        console.print(
                            f"profile: {name} has done its {last:,} steps, so there is none to trace; "
                            "choose another folder with --out"
                        )
                    if not done:
                        with sharding.use(mesh):
                            params = train(
                                stage,
                                name,
                                model,
                                tokenizer,
                                checkpoints,
                                records,
                                cache=cache,
                                seed=run_folder.seed_of(name, stage, folder, self.seed),
                                init=init,
                                frozen_models=load_frozen_models(name, stage, tokenizer, self.rules),
                                reading=readings.pop(name, None),
                                sample=functools.partial(_sample, model, stage, tokenizer) if self._generates else None,
                                start=run_folder.describe(origin),
                                description={"configuration": to_json(self), "origin": origin},
                                profile=profile,
                                accept_changes=accept_changes,
                                compiler_options=options,
                                local=run_folder.local_checkpoints(folder, name, origin, local_checkpoints, every),
                            )
                    of = run_folder.identity(folder, name)
                    trained = self._trained(folder, name, pretrained, of["step"], params)
                    results[name] = self._results(folder, of, mesh, model, trained, tokenizer, console, records)
                records.wall.end("evaluation")
            if jax.process_index() == 0:
                self._report(folder, results, console)
            processes.barrier("the report is written")
            return 0

    def _results(
        self,
        folder: Path,
        of: run_folder.Identity,
        mesh: jax.sharding.Mesh,
        model: Module,
        trained: Callable[[Params], Params],
        tokenizer: Tokenizer,
        console: Console,
        records: MetricsLogger,
    ) -> list[Result]:
        """Results of a stage's evaluations: those stored, or measured and stored.

        of       identity of the stage's last checkpoint
        trained  abstract parameters -> the stage's, on the mesh"""
        name = of["stage"]
        evaluations = self.stages[name].evaluations
        stored = run_folder.StoredResults(folder / "report" / f"{name}.json", of, evaluations)
        results = stored.read() or []
        if evaluations and not results:
            with sharding.use(mesh):
                params = trained(nested(declared(model)))
                if (qat := self.stages[name].quantisation) is not None:
                    params = jax.jit(functools.partial(qat.rounded, info=parameter_info(model)))(params)
            read = self._kind.settings_of_run(to_json(self.stages[name].data))
            if self._generates:
                read.pop("context", None)  # replies may be longer than the sequences of training
            evaluated = self._kind(self.model, params, tokenizer, rules=self.rules, **read)
            results = _evaluate(name, self.stages[name], evaluated, console)
            stored.write(results)
            records.wall.account("evaluation")
        return results

    def _report(self, folder: Path, results: dict[str, list[Result]], console: Console) -> None:
        """Write the report; print what was expected, and commands for the trained model."""
        units = {name: stage.objective.unit for name, stage in self.stages.items()}
        report.write(folder, results, units, self.expect)
        for checked in report.check(folder, self.expect):
            console.print(f"expected: {report.verdict(*checked)}")
        console.print(f"\nDone. Report: {_short(folder / 'report' / 'report.md')}")
        console.print("\n".join(["\nNow try:", *(f"  {line}" for line in self._uses(_short(folder)))]))

    def _uses(self, folder: str) -> list[str]:
        """Commands for the trained model; Python for one that no command knows."""
        if self.model.architecture != "decoder":
            return [
                f"python -i -c 'import gptjax; model = gptjax.load(\"{folder}\", kind=gptjax.{self._kind.__name__})'"
            ]
        chats = any(isinstance(stage.data, Chat) for stage in self.stages.values())
        return [f"gptjax chat {folder}"] * chats + [f'gptjax generate {folder} --prompt "..."']

    @property
    def _kind(self) -> type[Model]:
        return model_class(type(self.model))

    @property
    def _generates(self) -> bool:
        """True if the model generates text."""
        return self.model.architecture in GENERATING

    def _pretrained(self, model: Module, tokenizer: Tokenizer) -> Callable[[Params | None], Params] | None:
        """Abstract parameters -> those of `init_from`. None: initialise from `seed`."""
        path = self.init_from
        return None if path is None else lambda _: init_from_pretrained(path, model, tokenizer, self.seed)

    def _trained(
        self,
        folder: Path,
        name: str,
        pretrained: Callable[[Params | None], Params] | None,
        step: int,
        params: Params | None,
    ) -> Callable[[Params], Params]:
        """Abstract parameters -> those of a stage at a step, sharded alike: the trained `params` if they are at hand
        and the step is its last, else those of the checkpoint."""
        with Checkpoints(folder / "checkpoints" / name) as saved:
            if params is not None and step == saved.latest_step():
                return lambda _: params
        adapters = {name: stage.adapter for name, stage in self.stages.items()}
        model, checkpoints = self.model.build(self.rules), folder / "checkpoints"
        return lambda abstract: (
            restore_stage_params(checkpoints, adapters, name, model, abstract, pretrained, step).state
        )

    def _tokenizer(self, folder: Path, cache: str, console: Console) -> Tokenizer:
        """The run's tokenizer: loaded from its folder, or found beside prepared tokens, or built from the first stage's
        training text."""
        path = folder / "tokenizer"
        if path.exists():
            tokenizer = load_tokenizer(path)
        else:
            with console.status("building the tokenizer ..."):
                first = next(iter(self.stages.values())).data
                if "://" in cache or any(Path(cache).glob("tokenizer-*")):
                    from gptjax.data.prepared import tokenizer_of

                    tokenizer = tokenizer_of(self.tokenizer, first, cache)
                else:
                    tokenizer = self.tokenizer.build(first.texts())
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


def _evaluate(name: str, stage: Stage, model: Model, console: Console) -> list[Result]:
    """Run a stage's evaluations, with a line for each."""
    results = []
    for evaluation in stage.evaluations:
        with console.status(f"{name}: evaluating {type(evaluation).__name__} ..."):
            results.append(evaluation(model))
        values = ", ".join(f"{key} {value:.6g}" for key, value in results[-1].values.items())
        console.print(f"{name}: {results[-1].title}: {values}")
    return results


def _mirrored(folder: Path, mirror: str | None) -> contextlib.AbstractContextManager:
    """Context in which the folder is copied to `mirror`, if that is given."""
    if mirror is None:
        return contextlib.nullcontext()
    from gptjax.checkpoint.mirror import Mirror

    return Mirror(mirror, folder)


def _sample(model: Module, stage: Stage, tokenizer: Tokenizer, params: Params, prompt: str) -> str:
    """A short text after `prompt`, generated with the current parameters, on their mesh."""
    ids = stage.data.prompt(tokenizer, prompt)
    if model.config.architecture == "encoder-decoder":
        start, ends = decoder_start(tokenizer), [] if tokenizer.eos is None else [tokenizer.eos]
        from gptjax.inference.sequence_to_sequence import generate_targets

        done = generate_targets(model, params, tokenizer, [ids], start, ends, SAMPLE_TOKENS, SAMPLING)
    else:
        length = min(SAMPLE_TOKENS, (model.config.max_positions or sys.maxsize) - len(ids))
        done = generate(model, params, tokenizer, [ids], length, SAMPLING)
    return stage.data.separator + done[0].text


def _short(path: Path) -> str:
    """The path relative to the current directory, if it is inside."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
