"""Stage of an experiment, as data: training data, objective, optimizer, evaluations."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from gptjax.config import path_of
from gptjax.distributed.sharding import ShardingRules, data_shard
from gptjax.nn import LoRA
from gptjax.protocols import BatchIterator, Data, Evaluation, ModelConfig, Objective, Optimizer, Tokenizer
from gptjax.train.divergence import Stop
from gptjax.types import Batch, UserError


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training run on one kind of data, such as pretraining or fine-tuning."""

    data: Data
    """Training data: `data.Pretrain`, `data.Chat`, ..."""
    objective: Objective
    """Loss to minimise: `objectives.NextToken`, ..."""
    optimizer: Optimizer
    """Optimizer: `optim.AdamW`, `optim.Muon`, ..., `optim.Groups` of them, or `optim.KeepZeros` of a pruned model."""
    steps: int
    """Number of optimizer steps, one batch each."""
    init_from: Literal["latest", "best"] = "latest"
    """Checkpoint of the previous stage to start from: its last, or the best by validation loss."""
    adapter: LoRA | None = None
    """Adapters to train over frozen parameters: the previous stage's, or those of `init_from`. None: train all
    parameters."""
    accumulate: int = 1
    """Gradient accumulation: microbatches per step."""
    ema: float | None = None
    """Decay of an exponential moving average of the parameters, which is evaluated and deployed instead of them. None:
    no average."""
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
        for field in (
            "steps",
            "accumulate",
            "evaluate_every",
            "eval_sequences",
            "save_every",
            "max_to_keep",
            "log_every",
        ):
            if getattr(self, field) < 1:
                raise UserError(f"{field}: got {getattr(self, field)}, must be at least 1")
        if not self.hang_timeout > 0:
            raise UserError(f"hang_timeout: got {self.hang_timeout}, must be more than 0")
        if self.data.batch % self.accumulate:
            raise UserError(f"accumulate: got {self.accumulate}, must divide data.batch {self.data.batch}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"ema: got {self.ema}, must be between 0 and 1, or None")

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
        self.data.check(model)
        for number, evaluation in enumerate(self.evaluations):
            if model.architecture not in evaluation.architectures:
                raise UserError(
                    f"evaluations.{number}: got {type(evaluation).__name__}, which measures "
                    f"{' and '.join(evaluation.architectures)} models, must measure {model.architecture} models"
                )

    def read(
        self, name: str, tokenizer: Tokenizer, rules: ShardingRules, seed: int, cache: Path
    ) -> tuple[BatchIterator, Iterable[Batch] | None]:
        """Batches of this process to train on, and to validate with if there is a validation split, on the current
        mesh. Texts are tokenised unless the folder `cache` has them. Raises UserError that names the field of the stage
        `name`."""
        shard, num_shards = data_shard(rules)
        try:
            batches = self.data.batches(tokenizer, "train", seed, cache, shard, num_shards)
            return batches, self.data.evaluation(tokenizer, "validation", cache, shard, num_shards, self.eval_sequences)
        except UserError as error:
            field, _, reason = str(error).partition(":")
            path = path_of(self.data, field)
            raise UserError(str(error) if path is None else f"{name}.data.{path}:{reason}") from error

    def evaluates(self, step: int) -> bool:
        """True if there is a validation loss after this step."""
        return self.samples(step) or step % self.save_every == 0

    def samples(self, step: int) -> bool:
        """True if there are text samples after this step."""
        return step % self.evaluate_every == 0 or step == self.steps
