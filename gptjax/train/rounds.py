"""Rounds of rollouts: replies are written, scored, and made into the batches of some steps."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.distributed.sharding import fetch, on_mesh_of
from gptjax.protocols import Module, Tokenizer
from gptjax.train.episodes import Asked
from gptjax.train.writer import Scored, Share, Writer
from gptjax.types import Batch, Episodes, Params, UserError

if TYPE_CHECKING:
    from gptjax.train.rollouts import Rollouts

OUTSIDE = 0.2
"""Difference of a probability's ratio from 1 beyond which sampler and trainer disagree on a token."""

DISAGREE = 0.05
"""Share of such tokens that is said aloud."""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts of a split."""

    ids: Mapping[int, tuple[int, ...]]
    """Item -> token ids."""
    too_long: int
    """Number of items left out, whose prompts leave no room for a reply."""
    fingerprint: str
    """SHA-256, in hex, of the task, the settings and the tokenizer."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """The model at a step of its training."""

    model: Module
    params: Callable[[], Params]
    """Its parameters, merged, on this process's devices."""
    prepare: Callable[[Batch], Batch]
    """A batch on the host -> that which the step reads, on the devices."""
    step: int
    """Number of steps done."""
    rounds: Rounds
    """Batches that it writes, whose engine and scorers serve held-out items too."""


@dataclasses.dataclass(frozen=True)
class Round:
    """Replies of a round, in groups."""

    kept: list[list[Scored]]
    dropped: list[list[Scored]]
    """Groups with equal outcomes that are left out."""
    groups: int
    """Number of groups asked for so far, in all rounds."""
    step: int
    """Step of the policy that wrote them."""
    seconds: float
    """Duration of writing and scoring."""

    @property
    def replies(self) -> list[Scored]:
        """All replies, those left out too."""
        return [scored for group in self.kept + self.dropped for scored in group]

    def figures(self) -> dict[str, float]:
        """Means over all replies and counts, by name."""
        replies = self.replies
        tokens = [len(scored.episode.ids) for scored in replies]
        equal = sum(len({scored.score.outcome for scored in group}) == 1 for group in self.kept)
        counts = collections.Counter(scored.score.status for scored in replies)
        seconds = max(self.seconds, 1e-9)
        return {
            "reward": float(np.mean([scored.score.value for scored in replies])),
            "outcome": float(np.mean([scored.score.outcome for scored in replies])),
            "reply_tokens": float(np.mean(tokens)),
            "finished": float(np.mean([scored.episode.finished for scored in replies])),
            "equal_groups": (equal + len(self.dropped)) / (len(self.kept) + len(self.dropped)),
            "rollout_seconds": self.seconds,
            "rollout_tokens_per_second": sum(tokens) / seconds,
            **{status.replace(" ", "_"): float(n) for status, n in sorted(counts.items()) if status != "scored"},
            **_calls(replies),
        }

    def as_json(self) -> dict[str, Any]:
        """All of it, of JSON types but for the prompts."""
        groups = {name: [[one.as_json() for one in group] for group in getattr(self, name)] for name in GROUPS}
        return {**vars(self), **groups}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], prompts: Mapping[int, tuple[int, ...]]) -> Self:
        """The round that `as_json` returned."""
        kept, dropped = ([[Scored.from_json(one, prompts) for one in group] for group in data[name]] for name in GROUPS)
        return cls(**{**data, "kept": kept, "dropped": dropped})


GROUPS = "kept", "dropped"


