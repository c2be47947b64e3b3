"""Tokenizers of Hugging Face folders, in and out.

tokenizer, template = load(folder), load_template(folder)
save(tokenizer, other, context=2048, template=template)
transformers.AutoTokenizer.from_pretrained(other)       # the same ids for the same text, and for a conversation
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from gptjax.data.tokenizers import CHAT_SPECIALS, HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from gptjax.data.tokenizers.huggingface import unknown_piece
from gptjax.data.tokenizers.tokenizer import ROLES, named
from gptjax.interop.templates import NATIVE, ChatTemplate
from gptjax.interop.tokenizer_json import canonical, from_merges, from_pieces, specification
from gptjax.types import UserError


def load(folder: str | Path, vocab: int | None = None) -> Tokenizer:
    """The tokenizer of a folder: its tokenizer.json, else a SentencePiece model, else GPT-2's vocab.json and
    merges.txt, else BERT's vocab.txt. Its first and last token are those that tokenizer_config.json and
    special_tokens_map.json name; it has no first one where `transformers` doesn't put it before all text (GPT-2).

    vocab  how many tokens the model has; added ones beyond are left out, for it can neither read nor write them

    Raises UserError where there is none, or a damaged one."""
    folder = Path(folder)
    settings = _settings(folder)
    sentencepiece = [folder / name for name in ("tokenizer.model", "spiece.model") if (folder / name).exists()]
    if (folder / "tokenizer.json").exists():
        tokenizer = HuggingFaceTokenizer.from_file(folder / "tokenizer.json")
    elif sentencepiece:
        tokenizer = SentencePieceTokenizer.from_file(sentencepiece[0])
        # Fine-tuned models have more special tokens than their SentencePiece file.
        more = {token["content"]: int(i) for i, token in settings.get("added_tokens_decoder", {}).items()}
        more |= _json(folder / "added_tokens.json")
        if sentencepiece[0].name == "spiece.model":  # T5's: its sentinels are in none of its files, the last one first
            count = settings.get("extra_ids", 100)
            more |= {f"<extra_id_{count - 1 - i}>": len(tokenizer.pieces) + i for i in range(count)}
        more = {name: i for name, i in more.items() if i >= len(tokenizer.pieces)}
        tokenizer = dataclasses.replace(tokenizer, specials={**tokenizer.specials, **more})
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        tokenizer = _gpt2(folder, settings)
    elif (folder / "vocab.txt").exists():
        pieces = (folder / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
        tokenizer = from_pieces({piece: i for i, piece in enumerate(pieces)}, settings)
    else:
        raise UserError(
            f"tokenizer: got the folder {folder}, must hold tokenizer.json, tokenizer.model, spiece.model, vocab.txt, "
            "or vocab.json and merges.txt"
        )
    if vocab is not None and tokenizer.vocab > vocab:
        tokenizer = _within(tokenizer, vocab)
    names = canonical(tokenizer)
    specials = {name: i for i, name in names.items()}
    roles = {role: names.get(tokenizer.specials.get(role, -1)) for role in ROLES}
    roles |= {role: settings[key] for role, keys in ROLES.items() for key in reversed(keys) if settings.get(key)}
    if not _begins(folder, tokenizer, settings, specials.get(roles["<|bos|>"] or "", -1)):
        roles["<|bos|>"] = None
    return dataclasses.replace(tokenizer, specials=named(specials, roles))


def load_template(folder: str | Path) -> ChatTemplate | None:
    """How the folder's model reads conversations; None where it doesn't say, or where that is our own format.

    Raises UserError for a template that is not Jinja's, and where there are several and none is the default."""
    folder = Path(folder)
    settings = _settings(folder)
    source = settings.get("chat_template")
    if (folder / "chat_template.jinja").exists():
        source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(source, list):
        named_ = {template["name"]: template["template"] for template in source}
        if "default" not in named_:
            raise UserError(f"template: got {folder} with {', '.join(named_)}, must have one named default")
        source = named_["default"]
    if source is None or source == NATIVE:
        return None
    return ChatTemplate(source, {k: v for k, v in settings.items() if k.endswith("_token") and isinstance(v, str)})


