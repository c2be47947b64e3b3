"""An engine that writes many texts at a time: requests join and leave a running loop (Yu et al. 2022, Orca).

    engine = Engine(model, params, tokenizer, rows=8)
    texts = [engine.submit(Request(tuple(tokenizer.encode(prompt)))) for prompt in prompts]
    engine.run()                                            # or `start` it in a thread of its own
    [text.text for text in texts]

A text has the bits that it would have alone. Its prompt is read in chunks, at the same places of the same program
whoever else is there; pages that an earlier prompt left are those that it would have written; its draws depend
on its seed and the position. A text that has to give up its pages is read again, and its own tokens are decoded again.

A round reads some chunks of prompts and decodes a few tokens of every row. The next round is under way before the
last one's tokens are looked at.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from gptjax.data.tokenizers import Tokenizer
from gptjax.inference.constraints import Compiler, Constraint, Grammar
from gptjax.inference.engine import programs
from gptjax.inference.engine.adapters import Adapter
from gptjax.inference.engine.device import Device, Task
from gptjax.inference.engine.pages import Pages
from gptjax.inference.engine.prefill import prefill
from gptjax.inference.engine.queue import FairQueue
from gptjax.inference.engine.request import Busy, Generation, Request
from gptjax.inference.engine.running import Call, Running, tokens_of
from gptjax.inference.engine.speculation import Draft
from gptjax.types import Params, UserError

DISPATCH = 0.03
"""Seconds that a call of `decode` should take in a thread: text flows, and the device seldom waits for the host."""


class Engine:
    """Texts of one model. All methods may be called from any thread; `run`, or the thread of `start`, does the work.

    rows             number of texts at a time
    context          maximum number of tokens of a prompt and its text. None: the model's
    pages            number of pages of the pool. None: enough for all rows
    page             tokens per page, at most 16 or a multiple of it
    queue            maximum number of requests that wait
    stop_token_ids   tokens that end a text. None: all special tokens
    name             of the weights: prefixes are shared among texts of one name
    adapters         LoRA adapters by name, of which each request may choose one
    draft            guesses tokens, for speculative decoding: `NGram()`, `DraftModel` or `Heads`. None: no speculation

    Raises UserError for a model that cannot be served so. All processes of a job must call the same methods.
    """

    def __init__(
        self,
        model: Any,
        params: Params,
        tokenizer: Tokenizer,
        *,
        rows: int = 8,
        context: int | None = None,
        pages: int | None = None,
        page: int = 64,
        queue: int = 1_000,
        stop_token_ids: Sequence[int] | None = None,
        name: str = "",
        draft: Draft | None = None,
        adapters: Mapping[str, Adapter] | None = None,
    ):
        config = model.config
        for option, value in (("rows", rows), ("page", page), ("queue", queue), ("context", context)):
            if value is not None and value < 1:
                raise UserError(f"{option}: got {value}, must be at least 1")
        if page > programs.CHUNK and page % programs.CHUNK:
            raise UserError(f"page: got {page}, must be at most {programs.CHUNK} or a multiple of it")
        self.context = min(n for n in (context, config.max_positions, 1 << 30) if n is not None)
        if context is None and config.max_positions is None:
            raise UserError("context: got none, must be given for a model without a maximum number of positions")
        self.tokenizer, self.stop_token_ids = tokenizer, None if stop_token_ids is None else tuple(stop_token_ids)
        width = -(-self.context // page)  # pages of a text
        count = rows * width if pages is None else pages
        if count < width:
            raise UserError(f"pages: got {count}, must be at least {width}, for one text of {self.context} tokens")
        self.vocab = min(tokenizer.vocab, config.vocab)
        if draft is not None:
            draft.check(config, self.vocab, self.context)
        self.pages = Pages(count, page)
        self.queue_limit, self._name = queue, name
        self._device = Device(model, params, rows, count, page, width, self.vocab, draft, adapters)
        self._adapters = {None: 0, **{name: i for i, name in enumerate(adapters or {}, 1)}}
        self.attention = self._device.attention
        """Implementation of attention to the pages, of `kernels.attention.PAGED`."""
        self._queue: FairQueue[Generation] = FairQueue()
        self._running: list[Running] = []  # in the order in which they joined
        self._free = list(range(rows - 1, -1, -1))
        self._calls: deque[Call] = deque()
        self._changed = threading.Condition()
        self._cancelled: list[Generation] = []
        self._new_params: Params | None = None
        self._compiler: Compiler | None = None
        self._compiling = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._step_seconds = DISPATCH / programs.STEPS  # measured in a thread alone: processes of a job run in step
        self.broken: str | None = None
        """The error after which nothing works any more."""
        self.last_round = time.monotonic()
        """End of the last round, in seconds of `time.monotonic`."""
        self.written = 0
        """Number of tokens written."""
        self.decode_calls = self.decode_rows = 0
        """Numbers of calls of the decoding program, and of texts in them."""
        self.passes = 0
        """Number of times that the model ran for a text; with speculation there are fewer than tokens."""
        self.preempted = 0
        """Number of times that a text had to give up its pages."""

    def constraint(self, grammar: Grammar) -> Constraint:
        """The constraint of a grammar, for requests. Takes some milliseconds, at most about a second. Raises UserError
        for an invalid grammar, and for a model whose tokenizer cannot write every text."""
        with self._compiling:
            if self._compiler is None:
                self._compiler = Compiler(self.tokenizer, self.vocab)
        return self._compiler.compile(grammar)

    def submit(self, request: Request) -> Generation:
        """Ask for a text. Raises UserError for a request that can never be served, `Busy` if too many wait."""
        request.check(self._device.model.config.vocab, self.vocab, self.context)
        if request.adapter not in self._adapters:
            raise UserError(f"adapter: got {request.adapter}, must be one of {', '.join(filter(None, self._adapters))}")
        generation = Generation(request, self.tokenizer, self.stop_token_ids)
        with self._changed:
            if self.broken is not None:
                raise UserError(f"engine: got an error before, must be started again: {self.broken}")
            if generation.finish is not None:
                return generation
            if len(self._queue) >= self.queue_limit:
                raise Busy(f"requests: got {len(self._queue)} that wait, must be at most {self.queue_limit}; try later")
            self._queue.push(generation, request)
            self._changed.notify_all()
        return generation

    def cancel(self, generation: Generation, reason: str | None = None) -> None:
        """End a text, with this `error`; its row and pages are free after this round."""
        with self._changed:
            if generation.finish is not None:
                return
            generation.error = reason
            if self._queue.remove(generation):
                generation.end("cancelled")
            else:
                self._cancelled.append(generation)
            self._changed.notify_all()

    def update(self, params: Params) -> None:
        """Replace the model's parameters, from the next round on. No page of the old ones is read again: texts in
        progress keep their tokens, and prompt and tokens are read anew. The arrays are used, not copied, so they must
        not be donated while there is something to write."""
        with self._changed:
            self._new_params = params
            self._changed.notify_all()

    def run(self) -> None:
        """Write until nothing is left to do."""
        while self.run_round():
            pass

    def start(self) -> None:
        """Write in a thread of its own, until `close`, or the end of the program."""

        def loop() -> None:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closing or self._busy)
                    if self._closing:
                        return
                try:
                    self.run_round()
                except Exception as error:
                    self._break(f"{type(error).__name__}: {error}")
                    raise

        self._step_seconds = 1.0
        self._thread = threading.Thread(target=loop, name="engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # Python ends other threads inside of calls to the device, which aborts

    def close(self) -> None:
        """Stop the thread. Texts that are not finished end as cancelled."""
        atexit.unregister(self.close)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        for generation in [*(text.generation for text in self._running), *self._queue]:
            generation.end("cancelled")

    def warm_up(self) -> None:
        """Compile every program, before the first request."""
        length = min(self.pages.size + 2, self.context - 1)
        for scores in (False, True):
            self.submit(Request((0,) * length, max_tokens=1, stop_token_ids=(), prompt_logprobs=scores))
        self._device.copy(())
        self.run()

    @property
    def rows(self) -> int:
        """Number of texts at a time."""
        return self._device.rows

    @property
    def active(self) -> int:
        """Number of texts that have a row."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Number of requests that wait."""
        return len(self._queue)

    @property
    def _busy(self) -> bool:
        return bool(self._running or len(self._queue) or self._calls or self._cancelled)

    def run_round(self) -> bool:
        """Read some chunks of prompts and decode; False: there is nothing to do."""
        with self._changed:
            cancelled, self._cancelled = self._cancelled, []
            params, self._new_params = self._new_params, None
        if params is not None:
            self._update(params)
        for text in [text for text in self._running if text.generation in cancelled]:
            text.generation.end("cancelled")
            self._leave(text)
        self._admit()
        reading = [text for text in self._running if text.reading]
        self._calls += (scored := prefill(self._device, self.pages, reading))
        called = self._decode(hurry=bool(reading)) or len(scored) > 0
        while len(self._calls) > called:  # the last one stays under way
            self._look()
        self.last_round = time.monotonic()
        return self._busy

    def _admit(self) -> None:
        """Give rows to those who wait, while there are rows and pages for their prompts."""
        while self._free:
            with self._changed:
                if (generation := self._queue.peek()) is None or (text := self._join(generation)) is None:
                    return
                self._queue.pop()
                self._queue.serve(generation.request.client, len(generation.request.prompt))
            self._running.append(text)

    def _join(self, generation: Generation) -> Running | None:
        """A row for this text, with pages for its prompt. None: there are not enough."""
        request, pages = generation.request, self.pages
        before = request.prompt[:-1]
        # Not the name alone: a prefix of another client's must not show in the time to the first token.
        adapter = self._adapters[request.adapter]
        chains = list(pages.chains(pages.root(self._name, request.client, str(adapter)), before))
        found = [] if request.prompt_logprobs else pages.find(chains[: len(before) // pages.size])
        needed = -(-len(request.prompt) // pages.size) - len(found)
        if needed > pages.free:
            pages.hits -= len(found) * pages.size
            for page in reversed(found):
                pages.release(page)
            return None
        mine = [page for page in (pages.take() for _ in range(needed)) if page is not None]
        read = len(found) * pages.size
        text = Running(generation, self._free.pop(), adapter, chains, found + mine, read, list(generation.stream.ids))
        text.length = len(before)
        generation.began = generation.began or time.monotonic()
        generation.reused = max(generation.reused, read)
        self._device.admit(text.row, request, generation.stream.stop_token_ids, adapter)
        return text

    def _decode(self, hurry: bool) -> bool:
        """Decode some tokens of every row. False: there is no row to decode.

        A text under a constraint waits here until its last token was looked at; the calls of the others, of one token
        each while it is there, do not wait for it."""
        constrained = any(not text.reading and text.generation.matcher is not None for text in self._running)
        steps = 1 if hurry or constrained else max(1, min(programs.STEPS, int(DISPATCH / self._step_seconds)))
        most = steps * (1 + self._device.guesses)
        ready = [(text, count) for text in self._running if (count := text.ready(most, self._device.guesses > 0))]
        for text, count in ready:
            if text in self._running:
                self._make_room(text, text.length + count)
        tasks, texts = [], []
        for text, count in ready:
            if text not in self._running:
                continue
            written = text.length - len(text.prompt) + 1
            try:
                allowed = text.allowed(written + count, self.vocab)
            except Exception as error:
                self._fail(text, error)
                continue
            replay = text.replay[written : written + count]
            tasks.append(Task(text.row, text.pages, text.length + count, replay, allowed))
            texts.append((text, count))
            text.length += count
        if not tasks:
            return False
        self.decode_calls, self.decode_rows = self.decode_calls + 1, self.decode_rows + len(tasks)
        self._calls.append(Call(self._device.decode(tasks, steps), texts, steps))
        return True

    def _make_room(self, text: Running, length: int) -> None:
        """Pages for so many tokens. The youngest text with the lowest priority gives up its pages if there are none."""
        while len(text.pages) * self.pages.size < length:
            page = self.pages.take()
            if page is not None:
                text.pages.append(page)
                continue
            while self._calls:  # what is under way may end a text
                self._look()
            if text not in self._running:
                return
            if self.pages.free:
                continue
            _, victim = max(enumerate(self._running), key=lambda at: (-at[1].generation.request.priority, at[0]))
            self._set_back(victim)
            if victim is text:
                return

    def _set_back(self, text: Running) -> None:
        """Let a text give up its row and pages, and wait for others, before all who wait already."""
        self.preempted += 1
        self._leave(text)
        with self._changed:
            self._queue.push(text.generation, text.generation.request, first=True)

    def _update(self, params: Params) -> None:
        while self._calls:
            self._look()
        for text in self._running[::-1]:
            self._set_back(text)
        self.pages.forget()
        self._device.update(params)

    def _look(self) -> None:
        """Look at the tokens of the oldest call."""
        call = self._calls.popleft()
        started = time.perf_counter()
        drawn = jax.device_get(call.drawn)
        if call.steps and self._thread is not None:
            seconds = max(time.perf_counter() - started, 1e-5) / call.steps
            self._step_seconds += 0.2 * (seconds - self._step_seconds)
        for text, most in call.texts:
            generation, row = text.generation, text.row if call.steps else 0
            if generation.finish is not None:
                continue
            count, alternatives = int(drawn.count[row]), generation.request.alternatives
            if not call.steps:
                generation.extend_prompt(tokens_of(drawn, row, range(count), alternatives), text.scored)
                text.scored += count
            else:
                text.length -= most - count
                self.passes += int(drawn.passes[row])
                new = range(min(max(len(text.replay) - text.written, 0), count), count)
                text.written += count
                before = len(generation.tokens)
                try:
                    generation.extend(tokens_of(drawn, row, new, alternatives))
                except Exception as error:
                    self._fail(text, error)
                added = len(generation.tokens) - before  # without what was decoded after the end
                self.written += added
                with self._changed:
                    self._queue.serve(generation.request.client, added)
            if generation.finish is not None:
                self._leave(text)

    def _fail(self, text: Running, error: Exception) -> None:  # its constraint cannot go on
        text.generation.end("error", f"constraint: {error}")
        self._leave(text)

    def _leave(self, text: Running) -> None:
        """Free a row and its pages."""
        if text in self._running:
            self._running.remove(text)
            self._free.append(text.row)
            for page in reversed(text.pages):  # so that the end of a prompt is taken before its beginning
                self.pages.release(page)

    def _break(self, error: str) -> None:
        """End everything: the device's state is unknown."""
        with self._changed:
            self.broken = error
            waiting = list(self._queue)
        for generation in [*(text.generation for text in self._running), *waiting]:
            generation.end("error", error)
