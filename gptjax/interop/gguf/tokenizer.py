"""The tokenizer in a GGUF file.

llama.cpp has its own tokenizers, of two kinds. "llama" is SentencePiece's BPE: pieces with scores, merged in the order
of their scores. "gpt2" is byte-level BPE: tokens in GPT-2's alphabet for bytes, the list of merges in order, and the
name of a regular expression that splits text into words. Neither normalises text.
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

from gptjax.data.tokenizers import (
    HuggingFaceTokenizer,
    MissingTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
)
from gptjax.data.tokenizers.missing import missing
from gptjax.data.tokenizers.tiktoken import CL100K_PATTERN, GPT2_PATTERN, O200K_PATTERN, byte_alphabet
from gptjax.interop.tokenizer_json import canonical
from gptjax.types import Json, UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Token types, with SentencePiece's numbers."""

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
QWEN2_PATTERN = _CONTRACTIONS + _WORDS % ""
PATTERNS = {
    GPT2_PATTERN: "gpt-2",
    CL100K_PATTERN: "llama-bpe",
    O200K_PATTERN: "gpt-4o",
    _CONTRACTIONS + _WORDS % "{1,3}": "llama-bpe",
    QWEN2_PATTERN: "qwen2",
}
"""Regular expression that splits text into words -> llama.cpp's name for it."""


class Token(NamedTuple):
    text: str
    type: int
    score: float = 0.0


def metadata(tokenizer: Tokenizer, vocab: int) -> dict[str, Any]:
    """The metadata keys of `tokenizer` for a model with `vocab` rows in its embedding; rows without a token get an
    unused one.

    Raises UserError for a tokenizer that llama.cpp cannot express, one larger than the model, or one without an end
    token."""
    if isinstance(tokenizer, MissingTokenizer):
        raise missing()
    if tokenizer.vocab > vocab:
        raise UserError(f"tokenizer: got {tokenizer.vocab:,} ids, must be at most the model's {vocab:,}")
    if tokenizer.eos is None:
        raise UserError("tokenizer: got no end token, must have one; llama.cpp would use another token for it")
    if isinstance(tokenizer, SentencePieceTokenizer):
        keys, tokens = _sentencepiece(tokenizer)
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        keys, tokens = _huggingface(tokenizer)
    elif isinstance(tokenizer, TiktokenTokenizer):
        keys, tokens = _tiktoken(tokenizer)
    else:
        raise UserError(
            f"tokenizer: got kind {tokenizer.kind}, must be a BPE of SentencePiece, Hugging Face or tiktoken"
        )
    for i, name in canonical(tokenizer).items():
        tokens.setdefault(i, Token(name, CONTROL, -1000.0))
    listed = [tokens.get(i) or Token(f"[PAD{i}]", UNUSED, -1e4) for i in range(vocab)]
    keys |= {
        "tokenizer.ggml.tokens": [token.text for token in listed],
        "tokenizer.ggml.token_type": [token.type for token in listed],
        "tokenizer.ggml.eos_token_id": tokenizer.eos,
        "tokenizer.ggml.add_bos_token": _adds_bos(tokenizer),
        "tokenizer.ggml.add_eos_token": False,
    }
    if tokenizer.bos is not None:
        keys["tokenizer.ggml.bos_token_id"] = tokenizer.bos
    if keys["tokenizer.ggml.model"] == "llama":
        keys["tokenizer.ggml.scores"] = [token.score for token in listed]
        keys["tokenizer.ggml.add_space_prefix"] = tokenizer.decode_bytes(tokenizer.encode("a")) == b" a"
    return keys


_Description = tuple[dict[str, Any], dict[int, Token]]
"""Metadata keys of one kind of tokenizer, and id -> token."""


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> _Description:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.data)  # type: ignore[attr-defined]
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type != trainer.BPE:
        kind = trainer.ModelType.Name(trainer.model_type).lower()
        raise UserError(f"tokenizer: got a SentencePiece model of kind {kind}, must be bpe for a GGUF file")
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        raise UserError("tokenizer: got a SentencePiece model that normalises text, which a GGUF file cannot express")
    tokens = {i: Token(piece.piece, piece.type, piece.score) for i, piece in enumerate(model.pieces)}
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.unknown_token_id": trainer.unk_id}, tokens