def save(
    tokenizer: Tokenizer,
    folder: str | Path,
    context: int | None,
    template: ChatTemplate | None = None,
    append_eos: bool = False,
) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    context   the most tokens that the model reads
    template  how the model reads conversations; None: in our own format, where the tokenizer has its markers
    append_eos    all text ends with the last token, as encoders read it

    `transformers` then puts the first token, if there is one, before all text, unless told `add_special_tokens=False`,
    for so begin all documents that models are trained on here.
    Special tokens that a text spells out it reads as such, where `Tokenizer.encode` doesn't."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names, spec = canonical(tokenizer), specification(tokenizer, append_eos)
    tokens = dict(template.tokens) if template else {}
    encoder = "<|mask|>" in tokenizer.specials
    for role, keys in ROLES.items():
        if role in tokenizer.specials:
            tokens |= dict.fromkeys(keys if encoder else keys[:1], names[tokenizer.specials[role]])
    if (pad := padding(tokenizer, append_eos)) is not None:
        tokens.setdefault("pad_token", names[pad])
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= tokens
    if (unknown := unknown_piece(spec)) in {token["content"] for token in spec["added_tokens"]}:
        settings["unk_token"] = unknown
    if context is not None:
        settings["model_max_length"] = context
    if template is not None:
        settings["chat_template"] = template.source
    elif set(CHAT_SPECIALS) <= tokenizer.specials.keys():
        settings["chat_template"] = NATIVE
    files = {
        "tokenizer.json": spec,
        "tokenizer_config.json": settings,
        "special_tokens_map.json": tokens,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def padding(tokenizer: Tokenizer, append_eos: bool = False) -> int | None:
    """The token that fills up a row for `transformers`: the tokenizer's own, else the last one; where all text ends
    with that, another special one, for classifiers there look for a text's last token that is no padding."""
    if (pad := tokenizer.specials.get("<|pad|>")) is not None or not append_eos:
        return tokenizer.eos if pad is None else pad
    others = {tokenizer.bos, *tokenizer.specials.values()} - {None, tokenizer.eos}
    return tokenizer.bos if tokenizer.bos in others else min(others, default=None)


def closes(folder: str | Path, tokenizer: Tokenizer) -> bool:
    """Whether all text ends with the last token, as the folder's files have it."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return bool(tokenizer.around[1])
    return _settings(Path(folder)).get("add_eos_token", False)


def _within(tokenizer: Tokenizer, vocab: int) -> Tokenizer:
    """Without the added tokens from `vocab` on: one for images (Gemma 3 1B, which sees none), or for padding."""
    data = tokenizer.data
    if isinstance(tokenizer, HuggingFaceTokenizer):
        spec = json.loads(data)
        beyond = {token["content"] for token in spec["added_tokens"] if token["id"] >= vocab}
        spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in beyond]
        if isinstance(pieces := spec["model"]["vocab"], dict):  # which may have them too
            spec["model"]["vocab"] = {piece: i for piece, i in pieces.items() if piece not in beyond}
        data = json.dumps(spec).encode()
    specials = {name: i for name, i in tokenizer.specials.items() if i < vocab}
    return dataclasses.replace(tokenizer, data=data, specials=specials)


def _begins(folder: Path, tokenizer: Tokenizer, settings: dict[str, Any], first: int) -> bool:
    """Whether all text begins with the first token: as tokenizer.json has it; without one, as tokenizer_config.json
    says, else as is usual for SentencePiece's models (Llama) and not for GPT-2's."""
    if isinstance(tokenizer, HuggingFaceTokenizer) and ((folder / "tokenizer.json").exists() or tokenizer.around[0]):
        return tokenizer.around[0][:1] == [first]
    return settings.get("add_bos_token", isinstance(tokenizer, SentencePieceTokenizer))


def _settings(folder: Path) -> dict[str, Any]:
    """special_tokens_map.json and tokenizer_config.json, each token by its text."""
    settings = _json(folder / "special_tokens_map.json") | _json(folder / "tokenizer_config.json")
    return {k: v["content"] if k.endswith("_token") and isinstance(v, dict) else v for k, v in settings.items()}


def _gpt2(folder: Path, settings: dict[str, Any]) -> HuggingFaceTokenizer:
    """From vocab.json and merges.txt. How text is cut into words is in neither: not all models cut as GPT-2 does."""
    kind = settings.get("tokenizer_class", "GPT2Tokenizer")
    if kind.removesuffix("Fast") != "GPT2Tokenizer":
        raise UserError(f"tokenizer: got {folder}, a {kind} without tokenizer.json, must have it; download it too")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    vocab: dict[str, int] = _json(folder / "vocab.json")
    names = {settings.get(key, "<|endoftext|>") for key in ("bos_token", "eos_token")}
    specials = {name: vocab[name] for name in names if name in vocab}
    if not vocab or not all(len(m) == 2 and {*m, "".join(m)} <= vocab.keys() for m in merges):
        raise UserError(f"tokenizer: got {folder}, whose vocab.json and merges.txt don't belong together")
    return from_merges(vocab, merges, specials, settings.get("add_prefix_space", False))


def _json(file: Path) -> dict[str, Any]:
    """A file's object; of a file that is not there, none."""
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_bytes())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"tokenizer: got {file}, must be a JSON object; it is damaged")
    return content
