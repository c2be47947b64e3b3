"""Load and save the tokenizers of Hugging Face folders.

tokenizer, template = load(folder), load_template(folder)
save(tokenizer, other, context=2048, template=template)
transformers.AutoTokenizer.from_pretrained(other)       # the same ids for the same text, and for a conversation
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from gptjax.data.chat import Message
from gptjax.data.tokenizers import (
    HuggingFaceTokenizer,
    MissingTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    model_file,
)
from gptjax.data.tokenizers.huggingface import unknown_piece
from gptjax.data.tokenizers.tokenizer import ROLES, add_roles
from gptjax.interop.schema import read_fields
from gptjax.interop.templates import NATIVE, ChatTemplate, jinja_source
from gptjax.interop.tokenizer_json import canonical, from_merges, from_pieces, specification, with_added
from gptjax.types import UserError, one_line


def load(folder: str | Path, vocab: int | None = None) -> Tokenizer:
    """Load the tokenizer of a folder: its tokenizer.json, else a SentencePiece model or Llama 3's ranks, else
    tekken.json, else GPT-2's vocab.json and merges.txt, else BERT's vocab.txt; without any, a `MissingTokenizer` of
    `vocab` ids. Its first and last token are named by tokenizer_config.json and
    special_tokens_map.json; it has no first token if `transformers` does not put it before every text (GPT-2).

    vocab  vocabulary size of the model; added tokens beyond it are dropped

    Raises UserError if there is no tokenizer or it is damaged, and if a text ends or begins with a dropped token or the
    chat template writes one."""
    folder = Path(folder)
    settings = _settings(folder)
    file = folder / "spiece.model"
    file = file if file.exists() and not (folder / "tokenizer.json").exists() else model_file(folder)
    if file is not None and file.name == "tokenizer.json":
        tokenizer = with_added(HuggingFaceTokenizer.from_file(file), _named_elsewhere(folder, settings))
        tokenizer.check_specials(file)
    elif file is not None:
        tokenizer = load_tokenizer(file)
        # Fine-tuned models have more special tokens than their SentencePiece file, and Llama 3's file has none.
        more = {token["content"]: int(i) for i, token in settings.get("added_tokens_decoder", {}).items()}
        more |= _json(folder / "added_tokens.json")
        if file.name == "spiece.model":  # T5: its sentinels are in none of its files; the last comes first
            count = settings.get("extra_ids", 100)
            more |= {f"<extra_id_{count - 1 - i}>": len(tokenizer.pieces) + i for i in range(count)}
        more = {name: i for name, i in more.items() if i >= len(tokenizer.pieces)}
        own = {name: i for name, i in tokenizer.specials.items() if i not in more.values()}
        tokenizer = dataclasses.replace(tokenizer, specials=own | more)
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        tokenizer = _gpt2(folder, settings)
    elif (folder / "vocab.txt").exists():
        pieces = (folder / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
        tokenizer = from_pieces({piece: i for i, piece in enumerate(pieces)}, settings)
    elif vocab is not None:
        return MissingTokenizer(b"", {}, vocab)
    else:
        raise UserError(
            f"tokenizer: got the folder {folder}, must hold tokenizer.json, tokenizer.model, spiece.model, vocab.txt, "
            "tekken.json, or vocab.json and merges.txt"
        )
    if vocab is not None and tokenizer.vocab > vocab:
        whole, tokenizer = tokenizer, _within(tokenizer, vocab)
        _check_dropped(folder, settings, whole, vocab)
    names = canonical(tokenizer)
    specials = {name: i for i, name in names.items()}
    roles = {role: names.get(tokenizer.specials.get(role, -1)) for role in ROLES}
    roles |= {role: settings[key] for role, keys in ROLES.items() for key in reversed(keys) if settings.get(key)}
    if not _begins(folder, tokenizer, settings, specials.get(roles["<|bos|>"] or "", -1)):
        roles["<|bos|>"] = None
    return dataclasses.replace(tokenizer, specials=add_roles(specials, roles))


def load_template(folder: str | Path) -> ChatTemplate | None:
    """Load the folder's chat template. None: it has none, or it is our own format.

    Raises UserError for a template that is not Jinja, and for several templates without a default."""
    folder = Path(folder)
    settings = _settings(folder)
    source = settings.get("chat_template")
    if (folder / "chat_template.jinja").exists():
        source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(source, list):
        named_ = {template["name"]: template["template"] for template in source}
        if "default" not in named_:
            raise UserError(f"template: got {folder} with {', '.join(named_)}, must have a template named default")
        source = named_["default"]
    if source is None or source == NATIVE:
        return None
    return ChatTemplate(source, {k: v for k, v in settings.items() if k.endswith("_token") and isinstance(v, str)})


def load_max_length(folder: str | Path) -> int | None:
    """The folder's `model_max_length`. None: it has none, or transformers' very large number for that."""
    length = _settings(Path(folder)).get("model_max_length")
    return length if isinstance(length, int) and 0 < length < 2**31 else None


def save(
    tokenizer: Tokenizer,
    folder: str | Path,
    context: int | None,
    template: ChatTemplate | None = None,
    append_eos: bool = False,
) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    context     maximum number of tokens that the model reads. None: not limited
    template    chat template. None: our own format, if the tokenizer has its special tokens
    append_eos  end every text with the last token, as encoders expect

    `transformers` then puts the first token, if there is one, before every text unless `add_special_tokens=False`, as
    documents begin in training. It parses special tokens in text, which `Tokenizer.encode` does not."""
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
    if (jinja := jinja_source(template, tokenizer)) is not None:
        settings["chat_template"] = jinja
    files = {
        "tokenizer.json": spec,
        "tokenizer_config.json": settings,
        "special_tokens_map.json": tokens,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def padding(tokenizer: Tokenizer, append_eos: bool = False) -> int | None:
    """The padding token for `transformers`: the tokenizer's own, else the end token; if every text ends with that,
    another special token, because classifiers of `transformers` look for a text's last token that is not padding."""
    if (pad := tokenizer.specials.get("<|pad|>")) is not None or not append_eos:
        return tokenizer.eos if pad is None else pad
    others = {tokenizer.bos, *tokenizer.specials.values()} - {None, tokenizer.eos}
    return tokenizer.bos if tokenizer.bos in others else min(others, default=None)


def appends_eos(folder: str | Path, tokenizer: Tokenizer) -> bool:
    """True if the folder's tokenizer ends every text with the end token."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return bool(tokenizer.post_processor_ids[1])
    return _settings(Path(folder)).get("add_eos_token", False)


def _named_elsewhere(folder: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The tokens in the files beside tokenizer.json: those with an id, then the special tokens that are named."""
    decoder = {int(i): token for i, token in settings.get("added_tokens_decoder", {}).items()}
    found = [{**token, "id": i} for i, token in sorted(decoder.items())]
    added = sorted(_json(folder / "added_tokens.json").items(), key=lambda item: item[1])
    found += [{"content": name, "id": i} for name, i in added]
    names = [settings.get(key) for keys in ROLES.values() for key in keys]
    names += [token["content"] if isinstance(token, dict) else token for token in _additional(settings)]
    return found + [{"content": name, "special": True} for name in names if isinstance(name, str)]


def _additional(settings: dict[str, Any]) -> list[Any]:
    tokens = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
    return list(tokens.values()) if isinstance(tokens, dict) else list(tokens)


def _within(tokenizer: Tokenizer, vocab: int) -> Tokenizer:
    """Drop the added tokens from id `vocab` on: for images (in Gemma 3 1B, a text model) or padding."""
    data = tokenizer.data
    if isinstance(tokenizer, HuggingFaceTokenizer):
        spec = json.loads(data)
        beyond = {token["content"] for token in spec["added_tokens"] if token["id"] >= vocab}
        spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in beyond]
        if isinstance(pieces := spec["model"]["vocab"], dict):  # it may have them too
            spec["model"]["vocab"] = {piece: i for piece, i in pieces.items() if piece not in beyond}
        data = json.dumps(spec).encode()
    specials = {name: i for name, i in tokenizer.specials.items() if i < vocab}
    return dataclasses.replace(tokenizer, data=data, specials=specials)


