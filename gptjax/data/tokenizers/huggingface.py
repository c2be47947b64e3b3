"""Hugging Face's `tokenizer.json`, read by the `tokenizers` library."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from gptjax.data.tokenizers.tiktoken import byte_alphabet
from gptjax.data.tokenizers.tokenizer import REPLACEMENT, ROLES, Tokenizer, add_roles, well_formed
from gptjax.data.tokenizers.words import Words, splits
from gptjax.io.json_file import FLAG, NATURAL, TEXT, check, read_object
from gptjax.io.worker import Worker
from gptjax.types import Json, UserError, one_line

if TYPE_CHECKING:
    import tokenizers

STEP = {"type": TEXT, "decoders": [{"type": TEXT}]}
SCHEMA = {
    "added_tokens": [{"id": NATURAL, "content": TEXT, "special": FLAG}],
    "decoder": STEP,
    "model": {"type": TEXT, "unk_id": NATURAL, "unk_token": TEXT, "continuing_subword_prefix": TEXT},
}
"""Types of the fields that are read here; the library checks the others."""
MOST = 1 << 24
"""Bound of the ids: one more takes memory for all ids below it."""
JOINED = (".", ",", "!", "?")
"""Word pieces that follow a word without a space, as the library decodes them too."""


class HuggingFaceTokenizer(Tokenizer):
    """A byte-level BPE (GPT-2, Llama 3, Qwen), a BPE or unigram model converted from SentencePiece (Llama 2, T5), or a
    WordPiece (BERT).

    It normalises text if its file says so, and a converted SentencePiece reads U+2581 as a space: then
    `decode(encode(text))` is the normalised text. A WordPiece decodes every word with a space before it: `it's (so)`
    becomes `it ' s ( so )`.
    """

    kind = "huggingface"
    file = "tokenizer.json"

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a `tokenizer.json`, with `bos` and `eos` from the `tokenizer_config.json` beside it.

        If that does not name them, they are the tokens that the post-processor adds before and after all text. Raises
        `UserError` for other kinds of files, and for a file that encodes plain text to special tokens.
        """
        path = Path(path)
        config_file = path.with_name("tokenizer_config.json")
        try:
            spec, config = read_object(path), read_object(config_file) if config_file.exists() else {}
            data = path.read_bytes()
            added = {token["content"]: token["id"] for token in spec["added_tokens"] if token["special"]}
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"tokenizer: got {path}, must be a Hugging Face tokenizer.json; it is damaged or of another kind"
            ) from None
        check(spec, SCHEMA, f"tokenizer: got {path}, where")
        if not _decoders(spec) & {"ByteLevel", "ByteFallback", "Metaspace", "WordPiece"}:
            raise UserError(
                f"tokenizer: got {path} with decoder {', '.join(sorted(_decoders(spec))) or None}, "
                "must be ByteLevel, ByteFallback, Metaspace or WordPiece"
            )
        roles = _roles(cls(data, {}), added, config)
        if (unknown := unknown_piece(spec)) not in roles.values():
            added.pop(unknown, None)
        tokenizer = cls(data, add_roles(added, roles))
        tokenizer.check_specials(path)
        return tokenizer

    def check_specials(self, path: Path) -> None:
        """Raise `UserError` if plain text encodes to a special token."""
        for name in self.specials:
            if set(self.encode(name)) & set(self.specials.values()):
                raise UserError(
                    f"tokenizer: got {path}, which reads special token {name!r} in plain text, must not; use another"
                )

    @functools.cached_property
    def library(self) -> tokenizers.Tokenizer:
        """The library's tokenizer, which reads special tokens in text as plain text."""
        return _library(self.data)

    @functools.cached_property
    def post_processor_ids(self) -> tuple[list[int], list[int]]:
        """Ids that the file's post-processor adds before and after all text."""
        encoding = self.library.encode("a")
        text = [i for i, added in enumerate(encoding.special_tokens_mask) if not added]
        return (encoding.ids[: text[0]], encoding.ids[text[-1] + 1 :]) if text else (encoding.ids, [])

    @functools.cached_property
    def pieces(self) -> list[bytes]:
        tokenizer, spec = self.library, json.loads(self.data)
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        if (last := max(vocabulary.values(), default=-1)) >= MOST:
            raise UserError(f"tokenizer: got a tokenizer.json with the id {last}, must be less than {MOST}")
        pieces = [b""] * (1 + last)
        alphabet = byte_alphabet()
        byte_level, unknown = "ByteLevel" in _decoders(spec), unknown_piece(spec)
        inside = spec["model"].get("continuing_subword_prefix") if "WordPiece" in _decoders(spec) else None
        for piece, i in vocabulary.items():
            if piece == unknown:
                pieces[i] = (" " * (inside is not None) + REPLACEMENT).encode()
            elif inside is not None:
                joined = piece.startswith(inside) or piece in JOINED
                pieces[i] = (piece.removeprefix(inside) if joined else " " + piece).encode()
            elif byte_level:
                pieces[i] = bytes(alphabet[character] for character in piece if character in alphabet)
            elif len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                pieces[i] = bytes([int(piece[3:5], 16)])
            else:
                pieces[i] = piece.replace("\u2581", " ").encode()
        for i, token in tokenizer.get_added_tokens_decoder().items():
            if token.content != unknown:
                pieces[i] = b"" if token.special else token.content.encode()
        return pieces

    def encode_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        with no_panic():
            encoding = self.library.encode(well_formed(text), add_special_tokens=False)
        return encoding.ids, encoding.offsets

    @functools.cached_property
    def pair_ids(self) -> tuple[list[int], list[int], list[int]]:
        """Ids that the file's post-processor adds before, between and after two texts; if none between them, those of
        any tokenizer."""
        encoding = self.library.encode("a", "a")
        of = encoding.sequence_ids
        first, second = (of.index(text) for text in (0, 1))
        between = [i for i, text in zip(encoding.ids[first:second], of[first:second], strict=True) if text is None]
        last = len(of) - of[::-1].index(1)
        return (encoding.ids[:first], between, encoding.ids[last:]) if between else super().pair_ids

    def strips(self, token: int) -> tuple[bool, bool]:
        added = self.library.get_added_tokens_decoder().get(token)
        return (False, False) if added is None else (added.lstrip, added.rstrip)

    def _encode(self, text: str) -> list[int]:
        with no_panic():
            return self.library.encode(text, add_special_tokens=False).ids

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        one_thread = os.environ.get("TOKENIZERS_PARALLELISM") == "false"
        if one_thread and self._words is not None:
            return self._words.encode_batch(texts)
        return self._encode_texts(texts)

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        with no_panic():
            return [encoding.ids for encoding in self.library.encode_batch_fast(texts, add_special_tokens=False)]

    @functools.cached_property
    def _words(self) -> Words | None:
        """Encoding of words, faster than the library's on one thread. None: texts are not split into them."""
        return Words(self._encode_texts) if splits(json.loads(self.data)) else None


