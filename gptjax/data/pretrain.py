"""Pretraining data: plain text."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from gptjax.data.dataset import Dataset, PackedSequences
from gptjax.data.store import Tokens, encode_texts, tokenize
from gptjax.data.tokenizers.tokenizer import add_bos_eos
from gptjax.protocols import Source, Split, Tokenizer


@dataclasses.dataclass(frozen=True)
class Pretrain(Dataset):
    """Plain text. Every token is a target."""

    def sequences(
        self, source: Source | Tokens, tokenizer: Tokenizer, split: Split, cache_dir: str | Path
    ) -> PackedSequences:
        store = tokenize(source, tokenizer, split, cache_dir, encode_texts, self.document_type)
        return PackedSequences(store, self.packing.plan(store.offsets, self.length))

    def prompt(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Token ids of `text`, for the model to continue."""
        return add_bos_eos(tokenizer.encode(text), tokenizer, append_eos=False)
