"""Every token keeps its id: in chat, in exported folders, and among added tokens that are special and not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from test_tokenizer_folders import AWKWARD, LIBRARY, MAKE, byte_level

from gptjax.data.chat import Message
from gptjax.data.tokenizers import HuggingFaceTokenizer, TrainSentencePiece
from gptjax.interop.templates import ChatTemplate
from gptjax.interop.tokenizer_json import canonical, reader
from gptjax.interop.tokenizers import load, load_template, save
from gptjax.types import UserError

pytest.importorskip("tokenizers")


def added(kind: str) -> HuggingFaceTokenizer:
    """A tokenizer of the library with added tokens that are special and not, in turns, as DeepSeek's."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    if kind == "unigram":
        alphabet = [chr(i) for i in range(32, 127)]
        vocab = [("<unk>", 0.0), *((c, -5.0) for c in alphabet), ("he", -2.0), ("llo", -2.5)]
        made = tokenizers.Tokenizer(models.Unigram(vocab, 0, False))
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    elif kind == "wordpiece":
        pieces = ["[UNK]", "[PAD]", *(p + c for c in "abcdefghijklmnopqrstuvwxyz" for p in ("", "##")), "hello"]
        made = tokenizers.Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
        made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    else:
        made = tokenizers.Tokenizer.from_str(byte_level().data.decode())
    for i, name in enumerate(("<bos>", "<think>", "<user>", "<tool>", "<end>", "<assistant>", "<pad>")):
        add = made.add_tokens if i % 4 else made.add_special_tokens
        add([tokenizers.AddedToken(name, normalized=False)])
    return HuggingFaceTokenizer(
        made.to_str().encode(), {"<bos>": made.token_to_id("<bos>"), "<end>": made.token_to_id("<end>")}
    )


ADDED = {f"added to {kind}": lambda kind=kind: added(kind) for kind in ("bpe", "unigram", "wordpiece")}
UNIGRAM = {"sentencepiece unigram": lambda: TrainSentencePiece(vocab=420, kind="unigram").build(iter(LIBRARY))}


@pytest.mark.parametrize("change", ["as it is", "with specials", "after a gap"])
@pytest.mark.parametrize("kind", [*MAKE, *UNIGRAM, *ADDED])
def test_no_token_changes_its_id(kind: str, change: str, tmp_path: Path):
    """In chat (`reader`), in the written folder, and in what is read from it and written again."""
    import tokenizers

    tokenizer = (MAKE | UNIGRAM | ADDED)[kind]()
    if change == "with specials":
        tokenizer = tokenizer.with_specials()
    if change == "after a gap":
        specials = {**tokenizer.specials, "<late>": tokenizer.vocab + 3, "<later>": tokenizer.vocab + 9}
        tokenizer = dataclasses.replace(tokenizer, specials=specials)
    own = {name: i for i, name in canonical(tokenizer).items()}
    if isinstance(tokenizer, HuggingFaceTokenizer):
        own |= tokenizers.Tokenizer.from_str(tokenizer.data.decode()).get_vocab(with_added_tokens=True)
    else:  # the pieces that text has
        own |= {reader(tokenizer).id_to_token(i): i for i in range(tokenizer.vocab) if reader(tokenizer).id_to_token(i)}
        for text in ("hello world", *AWKWARD[:5]):
            assert reader(tokenizer).encode(text, add_special_tokens=False).ids == tokenizer.encode(text)
    save(tokenizer, tmp_path / "once", 64)
    save(load(tmp_path / "once"), tmp_path / "twice", 64)
    files = [tokenizers.Tokenizer.from_file(str(tmp_path / name / "tokenizer.json")) for name in ("once", "twice")]
    for library in (reader(tokenizer), reader(load(tmp_path / "once")), *files):
        found = library.get_vocab(with_added_tokens=True)
        assert {name: found.get(name) for name in own} == own
        for name in own.keys() & {"<think>", "<user>", "<late>", "<later>", "<|user|>"}:
            assert own[name] in library.encode(f"a {name} b", add_special_tokens=False).ids


