"""Byte-level BPE from published ranks, with the `tiktoken` library: GPT-2, GPT-4 and later.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.2.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Self

from gptjax.data.tokenizers.tokenizer import Tokenizer, add_roles
from gptjax.types import UserError

if TYPE_CHECKING:
    from tiktoken import Encoding

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
CL100K_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"""
    r"""\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)
O200K_PATTERN = (
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"""
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"""
    r"""\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
LLAMA3_PATTERN = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"""
    r"""\s+(?!\S)|\s+"""
)
LLAMA3_SIZE = 128_000
"""Ranks of Llama 3; its special tokens follow."""
TEKKEN_SPECIALS = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
"""Special tokens of a tekken.json that lists none, by id, as in `mistral_common`."""
ENCODINGS = {
    "gpt2": (GPT2_PATTERN, {"<|endoftext|>": 50_256}),
    "r50k_base": (GPT2_PATTERN, {"<|endoftext|>": 50_256}),
    "p50k_base": (GPT2_PATTERN, {"<|endoftext|>": 50_256}),
    "cl100k_base": (
        CL100K_PATTERN,
        {
            "<|endoftext|>": 100_257,
            "<|fim_prefix|>": 100_258,
            "<|fim_middle|>": 100_259,
            "<|fim_suffix|>": 100_260,
            "<|endofprompt|>": 100_276,
        },
    ),
    "o200k_base": (O200K_PATTERN, {"<|endoftext|>": 199_999, "<|endofprompt|>": 200_018}),
}
"""Name -> pre-tokenization pattern, and special tokens. From `tiktoken_ext` (MIT)."""

SOLE = {"<|bos|>": "<|endoftext|>", "<|end|>": "<|endoftext|>"}
"""One token starts and ends documents."""


@dataclasses.dataclass(frozen=True, eq=False)
class TiktokenTokenizer(Tokenizer):
    """A `.tiktoken` file: on each line the bytes of a token, in base64, and its rank, which is its id."""

    kind = "tiktoken"
    file = "ranks.tiktoken"

    pattern: str = GPT2_PATTERN
    """Pre-tokenization pattern: a regular expression for the words within which bytes are merged."""

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a file of ranks with a name in `ENCODINGS`. Raises `UserError` for another name or content."""
        path = Path(path)
        if path.stem not in ENCODINGS:
            raise UserError(
                f"tokenizer: got {path}, must be named after its encoding, one of {', '.join(ENCODINGS)}; "
                "that decides how text is split"
            )
        pattern, specials = ENCODINGS[path.stem]
        tokenizer = cls(path.read_bytes(), add_roles(specials, SOLE), pattern)
        if not tokenizer._complete:
            raise UserError(
                f"tokenizer: got {path}, must be a file of tiktoken ranks; it is damaged or of another kind"
            )
        return tokenizer

    @classmethod
    def from_llama3(cls, path: str | Path) -> Self:
        """Read a `tokenizer.model` of ranks, as Meta published Llama 3's. Its special tokens are in no file; those of
        Llama 3 follow 128,000 ranks. Raises `UserError` for other content."""
        path = Path(path)
        tokenizer = cls(path.read_bytes(), {}, LLAMA3_PATTERN)
        if not tokenizer._complete:
            raise UserError(
                f"tokenizer: got {path}, must be a file of tiktoken ranks; it is damaged or of another kind"
            )
        if len(tokenizer._ranks) != LLAMA3_SIZE:
            return tokenizer
        names = [f"<|reserved_special_token_{i}|>" for i in range(251)]
        names[0:0] = ["<|begin_of_text|>", "<|end_of_text|>"]
        names[6:6] = ["<|start_header_id|>", "<|end_header_id|>"]
        names[9:9] = ["<|eot_id|>"]
        specials = {name: LLAMA3_SIZE + i for i, name in enumerate(names)}
        roles = {"<|bos|>": "<|begin_of_text|>", "<|end|>": "<|end_of_text|>"}
        return dataclasses.replace(tokenizer, specials=add_roles(specials, roles))

    @classmethod
    def from_tekken(cls, path: str | Path) -> Self:
        """Read Mistral's `tekken.json`: special tokens first, then the ranks. Raises `UserError` for other content."""
        path = Path(path)
        try:
            content = json.loads(path.read_bytes())
            config, listed = content["config"], content.get("special_tokens")
            count, size = int(config["default_num_special_tokens"]), int(config["default_vocab_size"])
            named = dict(enumerate(TEKKEN_SPECIALS[:count]))
            if listed is not None:
                named = {int(token["rank"]): str(token["token_str"]) for token in listed}
            specials = {named.get(i, f"<SPECIAL_{i}>"): i for i in range(count)}
            vocab = {base64.b64decode(token["token_bytes"]): int(token["rank"]) for token in content["vocab"]}
            ranks = {token: rank + count for token, rank in vocab.items() if rank < size - count}
            roles = {"<|bos|>": "<s>", "<|end|>": "</s>", "<|pad|>": "<pad>"}
            tokenizer = cls(_lines(ranks), add_roles(specials, roles), str(config["pattern"]))
            if tokenizer._complete and len(ranks) == size - count and len(specials) == count:
                return tokenizer
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        raise UserError(f"tokenizer: got {path}, must be a tekken.json; it is damaged or of another kind")

    @functools.cached_property
    def _complete(self) -> bool:
        """True if the file is of ranks, and covers all bytes."""
        try:
            return all(bytes([byte]) in self._ranks for byte in range(256))
        except ValueError:  # binascii.Error among them
            return False

    @classmethod
    def from_gpt2_folder(cls, folder: str | Path) -> Self:
        """Read OpenAI's `encoder.json` and `vocab.bpe`. Raises `UserError` if they do not match."""
        folder = Path(folder)
        alphabet = byte_alphabet()
        try:
            encoder: dict[str, int] = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
            merges = (folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
            agree = all(encoder[merge.replace(" ", "")] == 256 + i for i, merge in enumerate(merges))
            specials = {"<|endoftext|>": encoder.pop("<|endoftext|>")}
            ranks = {bytes(map(alphabet.__getitem__, piece)): i for piece, i in encoder.items()}
        except (ValueError, KeyError):
            agree, specials, ranks = False, {}, {}
        if not agree:
            raise UserError(
                f"tokenizer: got {folder}, must hold an encoder.json and a vocab.bpe of one vocabulary; one is damaged"
            )
        return cls(_lines(ranks), add_roles(specials, SOLE), GPT2_PATTERN)

    @classmethod
    def download(cls, name: str) -> Self:
        """Download a published encoding with `tiktoken`, which caches it. Raises `UserError` without a network."""
        try:
            encoding = _tiktoken().get_encoding(name)
        except (OSError, ValueError) as error:
            raise UserError(
                f"tokenizer: got {name!r}, which cannot be downloaded ({type(error).__name__}); "
                "give the path of a file or folder with it"
            ) from None
        pattern, specials = ENCODINGS[name]
        return cls(_lines(encoding._mergeable_ranks), add_roles(specials, SOLE), pattern)

    @functools.cached_property
    def _ranks(self) -> dict[bytes, int]:
        lines = (line.split() for line in self.data.splitlines() if line)
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}

    @functools.cached_property
    def _encoding(self) -> Encoding:
        # Without special tokens it cannot produce any.
        return _tiktoken().Encoding("gptjax", pat_str=self.pattern, mergeable_ranks=self._ranks, special_tokens={})

    @functools.cached_property
    def pieces(self) -> list[bytes]:
        pieces = [b""] * (1 + max(self._ranks.values()))
        for token, rank in self._ranks.items():
            pieces[rank] = token
        return pieces

    def _encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)


def byte_alphabet() -> dict[str, int]:
    """Character in GPT-2's files -> the byte that it stands for: itself if printable, else U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _lines(ranks: dict[bytes, int]) -> bytes:
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ordered)


def _tiktoken():
    try:
        import tiktoken
    except ImportError:
        raise UserError("tokenizer: this one needs the tiktoken library; pip install 'gptjax[hf]'") from None
    return tiktoken
