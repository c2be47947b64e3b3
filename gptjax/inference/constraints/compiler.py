"""Compilation of grammars for a tokenizer by llguidance (MIT, a wheel without dependencies)."""

from __future__ import annotations

import functools
import importlib.util
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.data.tokenizers import Tokenizer
from gptjax.inference.constraints.constraint import Constraint, Matcher
from gptjax.inference.constraints.grammars import Grammar
from gptjax.io.worker import Worker
from gptjax.types import UserError

CACHED = 64
"""Number of compiled grammars that are kept."""
UTF8 = frozenset({*range(0x00, 0xC0), *range(0xC2, 0xF5)})
"""Bytes that UTF-8 has."""


class Compiler:
    """Makes grammars constraints for the first `vocab` tokens of a tokenizer. May be used from any thread.

    Raises UserError for a tokenizer that has no tokens for some bytes: a text could get stuck.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int):
        if importlib.util.find_spec("llguidance") is None:
            raise UserError("constraint: structured output needs the llguidance library; pip install 'gptjax[serve]'")
        self.vocab, self._vocabulary = vocab, _Vocabulary(tokenizer, vocab)
        missing = UTF8 - {piece[0] for piece in self._vocabulary.tokens if len(piece) == 1}
        if missing:
            raise UserError(
                f"constraint: got a tokenizer of the kind {tokenizer.kind} without tokens for {len(missing)} of the "
                "bytes of UTF-8, must have them all for structured output, as byte-level BPE and SentencePiece with "
                "byte fallback do"
            )
        self._compiled: OrderedDict[str, Constraint] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, grammar: Grammar) -> Constraint:
        """The grammar's constraint. Takes some milliseconds, at most about a second.

        Raises UserError for an invalid grammar, and for one that takes too long."""
        request = grammar.request()
        key = json.dumps(request, sort_keys=True)
        with self._lock:
            if key in self._compiled:
                self._compiled.move_to_end(key)
                return self._compiled[key]
        compiled = _Compiled(self._tokenizer, _tried(request), self.vocab)
        with self._lock:
            self._compiled[key] = compiled
            while len(self._compiled) > CACHED:
                self._compiled.popitem(last=False)
        return compiled

    @functools.cached_property
    def _tokenizer(self) -> Any:
        import llguidance

        # The library takes whatever says that it is a wrapper of its own.
        return llguidance.LLTokenizer(self._vocabulary)  # pyright: ignore[reportArgumentType]


_worker = Worker(Path(__file__).with_name("grammar_worker.py"))


def _tried(request: dict[str, Any]) -> str:
    """The source for llguidance of a grammar that compiles within the worker's limits."""
    found = _worker.ask(request)
    if "source" in found:
        return found["source"]
    if "invalid" in found:
        raise UserError(f"grammar: got an invalid one: {' '.join(found['invalid'].split())[:300]}")
    raise UserError(f"grammar: got one that {found['limit']}; make it simpler")


class _Vocabulary:
    """Tokens as llguidance reads them. Its end of a text is a token of its own, beyond the vocabulary: which tokens end
    a text is the request's affair."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab: int):
        names = {i: name.encode() for name, i in tokenizer.specials.items() if i < vocab}
        pieces = [*tokenizer.pieces[:vocab], *[b""] * (vocab - len(tokenizer.pieces))]
        self.tokens: Sequence[bytes] = [*(names.get(i, piece) for i, piece in enumerate(pieces)), b"<|grammar end|>"]
        self.special_token_ids = [*sorted(names), vocab]
        self.eos_token_id = vocab
        self._tokenizer = tokenizer
        self._ids = {piece: i for i, piece in reversed([*enumerate(pieces)]) if piece and i not in names}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: str | bytes) -> list[int]:
        """Tokens of a text that the grammar demands, with exactly its bytes: as the tokenizer writes them if it adds
        and changes nothing, else the longest ones."""
        data = text.encode() if isinstance(text, str) else bytes(text)
        plain = data.decode("utf-8", "replace")
        # SentencePiece may put a space before all text, but not after a line break.
        before = self._tokenizer.encode("\n")
        for skipped, ids in ((0, self._tokenizer.encode(plain)), (len(before), self._tokenizer.encode("\n" + plain))):
            known = ids[:skipped] == before[:skipped] and max(ids, default=0) < self.eos_token_id
            if known and self._tokenizer.decode_bytes(ids[skipped:]) == data:
                return ids[skipped:]
        found: list[int] = []
        while data:
            size = next(n for n in range(min(self._longest, len(data)), 0, -1) if data[:n] in self._ids)
            found.append(self._ids[data[:size]])
            data = data[size:]
        return found


class _Compiled(Constraint):
    """A grammar for a tokenizer."""

    def __init__(self, tokenizer: Any, source: str, vocab: int):
        import llguidance

        from gptjax.inference.constraints.grammar_worker import limits

        self._matcher, self._vocab = llguidance.LLMatcher(tokenizer, source, log_level=0, limits=limits()), vocab
        _check(self._matcher)

    def start(self) -> Matcher:
        return _Matcher(self._matcher.deep_copy(), self._vocab)


class _Matcher(Matcher):
    """A text's state in a grammar."""

    def __init__(self, matcher: Any, vocab: int):
        self._matcher, self._end = matcher, vocab
        self._mask = np.zeros(-(-(vocab + 1) // 32), np.uint32)  # with the end of the text

    def fill(self, mask: np.ndarray) -> None:
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        _check(self._matcher)
        self._mask[-1] &= ~np.uint32(1 << self._end % 32)
        mask[:] = self._mask[: len(mask)]

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        _check(self._matcher)

    @property
    def accepting(self) -> bool:
        return self._matcher.is_accepting()

    @property
    def finished(self) -> bool:
        return self._matcher.is_stopped()


def _check(matcher: Any) -> None:
    if matcher.is_error():
        raise UserError(f"grammar: got one that cannot go on: {' '.join(matcher.get_error().split())[:300]}")
