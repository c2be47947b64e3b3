"""Conversion of any tokenizer to Hugging Face's `tokenizer.json`: the same ids for the same text.

`specification(tokenizer)` is the file's content. Five kinds of tokenizer become three models: byte-level BPE (tiktoken;
bytes, without merges), BPE over characters with byte fallback (SentencePiece; characters, without merges) and Unigram
(SentencePiece). `from_merges` and `from_pieces` read other files of Hugging Face's.

SentencePiece writes a space as U+2581. The file has a space instead, so that the two characters stay distinct.
"""

from __future__ import annotations

import base64
import functools
import itertools
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gptjax.data.tokenizers import (
    ByteTokenizer,
    CharacterTokenizer,
    HuggingFaceTokenizer,
    MissingTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
)
from gptjax.data.tokenizers.missing import missing
from gptjax.data.tokenizers.sentencepiece import SPACE
from gptjax.data.tokenizers.tiktoken import byte_alphabet
from gptjax.data.tokenizers.tokenizer import REPLACEMENT, ROLES, add_roles
from gptjax.types import UserError

if TYPE_CHECKING:
    import tokenizers

Spec = dict[str, Any]


def specification(tokenizer: Tokenizer, append_eos: bool = False) -> Spec:
    """The content of the tokenizer's tokenizer.json. append_eos: every text ends with the end token, as encoders
    expect. Raises UserError for a kind of tokenizer that the format cannot express."""
    match tokenizer:
        case HuggingFaceTokenizer():
            spec = json.loads(tokenizer.data)
        case SentencePieceTokenizer():
            spec = _sentencepiece(tokenizer)
        case TiktokenTokenizer():
            words = {"type": "Split", "pattern": {"Regex": _oniguruma(tokenizer.pattern)}, "behavior": "Isolated"}
            spec = _byte_level(tokenizer._ranks, [words | {"invert": False}])
        case ByteTokenizer():
            spec = _byte_level({piece: i for i, piece in enumerate(tokenizer.pieces)}, [])
        case CharacterTokenizer():
            vocab = {piece.decode(): i for i, piece in enumerate(tokenizer.pieces)}
            spec = _spec(_bpe(vocab, [], unk_token=REPLACEMENT), decoder=_decoder(prefix=False))
        case MissingTokenizer():
            raise missing()
        case _:
            raise UserError(f"tokenizer: got a {type(tokenizer).__name__}, which tokenizer.json cannot express")
    known = {token["content"]: token["id"] for token in spec["added_tokens"]}
    for i, name in canonical(tokenizer).items():
        if name not in known:
            spec["added_tokens"].append(_added(name, i, special=True))
        elif known[name] != i:
            raise UserError(f"tokenizer: got the special token {name!r} with id {i}, must be {known[name]}, its own id")
    spec["added_tokens"].sort(key=lambda token: token["id"])
    _hold_ids(spec)
    current = spec["post_processor"] or {"type": "ByteLevel"}  # ByteLevel changes only offsets
    first, last = tokenizer.bos, tokenizer.eos if append_eos else None
    lacks_eos = append_eos and isinstance(tokenizer, HuggingFaceTokenizer) and not tokenizer.post_processor_ids[1]
    if (lacks_eos or current["type"] == "ByteLevel") and (first, last) != (None, None):
        spec["post_processor"] = _around(canonical(tokenizer), first, last)
    return spec


def _hold_ids(spec: Spec) -> None:
    """Put the added tokens into the model's vocabulary: the library renumbers those that it finds only in the list,
    from the size of the vocabulary."""
    vocab, added = spec["model"]["vocab"], {token["content"]: token["id"] for token in spec["added_tokens"]}
    if isinstance(vocab, dict):
        if moved := [name for name, i in added.items() if vocab.setdefault(name, i) != i]:
            raise UserError(f"tokenizer: got {moved[0]!r} as an added token and as a piece with another id")
        return
    there = {piece for piece, _ in vocab}
    new = {i: name for name, i in added.items() if name not in there}
    if new and sorted(new) != [*range(len(vocab), len(vocab) + len(new))]:  # a unigram's ids are the places of its list
        least = 1000 * min(score for _, score in vocab)  # below that of any text
        vocab += [[new.get(i, f"<unused {i}>"), least] for i in range(len(vocab), max(new) + 1)]


def canonical(tokenizer: Tokenizer) -> dict[int, str]:
    """Id -> name of each special token in the vocabulary. A name other than the role's takes precedence; of several
    roles, the first."""
    roles = [*reversed(ROLES)]
    ordered = sorted(tokenizer.specials.items(), key=lambda x: roles.index(x[0]) if x[0] in ROLES else len(roles))
    return dict(sorted({i: name for name, i in ordered}.items()))


