"""Log-likelihoods of continuations, given contexts: what perplexity, multiple choice and lm-eval's figures are made of.

    score(config, params, [Continuation((1, 306), (8, 9)), Continuation((1, 306), (5,))])
    -> [Likelihood(logprob=-3.2, greedy=False, tokens=2), ...]

A context that several continuations share is read once, into a cache that their rows start from; one without company is
read together with its continuation. Rows of similar sizes form batches of a few shapes, chosen to minimise padding.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.distributed.sharding import DEFAULT_RULES, ShardingRules, fetch, on_mesh_of, reshard
from gptjax.kernels.cross_entropy import cross_entropy
from gptjax.nn import Cache, make_cache
from gptjax.objectives.parts import deferred_logits, per_token
from gptjax.protocols import ModelConfig, Module, Tokenizer
from gptjax.types import Array, Params, UserError

TOKENS = 4_096
"""Tokens of a batch, those in the cache included."""
ROWS = 64
"""Maximum number of rows of a batch."""
SHAPE_COST = 4_096
"""Tokens that cost as much as one more shape: its compilation, and a last batch that is not full."""


class Continuation(NamedTuple):
    """Token ids whose likelihood is asked for, after those of their context. Neither is empty."""

    context: tuple[int, ...]
    ids: tuple[int, ...]


class Likelihood(NamedTuple):
    """Likelihood of a continuation under a model."""

    logprob: float
    """Log-probability of all its tokens, in nats."""
    greedy: bool
    """True: each token is the most likely one, so that greedy decoding writes the continuation."""
    tokens: int
    """Number of its tokens."""


def score(
    config: ModelConfig,
    params: Params,
    requests: Sequence[Continuation],
    rules: ShardingRules = DEFAULT_RULES,
    batch: int = TOKENS,
) -> list[Likelihood]:
    """Likelihood of each continuation, on the mesh of the parameters; the softmax is computed in float32.

    batch  tokens of a batch, a multiple of the mesh's data shards after rounding; changes speed and memory only

    Raises UserError for ids that are not the model's, and for a request that is longer than its positions: cut it with
    `cut`."""
    _check(config, requests)
    found = np.zeros((len(requests), 2))
    with on_mesh_of(params):
        shards = rules.num_shards("batch", dict(jax.sharding.get_mesh().shape))
        plans = _plans(requests, batch, shards)
        # All batches are enqueued before the first result is fetched: the devices never wait for the host.
        running = [(plan, _run(config.build(rules.for_batch_size(plan.rows)), params, plan)) for plan in plans]
        for plan, values in running:
            numbers = [row.request for group in plan.groups for row in group.rows]
            found[numbers] = fetch(values)[: len(numbers)]
    return [
        Likelihood(float(logprob), bool(greedy), len(request.ids))
        for (logprob, greedy), request in zip(found, requests, strict=True)
    ]


def encode(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Continuation]:
    """Token ids of (context, continuation), divided as lm-eval does: spaces at the end of a context go to the
    continuation, both are encoded as one text, and the continuation is what follows as many tokens as the context has
    alone. `bos` comes first, once; before a continuation without a context it is `eos` if the tokenizer has no `bos`.
    """
    moved = [(context[: (n := len(context.rstrip()))], context[n:] + text) for context, text in pairs]
    contexts = list(dict.fromkeys(context for context, _ in moved))
    ids = dict(zip(contexts, tokenizer.encode_batch(contexts), strict=True))
    wholes = tokenizer.encode_batch([context + text for context, text in moved])
    first = [tokenizer.bos] if tokenizer.bos is not None else []
    found = []
    for (context, text), whole in zip(moved, wholes, strict=True):
        head = first + ids[context] or [tokenizer.eos]
        if head[0] is None:
            raise UserError("tokenizer: got one without bos and eos, must have one to score a text without a context")
        if len(whole) <= len(ids[context]):
            raise UserError(f"continuation: got {text!r} after {context[-40:]!r}, must add at least one token")
        found.append(Continuation(tuple(cast(list[int], head)), tuple(whole[len(ids[context]) :])))
    return found


def cut(request: Continuation, length: int) -> Continuation:
    """The request without the first tokens of its context, so that the model reads at most `length` tokens; the last of
    the continuation is not read. Raises UserError if the continuation alone is longer."""
    if len(request.ids) > length:
        raise UserError(
            f"continuation: got {len(request.ids)} tokens, must be at most {length}, the model's context length"
        )
    return Continuation(request.context[-(length + 1 - len(request.ids)) :], request.ids)


def _check(config: ModelConfig, requests: Sequence[Continuation]) -> None:
    limit = config.max_positions
    for context, ids in requests:
        if not context or not ids:
            raise UserError("continuation: got no token in it or before it, must have at least one of each")
        if limit is not None and len(context) + len(ids) - 1 > limit:
            raise UserError(
                f"continuation: got {len(ids)} tokens after {len(context)}, must be at most {limit + 1} in all, "
                "for the positions of this model"
            )
        low, high = min(min(context), min(ids)), max(max(context), max(ids))
        if not 0 <= low <= high < config.vocab:
            raise UserError(f"continuation: got ids {low} to {high}, must be 0 to {config.vocab - 1} for this model")


class _Row(NamedTuple):
    """A request without the tokens that are cached."""

    request: int
    """Number of the request."""
    ids: tuple[int, ...]
    """Last token of the context or more, and the continuation."""
    new: int
    """Number of tokens of the continuation."""


class _Group(NamedTuple):
    """Rows that start from the same cached tokens."""

    prefix: tuple[int, ...]
    """Tokens to cache. Empty: none."""
    rows: list[_Row]

    @property
    def length(self) -> int:
        """Tokens that the longest row reads."""
        return max(len(row.ids) for row in self.rows) - 1


class _Plan(NamedTuple):
    """A batch: groups and its shape, padding included."""

    groups: list[_Group]
    contexts: int
    """C, number of prefixes."""
    rows: int
    """N, number of rows."""
    cached: int
    """S, tokens of a prefix. 0: none."""
    length: int
    """T, tokens of a row."""


def _groups(requests: Sequence[Continuation]) -> Iterator[_Group]:
    """Requests by context. The last token of a context begins each row: it predicts the first token after it."""
    by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, request in enumerate(requests):
        by_context[request.context].append(i)
    for context, members in by_context.items():
        prefix = len(context) - 1
        longest = max(len(requests[i].ids) for i in members)
        # A prefix alone pays where most of a row is context, because its logits are not computed.
        shared = prefix >= 16 and (len(members) > 1 or prefix >= 2 * longest)
        start = prefix if shared else 0
        rows = [_Row(i, (context + requests[i].ids)[start:], len(requests[i].ids)) for i in members]
        if shared:
            yield _Group(context[:start], rows)
        else:
            yield from (_Group((), [row]) for row in rows)


def _plans(requests: Sequence[Continuation], batch: int, shards: int) -> Iterator[_Plan]:
    """Batches of all requests, those of one shape one after the other."""
    for S, members in _by_size(list(_groups(requests)), lambda group: len(group.prefix), 8):
        for T, alike in _by_size(members, lambda group: group.length, 4):
            yield from _batches(alike, S, T, batch, shards)


def _by_size(
    groups: Sequence[_Group], length: Callable[[_Group], int], step: int
) -> Iterator[tuple[int, list[_Group]]]:
    """(size, groups that are padded to it): sizes are multiples of `step` that minimise the sum of the padded lengths
    of all rows, and of `SHAPE_COST` for each size."""
    by_length: dict[int, list[_Group]] = defaultdict(list)
    for group in groups:
        by_length[-(-length(group) // step) * step].append(group)
    lengths = sorted(by_length)
    rows = np.cumsum([0, *(sum(len(group.rows) for group in by_length[n]) for n in lengths)])
    best: list[tuple[float, list[int]]] = [(0.0, [])]  # of the first k lengths: (cost, ends of the sizes)
    for k, size in enumerate(lengths, 1):
        costs = ((best[j][0] + SHAPE_COST + size * int(rows[k] - rows[j]), j) for j in range(k))
        cost, j = min(costs)
        best.append((cost, [*best[j][1], k]))
    start = 0
    for end in best[-1][1]:
        yield lengths[end - 1], [group for n in lengths[start:end] for group in by_length[n]]
        start = end


def _batches(groups: Sequence[_Group], S: int, T: int, batch: int, shards: int) -> Iterator[_Plan]:
    """Batches of N rows of size T after C prefixes of size S, all of one shape."""
    total = sum(len(group.rows) for group in groups)
    N = max(min(batch // (S + T), ROWS, total), *(len(group.rows) for group in groups), 1)
    N = -(-N // shards) * shards
    C = -(-math.ceil(N * len(groups) / total) // shards) * shards if S else N
    held: list[_Group] = []
    for group in groups:
        if held and (len(held) == C or sum(len(g.rows) for g in held) + len(group.rows) > N):
            yield _Plan(held, C, N, S, T)
            held = []
        held.append(group)
    yield _Plan(held, C, N, S, T)


def _run(model: Module, params: Params, plan: _Plan) -> Array:
    """float32 [N, 2]: log-probability of each row's continuation, and 1 where it is greedy."""
    tokens, targets = np.zeros((2, plan.rows, plan.length), np.int32)
    new = np.zeros((plan.rows, plan.length), bool)
    owner = np.zeros(plan.rows, np.int32)
    prefix, present = np.zeros((2, plan.contexts, plan.cached), np.int32)
    rows = ((c, row) for c, group in enumerate(plan.groups) for row in group.rows)
    for i, (c, row) in enumerate(rows):
        n = len(row.ids) - 1
        tokens[i, :n], targets[i, :n] = row.ids[:-1], row.ids[1:]
        new[i, n - row.new : n], owner[i] = True, c
    if not plan.cached:
        return _score(model, params, (tokens, targets, new))
    for c, group in enumerate(plan.groups):
        prefix[c, : len(group.prefix)], present[c, : len(group.prefix)] = group.prefix, 1
    return _score(model, params, (tokens, targets, new), (prefix, present, owner))


