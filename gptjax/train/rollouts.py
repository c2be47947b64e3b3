"""Rollouts: batches of replies that the model itself writes while it is trained, with rewards from a task.

    Stage(data=Rollouts(tasks.Gsm8k("train.jsonl"), length=512), objective=objectives.GRPO(), ...)

A round writes the replies of some steps with the parameters of the moment, through the engine that also serves users,
and scores them in processes of their own. The prompts of a round, and the draws of each reply, are a pure function of
(seed, group): a run resumes to the same bits.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

import jax
import numpy as np

from gptjax.data import chat
from gptjax.data.chat import Conversation, ConversationTemplate
from gptjax.data.sources import check_fraction, held_out
from gptjax.data.tokenizers.tokenizer import add_bos_eos
from gptjax.inference.sampling import Sampling
from gptjax.protocols import ModelConfig, Reward, Split, Tokenizer
from gptjax.tasks.functions import ChatTools, check_tools
from gptjax.tasks.task import Task
from gptjax.tasks.tools import Tool
from gptjax.train.episodes import Writing
from gptjax.train.rounds import HeldOut, Prompts, Rounds
from gptjax.types import Batch, Episodes, UserError


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Replies to the prompts of a task, one per sequence, drawn from softmax(logits / temperature) and nothing else."""

    batch_type: ClassVar[type[Batch]] = Episodes
    separator: ClassVar[str] = "\n"

    task: Task
    """Prompts, and scores of replies, whose `value` is the reward."""
    reward: Reward | None = None
    """Rewards in place of the task's, such as `models.reward.RewardModel("runs/reward")`. Outcomes stay the task's."""
    length: int = 512
    """T, maximum number of tokens of a prompt and its reply. Items whose prompts leave no room are left out."""
    batch: int = 64
    """B, replies per step."""
    group: int = 8
    """Replies to each prompt."""
    minibatches: int = 1
    """Steps' batches that a round writes with the same parameters."""
    passes: int = 1
    """Times that the batches of a round are trained on."""
    ahead: Literal[0, 1] = 0
    """1: the next round is written while this one is trained on, with the parameters from before it: rollouts and
    updates overlap, and objectives correct for the difference. 0: one after the other."""
    max_tokens: int | None = None
    """Maximum number of tokens of a reply. None: the task's."""
    temperature: float = 1.0
    """Temperature of the draws, and of the objective's probabilities."""
    equal_groups: Literal["keep", "drop"] = "keep"
    """Groups whose outcomes are all equal, from which a baseline leaves nothing to learn: "drop" leaves them out of the
    loss and its denominator."""
    refill: int = 0
    """Maximum number of times that a round asks for more groups in place of those dropped (DAPO's dynamic sampling)."""
    tools: tuple[Tool, ...] | ChatTools = ()
    """Tools that answer in the middle of a reply, `(tasks.Calculator(),)`, or in a conversation, `tasks.ChatTools`."""
    form: Literal["chat", "text"] = "chat"
    """Form of the prompts: the model's conversation format, or a text to continue."""
    template: ConversationTemplate | None = None
    """Chat template of the model, as in `data.Chat`. None: the format of `gptjax.data.chat`."""
    validation: float = 0.1
    """Fraction of the items held out for validation, chosen by a hash of the item's cluster. 0: none."""
    rows: int = 32
    """Replies that are written at a time, by each process of a job."""
    workers: int = 2
    """Number of processes that score, for each process of a job."""
    timeout: float = 30.0
    """Seconds that a score may take; a reply whose score takes longer has no reward."""

    def __post_init__(self) -> None:
        for name in ("length", "batch", "group", "minibatches", "passes", "max_tokens", "rows", "workers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name}: got {value}, must be at least 1")
        if self.batch % self.group:
            raise UserError(f"group: got {self.group}, must divide batch {self.batch}")
        if not 0 < self.temperature < np.inf:
            raise UserError(f"temperature: got {self.temperature}, must be above 0, as the policy has to explore")
        for name, values in (("ahead", (0, 1)), ("equal_groups", ("keep", "drop")), ("form", ("chat", "text"))):
            if (value := getattr(self, name)) not in values:
                raise UserError(f"{name}: got {value!r}, must be {values[0]} or {values[1]}")
        if self.refill < 0 or (self.refill and self.equal_groups == "keep"):
            raise UserError(f'refill: got {self.refill}, must be 0 unless equal_groups is "drop", and never below')
        if not self.timeout > 0:
            raise UserError(f"timeout: got {self.timeout}, must be above 0 seconds")
        check_fraction(self.validation)
        check_tools(self.tools, self.form)

    @property
    def round(self) -> int:
        """Number of steps of a round. Checkpoints are saved between rounds."""
        return self.minibatches * self.passes

    def writing(self, tokenizer: Tokenizer) -> Writing:
        """Settings that replies are written with."""
        generation = self.task.generation
        stop = generation.stop if self.form == "chat" else generation.text_stop
        most = self.max_tokens or generation.max_tokens
        sampling, template = Sampling(temperature=self.temperature), self.template if self.form == "chat" else None
        return Writing.of(most, sampling, stop, self.tools, tokenizer, template)

    def batches(
        self, tokenizer: Tokenizer, split: Split, seed: int, cache_dir: str | Path, shard: int = 0, num_shards: int = 1
    ) -> Rounds:
        """Rounds of the items of a split. Raises UserError if there are none, if the task's rewards of a right and of
        bad replies are all the same, and for a batch that is not a multiple of `num_shards`."""
        if self.batch % num_shards:
            raise UserError(f"batch: got {self.batch}, must be a multiple of the number of data shards, {num_shards}")
        return Rounds(self, self.prompts(tokenizer, split), tokenizer, seed, shard, num_shards)

    def evaluation(
        self,
        tokenizer: Tokenizer,
        split: Split,
        cache_dir: str | Path,
        shard: int = 0,
        num_shards: int = 1,
        sequences: int | None = None,
    ) -> HeldOut | None:
        """Items of a split, or the first `sequences` of them, to be answered once each. None: nothing is held out."""
        if split == "validation" and not self.validation:
            return None
        return HeldOut(self.prompts(tokenizer, split), sequences)

    def prompts(self, tokenizer: Tokenizer, split: Split) -> Prompts:
        """Prompts of a split, as the model reads them."""
        task = self.task
        ids = {
            i: tuple(self._encode(tokenizer, i))
            for i in range(len(task))
            if held_out(task.cluster(i), self.validation) == (split == "validation")
        }
        if not ids:
            raise UserError(f"validation: got {self.validation}, which leaves no item of {task.name} for {split}")
        fitting = {i: prompt for i, prompt in ids.items() if len(prompt) <= self.length}
        if not fitting:
            shortest = min(map(len, ids.values()))
            raise UserError(f"length: got {self.length}, must be more than {shortest}, the shortest prompt's")
        own = {name: value for name, value in vars(self).items() if name not in ("task", "reward")}
        reward = "" if self.reward is None else self.reward.fingerprint()
        digest = hashlib.sha256(f"{task.fingerprint()} {reward} {own} {tokenizer.fingerprint} {split}".encode())
        return Prompts(fitting, len(ids) - len(fitting), digest.hexdigest())

    def _encode(self, tokenizer: Tokenizer, i: int) -> list[int]:
        if self.form == "text":
            return self.prompt(tokenizer, self.task.text(i))
        return self._converse(tokenizer, self.messages(i))

    def messages(self, i: int) -> Conversation:
        """Prompt of item `i`, which offers the tools of a conversation."""
        messages = self.task.prompt(i)
        return self.tools.offered(messages) if isinstance(self.tools, ChatTools) else messages

    def _converse(self, tokenizer: Tokenizer, messages: Conversation) -> list[int]:
        template = self.template
        return chat.prompt(messages, tokenizer) if template is None else template.prompt(messages, tokenizer)

    def empty(self, size: int) -> Episodes:
        """A numpy batch of `size` sequences of padding."""
        shape = size, self.length
        ids, numbers = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        return Episodes(
            tokens=ids,
            targets=ids.copy(),
            weights=numbers,
            segments=ids.copy(),
            positions=ids.copy(),
            logprobs=numbers.copy(),
            versions=np.full(shape, -1, np.int32),
            rewards=np.zeros(size, np.float32),
            groups=np.full(size, -1, np.int32),
            finished=np.zeros(size, np.float32),
            temperature=np.full(size, self.temperature, np.float32),
        )

    def abstract_batch(self) -> Episodes:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.empty(self.batch))

    def texts(self) -> Iterator[str]:
        for i in range(len(self.task)):
            yield from (message.text for message in self.task.example(i))

    def prompt(self, tokenizer: Tokenizer, text: str) -> list[int]:
        if self.form == "text":
            return add_bos_eos(tokenizer.encode(text), tokenizer, append_eos=False)
        return self._converse(tokenizer, (chat.Message("user", text),))

    def check(self, model: ModelConfig) -> None:
        limit = model.max_positions
        if limit is not None and self.length > limit:
            raise UserError(f"data.length: got {self.length}, must be at most {limit}, the maximum of model.positions")
