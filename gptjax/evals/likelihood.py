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
ROWS_COST = 2_048
"""The same, of rows of one more size after the same prefixes."""


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
        running = []
        for plan in plans:
            model, rows = config.build(rules.for_batch_size(plan.shape.rows[0][0])), plan.rows()
            running.append((rows, _run(model, params, plan, rows)))
        for rows, values in running:
            for of_size, each in zip(rows, values, strict=True):
                found[[row.request for _, row in of_size]] = fetch(each)[: len(of_size)]
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

    @property
    def length(self) -> int:
        """Number of tokens to read: the last is not."""
        return len(self.ids) - 1


class _Group(NamedTuple):
    """Rows that start from the same cached tokens."""

    prefix: tuple[int, ...]
    """Tokens to cache. Empty: none."""
    rows: list[_Row]


class _Shape(NamedTuple):
    """Shape of a batch, padding included."""

    contexts: int
    """C, number of prefixes."""
    cached: int
    """S, tokens of a prefix. 0: none."""
    rows: tuple[tuple[int, int], ...]
    """(N, T), number of rows and their tokens, for each size T of rows, the smallest first."""


class _Plan(NamedTuple):
    """A batch."""

    shape: _Shape
    groups: list[_Group]

    def rows(self) -> list[list[tuple[int, _Row]]]:
        """(number of its prefix, row) of those of each size. Rows for which there is no room go to the next size."""
        found: list[list[tuple[int, _Row]]] = [[] for _ in self.shape.rows]
        rows = [(c, row) for c, group in enumerate(self.groups) for row in group.rows]
        for c, row in sorted(rows, key=lambda each: -each[1].length):
            fits = (k for k, (N, T) in enumerate(self.shape.rows) if row.length <= T and len(found[k]) < N)
            found[next(fits)].append((c, row))
        return found


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
    for S, members in _by_size(list(_groups(requests)), lambda group: len(group.prefix), 8, SHAPE_COST):
        rows = [_Group(group.prefix, [row]) for group in members for row in group.rows]
        sizes = _by_size(rows, lambda group: group.rows[0].length, 4, ROWS_COST if S else SHAPE_COST)
        if S:
            yield from _batches(members, S, [T for T, _ in sizes], batch, shards)
        else:
            for T, alike in sizes:
                yield from _batches(alike, S, [T], batch, shards)