def _check_dropped(folder: Path, settings: dict[str, Any], tokenizer: Tokenizer, vocab: int) -> None:
    """Raise UserError if the model needs a token of the whole tokenizer that its embedding has no row for."""
    names = {name: i for i, name in canonical(tokenizer).items()}
    around: list[int] = []
    if isinstance(tokenizer, HuggingFaceTokenizer):
        names = {token["content"]: token["id"] for token in json.loads(tokenizer.data)["added_tokens"]}
        around = [*tokenizer.post_processor_ids[0], *tokenizer.post_processor_ids[1]]
    beyond = {name: i for name, i in names.items() if i >= vocab}
    needed = {name: "which is in every text" for name, i in beyond.items() if i in around}
    needed[settings.get("eos_token")] = "which ends a text"
    if settings.get("add_bos_token"):
        needed[settings.get("bos_token")] = "which begins a text"
    if (template := load_template(folder)) is not None:
        try:
            written = template.text([Message("user", "-"), Message("assistant", "-"), Message("user", "-")])
        except UserError:
            written = template.source
        needed |= {name: "which the chat template writes" for name in beyond if name in written}
    for name, why in needed.items():
        if name in beyond:
            raise UserError(
                f"tokenizer: got {folder}, whose token {name!r}, {why}, has the id {beyond[name]}, beyond the model's "
                f"vocabulary of {vocab}; take the tokenizer of the model, or resize the model's embedding"
            )