def test_chat_prompts_are_the_librarys(tmp_path: Path):
    source = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    save(added("bpe"), tmp_path, 64, ChatTemplate(source, {"bos_token": "<bos>"}))
    import tokenizers

    library, template = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")), load_template(tmp_path)
    assert template is not None
    talk = [Message("user", "hi"), Message("assistant", "ho"), Message("user", "<think>?")]
    expected = library.encode("<bos><user>hi<assistant>ho<user><think>?<assistant>", add_special_tokens=False).ids
    assert template.prompt(talk, load(tmp_path)) == expected


def test_a_special_token_with_another_id_is_refused():
    tokenizer = added("bpe")
    other = dataclasses.replace(tokenizer, specials={**tokenizer.specials, "<user>": tokenizer.vocab})
    with pytest.raises(UserError, match=r"special token '<user>' with id \d+, must be \d+, its own id"):
        reader(other)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, None),
        ({"chat_template": "{{ messages[0].content }}{% if messages[0].image %}<end>{% endif %}"}, None),
        ({"eos_token": "<end>"}, "<end>', which ends a text, has the id"),
        ({"bos_token": "<bos>", "add_bos_token": True}, "<bos>', which begins a text"),
        ({"chat_template": "<user>{{ messages[0].content }}"}, "<user>', which the chat template writes"),
        ({"chat_template": "{{ raise_exception('no') }}<assistant>"}, "<assistant>', which the chat template writes"),
    ],
)
def test_a_token_beyond_the_embedding_is_dropped_or_refused_if_needed(settings: dict, says: str | None, tmp_path: Path):
    tokenizer = added("bpe")
    size = min(i for name, i in reader(tokenizer).get_vocab().items() if name == "<bos>")
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.data)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load(tmp_path, size + 7).vocab == size + 7
    if says is None:
        loaded = load(tmp_path, size)
        assert loaded.vocab == size
        assert loaded.encode("<user> hi") == byte_level().encode("<user> hi")
    else:
        with pytest.raises(UserError, match=says):
            load(tmp_path, size)


@pytest.mark.torch
@pytest.mark.filterwarnings("default")
def test_tokens_that_only_other_files_name_are_added_as_transformers_adds_them(tmp_path: Path):
    """Older fine-tuned models have some in tokenizer_config.json or added_tokens.json alone."""
    transformers = pytest.importorskip("transformers", reason="compares with it: pip install -e '.[torch]'")
    base = json.loads(byte_level().data)
    piece = "<|start|>"  # in the vocabulary, and no merge makes it
    base["model"]["vocab"][piece] = len(base["model"]["vocab"])
    size = len(base["model"]["vocab"])
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {
            str(size): {"content": "<think>", "special": False, **flags},
            str(size + 1): {"content": "<|im_end|>", "special": True, **flags},
        },
        "eos_token": "<|im_end|>",
        "pad_token": "<pad>",
        "bos_token": piece,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(base))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load(tmp_path)
    assert reader(ours).get_vocab(with_added_tokens=True) == theirs.get_vocab()
    assert (ours.eos, ours.specials["<pad>"]) == (size + 1, size + 2) == (theirs.eos_token_id, theirs.pad_token_id)
    text = f"a<think>b<|im_end|>{piece}<pad> c"
    assert reader(ours).encode(text, add_special_tokens=False).ids == theirs(text, add_special_tokens=False).input_ids
    assert not {*ours.encode(text)} & {*ours.specials.values()}
    assert load(tmp_path, size + 2).vocab == size + 2, "padding is dropped"
    with pytest.raises(UserError, match=r"'<\|im_end\|>', which ends a text"):
        load(tmp_path, size + 1)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "x"}))
    with pytest.raises(UserError, match="reads special token 'x' in plain text"):
        load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<late>": size + 5}))
    assert reader(load(tmp_path)).token_to_id("<late>") == size + 5