@functools.lru_cache(maxsize=4)
def reader(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The `tokenizers` library's tokenizer, which parses special tokens in text."""
    try:
        import tokenizers
    except ImportError:
        raise UserError("tokenizer: a chat template needs the tokenizers library; pip install 'gptjax[hf]'") from None
    made = tokenizers.Tokenizer.from_str(json.dumps(specification(tokenizer)))
    made.no_truncation()
    made.no_padding()
    return made


def with_added(tokenizer: HuggingFaceTokenizer, tokens: Iterable[Mapping[str, Any]]) -> HuggingFaceTokenizer:
    """The tokenizer with those of the tokens that it lacks, as `transformers` adds them.

    tokens  like those of "added_tokens"; without an "id", that of the piece of this name, or the next"""
    spec, specials = json.loads(tokenizer.data), dict(tokenizer.specials)
    known = {token["content"] for token in spec["added_tokens"]}
    there = tokenizer.library.get_vocab(with_added_tokens=True)
    for token in tokens:
        name = token["content"]
        if name in known:
            continue
        known.add(name)
        i = there[name] = token.get("id", there.get(name, 1 + max(there.values())))
        flags = {flag: token[flag] for flag in ("single_word", "lstrip", "rstrip", "normalized") if flag in token}
        special = bool(token.get("special"))
        spec["added_tokens"].append(_added(name, i, special) | flags)
        if special:
            specials[name] = i
    if len(known) == len(json.loads(tokenizer.data)["added_tokens"]):
        return tokenizer
    spec["added_tokens"].sort(key=lambda token: token["id"])
    _hold_ids(spec)
    return HuggingFaceTokenizer(json.dumps(spec).encode(), specials)


def from_merges(
    vocab: Mapping[str, int], merges: Iterable[Sequence[str]], specials: Mapping[str, int], prefix: bool
) -> HuggingFaceTokenizer:
    """Build a byte-level BPE that splits text as GPT-2 does. prefix: put a space before every text."""
    level = {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": True}
    spec = _spec(_bpe(vocab, merges), decoder=level, pre_tokenizer=level)
    spec["added_tokens"] = [_added(name, i, special=True) for name, i in specials.items()]
    return HuggingFaceTokenizer(json.dumps(spec).encode(), specials)


def byte_level_bpe(
    vocab: Mapping[str, int],
    merges: Iterable[Sequence[str]],
    pattern: str | None,
    added: Mapping[int, str],
    special: Collection[int],
    first: int | None,
    whole_words: bool,
) -> Spec:
    """The tokenizer.json of a byte-level BPE.

    pattern      regular expression that splits text into words. None: GPT-2's
    added        id -> added token, which is read whole, or not at all in plain text if it is in `special`
    first        token that every text begins with
    whole_words  a word in the vocabulary is a token, whatever the merges"""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pattern is None}
    words = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    split = level if pattern is None else {"type": "Sequence", "pretokenizers": [words, level]}
    spec = _spec(_bpe(vocab, merges, ignore_merges=whole_words), decoder=level, pre_tokenizer=split)
    spec["added_tokens"] = [_added(name, i, special=i in special) for i, name in sorted(added.items())]
    if first is not None:
        spec["post_processor"] = _around(added, first, None)
    return spec


def from_pieces(vocab: Mapping[str, int], settings: Mapping[str, Any]) -> HuggingFaceTokenizer:
    """Build BERT's WordPiece, which splits text at spaces and punctuation, and words into the longest pieces.

    settings  from tokenizer_config.json: do_lower_case, strip_accents, tokenize_chinese_chars and the tokens' names"""
    tokens = {key: settings.get(f"{key}_token") or f"[{key.upper()}]" for key in ("cls", "sep", "mask", "pad", "unk")}
    lower, accents = settings.get("do_lower_case", True), settings.get("strip_accents")
    normalizer = {"type": "BertNormalizer", "clean_text": True, "lowercase": lower, "strip_accents": accents}
    normalizer["handle_chinese_chars"] = settings.get("tokenize_chinese_chars", True)
    model = {"type": "WordPiece", "unk_token": tokens["unk"], "continuing_subword_prefix": "##"}
    model |= {"max_input_chars_per_word": 100, "vocab": dict(vocab)}
    decoder = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    spec = _spec(model, decoder, normalizer, pre_tokenizer={"type": "BertPreTokenizer"})
    names = {vocab[name]: name for name in tokens.values() if name in vocab}
    spec["added_tokens"] = [_added(name, i, special=True) for i, name in sorted(names.items())]
    first, last = (vocab.get(tokens[key]) for key in ("cls", "sep"))
    spec["post_processor"] = _around(names, first, last)
    specials = {name: i for i, name in names.items() if name != tokens["unk"]}
    roles = {role: tokens[key.removesuffix("_token")] for role, (*_, key) in ROLES.items()}
    return HuggingFaceTokenizer(json.dumps(spec).encode(), add_roles(specials, roles))


def _spec(model: Spec, decoder: Spec, normalizer: Spec | None = None, pre_tokenizer: Spec | None = None) -> Spec:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def _bpe(vocab: Mapping[str, int], merges: Iterable[Sequence[str]], **options: Any) -> Spec:
    defaults = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE"} | defaults | flags | options | {"vocab": dict(vocab), "merges": [list(m) for m in merges]}


def _added(name: str, i: int, special: bool) -> Spec:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": name} | flags | {"special": special}


def _around(names: Mapping[int, str], first: int | None, last: int | None) -> Spec:
    """Post-processor that adds a first and a last token to every text."""

    def token(i: int | None, kind: int) -> list[Spec]:
        return [] if i is None else [{"SpecialToken": {"id": names[i], "type_id": kind}}]

    single = [*token(first, 0), {"Sequence": {"id": "A", "type_id": 0}}, *token(last, 0)]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}, *token(last, 1)]
    special = {names[i]: {"id": names[i], "ids": [i], "tokens": [names[i]]} for i in (first, last) if i is not None}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def _decoder(prefix: bool) -> Spec:
    """Decoder from pieces of characters and bytes to text. prefix: remove the space before the text."""
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}, *strip]}


