"""Stage of an experiment, as data: training data, objective, optimizer, evaluations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import jax

from gptjax.config import path_of
from gptjax.distributed.sharding import ShardingRules, data_shard
from gptjax.nn import LoRA
from gptjax.protocols import (
    Answers,
    BatchIterator,
    Data,
    Evaluation,
    ModelConfig,
    Module,
    Objective,
    Optimizer,
    Pretrained,
    Tokenizer,
)
from gptjax.train.divergence import RollBack, Stop
from gptjax.train.privacy import DifferentialPrivacy, Mechanism
from gptjax.train.state import State, device_bytes, parameter_count
from gptjax.types import Batch, Json, Params, UserError


@dataclasses.dataclass(frozen=True)
class EarlyStopping:
    """End a stage after `patience` evaluations without an improvement; its best checkpoint becomes its last (Prechelt
    1998, "Early stopping - but when?"). Every evaluation saves a checkpoint."""

    patience: int = 3
    """Number of consecutive evaluations without an improvement that ends the stage."""
    min_delta: float = 0.0
    """Minimum decrease of the lowest validation loss so far that counts as an improvement."""

    def __post_init__(self):
        if self.patience < 1:
            raise UserError(f"early_stopping.patience: got {self.patience}, must be at least 1")
        if not 0 <= self.min_delta < math.inf:
            raise UserError(f"early_stopping.min_delta: got {self.min_delta}, must be 0 or more")

    def stops(self, losses: Sequence[tuple[int, float]]) -> bool:
        """True if the last `patience` losses are no improvement. A pure function of the losses so far, which every
        checkpoint has: a resumed run ends at the same step.

        losses  (step, validation loss) of the evaluations so far"""
        lowest, waited = math.inf, 0
        for _, loss in losses:
            improved = loss < lowest - self.min_delta
            lowest, waited = (loss, 0) if improved else (lowest, waited + 1)
        return waited >= self.patience


@dataclasses.dataclass(frozen=True)
class QAT:
    """Quantisation-aware training, for a model that is then quantised with the same `bits`, `group` and `embeddings`
    (`gptjax quantize`, `lm.quantised`): loss and gradient are those of its rounded weights, and the gradient changes
    the floats that they are rounded from, straight through the rounding (Jacob et al. 2018, arXiv:1712.05877; Bengio et
    al. 2013, arXiv:1308.3432). Validation losses, samples, rollouts and the stage's evaluations are of the rounded
    weights. Checkpoints have the floats.
    """

    bits: Literal[8, 4] = 4
    """Bits of the integers that matrices are rounded to."""
    group: int | None = None
    """Inputs per scale. None, or where it does not divide their number: a scale per output."""
    embeddings: bool = True
    """Round the token embeddings and the head too, to 8 bits, as our own format does. Hugging Face's leaves them
    floats."""

    def __post_init__(self):
        from gptjax.inference.quantise.weights import check_size

        check_size(self.bits, self.group, "quantisation.")

    def rounded(self, params: Params, info: Params) -> Params:
        """Parameters with the values of the quantised model's, as arrays on their mesh. Trace it.

        info  `parameter_info` of the model"""
        from gptjax.inference.quantise.weights import rounded_params

        return rounded_params(params, info, self.bits, self.group, self.embeddings)

    def check_rounding(self, **settings: Any) -> None:
        """Raise UserError for another rounding of weights that were trained for this one.

        settings  fields of this class, and the method. None: this one's"""
        trained = {**dataclasses.asdict(self), "method": "round"}
        for name, value in settings.items():
            if value not in (None, trained[name]):
                raise UserError(
                    f"{name}: got {value}, must be {trained[name]}, as the weights were trained to be rounded (QAT): "
                    "leave it out, or train another run for it"
                )

    def __str__(self) -> str:
        return f"{self.bits} bits, {f'a scale per {self.group} inputs' if self.group else 'a scale per output'}"


