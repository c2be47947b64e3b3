"""Pretraining data: plain text."""

from __future__ import annotations

import dataclasses

from gptjax.data.dataset import Dataset
from gptjax.data.store import Encode, encode_texts
from gptjax.data.tokenizers.tokenizer import add_bos_eos
from gptjax.protocols import Tokenizer


@dataclasses.dataclass(frozen=True)
class Pretrain(Dataset):
    """Plain text. Every token is a target."""

    def encodings(self) -> tuple[Encode, ...]:
        return (encode_texts,)

    def prompt(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Token ids of `text`, for the model to continue."""
        return add_bos_eos(tokenizer.encode(text), tokenizer, append_eos=False)
