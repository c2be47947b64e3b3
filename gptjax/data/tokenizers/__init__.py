"""Tokenizers: text to ids and back, through one small interface (`Tokenizer`).

An experiment uses one of `TrainSentencePiece`, `TrainCharacters`, `Bytes` and `LoadTokenizer`; `build(texts)` returns
the tokenizer. `save(folder)` and `load_tokenizer(folder)` write and read any of them.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptjax.data.tokenizers.tokenizer import CHAT_SPECIALS, DESCRIPTOR, Tokenizer, TokenizerConfig
from gptjax.types import UserError

if TYPE_CHECKING:
    from gptjax.data.tokenizers.bytes import Bytes, ByteTokenizer
    from gptjax.data.tokenizers.characters import CharacterTokenizer, TrainCharacters
    from gptjax.data.tokenizers.huggingface import HuggingFaceTokenizer
    from gptjax.data.tokenizers.measure import Report, report
    from gptjax.data.tokenizers.missing import MissingTokenizer
    from gptjax.data.tokenizers.sentencepiece import SentencePieceTokenizer, TrainSentencePiece
    from gptjax.data.tokenizers.tiktoken import TiktokenTokenizer

__all__ = [
    "CHAT_SPECIALS",
    "ByteTokenizer",
    "Bytes",
    "CharacterTokenizer",
    "HuggingFaceTokenizer",
    "LoadTokenizer",
    "MissingTokenizer",
    "Report",
    "SentencePieceTokenizer",
    "TiktokenTokenizer",
    "Tokenizer",
    "TokenizerConfig",
    "TrainCharacters",
    "TrainSentencePiece",
    "has_tokenizer",
    "load_tokenizer",
    "model_file",
    "report",
]

KINDS = {
    "bytes": "ByteTokenizer",
    "characters": "CharacterTokenizer",
    "huggingface": "HuggingFaceTokenizer",
    "missing": "MissingTokenizer",
    "sentencepiece": "SentencePieceTokenizer",
    "tiktoken": "TiktokenTokenizer",
}
"""Module of this package, which is the `kind` in a saved descriptor -> its class. Imported on first use."""
_RANKS = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
"""Start of a file of tiktoken ranks."""
_HOME = {name: module for module, name in KINDS.items()}
_HOME |= {"Bytes": "bytes", "TrainCharacters": "characters", "TrainSentencePiece": "sentencepiece"}
_HOME |= {"Report": "measure", "report": "measure"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclasses.dataclass(frozen=True)
class LoadTokenizer:
    """Use an existing tokenizer."""

    path: str
    """Argument of `load_tokenizer`: a folder, a file, or a published name such as gpt2."""
    specials: tuple[str, ...] = ()
    """Special tokens to add after the vocabulary if it lacks them. Chat needs `CHAT_SPECIALS`."""

    def build(self, texts: Iterator[str]) -> Tokenizer:
        """The tokenizer. `texts` is not read."""
        return load_tokenizer(self.path).with_specials(self.specials)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a saved tokenizer (its folder, or a run's), a SentencePiece `.model` (or `.model.v3`), a Hugging Face
    `tokenizer.json`, Mistral's `tekken.json`, a `.tiktoken` file of ranks, Llama 3's `tokenizer.model`, a folder with
    one of these or with GPT-2's `encoder.json` and `vocab.bpe`, or an encoding that `tiktoken` downloads, by name.
    Raises `UserError` if it is missing or damaged."""
    file = Path(path).expanduser()
    if file.is_dir():
        return _from_folder(file)
    if file.is_file():
        return _from_file(file)
    from gptjax.data.tokenizers.tiktoken import ENCODINGS, TiktokenTokenizer

    if str(path) in ENCODINGS:
        return TiktokenTokenizer.download(str(path))
    raise UserError(
        f"tokenizer: got {path}, must be a file, a folder or one of {', '.join(ENCODINGS)}; there is no such file"
    )


def _from_folder(folder: Path) -> Tokenizer:
    from gptjax.io.json_file import check_regular

    for saved in (folder, folder / "tokenizer"):
        if saved.is_dir():
            check_regular(saved)
        if (saved / DESCRIPTOR).exists():
            return _saved(saved)
    if (folder / "encoder.json").exists() and (folder / "vocab.bpe").exists():
        from gptjax.data.tokenizers.tiktoken import TiktokenTokenizer

        return TiktokenTokenizer.from_gpt2_folder(folder)
    if (file := model_file(folder)) is not None:
        return _from_file(file)
    raise UserError(
        f"tokenizer: got the folder {folder}, must hold {DESCRIPTOR}, tokenizer.json, tokenizer.model, tekken.json, "
        "or encoder.json and vocab.bpe"
    )


def has_tokenizer(folder: Path) -> bool:
    """True if `load_tokenizer` finds a tokenizer in the folder."""
    openai = (folder / "encoder.json").exists() and (folder / "vocab.bpe").exists()
    saved = any((saved / DESCRIPTOR).exists() for saved in (folder, folder / "tokenizer"))
    return saved or openai or model_file(folder) is not None


def model_file(folder: Path) -> Path | None:
    """The file of a folder's tokenizer: the first that there is of tokenizer.json, tokenizer.model, tekken.json and
    tokenizer.model.v3 or another version, the last."""
    names = ("tokenizer.json", "tokenizer.model", "tekken.json")
    versions = sorted(folder.glob("tokenizer.model.v*"), reverse=True)
    return next((file for file in (*(folder / name for name in names), *versions) if file.is_file()), None)


def _from_file(file: Path) -> Tokenizer:
    if file.name == DESCRIPTOR:
        return _saved(file.parent)
    if file.name == "tekken.json":
        from gptjax.data.tokenizers.tiktoken import TiktokenTokenizer

        return TiktokenTokenizer.from_tekken(file)
    if file.suffix == ".json":
        from gptjax.data.tokenizers.huggingface import HuggingFaceTokenizer

        return HuggingFaceTokenizer.from_file(file)
    if ".model" in (file.suffix, Path(file.stem).suffix):
        with file.open("rb") as opened:
            start = opened.read(1_000)
        if _RANKS.match(start):
            from gptjax.data.tokenizers.tiktoken import TiktokenTokenizer

            return TiktokenTokenizer.from_llama3(file)
        from gptjax.data.tokenizers.sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer.from_file(file)
    if file.suffix == ".tiktoken":
        from gptjax.data.tokenizers.tiktoken import TiktokenTokenizer

        return TiktokenTokenizer.from_file(file)
    raise UserError(f"tokenizer: got {file}, must be a .json (Hugging Face), .model (SentencePiece) or .tiktoken file")


def _saved(folder: Path) -> Tokenizer:
    """Load the output of `Tokenizer.save`, and check its fingerprint."""
    try:
        settings = json.loads((folder / DESCRIPTOR).read_text(encoding="utf-8"))
        fingerprint, cls = settings.pop("fingerprint"), __getattr__(KINDS[settings.pop("kind")])
        tokenizer = cls((folder / cls.file).read_bytes() if cls.file else b"", **settings)
        if tokenizer.fingerprint == fingerprint:
            return tokenizer
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise UserError(f"tokenizer: got {folder}, must hold the saved files; one is missing or changed, restore it")