def _tiktoken(tokenizer: TiktokenTokenizer) -> _Description:
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    ranks = {piece: i for i, piece in enumerate(tokenizer.pieces) if piece}
    text = {piece: "".join(letters[byte] for byte in piece) for piece in ranks}
    merges = [f"{text[left]} {text[right]}" for left, right in _merges(ranks)]
    return _byte_level(tokenizer.pattern, merges), {i: Token(text[piece], NORMAL) for piece, i in ranks.items()}


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The pair that each token was merged from: its two pieces after all earlier merges."""
    for token, rank in ranks.items():
        pieces = [token[i : i + 1] for i in range(len(token))]
        while len(pieces) > 2:
            pairs = [ranks.get(left + right, rank) for left, right in itertools.pairwise(pieces)]
            if (best := min(pairs)) >= rank:
                break
            i = pairs.index(best)
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
        if len(pieces) == 2:
            yield pieces[0], pieces[1]


def _huggingface(tokenizer: HuggingFaceTokenizer) -> _Description:
    spec = json.loads(tokenizer.data)
    model = spec["model"]
    if model.get("type", "BPE") != "BPE":
        raise UserError(f"tokenizer: got a tokenizer.json of type {model['type']}, must be BPE for a GGUF file")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    _check_normalizer(spec, byte_level=not model.get("byte_fallback"))
    added = {
        token["id"]: Token(token["content"], CONTROL if token["special"] else USER_DEFINED, -1000.0)
        for token in spec["added_tokens"]
    }
    if not model.get("byte_fallback"):
        tokens = {i: Token(text, NORMAL) for text, i in model["vocab"].items()}
        return _byte_level(_pattern(spec.get("pre_tokenizer")), merges), tokens | added
    # Converted from SentencePiece, where a piece's score was the rank of its first merge.
    scores: dict[str, float] = {}
    for i, merge in enumerate(model["merges"]):
        scores.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), -float(i))
    tokens = {
        i: Token(
            text.replace(" ", "\u2581"),  # we write a space as it is, see `tokenizer_json`
            BYTE if text.startswith("<0x") and len(text) == 6 else NORMAL,
            scores.get(text, -1e6),
        )
        for text, i in model["vocab"].items()
    } | added
    unknown = model["vocab"].get(model.get("unk_token"))
    if unknown is None:
        return {"tokenizer.ggml.model": "llama"}, tokens
    tokens[unknown] = Token(model["unk_token"], UNKNOWN)
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.unknown_token_id": unknown}, tokens


def _check_normalizer(spec: dict[str, Any], byte_level: bool) -> None:
    """Raise UserError for a normaliser that llama.cpp does not have; warn of NFC, which changes few texts and is left
    out by its own converter too. SentencePiece's may put a space before all text, and write a space as U+2581."""
    normalizer = spec.get("normalizer") or {}
    for step in normalizer.get("normalizers", [normalizer] if normalizer else []):
        match step:
            case {"type": "NFC"}:
                message = "tokenizer: got the normaliser NFC, which llama.cpp lacks: give it text in NFC"
                warnings.warn(message, stacklevel=2)
            case {"type": "Prepend", "prepend": " " | "\u2581"} if not byte_level:
                pass
            case {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"} if not byte_level:
                pass
            case _:
                raise _inexpressible("normaliser", step)
    if byte_level:
        return  # `_pattern` looks at the pre-tokenizer
    pre = spec.get("pre_tokenizer") or {}
    for step in pre.get("pretokenizers", [pre] if pre else []):
        harmless = step["type"] == "Metaspace" or step.get("pattern") == {"String": " "}
        if not harmless:
            raise _inexpressible("pre-tokenizer", step)


def _inexpressible(kind: str, step: Json) -> UserError:
    return UserError(f"tokenizer: got the {kind} {json.dumps(step)[:200]}, which a GGUF file cannot express")


def _byte_level(pattern: str, merges: list[str]) -> dict[str, Any]:
    if pattern not in PATTERNS:
        names = ", ".join(sorted(set(PATTERNS.values())))
        raise UserError(f"tokenizer: got the pattern {pattern!r}, must be that of {names} for a GGUF file")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": PATTERNS[pattern],
        "tokenizer.ggml.merges": merges,
    }


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str:
    """The regular expression of a tokenizer.json's pre-tokenizer; any other pre-tokenizer as JSON, for the message."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    match steps:
        case [{"type": "ByteLevel", "add_prefix_space": False} as step] if step.get("use_regex", True):
            return GPT2_PATTERN
        case [
            {"type": "Split", "pattern": {"Regex": pattern}},
            {"type": "ByteLevel", "add_prefix_space": False} as step,
        ] if not step.get("use_regex", True):
            return pattern
    return json.dumps(pre_tokenizer)


def _adds_bos(tokenizer: Tokenizer) -> bool:
    """True if every text begins with the start token: as a tokenizer.json says; else if there is a start token that
    is not also the end token, as GPT-2's is."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        import tokenizers

        return tokenizers.Tokenizer.from_str(tokenizer.data.decode()).encode("").ids == [tokenizer.bos]
    return tokenizer.bos not in (None, tokenizer.eos)
