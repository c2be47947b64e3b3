"""Tokenizers: text to ids and back, behind one small interface (`Tokenizer`).

An experiment names one of `TrainSentencePiece`, `TrainCharacters`, `Bytes` and `LoadTokenizer`; its `build(texts)`
gives the tokenizer. `save(folder)` and `load_tokenizer(folder)` keep any of them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from gptjax.data.tokenizers.bytes import Bytes, ByteTokenizer
from gptjax.data.tokenizers.characters import CharacterTokenizer, TrainCharacters
from gptjax.data.tokenizers.huggingface import HuggingFaceTokenizer
from gptjax.data.tokenizers.report import Report, report
from gptjax.data.tokenizers.sentencepiece import SentencePieceTokenizer, TrainSentencePiece
from gptjax.data.tokenizers.tiktoken import ENCODINGS, TiktokenTokenizer
from gptjax.data.tokenizers.tokenizer import CHAT_SPECIALS, DESCRIPTOR, Tokenizer, TokenizerConfig
from gptjax.types import UserError

__all__ = [
    "CHAT_SPECIALS",
    "ByteTokenizer",
    "Bytes",
    "CharacterTokenizer",
    "HuggingFaceTokenizer",
    "LoadTokenizer",
    "Report",
    "SentencePieceTokenizer",
    "TiktokenTokenizer",
    "Tokenizer",
    "TokenizerConfig",
    "TrainCharacters",
    "TrainSentencePiece",
    "load_tokenizer",
    "report",
]

KINDS = {
    cls.kind: cls
    for cls in (ByteTokenizer, CharacterTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer, TiktokenTokenizer)
}
"""What a descriptor may name: a file has only strings."""


@dataclasses.dataclass(frozen=True)
class LoadTokenizer:
    """Use a tokenizer that exists."""

    path: str
    """What `load_tokenizer` takes: a folder, a file, or a published name such as gpt2."""
    specials: tuple[str, ...] = ()
    """Special tokens to add after the vocabulary where it lacks them; for chat, `CHAT_SPECIALS`."""

    def build(self, texts: Iterator[str]) -> Tokenizer:
        """The tokenizer. `texts` are not read."""
        return load_tokenizer(self.path).with_specials(self.specials)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A saved tokenizer (its folder, or a run's), a SentencePiece `.model`, a Hugging Face `tokenizer.json`, a
    `.tiktoken` file of ranks, a folder that holds one of these or GPT-2's `encoder.json` and `vocab.bpe`, or the name
    of an encoding that `tiktoken` downloads. Raises `UserError` where there is none, or a damaged one."""
    file = Path(path).expanduser()
    if file.is_dir():
        return _from_folder(file)
    if file.is_file():
        return _from_file(file)
    if str(path) in ENCODINGS:
        return TiktokenTokenizer.download(str(path))
    raise UserError(
        f"tokenizer: got {path}, must be a file, a folder or one of {', '.join(ENCODINGS)}; there is no such file"
    )


def _from_folder(folder: Path) -> Tokenizer:
    for saved in (folder, folder / "tokenizer"):
        if (saved / DESCRIPTOR).exists():
            return _saved(saved)
    if (folder / "encoder.json").exists() and (folder / "vocab.bpe").exists():
        return TiktokenTokenizer.from_gpt2_folder(folder)
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).exists():
            return _from_file(folder / name)
    raise UserError(
        f"tokenizer: got the folder {folder}, must hold {DESCRIPTOR}, tokenizer.json, tokenizer.model, "
        "or encoder.json and vocab.bpe"
    )


def _from_file(file: Path) -> Tokenizer:
    if file.name == DESCRIPTOR:
        return _saved(file.parent)
    if file.suffix == ".json":
        return HuggingFaceTokenizer.from_file(file)
    if file.suffix == ".model":
        return SentencePieceTokenizer.from_file(file)
    if file.suffix == ".tiktoken":
        return TiktokenTokenizer.from_file(file)
    raise UserError(f"tokenizer: got {file}, must be a .json (Hugging Face), .model (SentencePiece) or .tiktoken file")


def _saved(folder: Path) -> Tokenizer:
    """What `Tokenizer.save` wrote, checked against the fingerprint it had then."""
    try:
        settings = json.loads((folder / DESCRIPTOR).read_text(encoding="utf-8"))
        fingerprint, cls = settings.pop("fingerprint"), KINDS[settings.pop("kind")]
        tokenizer = cls((folder / cls.file).read_bytes() if cls.file else b"", **settings)
        if tokenizer.fingerprint == fingerprint:
            return tokenizer
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(
        f"tokenizer: got {folder}, must hold what was saved there; a file is missing or changed, restore it"
    )
