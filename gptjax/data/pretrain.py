"""Pretraining data: texts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from gptjax.data.dataset import Dataset, PackedRows
from gptjax.data.store import Tokens, encode_texts, tokenize
from gptjax.data.tokenizers.tokenizer import frame
from gptjax.protocols import Source, Split, Tokenizer


@dataclasses.dataclass(frozen=True)
class Pretrain(Dataset):
    """Texts; every token is a target."""

    def rows(self, source: Source | Tokens, tokenizer: Tokenizer, split: Split, cache_dir: str | Path) -> PackedRows:
        store = tokenize(source, tokenizer, split, cache_dir, encode_texts, self.document_type)
        return PackedRows(store, self.packing.plan(store.offsets, self.length))

    def prompt(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Ids after which the model continues `text`."""
        return frame(tokenizer.encode(text), tokenizer, append_eos=False)
