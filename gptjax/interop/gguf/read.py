"""Read a model and its tokenizer from a GGUF file.

fields, tensors, text = read("model.gguf")      # a config.json, tensors by Hugging Face's names, the tokenizer
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from gptjax.data.tokenizers import Tokenizer
from gptjax.interop.gguf import container, read_tokenizer
from gptjax.interop.gguf.model import VOCAB, Restored, restore
from gptjax.interop.templates import ChatTemplate
from gptjax.types import UserError


class Text(NamedTuple):
    """A file's tokenizer, chat template and the ids that end a text."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    stop_token_ids: tuple[int, ...] | None


def is_gguf(path: Path) -> bool:
    """True if the file begins as a GGUF file."""
    with path.open("rb") as file:
        return file.read(4) == container.MAGIC


def read(path: str | Path) -> tuple[dict[str, Any], Restored, Text]:
    """Read the fields of a config.json, the tensors, by Hugging Face's names, and the tokenizer.

    The file is memory-mapped. Tensors are decoded when they are converted to an array: floats keep their dtype,
    quantised ones become float32.

    Raises UserError for a file that is damaged, one of several parts, or of a model or a tokenizer that gptjax cannot
    express."""
    metadata, stored = container.read(Path(path))
    kind, parts = metadata.get("general.type", "model"), metadata.get("split.count", 1)
    if kind != "model":
        raise UserError(f"general.type: got {str(kind)[:40]!r}, must be model")
    if parts not in (0, 1):
        raise UserError(f"path: got {path}, one of {str(parts)[:40]} parts; merge them: llama-gguf-split --merge")
    fields, tensors = restore(metadata, stored)
    return fields, tensors, Text(*read_tokenizer.read(metadata, fields[VOCAB]))
