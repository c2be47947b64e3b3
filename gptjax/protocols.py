"""Protocols of a run's components: tokenizer, sources, data, model, objective, optimizer, evaluations.

    Source --documents--> Data --Batch [B, T]--> Objective --Metrics--> optimizer
                                                 ModelConfig.build() -> Module: tokens [B, T] -> logits [B, T, V]
                                                 Evaluation(model) -> Result

A class with these attributes and methods fits in; a base class has defaults for some. Shapes of `Batch` and `Metrics`,
and the dimension letters, are in `gptjax.types`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self, TypeVar

from gptjax.distributed.parameters import ParamInfo
from gptjax.distributed.sharding import ShardingRules
from gptjax.types import Batch, Json, Key, Metrics, Params, Result, UserError

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from optax import GradientTransformation

Split = Literal["train", "validation"]
Document_co = TypeVar("Document_co", covariant=True)


class Config(Protocol):
    """A frozen dataclass, which `gptjax.config` can save, compare and override."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


class Tokenizer(Protocol):
    """Text to token ids and back; `gptjax.data.Tokenizer` is the base class."""

    @property
    def vocab(self) -> int:
        """V, the number of ids. Every id is below it."""
        ...

    @property
    def specials(self) -> Mapping[str, int]:
        """Name -> id of each special token."""
        ...

    @property
    def bos(self) -> int | None:
        """Id that starts a document, or None."""
        ...

    @property
    def eos(self) -> int | None:
        """Id that ends a document or message, or None."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of everything that determines the tokenizer's behaviour."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        ...

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """`[encode(text) for text in texts]`, faster."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, without special tokens."""
        ...


class Source(Config, Protocol[Document_co]):
    """Documents to make data of: texts (`Source[str]`), conversations, texts with labels, ... One whose attribute
    `validation` is 0 has no validation split."""

    def documents(self, split: Split) -> Iterator[Document_co]:
        """The documents of one split, always in the same order. Raises UserError when there are none."""
        ...

    def fingerprint(self) -> str:
        """SHA-256, in hex, that changes when the documents may have changed."""
        ...


class BatchIterator(Protocol):
    """Endless batches whose position can be saved and restored. A run is resumed only on the same data if they, and the
    validation batches, have a `fingerprint`; a stage may be so many epochs long if they have `epoch`, a number of
    sequences. Their size is shown before the first step if they have
    `describe(sequences)`, as `gptjax.data.Batches` do."""

    def __next__(self) -> Batch:
        """The next batch, numpy arrays [B / num_shards, ...]."""
        ...

    def state(self) -> dict[str, int]:
        """Position, as JSON; the same for any number of data shards."""
        ...

    def restore(self, state: dict[str, int]) -> None:
        """Go to a position that `state()` returned."""
        ...

    def close(self) -> None:
        """Free threads and buffers; `next` continues at the same position."""
        ...


class Reward(Config, Protocol):
    """A judge of replies: `gptjax.models.reward.RewardModel`. Base class of frozen dataclasses."""

    collective: ClassVar[bool] = False
    """True: all processes of a job call it with the same conversations, as its model is on all their devices."""

    @abc.abstractmethod
    def __call__(self, conversations: Sequence[Any]) -> Sequence[float]:
        """Reward of the reply that ends each `data.chat.Conversation`."""
        ...

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """SHA-256, in hex, of all that the rewards depend on."""
        ...


class WrittenBatches(BatchIterator, Protocol):
    """Batches that the model writes itself while it is trained: `gptjax.train.rounds.Rounds`. Some steps are a round;
    a run is saved between rounds."""

    figures: dict[str, float]
    """Figures of the last round, by name."""
    records: list[dict[str, Json]]
    """Replies of the last round, of JSON types."""
    warning: str
    """Fault of it, in words, or ""."""

    def next_batch(self, policy: Any, stopped: Callable[[], bool] = ...) -> Any:
        """The batch of the next step, on the devices; of a new round, written by this `gptjax.train.rounds.Policy`.
        None: a stop was asked for meanwhile."""
        ...


class Answers(Protocol):
    """Held-out items that the model answers: `gptjax.train.rounds.HeldOut`."""

    def measure(self, policy: Any, stopped: Callable[[], bool]) -> dict[str, float] | None:
        """Figures by name, "validation_loss" among them. None: a stop was asked for meanwhile."""
        ...


