"""The engine's device: a model, rows and pages there, and the calls that change them.

Calls return before they are done. Each takes what the last one leaves, so they run in order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.distributed.sharding import on_mesh_of
from gptjax.inference.engine import programs
from gptjax.inference.engine.adapters import Adapter, attach
from gptjax.inference.engine.drawn import Drawn
from gptjax.inference.engine.request import Request
from gptjax.inference.engine.speculation import Draft
from gptjax.inference.sampling import SamplingRows
from gptjax.kernels.attention.spec import PairedPages
from gptjax.nn import BackboneConfig
from gptjax.protocols import Module
from gptjax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A part of a prompt to read at a time."""

    tokens: Sequence[int]
    """At most `Device.chunk`."""
    start: int
    """Position of the first, a multiple of it."""
    pages: Sequence[int]
    """Pages of the text."""
    adapter: int
    """Number of its adapter, or 0."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A row's part in a call of `decode`."""

    row: int
    pages: Sequence[int]
    """Pages of the text."""
    limit: int
    """Number of tokens in the cache after the call."""
    replay: Sequence[int]
    """Tokens to take in place of the first ones drawn."""
    allowed: np.ndarray | None = None
    """Tokens of which to draw, as `token_set` has them. None: all."""


class Device:
    """`rows` rows and `pages` pages of `page` tokens; a text has at most `width` pages.

    vocab     tokens from this one on are never drawn
    draft     guesses tokens
    adapters  by name; their numbers are 1, 2, ... in this order
    """

    def __init__(
        self,
        model: Module,
        params: Params,
        rows: int,
        pages: int,
        page: int,
        width: int,
        vocab: int,
        draft: Draft | None = None,
        adapters: Mapping[str, Adapter] | None = None,
    ):
        # Rows are on all devices; heads, experts and the hidden sizes are sharded as the parameters are.
        model = model.clone(rules=dataclasses.replace(model.rules, batch=None, sequence=None))
        self.model, self.rows, self.pages, self.page, self.width, self.vocab = model, rows, pages, page, width, vocab
        # A chunk needs the states before it, so that those of a recurrent model come one after the other, each a page.
        sequential = cast(BackboneConfig, model.config).sequential or (draft is not None and draft.sequential)
        self.chunk, self.chunks = (page, 1) if sequential else (min(page, programs.CHUNK), programs.CHUNKS)
        """Maximum number of tokens of a `Chunk`, and of chunks per call of `programs.prefill`."""
        self._draft, self._adapters = draft, adapters or {}
        self.update(params)
        with on_mesh_of(params):
            # The last page is nobody's.
            self._state = programs.idle(self._models, rows, pages + 1, page, vocab, width * page)
            self._free = self._held(())
        self.guesses = 0 if draft is None else draft.tokens
        """Number of guesses at a time."""

    def update(self, params: Params) -> None:
        """Replace the model's parameters, in calls from now on."""
        self._mesh_of, draft = params, self._draft
        with on_mesh_of(params):
            own, guessing = attach(self.model.config, params, self._adapters), {} if draft is None else draft.weights
            self._models = programs.Models(self.model, own, draft, guessing)

    @property
    def attention(self) -> str:
        """Implementation of attention to the model's pages, of `kernels.attention.PAGED`; all, if layers differ."""
        return ", ".join(sorted({"ragged" if isinstance(x, PairedPages) else "paged" for x in self._state.layers}))

    def admit(self, row: int, request: Request, ends: Iterable[int], adapter: int) -> None:
        """Give a row to a text, of whose prompt all but the last token will be in its pages when it is decoded.

        ends     tokens that end the text
        adapter  number of its adapter, or 0"""
        prompt, bias = np.zeros(self.vocab, bool), np.zeros(self.vocab, np.float32)
        known, history = np.asarray(request.prompt), np.full(self._state.history.shape[1], -1, np.int32)
        history[: len(known)] = known[: len(history)]
        prompt[known[known < self.vocab]] = True
        for token, value in request.bias.items():
            bias[token] = value
        with on_mesh_of(self._mesh_of):
            self._state = programs.admit(
                self._state,
                np.int32(row),
                np.int32(request.prompt[-1]),
                np.int32(len(request.prompt) - 1),
                np.uint32(request.seed),
                np.uint32(request.choice),
                SamplingRows.of([request.sampling]),
                prompt,
                bias,
                np.bool_(request.alternatives > 0),
                token_set(ends, self.vocab),
                np.int32(len(request.prompt) - 1 + request.min_tokens),
                history,
                np.int32(adapter),
                np.float32(1 / request.sampling.temperature if request.tempered else 1),
            )

    def read(self, chunks: Sequence[Chunk]) -> None:
        """Read chunks of prompts, in this order."""
        for i in range(0, len(chunks), self.chunks):
            with on_mesh_of(self._mesh_of):
                placed = self._chunks(chunks[i : i + self.chunks], self.chunks)
                self._state = programs.prefill(self._models, self._state, placed)

    def copy(self, pages: Sequence[tuple[int, int]]) -> None:
        """Copy pages, each to the one beside it: at most one for each row."""
        padded = np.full((self.rows, 2), self.pages, np.int32)
        padded[: len(pages)] = np.reshape(pages, (-1, 2))
        with on_mesh_of(self._mesh_of):
            self._state = programs.copy(self._state, padded, np.int32(len(pages)))

    def score(self, chunks: Sequence[Chunk], following: Sequence[int], compare: bool) -> Drawn:
        """As `read`, of at most a page of one prompt, with the log-probabilities of the tokens that follow each, and
        the most likely ones if `compare`. The result is on its way to the host."""
        padded = np.full(self.page, -1, np.int32)
        padded[: len(following)] = following
        with on_mesh_of(self._mesh_of):
            placed = self._chunks(chunks, self.page // self.chunk)
            self._state, drawn = programs.score(self._models, self._state, placed, padded, np.bool_(compare))
        jax.tree.map(lambda x: x.copy_to_host_async(), drawn)
        return drawn

    def decode(self, tasks: Sequence[Task], steps: int) -> Drawn:
        """Decode up to `steps` tokens of these rows, and their guesses. The result is on its way to the host."""
        table: list[Sequence[int]] = [()] * self.rows
        most = programs.STEPS * (1 + self.guesses)
        limit, replayed = np.zeros(self.rows, np.int32), np.full((self.rows, most), -1, np.int32)
        for task in tasks:
            table[task.row], limit[task.row] = task.pages, task.limit
            replayed[task.row, : len(task.replay)] = task.replay
        with on_mesh_of(self._mesh_of):
            held = self._held(tasks) if any(task.allowed is not None for task in tasks) else self._free
            arguments = self._table(table), limit, replayed, *held, np.int32(steps)
            self._state, drawn = programs.decode(self._models, self._state, *arguments)
        jax.tree.map(lambda x: x.copy_to_host_async(), drawn)
        return drawn

    def _held(self, tasks: Sequence[Task]) -> tuple[Array, Array]:
        """Sets of the tokens that rows draw of, and which rows do."""
        allowed, held = np.zeros((self.rows, -(-self.vocab // 32)), np.uint32), np.zeros(self.rows, bool)
        for task in tasks:
            if task.allowed is not None:
                allowed[task.row], held[task.row] = task.allowed, True
        return jnp.asarray(allowed), jnp.asarray(held)

    def _chunks(self, chunks: Sequence[Chunk], count: int) -> programs.Chunks:
        """So many chunks, the last of them empty if there are fewer."""
        tokens, start, adapter = np.full((count, self.chunk), -1, np.int32), *np.zeros((2, count), np.int32)
        for i, chunk in enumerate(chunks):
            tokens[i, : len(chunk.tokens)], start[i], adapter[i] = chunk.tokens, chunk.start, chunk.adapter
        missing: list[Sequence[int]] = [()] * (count - len(chunks))
        return programs.Chunks(tokens, start, self._table([*(chunk.pages for chunk in chunks), *missing]), adapter)

    def _table(self, pages: Sequence[Sequence[int]]) -> np.ndarray:
        """int32 [len(pages), M]; beyond a text's pages is the one that is nobody's."""
        table = np.full((len(pages), self.width), self.pages, np.int32)
        for line, own in zip(table, pages, strict=True):
            line[: len(own)] = own
        return table


def token_set(tokens: Iterable[int], vocab: int) -> np.ndarray:
    """A set of tokens, those below `vocab`: token i is bit i % 32 of word i // 32, uint32 [ceil(vocab / 32)]."""
    found = np.zeros(-(-vocab // 32), np.uint32)
    for token in tokens:
        if token < vocab:
            found[token // 32] |= np.uint32(1 << token % 32)
    return found