@functools.partial(jax.jit, static_argnums=0)
def _score(
    model: Module,
    params: Params,
    rows: tuple[np.ndarray, np.ndarray, np.ndarray],
    prefixes: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
) -> Array:
    """`_run` of rows: tokens int32 [N, T], targets int32 [N, T], bool [N, T], True for those of the continuation;
    prefixes: tokens and segments int32 [C, S], and the number of each row's prefix int32 [N]."""
    tokens, targets, new = (reshard(x, model.rules("batch", None)) for x in rows)
    cache = None if prefixes is None else _read(model, params, *prefixes, tokens.shape[1])
    (logits, _), shown = model.apply({"params": params}, tokens, cache=cache, mutable=["deferred_logits"])
    nll, greedy = per_token(_of_tokens, {"next": logits, **deferred_logits(shown)}["next"], targets)
    values = jnp.stack([-jnp.sum(nll * new, -1), jnp.all((greedy > 0) | ~new, -1).astype(jnp.float32)], -1)
    return reshard(values, model.rules(None, None))


def _of_tokens(logits: Array, targets: Array) -> tuple[Array, Array]:
    """-log p of each target, and 1 where it is the most probable token, the first of equal ones."""
    logits = logits.astype(jnp.float32)
    nll, _ = cross_entropy(logits, targets)
    # jax refuses argmax along a sharded vocabulary
    ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    top = jnp.min(jnp.where(logits == logits.max(-1, keepdims=True), ids, logits.shape[-1]), -1)
    return nll, (top == targets).astype(jnp.float32)


def _read(
    model: Module, params: Params, prefix: np.ndarray, present: np.ndarray, owner: np.ndarray, room: int
) -> Cache:
    """Cache of each row's prefix, with room for `room` more tokens."""
    (C, S), N = prefix.shape, len(owner)
    rules = model.rules.for_batch_size(C)
    inputs = [reshard(x, rules("batch", None)) for x in (prefix, present)]
    cache = make_cache(model.config, C, S + room, rules)
    # These logits are unused, so the compiler drops the head, the largest matrix product.
    _, cache = model.clone(rules=rules).apply({"params": params}, inputs[0], None, inputs[1], cache)

    def rows(x: Array, target: Array) -> Array:
        no_mesh = jax.sharding.get_abstract_mesh().empty
        return x.at[owner].get(out_sharding=None if no_mesh else jax.typeof(target).sharding.spec)

    return jax.tree.map(rows, cache, make_cache(model.config, N, S + room, model.rules))