def _by_size(
    groups: Sequence[_Group], length: Callable[[_Group], int], step: int, price: int
) -> Iterator[tuple[int, list[_Group]]]:
    """(size, groups that are padded to it): sizes are multiples of `step` that minimise the sum of the padded lengths
    of all rows, and of the price of each size."""
    by_length: dict[int, list[_Group]] = defaultdict(list)
    for group in groups:
        by_length[-(-length(group) // step) * step].append(group)
    lengths = sorted(by_length)
    rows = np.cumsum([0, *(sum(len(group.rows) for group in by_length[n]) for n in lengths)])
    best: list[tuple[float, list[int]]] = [(0.0, [])]  # of the first k lengths: (cost, ends of the sizes)
    for k, size in enumerate(lengths, 1):
        costs = ((best[j][0] + price + size * int(rows[k] - rows[j]), j) for j in range(k))
        cost, j = min(costs)
        best.append((cost, [*best[j][1], k]))
    start = 0
    for end in best[-1][1]:
        yield lengths[end - 1], [group for n in lengths[start:end] for group in by_length[n]]
        start = end


def _batches(groups: Sequence[_Group], S: int, sizes: Sequence[int], batch: int, shards: int) -> Iterator[_Plan]:
    """Batches of N rows of each of the sizes T after C prefixes of size S, all of one shape."""
    of_row = np.searchsorted(sizes, [row.length for group in groups for row in group.rows])  # number of each row's size
    owner = np.repeat(np.arange(len(groups)), [len(group.rows) for group in groups])
    counts = np.zeros((len(groups), len(sizes)), int)
    np.add.at(counts, (owner, of_row), 1)
    of_size, total = counts.sum(0), int(counts.sum())
    N = max(min(int(batch // (S + of_size @ sizes / total)), ROWS, total), int(counts.sum(1).max()), 1)
    share = of_size / total
    spread = np.sqrt(N * share * (1 - share))  # with room for half of it, fewer batches end before they are full
    room = np.maximum(np.ceil(N * share + spread / 2).astype(int), counts.max(0))
    room = -(-room // shards) * shards
    C = -(-math.ceil(N * len(groups) / total) // shards) * shards if S else int(room[0])
    shape = _Shape(C, S, tuple(zip(room.tolist(), sizes, strict=True)))
    held: list[_Group] = []
    used = np.zeros_like(room)
    for group, count in zip(groups, counts, strict=True):
        # rows of this size and longer ones, for whom there must be room
        if held and (len(held) == C or (np.cumsum((used + count - room)[::-1]) > 0).any()):
            yield _Plan(shape, held)
            held, used = [], np.zeros_like(room)
        held.append(group)
        used = used + count
    yield _Plan(shape, held)


def _run(model: Module, params: Params, plan: _Plan, rows: list[list[tuple[int, _Row]]]) -> list[Array]:
    """float32 [N, 2] for each size of rows, `plan.rows()`: log-probability of each continuation, and 1 where it is
    greedy."""
    shape, batches = plan.shape, []
    for (N, T), of_size in zip(shape.rows, rows, strict=True):
        tokens, targets = np.zeros((2, N, T), np.int32)
        new, owner = np.zeros((N, T), bool), np.zeros(N, np.int32)
        for i, (c, row) in enumerate(of_size):
            n = row.length
            tokens[i, :n], targets[i, :n] = row.ids[:-1], row.ids[1:]
            new[i, n - row.new : n], owner[i] = True, c
        batches.append((tokens, targets, new, owner))
    if not shape.cached:
        return _score(model, params, batches)
    prefix, present = np.zeros((2, shape.contexts, shape.cached), np.int32)
    for c, group in enumerate(plan.groups):
        prefix[c, : len(group.prefix)], present[c, : len(group.prefix)] = group.prefix, 1
    return _score(model, params, batches, (prefix, present))


@functools.partial(jax.jit, static_argnums=0)
def _score(
    model: Module,
    params: Params,
    batches: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]],
    prefixes: tuple[np.ndarray, np.ndarray] | None = None,
) -> list[Array]:
    """`_run` of rows of each size: tokens int32 [N, T], targets int32 [N, T], bool [N, T], True for those of the
    continuation, and the number of each row's prefix int32 [N]; prefixes: tokens and segments int32 [C, S]."""
    room = max(tokens.shape[1] for tokens, *_ in batches)
    cached = None if prefixes is None else _read(model, params, *prefixes, room)
    found = []
    for *rows, owner in batches:
        tokens, targets, new = (reshard(x, model.rules("batch", None)) for x in rows)
        cache = None if cached is None else _of_rows(model, cached, owner)
        (logits, _), shown = model.apply({"params": params}, tokens, cache=cache, mutable=["deferred_logits"])
        nll, greedy = per_token(_of_tokens, {"next": logits, **deferred_logits(shown)}["next"], targets)
        values = jnp.stack([-jnp.sum(nll * new, -1), jnp.all((greedy > 0) | ~new, -1).astype(jnp.float32)], -1)
        found.append(reshard(values, model.rules(None, None)))
    return found


def _of_tokens(logits: Array, targets: Array) -> tuple[Array, Array]:
    """-log p of each target, and 1 where it is the most probable token, the first of equal ones."""
    logits = logits.astype(jnp.float32)
    nll, _ = cross_entropy(logits, targets)
    # jax refuses argmax along a sharded vocabulary
    ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    top = jnp.min(jnp.where(logits == logits.max(-1, keepdims=True), ids, logits.shape[-1]), -1)
    return nll, (top == targets).astype(jnp.float32)


def _read(model: Module, params: Params, prefix: np.ndarray, present: np.ndarray, room: int) -> Cache:
    """Cache of the prefixes, with room for `room` more tokens."""
    C, S = prefix.shape
    rules = model.rules.for_batch_size(C)
    inputs = [reshard(x, rules("batch", None)) for x in (prefix, present)]
    cache = make_cache(model.config, C, S + room, rules)
    # These logits are unused, so the compiler drops the head, the largest matrix product.
    _, cache = model.clone(rules=rules).apply({"params": params}, inputs[0], None, inputs[1], cache)
    return cache


def _of_rows(model: Module, cache: Cache, owner: np.ndarray) -> Cache:
    """Cache of each row's prefix."""

    def rows(x: Array, target: Array) -> Array:
        no_mesh = jax.sharding.get_abstract_mesh().empty
        return x.at[owner].get(out_sharding=None if no_mesh else jax.typeof(target).sharding.spec)

    return jax.tree.map(rows, cache, make_cache(model.config, len(owner), cache.size, model.rules))