def _begins(folder: Path, tokenizer: Tokenizer, settings: dict[str, Any], first: int) -> bool:
    """True if every text begins with the first token: by tokenizer.json; without one, by tokenizer_config.json; else
    True for SentencePiece models (Llama), Llama 3 and tekken.json, and False for GPT-2's."""
    if isinstance(tokenizer, HuggingFaceTokenizer) and (
        (folder / "tokenizer.json").exists() or tokenizer.post_processor_ids[0]
    ):
        return tokenizer.post_processor_ids[0][:1] == [first]
    begun = {"<|begin_of_text|>", "[INST]"} & tokenizer.specials.keys()
    return settings.get("add_bos_token", isinstance(tokenizer, SentencePieceTokenizer) or bool(begun))


def _settings(folder: Path) -> dict[str, Any]:
    """Merge special_tokens_map.json and tokenizer_config.json, with tokens given by their text."""
    settings = _json(folder / "special_tokens_map.json") | _json(folder / "tokenizer_config.json")
    return {k: v.get("content") if k.endswith("_token") and isinstance(v, dict) else v for k, v in settings.items()}


def _gpt2(folder: Path, settings: dict[str, Any]) -> HuggingFaceTokenizer:
    """Build a tokenizer from vocab.json and merges.txt. They do not say how text is split into words, so only GPT-2's
    own class is accepted."""
    kind = settings.get("tokenizer_class", "GPT2Tokenizer")
    if kind.removesuffix("Fast") != "GPT2Tokenizer":
        raise UserError(f"tokenizer: got {folder}, a {kind} without tokenizer.json, must have one; download it too")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    vocab: dict[str, int] = _json(folder / "vocab.json")
    names = {settings.get(key, "<|endoftext|>") for key in ("bos_token", "eos_token")}
    specials = {name: vocab[name] for name in names if name in vocab}
    if not vocab or not all(len(m) == 2 and {*m, "".join(m)} <= vocab.keys() for m in merges):
        raise UserError(f"tokenizer: got {folder}, whose vocab.json and merges.txt do not match")
    return from_merges(vocab, merges, specials, settings.get("add_prefix_space", False))


def _json(file: Path) -> dict[str, Any]:
    """A file's JSON object, or an empty one if the file does not exist."""
    if not file.exists():
        return {}
    try:
        return read_fields(file)
    except UserError as error:
        raise UserError(f"tokenizer: got {file.parent}, where {error}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer: got {file}, must be a JSON object; it is damaged ({one_line(error)})") from None
