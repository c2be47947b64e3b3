"""Best of n: of n replies to a prompt, the one with the highest reward.

    best_of(lm, [(Message("user", "Hi"),)], RewardModel("runs/reward"), n=8)[0].text
    evals.Generative(task, samples=8, sampling=Sampling(), chooser=RewardModel("runs/reward"))      # figures best@k

The chosen replies have another distribution than the model's: their divergence from it is at most ln n - (n - 1) / n,
and equals it where no two replies have the same reward and all are improbable (Beirami et al. 2024, arXiv:2401.01879).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gptjax.data.chat import Conversation, Message
from gptjax.evals.replies import Prompt, form_of, write
from gptjax.inference.sampling import Sampling
from gptjax.protocols import Reward
from gptjax.tasks.task import Generation
from gptjax.types import UserError


@dataclasses.dataclass(frozen=True)
class Best:
    """The chosen reply to a prompt."""

    text: str
    finished: bool
    """False: cut off at its maximum length."""
    reward: float
    rewards: tuple[float, ...]
    """Rewards of all replies, in the order of their samples."""


def choose(rewards: np.ndarray) -> np.ndarray:
    """Index of the highest reward along the last axis, the first of equal ones. Raises UserError for NaN."""
    if np.isnan(rewards).any():
        raise UserError("reward: got NaN, must be a number")
    return np.argmax(rewards, -1)


def kl_bound(n: int) -> float:
    """Upper bound of KL(best of n, model) in nats: ln n - (n - 1) / n."""
    return math.log(n) - (n - 1) / n


def expected_outcome(outcomes: Sequence[float], rewards: Sequence[float], k: int) -> float:
    """Mean outcome of the best of k replies over all choices of k out of those given: unbiased. Of replies with equal
    rewards each is as likely chosen."""
    total, seen, mean = math.comb(len(rewards), k), 0, 0.0
    for reward in sorted(set(rewards)):
        tied = [outcome for outcome, other in zip(outcomes, rewards, strict=True) if other == reward]
        highest = math.comb(seen + len(tied), k) - math.comb(seen, k)  # choices whose highest reward is this one
        mean += highest / total * sum(tied) / len(tied)
        seen += len(tied)
    return mean


def best_of(
    model: Any,
    prompts: Sequence[Conversation],
    reward: Reward,
    n: int = 8,
    max_tokens: int = 256,
    sampling: Sampling | None = None,
    seed: int = 0,
    rows: int = 16,
) -> list[Best]:
    """The best of n replies to each prompt, written by the model's engine.

    model     language model
    sampling  None: the model's probabilities as they are
    rows      replies that are written at a time

    Raises UserError for a greedy model, whose replies are all the same, and for a prompt that leaves no room."""
    sampling = sampling or Sampling()
    if n < 1:
        raise UserError(f"n: got {n}, must be at least 1")
    if n > 1 and sampling.greedy:
        raise UserError(f"n: got {n} at temperature 0, where all are the same; must be 1, or set a temperature")
    form, found = form_of(model), []
    for i, messages in enumerate(prompts):
        ids = model.encode_chat(messages) if form == "chat" else model.encode_prompt(messages[-1].text)
        found.append(Prompt(i, tuple(ids), messages))
    asked = [(prompt, sample) for prompt in found for sample in range(n)]
    generation = Generation(max_tokens, text_stop=())
    written = {(w.prompt.item, w.sample): w for w in write(model, asked, generation, sampling, form, seed, rows)}
    if long := [i for (i, _), w in written.items() if not w.fits]:
        raise UserError(f"prompts: got {len(found[long[0]].ids)} tokens in number {long[0]}, which leave no room")
    replies = [written[prompt.item, sample].reply for prompt, sample in asked]
    said = [(*p.messages, Message("assistant", r.text)) for (p, _), r in zip(asked, replies, strict=True)]
    rewards = np.asarray(reward(said), float).reshape(len(prompts), n)
    return [
        Best(replies[i * n + at].text, replies[i * n + at].finished, float(row[at]), tuple(row.tolist()))
        for i, (row, at) in enumerate(zip(rewards, choose(rewards), strict=True))
    ]
