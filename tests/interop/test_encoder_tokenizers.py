"""The tokenizers of BERT and T5: the ids that `transformers` gives, from each of the files that they come in."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest

from gptjax.data.tokenizers import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from gptjax.interop.tokenizers import load, save
from gptjax.types import UserError

tokenizers = pytest.importorskip("tokenizers")

CORPUS = [Path(json.__file__).with_name(name).read_text(encoding="utf-8") for name in ("decoder.py", "encoder.py")]
AWKWARD = [
    "",
    " \n\t ",
    "Return the decoder, or the ENCODER!",
    "Crème brûlée, naïve ÀÉ e\u0301 ﬁ ＡＢＣ İK",
    "日本語のテキスト 한국어 العربية 👩‍👩‍👧‍👦",
    "it's (so) --- self.x_y[0] = 'a'; 1234567 x²³",
    "\x00\x01\x7f\u200b\ufeff\u2028 \ufffd \U0010ffff",
    "a" * 300,
]
SPELT = ["[CLS] a [MASK] [SEP]", "a[UNK][PAD]", "<pad></s> <unk> a <extra_id_0>", "＜pad＞ ▁</s>"]
"""Texts that spell special tokens out, which `transformers` takes for them."""


def bert(folder: Path, lower: bool = True) -> None:
    """A vocab.txt, and what says how to use it."""
    made = tokenizers.BertWordPieceTokenizer(lowercase=lower)
    made.train_from_iterator(CORPUS, vocab_size=400, show_progress=False)
    folder.mkdir(parents=True)
    made.save_model(str(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))


def t5(folder: Path) -> None:
    """A spiece.model, which lacks "<", as T5's does; its normaliser is SentencePiece's own."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # type: ignore[attr-defined]
        sentence_iterator=(line for text in CORPUS for line in text.replace("<", "").splitlines()),
        model_writer=model,
        model_type="unigram",
        vocab_size=300,
        character_coverage=0.99,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))


MAKE = {"bert": bert, "bert cased": lambda folder: bert(folder, lower=False), "t5": t5}


def roles(tokenizer: Tokenizer) -> dict[str, int]:
    return {name: i for name, i in tokenizer.specials.items() if name.startswith("<|")}


def laws(tokenizer: Tokenizer) -> None:
    special = set(tokenizer.specials.values())
    for text in [*AWKWARD, *SPELT]:
        ids = tokenizer.encode(text)
        assert not special & set(ids), text
        assert tokenizer.decode_bytes(ids) == b"".join(tokenizer.decode_bytes([i]) for i in ids)
        assert max(ids, default=0) < tokenizer.vocab


def test_bert_from_its_vocabulary(tmp_path: Path):
    bert(tmp_path / "bert")
    tokenizer = load(tmp_path / "bert")
    laws(tokenizer)
    assert roles(tokenizer) == {"<|bos|>": 2, "<|end|>": 3, "<|mask|>": 4, "<|pad|>": 0}
    assert "[UNK]" not in tokenizer.specials
    assert tokenizer.encode("日 the") == [1, *tokenizer.encode("The")]
    assert tokenizer.decode(tokenizer.encode("Décoder, encoders! 日?")) == "decoder, encoders! \ufffd?"
    assert len(tokenizer.encode("jsondecoder")) < len("jsondecoder") / 2, "pieces of several characters"
    tokenizer.save(tmp_path / "ours")
    again = load_tokenizer(tmp_path / "ours")
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode_batch(AWKWARD) == tokenizer.encode_batch(AWKWARD)
    with pytest.raises(UserError, match=r"must hold tokenizer.json, tokenizer.model, spiece.model, vocab.txt, or"):
        load(tmp_path)


def test_t5_from_its_sentencepiece_model(tmp_path: Path):
    t5(tmp_path / "t5")
    tokenizer = load(tmp_path / "t5")
    laws(tokenizer)
    assert roles(tokenizer) == {"<|end|>": 1, "<|pad|>": 0}
    assert (tokenizer.vocab, tokenizer.specials["<extra_id_0>"], tokenizer.specials["<extra_id_99>"]) == (400, 399, 300)
    assert tokenizer.decode([*tokenizer.encode("the decoder"), 399, 1]) == "the decoder"
    save(tokenizer, tmp_path / "json", context=None, closed=True)
    again = load(tmp_path / "json")
    laws(again)
    assert (again.vocab, dict(again.specials)) == (tokenizer.vocab, dict(tokenizer.specials))
    assert again.encode_batch(AWKWARD) == tokenizer.encode_batch(AWKWARD)


@pytest.mark.torch
@pytest.mark.filterwarnings("default")  # theirs are not ours to mend
@pytest.mark.parametrize("kind", MAKE)
def test_ids_are_those_of_transformers(kind: str, tmp_path: Path):
    """From the oldest files, from what `transformers` writes, from that alone, and from what we write."""
    transformers = pytest.importorskip("transformers")
    MAKE[kind](tmp_path / "old")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "old")
    theirs.save_pretrained(tmp_path / "new")
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "new" / "tokenizer.json", tmp_path / "alone")
    save(load(tmp_path / "new"), tmp_path / "ours", context=64, closed=True)
    mask = theirs.mask_token or "<extra_id_7>"
    for name in ("old", "new", "alone", "ours"):
        tokenizer = load(tmp_path / name)
        laws(tokenizer)
        if name != "old":
            assert isinstance(tokenizer, HuggingFaceTokenizer)
        assert roles(tokenizer) == roles(load(tmp_path / "old")), name
        for text in AWKWARD:
            assert tokenizer.encode(text) == theirs(text, add_special_tokens=False).input_ids, (name, text)
        begin = [] if tokenizer.bos is None else [tokenizer.bos]
        whole = [*begin, *tokenizer.encode("a "), tokenizer.specials[mask], *tokenizer.encode("."), tokenizer.end]
        assert theirs(f"a {mask}.").input_ids == whole
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    for text in [*AWKWARD, f"a {mask} b"]:
        assert ours(text).input_ids == theirs(text).input_ids
    for role in ("cls_token", "sep_token", "mask_token", "pad_token", "unk_token"):
        assert getattr(ours, role) == getattr(theirs, role), role