class Rounds(Iterator[Batch]):
    """Batches of rollouts: `next_batch` writes the replies of a round before its first step.

    The scores of right and of empty replies are compared first. Raises UserError if they are all the same."""

    def __init__(
        self, data: Rollouts, prompts: Prompts, tokenizer: Tokenizer, seed: int, shard: int = 0, num_shards: int = 1
    ):
        self.fingerprint = prompts.fingerprint
        self.figures: dict[str, float] = {}
        """Figures of the last round, by name."""
        self.records: list[dict[str, Any]] = []
        """Replies of the last round, of JSON types."""
        self.warning = ""
        """Share of its tokens on which sampler and trainer disagree, in words, if it is large."""
        self._data, self._prompts, self._seed = data, prompts, seed
        self._items = sorted(prompts.ids)
        self.writer = Writer(data, tokenizer)
        """Engine and scorers, for held-out items too."""
        try:
            self.writer.probe(self._items)
        except BaseException:
            self.writer.close()
            raise
        self._groups = self._step = 0  # groups asked for, steps begun
        self._last_order: tuple[int, np.ndarray] | None = None  # epoch, and order of its items
        self._rows = slice(shard * data.batch // num_shards, (shard + 1) * data.batch // num_shards)
        self._prepared: list[Batch] = []
        self._ahead: Future[Callable[[], Round | None]] | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "rollouts")

    def __next__(self) -> Batch:
        raise UserError("divergence: got RollBack, must be Stop or Skip: rollouts cannot be skipped, only written anew")

    def next_batch(self, policy: Policy, stopped: Callable[[], bool] = lambda: False) -> Batch | None:
        """The batch of the next step, on the devices. A collective call. None: a stop was asked for while a round was
        being written: it is given up, and the position is still before it, as it is after an error of the writer."""
        data, place, self.warning = self._data, self._step % self._data.round, ""
        if place == 0:
            ahead, self._ahead = self._ahead, None
            written = self._write(policy, self._groups, stopped) if ahead is None else ahead.result()()
            if written is None:
                return None
            self._groups = written.groups
            if data.ahead:
                params = policy.params()
                with on_mesh_of(params):
                    copied = jax.tree.map(jnp.copy, params)  # the step donates its own
                later = dataclasses.replace(policy, params=lambda: copied)
                self._ahead = self._thread.submit(self._write_ahead, later, self._groups)
            batches = [_batch(data, groups, written.step) for groups in self._minibatches(written)]
            self._prepared = [policy.prepare(jax.tree.map(lambda x: x[self._rows], batch)) for batch in batches]
            self.figures = written.figures() | mismatch(batches, self._prepared)
            if (outside := self.figures.get("mismatch_outside", 0)) > DISAGREE:
                self.warning = (
                    f"sampler and trainer disagree by more than {OUTSIDE:.0%} on {outside:.1%} of the tokens' "
                    "probabilities; see mismatch_p95, and try model.dtype float32"
                )
            self.records = [scored.record(written.step) for scored in written.replies]
        self._step += 1
        return self._prepared[place % data.minibatches]

    def state(self) -> dict[str, Any]:
        """Position at the end of a round, with the replies that were written ahead. A collective call."""
        assert self._step % self._data.round == 0, "checkpoints are saved between rounds"
        ahead = None if self._ahead is None else self._end_ahead(self._ahead)
        return {"step": self._step, "groups": self._groups, "ahead": None if ahead is None else ahead.as_json()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a position that `state()` returned."""
        self._step, self._groups, self._prepared, self._ahead = int(state["step"]), int(state["groups"]), [], None
        if state["ahead"] is not None:
            written = Round.from_json(state["ahead"], self._prompts.ids)
            self._ahead = Future()
            self._ahead.set_result(lambda: written)

    def close(self) -> None:
        """End the processes that score."""
        self._thread.shutdown()
        self.writer.close()

    def describe(self, sequences: int) -> str:
        """Number of replies in so many sequences, of prompts, and of those left out."""
        left_out = f"; {self._prompts.too_long:,} are too long" if self._prompts.too_long else ""
        of = f"{len(self._items):,} prompts of {self._data.task.name}"
        return f"{sequences // self._data.passes:,} replies to {of}, {self._data.group} each{left_out}"

    def _write(
        self, policy: Policy, first: int, stopped: Callable[[], bool] = lambda: False, share: Share | None = None
    ) -> Round | None:
        """Write and score the replies of a round: of group number `first` and those after it. A collective call.

        share  this process's, of the first groups, if it is written"""
        data, seconds = self._data, 0.0
        groups: dict[bool, list[list[Scored]]] = {True: [], False: []}  # by whether they count
        for _ in range(1 + data.refill):
            asked = self._asked_of(first, self._wanted - len(groups[True]))
            share, begun = share or self.writer.begin(policy, asked, stopped), time.monotonic()
            if (scored := self.writer.gather(asked, share)) is None:
                return None
            seconds += share.seconds + time.monotonic() - begun
            first, share = first + len(asked) // data.group, None
            for at in range(0, len(scored), data.group):
                group = scored[at : at + data.group]
                equal = len({one.score.outcome for one in group}) == 1
                groups[data.equal_groups == "keep" or not equal].append(group)
            if len(groups[True]) == self._wanted:
                break
        return Round(groups[True], groups[False], first, policy.step, seconds)

    def _write_ahead(self, policy: Policy, first: int) -> Callable[[], Round | None]:
        """A function that returns the round. What is done before it is called may run in another thread: all of it in a
        job of one process; this process's share in one of several, as collective calls have one order."""
        if jax.process_count() == 1:
            written = self._write(policy, first)
            return lambda: written
        share = self.writer.begin(policy, self._asked_of(first, self._wanted), lambda: False)
        return lambda: self._write(policy, first, share=share)

    def _end_ahead(self, ahead: Future[Callable[[], Round | None]]) -> Round | None:
        """The round ahead, written to its end. None: it failed, as `next_batch` will say."""
        written, self._ahead = None, Future()
        try:
            written = ahead.result()()
            self._ahead.set_result(lambda: written)
        except UserError as error:
            self._ahead.set_exception(error)
        return written

    @property
    def _wanted(self) -> int:
        """Number of groups of a round."""
        return self._data.batch * self._data.minibatches // self._data.group

    def _asked_of(self, first: int, count: int) -> list[Asked]:
        """All samples of so many groups."""
        return [
            self._asked(group, sample) for group in range(first, first + count) for sample in range(self._data.group)
        ]

    def _asked(self, group: int, sample: int) -> Asked:
        """Sample of a group: its item, in a random order of all items in each epoch, and the seed of its draws."""
        epoch, place = divmod(group, len(self._items))
        item = self._items[self._order(epoch)[place]]
        seed = int.from_bytes(hashlib.sha256(f"{self._seed} {group}".encode()).digest()[:4], "little")
        return Asked(item, sample, self._prompts.ids[item], seed)

    def _order(self, epoch: int) -> np.ndarray:
        if self._last_order is None or self._last_order[0] != epoch:
            self._last_order = epoch, np.random.default_rng([self._seed, epoch]).permutation(len(self._items))
        return self._last_order[1]

    def _minibatches(self, written: Round) -> list[list[list[Scored]]]:
        """Groups of each batch of a round; the last ones have fewer if too few were kept."""
        per = self._data.batch // self._data.group
        return [written.kept[i * per : (i + 1) * per] for i in range(self._data.minibatches)]


class HeldOut:
    """Held-out items of a task, each answered once by the policy."""

    def __init__(self, prompts: Prompts, items: int | None):
        self.fingerprint = prompts.fingerprint
        chosen = sorted(prompts.ids)[:items]
        self._asked = [Asked(item, 0, prompts.ids[item], item % 2**32) for item in chosen]

    def measure(self, policy: Policy, stopped: Callable[[], bool]) -> dict[str, float] | None:
        """Figures of the replies, by name; "validation_loss" is 1 less the mean outcome. None: stopped."""
        if (scored := policy.rounds.writer.write(policy, self._asked, stopped)) is None:
            return None
        figures = Round([[one] for one in scored], [], 0, policy.step, 0.0).figures()
        names = "reward", "outcome", "reply_tokens", "finished"
        return {"validation_loss": 1 - figures["outcome"], **{f"validation_{name}": figures[name] for name in names}}


def mismatch(batches: Sequence[Episodes], prepared: Sequence[Batch]) -> dict[str, float]:
    """Difference of log-probabilities between the sampler and the trainer, over the tokens of a round: 95th percentile
    and maximum of the absolute values, and the share of tokens whose ratio of probabilities is more than 0.2 from 1.
    Empty if the objective does not compute them."""
    found = []
    for batch, ready in zip(batches, prepared, strict=True):
        if (old := getattr(ready, "old_logprobs", None)) is not None:
            found.append((fetch(old) - batch.logprobs)[np.asarray(batch.weights) > 0])
    if not found or not (difference := np.concatenate(found)).size:
        return {}
    size, ratio = np.abs(difference), np.exp(np.clip(difference, -20, 20))
    return {
        "mismatch_p95": float(np.quantile(size, 0.95)),
        "mismatch_max": float(size.max()),
        "mismatch_outside": float(np.mean(np.abs(ratio - 1) > OUTSIDE)),
    }


def _batch(data: Rollouts, groups: Sequence[Sequence[Scored]], step: int) -> Episodes:
    """Replies of these groups as a batch; sequences that are left over are padding."""
    batch = data.empty(data.batch)
    rows = ((number, scored) for number, group in enumerate(groups) for scored in group)
    for row, (number, scored) in enumerate(rows):
        episode = scored.episode
        ids = np.asarray([*episode.asked.prompt, *episode.ids], np.int32)
        size, start = len(ids) - 1, len(episode.asked.prompt) - 1
        batch.tokens[row, :size], batch.targets[row, :size] = ids[:-1], ids[1:]
        batch.segments[row, :size], batch.positions[row, :size] = 1, np.arange(size)
        batch.weights[row, start:size] = episode.drawn
        batch.logprobs[row, start:size] = episode.logprobs
        batch.versions[row, start:size] = np.where(episode.drawn, step, -1)
        batch.rewards[row], batch.finished[row], batch.groups[row] = scored.score.value, episode.finished, number
    return batch


def _calls(replies: Sequence[Scored]) -> dict[str, float]:
    """Mean numbers of calls of tools and of those that failed; empty if there were no calls."""
    calls = float(np.mean([scored.episode.calls for scored in replies]))
    errors = float(np.mean([scored.episode.errors for scored in replies]))
    return {"tool_calls": calls, "tool_errors": errors} if calls else {}