@dataclasses.dataclass(frozen=True)
class Reading:
    """The data of a stage while they are read."""

    batches: BatchIterator
    """Batches to train on. Close them in the end."""
    validation: Iterable[Batch] | Answers | None
    """Batches to validate with, or items for the model to answer. None: no validation split."""

    @property
    def fingerprints(self) -> dict[str, str | None]:
        """Fingerprints of the documents of both splits. None: not known, or no such split."""
        both = {"train": self.batches, "validation": self.validation}
        return {split: getattr(read, "fingerprint", None) for split, read in both.items()}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training run on one kind of data, such as pretraining or fine-tuning."""

    data: Data
    """Training data: `data.Pretrain`, `data.Chat`, ..."""
    objective: Objective
    """Loss to minimise: `objectives.NextToken`, ..."""
    optimizer: Optimizer
    """Optimizer: `optim.AdamW`, `optim.Muon`, ..., `optim.Groups` of them, or `optim.KeepZeros` of a pruned model."""
    steps: int | None = None
    """Number of optimizer steps, one batch each. None: `epochs` says it."""
    epochs: float | None = None
    """Number of passes over the training data; of a mixture, over the source that lasts longest. The number of steps is
    known, and the learning-rate schedule with it, before the first step. None: `steps` says it."""
    early_stopping: EarlyStopping | None = None
    """End before that if the validation loss no longer falls: `EarlyStopping(patience=3)`. None: do not."""
    init_from: Literal["latest", "best"] = "latest"
    """Checkpoint of the previous stage to start from: its last, or the best by validation loss."""
    adapter: LoRA | None = None
    """Adapters to train over frozen parameters: the previous stage's, or those of `init_from`. None: train all
    parameters."""
    accumulate: int = 1
    """Gradient accumulation: microbatches per step, and per batch of a validation loss."""
    ema: float | None = None
    """Decay of an exponential moving average of the parameters, which is evaluated and deployed instead of them. None:
    no average."""
    privacy: DifferentialPrivacy | None = None
    """Differential privacy of the training sequences (DP-SGD): `DifferentialPrivacy(epsilon=8)`. None: none."""
    quantisation: QAT | None = None
    """Quantisation-aware training: train the model for rounded weights, `QAT(bits=4, group=32)`. None: do not."""
    divergence: Stop = Stop()
    """Policy for a loss that is not finite or spikes: `Stop`, `Skip` the step, `RollBack` to a checkpoint."""
    evaluate_every: int = 250
    """Steps between validation losses and text samples. Every checkpoint has a validation loss too, but for those of
    Ctrl-C and SIGTERM."""
    eval_sequences: int = 256
    """Number of validation sequences in a validation loss."""
    save_every: int = 250
    """Steps between checkpoints. Ctrl-C and SIGTERM also save one."""
    max_to_keep: int = 2
    """Number of checkpoints to keep, the newest ones. The best by validation loss is kept too."""
    log_every: int = 10
    """Steps between lines in metrics.jsonl."""
    hang_timeout: float = 300.0
    """Seconds after which an unfinished step is reported as hanging, with the stacks of all threads. The limit is at
    least three times the longest step."""
    prompts: tuple[str, ...] = ("\n",)
    """Prompts of the text samples shown during training."""
    evaluations: tuple[Evaluation, ...] = ()
    """Evaluations after the last step: `evals.BitsPerByte`, `evals.Answers`, ..."""

    def __post_init__(self):
        if (self.steps is None) == (self.epochs is None):
            raise UserError(f"steps: got {self.steps} and epochs {self.epochs}, must be one of the two, the other None")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise UserError(f"epochs: got {self.epochs}, must be more than 0")
        counts = ("steps", "accumulate", "evaluate_every", "eval_sequences", "save_every", "max_to_keep", "log_every")
        for field in counts:
            if (count := getattr(self, field)) is not None and count < 1:
                raise UserError(f"{field}: got {getattr(self, field)}, must be at least 1")
        if not self.hang_timeout > 0:
            raise UserError(f"hang_timeout: got {self.hang_timeout}, must be more than 0")
        if self.data.batch % self.accumulate:
            raise UserError(f"accumulate: got {self.accumulate}, must divide data.batch {self.data.batch}")
        if self.objective.whole_batch and self.accumulate > 1:
            raise UserError(
                f"accumulate: got {self.accumulate}, must be 1: {type(self.objective).__name__} compares all sequences "
                "of a step"
            )
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"ema: got {self.ema}, must be between 0 and 1, or None")
        if self.round > 1:
            early = {"evaluate_every": self.evaluate_every} if self.early_stopping is not None else {}
            for field, value in {"steps": self.steps, "save_every": self.save_every, **early}.items():
                if value is not None and value % self.round:
                    raise UserError(f"{field}: got {value}, must be a multiple of {self.round}, the steps of a round")
        if self.privacy is not None:
            self._check_privacy()
        if self.quantisation is not None and self.adapter is not None:
            raise UserError(
                "quantisation: got QAT, must be None with an adapter, whose frozen matrices `adapter.bits` rounds; or "
                "train all parameters, with adapter None"
            )
        if self.writes and isinstance(self.divergence, RollBack):
            raise UserError("divergence: got RollBack, must be Stop or Skip: rollouts cannot be skipped")

    def _check_privacy(self) -> None:
        """Raise UserError for what the guarantee does not hold with, or nobody has shown that it does."""
        objective, data = type(self.objective).__name__, type(self.data).__name__
        if self.epochs is not None:
            raise UserError(f"epochs: got {self.epochs}, must be None with privacy, which draws at random; give steps")
        if type(self.divergence) is not Stop:
            raise UserError(
                f"divergence: got {type(self.divergence).__name__}, must be Stop with privacy: it depends on losses, "
                "which are not private"
            )
        if self.objective.whole_batch or self.objective.prepares:
            raise UserError(f"objective: got {objective}, must be one without a common term of several sequences")
        if not getattr(self.data, "can_sample", False):
            raise UserError(f"data: got {data}, must be a Dataset with privacy, which draws sequences at random")

    def check(self, model: ModelConfig) -> None:
        """Raise UserError, naming the field, if data, objective, evaluations and model do not match."""
        data, objective = type(self.data).__name__, type(self.objective).__name__
        if model.architecture not in self.objective.architectures:
            raise UserError(
                f"objective: got {objective}, which trains {' and '.join(self.objective.architectures)} models, must "
                f"train {model.architecture} models, as {type(model).__name__} is one"
            )
        if self.data.batch_type is not self.objective.batch_type:
            made, read = self.data.batch_type.__name__, self.objective.batch_type.__name__
            raise UserError(f"data: got {data}, which makes {made} batches, must make {read} for {objective}")
        if self.quantisation is not None and model.architecture != "decoder":
            raise UserError(
                f"quantisation: got QAT, must be None: only decoders are quantised, and {type(model).__name__} is none"
            )
        self.data.check(model)
        for number, evaluation in enumerate(self.evaluations):
            if model.architecture not in evaluation.architectures:
                raise UserError(
                    f"evaluations.{number}: got {type(evaluation).__name__}, which measures "
                    f"{' and '.join(evaluation.architectures)} models, must measure {model.architecture} models"
                )

    def read(self, name: str, tokenizer: Tokenizer, rules: ShardingRules, seed: int, cache: str | Path) -> Reading:
        """Batches of this process to train on, and to validate with if there is a validation split, on the current
        mesh. Texts are tokenised unless the folder `cache` has them. Raises UserError that names the field of the stage
        `name`."""
        shard, num_shards = data_shard(rules)
        rate: dict[str, Any] = {}
        if (privacy := self.privacy) is not None:
            rate["rate"] = lambda sequences: privacy.rate(sequences, self.data.batch, self.last_step)
        try:
            batches = self.data.batches(tokenizer, "train", seed, cache, shard, num_shards, **rate)
            held_out = self.data.evaluation(tokenizer, "validation", cache, shard, num_shards, self.eval_sequences)
        except UserError as error:
            field, _, reason = str(error).partition(":")
            path = path_of(self.data, field)
            raise UserError(str(error) if path is None else f"{name}.data.{path}:{reason}") from error
        if held_out is None and self.early_stopping is not None:
            raise UserError(f"{name}.early_stopping: got one, must be None: the data have no validation split")
        return Reading(batches, held_out)

    def mechanism(self, batches: BatchIterator) -> Mechanism | None:
        """Mechanism of `privacy` for these batches, which takes some seconds the first time. None: no privacy."""
        return None if self.privacy is None else self.privacy.mechanism(**self._sizes(batches))

    def promise(self, batches: BatchIterator) -> Json:
        """`privacy` with the sizes that its noise depends on. None: no privacy."""
        return None if self.privacy is None else dataclasses.asdict(self.privacy) | self._sizes(batches)

    def _sizes(self, batches: BatchIterator) -> dict[str, int]:
        sequences: Any = getattr(batches, "epoch", 0)
        return {"sequences": int(sequences), "batch": self.data.batch, "steps": self.last_step}

    def with_steps(self, name: str, batches: BatchIterator) -> Self:
        """The stage `name` with `steps` in place of `epochs` of these batches. Raises UserError if they do not know the
        length of an epoch."""
        if self.epochs is None:
            return self
        if (epoch := getattr(batches, "epoch", None)) is None:
            data = type(self.data).__name__
            raise UserError(f"{name}.epochs: got {self.epochs}, must be None: {data} knows no epochs; give steps")
        return dataclasses.replace(self, steps=math.ceil(self.epochs * epoch / self.data.batch), epochs=None)

    @property
    def frozen_models(self) -> dict[str, Pretrained]:
        """Field -> model, of the models that the objective reads and does not train."""
        fields = {field.name: getattr(self.objective, field.name) for field in dataclasses.fields(self.objective)}
        return {name: value for name, value in fields.items() if isinstance(value, Pretrained)}

    @property
    def writes(self) -> bool:
        """True: the model writes the batches itself, in rounds."""
        return hasattr(self.data, "round")

    @property
    def round(self) -> int:
        """Number of steps between two moments when the stage can be saved."""
        return getattr(self.data, "round", 1)

    @property
    def has_frozen(self) -> bool:
        """True: the stage takes parameters that it does not train, those at its start."""
        return self.adapter is not None or self.objective.reference

    @property
    def last_step(self) -> int:
        """Number of steps. Raises UserError for `epochs` that are not yet known in steps."""
        if self.steps is None:
            raise UserError(
                f"epochs: got {self.epochs}, must be steps: how many they are is not known without the data"
            )
        return self.steps

    def ends(self, step: int, losses: Sequence[tuple[int, float]]) -> bool:
        """True if there is no step after this one.

        losses  (step, validation loss) of the evaluations so far"""
        reached = max([step, *(at for at, _ in losses)])
        return reached >= self.last_step or (self.early_stopping is not None and self.early_stopping.stops(losses))

    def saves(self, step: int) -> bool:
        """True if there is a checkpoint after this step."""
        early = self.early_stopping is not None and self.samples(step)
        return early or step % self.save_every == 0 or step == self.last_step

    def evaluates(self, step: int) -> bool:
        """True if there is a validation loss after this step."""
        return self.samples(step) or step % self.save_every == 0

    @property
    def pauses(self) -> dict[str, tuple[int, ...]]:
        """Numbers of steps after which training pauses, by the reason."""
        saves, samples = (self.save_every,), (self.evaluate_every,)
        return {"evaluating": saves + samples, "sampling": samples, "saving": saves}

    def samples(self, step: int) -> bool:
        """True if there are text samples after this step."""
        return step % self.evaluate_every == 0 or step == self.last_step


def step_size(stage: Stage, model: Module) -> tuple[int, int]:
    """Tokens of a step, and FLOPs of training on one of them."""
    return stage.data.batch * stage.data.length, model.config.flops(stage.data.length)


def summary(
    name: str, stage: Stage, model: Module, state: State, frozen: tuple[Params, ...], batches: BatchIterator, start: str
) -> list[str]:
    """Lines about what is trained, on which devices, in how much memory, on which data, and from where.

    state  abstract, with shardings"""
    config, mesh = model.config, jax.sharding.get_mesh()
    layers = f" in {number} layers" if (number := getattr(config, "layers", None)) else ""
    of = f" of adapters to {parameter_count(frozen[0]):,}" if stage.adapter is not None else ""
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    memory = {
        "parameters": device_bytes((state.params, frozen)),
        "gradients": device_bytes(state.params),
        "optimizer": device_bytes(state.opt_state),
        "average": device_bytes(state.ema),
        "rounded parameters": 0 if stage.quantisation is None else device_bytes(state.params),
    }
    total, limit = sum(memory.values()), (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    unit, divisor = ("GiB", 2**30) if total >= 2**30 else ("MiB", 2**20)
    parts = ", ".join(f"{part} {size / divisor:.1f}" for part, size in memory.items() if size)
    describe = getattr(batches, "describe", None)
    data = "" if describe is None else f": {describe(stage.last_step * stage.data.batch)}"
    mechanism, early = stage.mechanism(batches), ""
    if (rule := stage.early_stopping) is not None:
        delta = f" by more than {rule.min_delta:g}" if rule.min_delta else ""
        early = f"; or until {rule.patience} evaluations in a row do not lower the validation loss{delta}"
    return [
        f"{name}: {type(config).__name__}, {parameter_count(state.params):,} parameters{of}{layers}",
        f"  devices  {max(mesh.size, 1)} x {jax.devices()[0].device_kind}{f', mesh {axes}' if axes else ''}",
        f"  memory   {total / divisor:.1f}{f' of {limit / divisor:.1f}' if limit else ''} {unit} per device, without "
        f"activations: {parts}",
        f"  data     {stage.last_step:,} steps of {stage.data.batch * stage.data.length:,} tokens{data}{early}",
        f"  start    {start}",
        *([] if stage.quantisation is None else [f"  weights  rounded to {stage.quantisation}"]),
        *([] if mechanism is None else [f"  privacy  {mechanism.describe(stage.data.batch)}"]),
    ]