class Data(Config, Protocol):
    """A kind of training data: documents of a source as batches. Pretraining texts, conversations, ...

    A batch is a pure function of (source, tokenizer, seed, step). Each process makes one data shard of it: sequences
    `shard * B / num_shards` to `(shard + 1) * B / num_shards - 1`. `gptjax.data.Dataset` is the base class.
    """

    batch_type: ClassVar[type[Batch]]
    """Class of its batches: `Batch` or a subclass with more arrays, which the objective reads."""
    separator: ClassVar[str]
    """Shown between a prompt and the model's output."""

    @property
    def length(self) -> int:
        """T, tokens per sequence."""
        ...

    @property
    def batch(self) -> int:
        """B, sequences per optimizer step, over all processes."""
        ...

    def batches(
        self, tokenizer: Tokenizer, split: Split, seed: int, cache_dir: str | Path, shard: int = 0, num_shards: int = 1
    ) -> BatchIterator:
        """Endless shuffled batches to train on. Raises UserError for an empty split."""
        ...

    def evaluation(
        self,
        tokenizer: Tokenizer,
        split: Split,
        cache_dir: str | Path,
        shard: int = 0,
        num_shards: int = 1,
        sequences: int | None = None,
    ) -> Iterable[Batch] | Answers | None:
        """All sequences of a split in order, or `sequences` of them at equal distances. The last batch is padded. Or,
        for data that the model writes itself, items to answer. None: the source has no validation split, and the run
        has no validation loss."""
        ...

    def abstract_batch(self) -> Batch:
        """Shapes and dtypes of the batch of a step, over all processes, as `jax.ShapeDtypeStruct`s."""
        ...

    def texts(self) -> Iterator[str]:
        """Training text, for a tokenizer to be trained on."""
        ...

    def prompt(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Token ids of a prompt with `text`. Raises UserError if the model does not generate text."""
        ...

    def check(self, model: ModelConfig) -> None:
        """Raise UserError, naming the field, if the sequences do not fit the model: too long, for example."""
        ...


class Module(Protocol):
    """A Flax module, as `ModelConfig.build` returns it. `init` and `apply` are pure functions."""

    @property
    def config(self) -> ModelConfig:
        """The configuration that it was built from."""
        ...

    @property
    def rules(self) -> ShardingRules:
        """Sharding of parameters and activations on the current mesh."""
        ...

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """(key, tokens int32 [B, T]) -> {"params": nested dict of arrays}."""
        ...

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """({"params": params}, tokens, positions, segments, cache) -> (logits [B, T, V], cache), the first three int32
        [B, T]. A classifier's logits are [B, M, C], for the M documents of each sequence."""
        ...

    def clone(self, **fields: Any) -> Self:
        """The same module with other `rules`."""
        ...


class ModelConfig(Config, Protocol):
    """Architecture and sizes of a model, as a frozen dataclass. Base class."""

    architecture: ClassVar[str] = "decoder"
    """Output of `build().apply`: logits [B, T, V] of the next tokens ("decoder"), of masked tokens ("encoder") or of a
    target given its source ("encoder-decoder"), logits [B, M, C] of documents ("classifier"), one number for each,
    [B, M, 1] ("regressor"), logits [B, T, C] of tokens ("token-classifier"), [B, T, 2] of tokens as an answer's first
    and last ("span-extractor"), or vectors [B, M, D] of documents ("embedder")."""
    vocab: int
    """V, the number of token ids."""

    @abc.abstractmethod
    def build(self, rules: ShardingRules = ShardingRules()) -> Any:
        """The Flax module, a `Module`."""
        ...

    @abc.abstractmethod
    def flops(self, length: int) -> int:
        """FLOPs of training on one token, forward and backward, at this context length."""
        ...

    @abc.abstractmethod
    def with_dtype(self, dtype: str) -> Self:
        """The same model with another compute dtype: float32 or bfloat16."""
        ...

    @property
    def max_positions(self) -> int | None:
        """Number of positions that the model can tell apart. None: unlimited."""
        return None

    @property
    def max_source_positions(self) -> int | None:
        """Number of source positions of an encoder-decoder. None: unlimited."""
        return None

    @property
    def width_multiplier(self) -> float:
        """Width divided by the width that the hyperparameters were tuned at, in muP. Else 1."""
        return 1.0

    @property
    def axes(self) -> tuple[tuple[str, str, int], ...]:
        """(logical axis, field, size) of the parameters' axes that a mesh may shard."""
        return (("vocab", "model.vocab", self.vocab),)

    def init_cache(self, batch: int, size: int, rules: ShardingRules = ShardingRules(), paged=False) -> tuple[Any, ...]:
        """Empty cache entries of each layer, for `size` positions of `batch` rows; of pages if `paged`."""
        raise UserError(f"model: got {type(self).__name__}, must be a decoder to generate text")

    def unstack(self, params: Params) -> Params:
        """Split stacked layers, for decoding without copies."""
        return params


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A trained model that a stage reads and does not train, such as a teacher. It is loaded once, before the first
    step, and sharded like the model that is trained; its architecture may be another. The tokenizer must be the
    run's."""

    path: str
    """Its run, folder or file, as for `gptjax.load`. A run is resumed with the same content only."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Parameter and compute dtype. None: that of the files."""
    bits: Literal[4, 8] | None = None
    """Quantise its weights, on one device. None: do not."""


class Objective(Config, Protocol):
    """A loss: a pure function of a module's `apply`, parameters and batch. Base class. A field that is a `Pretrained`
    names another model that it reads: a `FrozenModel`, after its other arguments."""

    architectures: ClassVar[tuple[str, ...]] = ("decoder",)
    """Architectures of the models that it trains."""
    batch_type: ClassVar[type[Batch]] = Batch
    """Class of the batches that it reads."""
    unit: ClassVar[str] = "token"
    """Unit of the mean loss: "token", "text" or "pair"."""
    whole_batch: ClassVar[bool] = False
    """True: it compares the sequences of a step, which is never split into microbatches."""
    prepares: ClassVar[bool] = False
    """True: its batches go through `prepare` before they are trained on."""

    @property
    def reference(self) -> bool:
        """True: it takes the parameters at the stage's start too, which stay as they are: a fifth argument."""
        return False

    def parameters(self, model: ModelConfig) -> dict[str, ParamInfo]:
        """Name -> `ParamInfo` of parameters that it trains beside the model's, such as a critic's. They are 0 at the
        stage's start, and are dropped at its end. It finds them in `params[BESIDE]`."""
        return {}

    def __call__(self, apply: Callable[..., Any], params: Params, batch: Any, key: Key | None = None) -> Metrics:
        """Metrics whose "loss" entry is the (sum, weight) to minimise.

        apply  `Module.apply`
        batch  of `batch_type`
        key    random key of dropout and the like. None: no randomness
        """
        ...

    def prepare(self, apply: Callable[..., Any], params: Params, batch: Any, *frozen: Params, parts: int = 1) -> Any:
        """The batch of a whole step with what is computed once before the first update on it, without a gradient: a
        subclass of `batch_type`, or the batch itself. A batch of such a subclass is not prepared again.

        frozen  parameters of the reference, if it has one, then its other models
        parts   microbatches of the model's forward passes
        """
        return batch


class Optimizer(Config, Protocol):
    """An update rule of the parameters: a subclass of `gptjax.optim.Optimizer`, or `gptjax.optim.Groups` of them."""

    @property
    def learning_rate(self) -> float:
        """Peak learning rate."""
        ...

    def learning_rate_schedule(self, steps: int) -> Callable[[ArrayLike], ArrayLike]:
        """Step, from 0 -> learning rate, for a run of `steps`."""
        ...

    def with_schedule(self, schedule: Any) -> Self:
        """This optimizer with another learning-rate schedule."""
        ...

    def build(self, steps: int, info: Params, width_multiplier: float = 1.0) -> GradientTransformation:
        """The optax transformation for a run of `steps`.

        info              tree of `ParamInfo`, in the place of each parameter
        width_multiplier  that of the model's configuration (muP)
        """
        ...


class Evaluation(Config, Protocol):
    """A measurement of a trained model (`LanguageModel`, `ClassifierModel`, ...). Base class.

    It runs on the mesh that the model's parameters are sharded over, on all processes of a job alike.
    """

    architectures: ClassVar[tuple[str, ...]] = ("decoder",)
    """Architectures of the models that it measures."""

    def check(self, tokenizer: Tokenizer) -> None:
        """Raise UserError, naming the field, if it cannot be run. Called before the first training step."""

    def check_chat(self, tokenizer: Tokenizer, template: Any) -> None:
        """Raise UserError if a model of this chat template cannot answer. None: our format."""

    @abc.abstractmethod
    def __call__(self, model: Any) -> Result:
        """Evaluate a `LanguageModel`, or another class with a model of this architecture."""
        ...
