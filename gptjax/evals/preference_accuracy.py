"""Accuracy of a model's likelihoods on pairs of replies, of which people chose one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from gptjax.config import digest
from gptjax.data.chat import ConversationTemplate, Message
from gptjax.data.encoding import DROPPED, held_out
from gptjax.data.preferences import Preference, first_message, rendered
from gptjax.evals import intervals
from gptjax.evals.likelihood import Continuation, Likelihood, score
from gptjax.protocols import Evaluation, Source, Split, Tokenizer
from gptjax.types import Result, UserError


@dataclasses.dataclass(frozen=True)
class PreferenceAccuracy(Evaluation):
    """Share of pairs whose chosen reply is more likely than the rejected one, summed over tokens and per token, beside
    the rule "the shorter reply", in characters. A tie counts half. Pairs whose first message is the same are a cluster.

        PreferenceAccuracy(data.PreferencesJsonl("pairs.jsonl"))(language_model) -> Result
    """

    source: Source[Preference]
    """Source of pairs: `data.PreferencesJsonl`."""
    split: Split = "validation"
    """Split to evaluate on."""
    pairs: int | None = None
    """Number of pairs, the first of the split. None: all."""
    length: int | None = None
    """Maximum tokens of a conversation; the oldest turns of longer prompts are left out. None: the model's context."""
    template: ConversationTemplate | None = None
    """Chat template. None: the model's own."""

    def check(self, tokenizer: Tokenizer) -> None:
        held_out(self.source, self.split, 1, Preference)

    def __call__(self, model: Any) -> Result:
        pairs = held_out(self.source, self.split, self.pairs, Preference)
        kept, likelihoods = pair_likelihoods(model, pairs, self.length, self.template)
        sides = [(a.logprob, b.logprob) for a, b in likelihoods]
        means = [(a.logprob / a.tokens, b.logprob / b.tokens) for a, b in likelihoods]
        sizes = [(-len(pair.chosen.text), -len(pair.rejected.text)) for pair in kept]
        right = {"accuracy": wins(sides), "accuracy_per_token": wins(means), "shorter": wins(sizes)}
        clusters = [digest(first_message(pair.prompt))[:12] for pair in kept]
        values: dict[str, float] = {}
        lines = ["| chosen by | accuracy, 95 % interval |", "|---|---|"]
        names = ("log-probability", "log-probability per token", "the shorter reply")
        for (name, outcomes), title in zip(right.items(), names, strict=True):
            interval = intervals.mean(outcomes, clusters)
            values |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
            lines.append(f"| {title} | {interval:.1%} |")
        lines.append("")
        for name, title in (("accuracy", "Log-probability"), ("accuracy_per_token", "Per token")):
            gap = intervals.difference(right[name], right["shorter"], clusters)
            values |= {f"{name}_over_shorter": gap.mean, f"{name}_over_shorter_p": gap.p}
            points = "{:+.1f} points [{:+.1f}, {:+.1f}]".format(*(100 * x for x in (gap.mean, gap.low, gap.high)))
            lines.append(f"{title} over the shorter reply: {points}, p = {gap.p:.2g}.")
        left_out = len(pairs) - len(kept)
        values |= {"pairs": len(kept), "left_out": left_out}
        lines += [f"{left_out} pairs were left out: a reply does not fit into the context."] if left_out else []
        items = tuple(
            {"item": i, "cluster": cluster, "outcome": a, "per_token": b, "shorter": c}
            for i, (cluster, a, b, c) in enumerate(zip(clusters, *right.values(), strict=True))
        )
        return Result("Preferences", values, "\n".join(lines), items)


def wins(pairs: Sequence[tuple[float, float]]) -> list[float]:
    """1 where the first is larger, 0 where the second is, 0.5 for a tie."""
    a, b = np.asarray(pairs, np.float64).T
    return (0.5 + 0.5 * np.sign(a - b)).tolist()


def pair_likelihoods(
    model: Any,
    pairs: Sequence[Preference],
    length: int | None = None,
    template: ConversationTemplate | None = None,
) -> tuple[list[Preference], list[tuple[Likelihood, Likelihood]]]:
    """The pairs whose replies fit into the context of a language model, and the likelihoods of their replies: of the
    targets that training has. Arguments as in `PreferenceAccuracy`. Raises UserError if no pair fits."""
    limit = min(x for x in (length, model.max_length, 1 << 30) if x is not None)
    template = template or model.template
    kept, requests = [], []
    for pair in pairs:
        sides = [_request(model, pair, reply, limit, template) for reply in (pair.chosen, pair.rejected)]
        if all(side is not None for side in sides):
            kept.append(pair)
            requests += sides
    if not kept:
        raise UserError(f"length: got {limit}, must be more: no pair has replies that fit")
    found = score(model.config, model.params, requests, model.rules)
    return kept, list(zip(found[::2], found[1::2], strict=True))


def _request(
    model: Any, pair: Preference, reply: Message, length: int, template: ConversationTemplate | None
) -> Continuation | None:
    ((ids, weights),), note = rendered(pair.prompt, (reply,), length, model.tokenizer, template)
    if note == DROPPED:
        return None
    at = np.flatnonzero(weights)
    if not at.size or not at[0]:
        raise UserError("template: got a conversation without a prompt or a reply, must have both")
    return Continuation(tuple(ids[: at[0]]), tuple(ids[at[0] : at[-1] + 1]))
