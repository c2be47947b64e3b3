"""Read the tokenizer in a GGUF file, its chat template and the tokens that end a text: the inverse of `tokenizer`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gptjax.data.tokenizers import HuggingFaceTokenizer, MissingTokenizer, SentencePieceTokenizer, Tokenizer
from gptjax.data.tokenizers.tiktoken import GPT2_PATTERN, LLAMA3_PATTERN, O200K_PATTERN
from gptjax.data.tokenizers.tokenizer import add_roles
from gptjax.interop.gguf.tokenizer import BYTE, CONTROL, NORMAL, QWEN2_PATTERN, UNKNOWN, UNUSED, USER_DEFINED
from gptjax.interop.templates import NATIVE, ChatTemplate
from gptjax.interop.tokenizer_json import byte_level_bpe
from gptjax.types import UserError, one_line

PATTERNS = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "roberta-bpe"), GPT2_PATTERN),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"), LLAMA3_PATTERN),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen"), QWEN2_PATTERN),
    **dict.fromkeys(("gpt-4o", "llama4"), O200K_PATTERN),
}
"""llama.cpp's name of a regular expression that splits text into words -> the expression."""
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3")
"""Names with which a word in the vocabulary is a token, whatever the merges."""
ENDS = (
    *("</s>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>"),
    *("<end_of_turn>", "<|return|>", "<|call|>", "<｜end▁of▁sentence｜>", "<|end_of_turn|>", "<EOT>"),
)
"""Control tokens that end a text or a turn wherever they are found, as in llama.cpp."""


def read(metadata: Mapping[str, Any], vocab: int) -> tuple[Tokenizer, ChatTemplate | None, tuple[int, ...] | None]:
    """The tokenizer for a model with `vocab` rows in its embedding, the chat template, and the ids that end a text.

    Raises UserError for a tokenizer of another kind than SentencePiece's BPE and byte-level BPE, for an unknown regular
    expression, and for a damaged one."""
    keys = _Keys(metadata)
    kind = keys.get("model", str, "none")
    if kind in ("none", "no_vocab"):
        return MissingTokenizer(b"", {}, vocab), None, None
    if kind not in ("llama", "gpt2"):
        raise UserError(f"tokenizer.ggml.model: got {kind[:40]!r}, must be llama (SentencePiece's BPE) or gpt2")
    tokens = keys.list("tokens", str)
    if not 0 < len(tokens) <= vocab:
        raise UserError(f"tokenizer.ggml.tokens: got {len(tokens):,}, must be 1 to the model's {vocab:,}")
    types = keys.list("token_type", int, [NORMAL] * len(tokens), len(tokens))
    ids = {name: keys.id(name, len(tokens)) for name in ("bos", "eos", "eot", "eom", "unknown")}
    for name in ("bos", "eos", "eot"):  # never read in text, whatever the file calls them
        if (i := ids[name]) is not None and types[i] != UNKNOWN:
            types[i] = CONTROL
    while types and types[-1] == UNUSED:
        types.pop()
    tokens = tokens[: len(types)]
    if keys.get("add_eos_token", bool, False):
        raise UserError("tokenizer.ggml.add_eos_token: got True, must be False for a model that continues a text")
    names = {"<|bos|>": ids["bos"], "<|end|>": ids["eos"]}
    if not keys.get("add_bos_token", bool, kind == "llama"):
        names["<|bos|>"] = None
    roles = {role: None if i is None else tokens[i] for role, i in names.items()}
    controls = {token: i for i, (token, type_) in enumerate(zip(tokens, types, strict=True)) if type_ == CONTROL}
    specials = add_roles(controls, roles)
    build = _sentencepiece if kind == "llama" else _byte_level
    tokenizer = build(keys, tokens, types, specials, names["<|bos|>"])
    ends = {i for name in ("eos", "eot", "eom") if (i := ids[name]) is not None}
    more = {name: i for name, i in controls.items() if name in ENDS}
    if {"<|return|>", "<|call|>"} <= more.keys():  # gpt-oss ends each message with <|end|>, a turn with these
        more.pop("<|end|>", None)
    ends |= set(more.values())
    return tokenizer, _template(metadata, tokens, ids), tuple(sorted(ends)) or None