@contextlib.contextmanager
def no_panic() -> Iterator[None]:
    """Context in which a panic of the library, as of a regular expression that backtracks too far, is a UserError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(f"tokenizer: its library cannot encode a text ({one_line(error)}); use another") from None


_worker = Worker(Path(__file__).with_name("pattern_worker.py"))


def check_patterns(data: bytes) -> None:
    """Raise UserError for a regular expression of a tokenizer.json that takes more than a second on short texts."""
    spec = json.loads(data)
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        for pattern in _patterns(spec.get(part)):
            if found := _worker.ask({"pattern": pattern}):
                (reason,) = found.values()
                raise UserError(
                    f"tokenizer: got a tokenizer.json whose {part} has the regular expression {pattern[:60]!r}, which "
                    f"{' '.join(reason.split())[:200]}; use another"
                )


def _patterns(part: Json) -> Iterator[str]:
    """Regular expressions inside a part of a tokenizer.json."""
    inside = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    for key, value in inside:
        if key == "Regex" and isinstance(value, str):
            yield value
        else:
            yield from _patterns(value)


@functools.lru_cache(maxsize=2)  # large files are slow to read
def _library(data: bytes) -> tokenizers.Tokenizer:
    try:
        import tokenizers
    except ImportError:
        raise UserError("tokenizer: this one needs the tokenizers library; pip install 'gptjax[hf]'") from None
    try:
        check_patterns(data)
        tokenizer = tokenizers.Tokenizer.from_str(data.decode())
    except UserError:
        raise
    except Exception as error:  # the library raises no narrower class
        raise UserError(f"tokenizer: got a tokenizer.json that the library refuses: {one_line(error)}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # encode them as plain text
    names = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    if isinstance(tokenizer.model, tokenizers.models.Unigram) and names:
        # Special tokens are also pieces of a Unigram model, the likeliest ones. Split after their first character, they
        # cannot match.
        inside = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names)
        cut = tokenizers.pre_tokenizers.Split(tokenizers.Regex(inside), "merged_with_previous")
        before = [] if tokenizer.pre_tokenizer is None else [tokenizer.pre_tokenizer]
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*before, cut])
    return tokenizer


def _decoders(spec: dict[str, Any]) -> set[str]:
    """Types of a tokenizer's decoder, or of each decoder in the sequence."""
    decoder = spec.get("decoder") or {}
    return {part["type"] for part in decoder.get("decoders", [decoder]) if part}


def unknown_piece(spec: dict[str, Any]) -> str | None:
    """Piece for text that a tokenizer.json does not cover. None: bytes cover all text."""
    model = spec["model"]
    if "ByteLevel" in _decoders(spec) or model.get("byte_fallback"):
        return None
    if model.get("unk_id") is not None:  # Unigram
        return model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def _roles(tokenizer: HuggingFaceTokenizer, added: dict[str, int], config: dict[str, Any]) -> dict[str, str | None]:
    """Token of each of `ROLES`. Those missing from the config are found otherwise: `bos` and `eos` are the tokens
    around all text; the only special token of a model is both; the rest have BERT's names, or T5's and RoBERTa's."""
    names = {i: name for name, i in added.items()}
    sole = next(iter(added)) if len(added) == 1 else None
    first, last = tokenizer.post_processor_ids
    unsaid = {
        "<|bos|>": names.get(first[0]) if first else sole,
        "<|end|>": names.get(last[-1]) if last else sole,
        "<|mask|>": "[MASK]" if "[MASK]" in added else "<mask>",
        "<|pad|>": "[PAD]" if "[PAD]" in added else "<pad>",
    }
    said = {role: next((config[key] for key in keys if config.get(key)), None) for role, keys in ROLES.items()}
    return {role: _content(token) or unsaid[role] for role, token in said.items()}


def _content(token: str | dict[str, Any] | None) -> str | None:
    """Token in `tokenizer_config.json`: a text, or an object with it."""
    return token.get("content") if isinstance(token, dict) else token
