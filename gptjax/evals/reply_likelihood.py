"""Likelihood of held-out replies after their own conversation, and after others: what a dialogue model has learned.

    ReplyLikelihood(data.ChatJsonl("dialogues.jsonl"))(language_model).values["perplexity_per_token"]

A reply's perplexity falls too when a model has only learned what replies look like. So each reply is also scored after
conversations that belong to other replies: the difference comes from reading the conversation. The reply stays the
same, so no normalisation for length is needed.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from gptjax.data import chat
from gptjax.data.chat import Conversation
from gptjax.data.encoding import held_out
from gptjax.evals import intervals
from gptjax.evals.bits_per_byte import interval
from gptjax.evals.likelihood import Continuation, cut, score
from gptjax.protocols import Evaluation, Source, Split, Tokenizer
from gptjax.types import Result, UserError


@dataclasses.dataclass(frozen=True)
class ReplyLikelihood(Evaluation):
    """Perplexity of the assistant's messages in held-out conversations, and the share of them that are likelier after
    their own conversation than after others: `ReplyLikelihood(source)(language_model) -> Result`.

    Intervals count conversations."""

    source: Source[Conversation]
    """Source of the conversations: `data.ChatJsonl`, `tasks.TaskConversations`."""
    split: Split = "validation"
    """Split to evaluate on."""
    documents: int | None = None
    """Number of conversations, the first of the split. None: all."""
    others: int = 3
    """Number of other conversations that each reply is scored after. Chance is 1 / (others + 1)."""
    seed: int = 0
    """Random seed of the choice of other conversations."""
    title: str = "Replies"
    """Title in reports, where an experiment has several of them."""

    def __post_init__(self) -> None:
        if self.others < 1:
            raise UserError(f"others: got {self.others}, must be at least 1")

    def check(self, tokenizer: Tokenizer) -> None:
        (first,) = held_out(self.source, self.split, 1, tuple)
        chat.render(first, tokenizer)

    def __call__(self, model: Any) -> Result:
        conversations = held_out(self.source, self.split, self.documents, tuple)
        turns = [(c, i) for c, messages in enumerate(conversations) for i, m in enumerate(messages) if m.target]
        if len({c for c, _ in turns}) <= self.others:
            raise UserError(
                f"others: got {self.others}, must be below {len(conversations)}, the held-out conversations"
            )
        contexts = [tuple(model.encode_chat(conversations[c][:i])) for c, i in turns]
        wholes = [conversations[c][: i + 1] for c, i in turns]
        replies = [_reply(model, *pair) for pair in zip(contexts, wholes, strict=True)]
        drawn = self._draw([c for c, _ in turns])
        requests = [
            cut(Continuation(contexts[j], reply), model.max_length or sys.maxsize)
            for row, reply in zip(drawn, replies, strict=True)
            for j in row
        ]
        scored = score(model.config, model.params, requests, model.rules)
        nats = -np.array([each.logprob for each in scored]).reshape(drawn.shape)
        return self._result(nats, [len(reply) for reply in replies], [c for c, _ in turns], conversations, turns)

    def _draw(self, clusters: Sequence[int]) -> np.ndarray:
        """Turns whose contexts each reply is scored after, the own one first: int [replies, 1 + others]."""
        rows, each = [], np.array(clusters)
        for turn, own in enumerate(clusters):
            foreign = np.flatnonzero(each != own)
            chosen = np.random.default_rng([self.seed, turn]).choice(foreign, self.others, replace=False)
            rows.append([turn, *chosen])
        return np.array(rows)

    def _result(
        self,
        nats: np.ndarray,
        tokens: Sequence[int],
        clusters: Sequence[int],
        conversations: Sequence[Conversation],
        turns: Sequence[tuple[int, int]],
    ) -> Result:
        own, other = nats[:, 0], nats[:, 1:].mean(1)
        first = intervals.mean((nats[:, 0] < nats[:, 1:].min(1)).astype(float), clusters)
        count, sums, gains = (np.bincount(clusters, x) for x in (tokens, own, other - own))
        count, sums, gains = (x[count > 0] for x in (count, sums, gains))  # conversations with a reply
        total = int(count.sum())
        values = {
            "perplexity_per_token": math.exp(own.sum() / total),
            "perplexity_after_others": math.exp(other.sum() / total),
            "nats_gained": float((other - own).sum() / total),
            "own_first": first.mean,
            "own_first_low": first.low,
            "own_first_high": first.high,
        }
        for name, x in (("perplexity_per_token", sums), ("nats_gained", gains)):
            low, high = interval(x.tolist(), count.tolist())
            if name == "perplexity_per_token":
                low, high = math.exp(low), math.exp(high)
            values |= {f"{name}_low": low, f"{name}_high": high}
        values |= {"chance": 1 / nats.shape[1], "replies": len(own), "conversations": len(count), "tokens": total}
        v = values
        markdown = (
            f"Perplexity of a reply's token after its own conversation **{v['perplexity_per_token']:.2f}** "
            f"[{v['perplexity_per_token_low']:.2f}, {v['perplexity_per_token_high']:.2f}], after others "
            f"{v['perplexity_after_others']:.2f}: reading gains {v['nats_gained']:.3f} "
            f"[{v['nats_gained_low']:.3f}, {v['nats_gained_high']:.3f}] nats a token. Likelier after its own than "
            f"after {self.others} others: **{first:.1%}**; chance is {v['chance']:.1%}."
        )
        items = tuple(
            {"item": n, "cluster": c, "reply": conversations[c][i].text, "tokens": tokens[n], "nats": nats[n].tolist()}
            for n, (c, i) in enumerate(turns)
        )
        return Result(self.title, values, markdown, items)


def _reply(model: Any, context: tuple[int, ...], messages: Conversation) -> tuple[int, ...]:
    """Token ids of the last message, its end included. Raises UserError if they do not follow its prompt."""
    if model.template is None:
        ids, _ = chat.render(messages, model.tokenizer)
    else:
        ids, _ = model.template.render(messages, model.tokenizer)
    if tuple(ids[: len(context)]) != context or len(ids) == len(context):
        raise UserError(
            "template: got one whose conversations do not begin as their prompts do; its replies cannot be scored"
        )
    return tuple(ids[len(context) :])