class _Keys:
    """The metadata of the tokenizer."""

    def __init__(self, metadata: Mapping[str, Any]):
        self._metadata = metadata

    def get(self, name: str, kind: type, default: Any) -> Any:
        value = self._metadata.get(f"tokenizer.ggml.{name}", default)
        if type(value) is not kind:
            raise UserError(f"tokenizer.ggml.{name}: got {str(value)[:40]}, must be of type {kind.__name__}")
        return value

    def list(self, name: str, kind: type, default: list[Any] | None = None, length: int | None = None) -> list[Any]:
        values = self.get(name, list, default)
        if any(type(value) is not kind for value in values) or len(values) != (length or len(values)):
            raise UserError(f"tokenizer.ggml.{name}: got {len(values)} values, must be {length} of {kind.__name__}")
        return list(values)

    def id(self, name: str, count: int) -> int | None:
        key = f"{name}_token_id"
        if f"tokenizer.ggml.{key}" not in self._metadata:
            return None
        if not 0 <= (i := self.get(key, int, None)) < count:
            raise UserError(f"tokenizer.ggml.{key}: got {i}, must be less than the number of tokens, {count}")
        return i


def _template(metadata: Mapping[str, Any], tokens: list[str], ids: Mapping[str, int | None]) -> ChatTemplate | None:
    source = metadata.get("tokenizer.chat_template")
    if source is None or source == NATIVE:
        return None
    if not isinstance(source, str):
        raise UserError(f"tokenizer.chat_template: got {str(source)[:40]}, must be text")
    named = {f"{name}_token": tokens[i] for name in ("bos", "eos") if (i := ids[name]) is not None}
    return ChatTemplate(source, named)


def _sentencepiece(
    keys: _Keys, tokens: list[str], types: list[int], specials: Mapping[str, int], bos: int | None
) -> Tokenizer:
    from sentencepiece import sentencepiece_model_pb2

    scores = keys.list("scores", float, [0.0] * len(tokens))[: len(tokens)]
    if len(scores) < len(tokens):
        raise UserError(
            f"tokenizer.ggml.scores: got {len(scores)} numbers, must be one for each of {len(tokens)} tokens"
        )
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    for token, type_, score in zip(tokens, types, scores, strict=True):
        if type_ not in (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE):
            raise UserError(f"tokenizer.ggml.token_type: got {type_}, must be 1 to 6")
        proto.pieces.add(piece=token, type=type_, score=score)
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.byte_fallback = trainer.BPE, BYTE in types
    unknown = [i for i, type_ in enumerate(types) if type_ == UNKNOWN]
    if len(unknown) != 1:
        raise UserError(f"tokenizer.ggml.token_type: got {len(unknown)} unknown tokens, must be one")
    trainer.unk_id = unknown[0]
    trainer.unk_piece = tokens[unknown[0]]
    trainer.bos_id = trainer.eos_id = trainer.pad_id = -1
    rules.name, rules.remove_extra_whitespaces = "identity", False
    rules.add_dummy_prefix = keys.get("add_space_prefix", bool, True)
    tokenizer = SentencePieceTokenizer(proto.SerializeToString(), specials)
    try:
        tokenizer.encode("a")
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"tokenizer: got tokens that SentencePiece refuses: {one_line(error)}") from None
    return tokenizer


def _byte_level(
    keys: _Keys, tokens: list[str], types: list[int], specials: Mapping[str, int], bos: int | None
) -> Tokenizer:
    pre = keys.get("pre", str, "default")
    if pre not in PATTERNS:
        raise UserError(f"tokenizer.ggml.pre: got {pre[:40]!r}, must be one of {', '.join(PATTERNS)}")
    merges = [merge.split(" ", 1) for merge in keys.list("merges", str)]
    if not all(len(merge) == 2 for merge in merges):
        raise UserError("tokenizer.ggml.merges: got one without two parts; the file is damaged")
    vocab = {token: i for i, (token, type_) in enumerate(zip(tokens, types, strict=True)) if type_ != UNUSED}
    if len(vocab) < len(types) - types.count(UNUSED):
        raise UserError("tokenizer.ggml.tokens: got a token twice; the file is damaged")
    if not all({*merge, "".join(merge)} <= vocab.keys() for merge in merges):
        raise UserError("tokenizer.ggml.merges: got one of tokens that are not there; the file is damaged")
    added = {i: tokens[i] for i, type_ in enumerate(types) if type_ in (CONTROL, USER_DEFINED)}
    special = {i for i in added if types[i] == CONTROL}
    pattern = None if PATTERNS[pre] == GPT2_PATTERN else PATTERNS[pre]
    spec = byte_level_bpe(vocab, merges, pattern, added, special, bos, whole_words=pre in WHOLE_WORDS)
    tokenizer = HuggingFaceTokenizer(json.dumps(spec).encode(), specials)
    for name in specials:
        if set(tokenizer.encode(name)) & set(specials.values()):
            raise UserError(f"tokenizer: got the special token {name[:40]!r}, which it reads in plain text, must not")
    return tokenizer