def _byte_level(ranks: Mapping[bytes, int], words: list[Spec]) -> Spec:
    letters = {byte: letter for letter, byte in byte_alphabet().items()}

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [(spell(a), spell(b)) for a, b in _merges(ranks)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = _bpe({spell(token): rank for token, rank in ranks.items()}, merges, ignore_merges=bool(merges))
    return _spec(model, decoder=level, pre_tokenizer={"type": "Sequence", "pretokenizers": [*words, level]})


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each token was merged from, in the order of the ranks: its two pieces after all earlier merges."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        pieces = [token[i : i + 1] for i in range(len(token))]
        while len(pieces) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in itertools.pairwise(pieces)]
            lowest = min(pairs)
            if lowest >= rank:
                break
            i = pairs.index(lowest)
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
        if len(pieces) == 2:
            merges.append((pieces[0], pieces[1]))
    return merges


def _oniguruma(pattern: str) -> str:
    """Translate tiktoken's pattern to Oniguruma, where `{1,3}+` means repetition and `$` the end of a line. Possessive
    quantifiers become greedy ones, which match the same text in these patterns."""
    return re.sub(r"([+*?]|\{\d+,\d+\})\+", r"\1", pattern).replace("$", r"\z")


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> Spec:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.data)  # type: ignore[attr-defined]
    kinds, rules, trainer = proto.SentencePiece, proto.normalizer_spec, proto.trainer_spec
    literal = (kinds.CONTROL, kinds.UNKNOWN, kinds.BYTE)
    pieces = [p.piece if p.type in literal else p.piece.replace(SPACE, " ") for p in proto.pieces]
    unknown = next(i for i, p in enumerate(proto.pieces) if p.type == kinds.UNKNOWN)
    if trainer.model_type == trainer.BPE:
        scores = {piece: p.score for piece, p in zip(pieces, proto.pieces, strict=True) if p.type == kinds.NORMAL}
        vocab = {piece: i for i, piece in enumerate(pieces)}
        options = {"unk_token": pieces[unknown], "fuse_unk": True, "byte_fallback": trainer.byte_fallback}
        model = _bpe(vocab, _splits(scores, vocab), **options)
    elif trainer.model_type == trainer.UNIGRAM:
        # Control symbols must never be produced from text: give them a score below that of any text.
        lowest = min(p.score for p in proto.pieces if p.type == kinds.NORMAL)
        scored = [
            [piece, p.score if p.type == kinds.NORMAL else 1000 * lowest]
            for piece, p in zip(pieces, proto.pieces, strict=True)
        ]
        model = {"type": "Unigram", "unk_id": unknown, "vocab": scored, "byte_fallback": trainer.byte_fallback}
    else:
        raise UserError("tokenizer: got a SentencePiece model of kind word or char, must be bpe or unigram")
    normalizers = []
    if rules.precompiled_charsmap:
        charsmap = base64.b64encode(rules.precompiled_charsmap).decode()
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if rules.remove_extra_whitespaces:
        normalizers += [_replace(r"\A +| +\z", ""), _replace(" {2,}", " ")]
    if rules.add_dummy_prefix:
        normalizers.append({"type": "Prepend", "prepend": " "})
    sequence = {"type": "Sequence", "normalizers": normalizers} if normalizers else None
    spec = _spec(model, decoder=_decoder(rules.add_dummy_prefix), normalizer=sequence)
    added = [_added(pieces[i], i, special=False) for i, p in enumerate(proto.pieces) if p.type == kinds.USER_DEFINED]
    return spec | {"added_tokens": added}


def _splits(scores: Mapping[str, float], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Merges equivalent to SentencePiece's BPE, which has scores instead: two adjacent pieces are merged if the
    vocabulary has the result, in the order of the scores."""
    merges = []
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        found = [pair for pair in pairs if pair[0] in scores and pair[1] in scores]
        merges += sorted(found, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return merges


def _replace(pattern: str, content: str) -> Spec:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}
