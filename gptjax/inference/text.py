"""Incremental decoding of sampled token ids to text, with stop tokens and stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from gptjax.data.tokenizers import Tokenizer

Finish = Literal["stop", "length"]
"""Reason for the end of a text: a stop token or stop string, or the maximum length."""


class TextStream:
    """A text during generation. Its state depends only on the ids, not on how many are added at a time."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_tokens: int,
        stop: Sequence[str],
        stop_token_ids: Iterable[int] | None = None,
        marks: Mapping[int, str] | None = None,
    ):
        """marks: special tokens that are part of the text, and their texts; they end no text unless asked."""
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.text = ""
        self.finish: Finish | None = None
        self.max_tokens = max_tokens
        self._tokenizer = tokenizer
        self._marks = {} if marks is None else {token: text.encode() for token, text in marks.items()}
        ends = {*tokenizer.specials.values()} - self._marks.keys() if stop_token_ids is None else stop_token_ids
        self.stop_token_ids = frozenset(ends)
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # buffers an incomplete character

    def extend(self, ids: Iterable[int], logprobs: Iterable[float]) -> None:
        """Append sampled ids, up to the one that ends the text."""
        for token, logprob in zip(ids, logprobs, strict=True):
            if self.finish is not None:
                return
            self.ids.append(token)
            self.logprobs.append(logprob)
            if token in self.stop_token_ids:
                self.finish = "stop"
                return
            self.text += self._decoder.decode(self._marks.get(token) or self._tokenizer.decode_bytes([token]))
            found = [(at + len(s), at) for s in self._stop if (at := self.text.find(s)) >= 0]
            if found:
                # The first string to be complete, as if the text had arrived a character at a time.
                self.text = self.text[: min(found)[1]]
                self.finish = "stop"
            elif len(self.ids) == self.max_tokens:
                self.finish = "length"

    @property
    def safe(self) -> str:
        """The part of the text that no later id can change: without a possible beginning of a stop string."""
        if self.finish is not None:
            return self.text
        withheld = max((n for s in self._stop for n in range(1, len(s)) if self.text.endswith(s[:n])), default=0)
        return self.text[: len(self.text) - withheld]
