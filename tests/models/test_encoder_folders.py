"""Published folders of BERT, RoBERTa and T5, with their tokenizers, give what `transformers` does, in and out."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import gptjax
from gptjax.cli.main import main
from gptjax.data.tokenizers import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from gptjax.distributed.sharding import MeshConfig, ShardingRules
from gptjax.interop.huggingface import save_hf
from gptjax.interop.tokenizers import load, save
from gptjax.nn import First, Last
from gptjax.types import UserError

tokenizers = pytest.importorskip("tokenizers")

THEIRS = pytest.mark.filterwarnings("default")  # theirs are not ours to mend
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


def roberta(folder: Path) -> None:
    """A tokenizer.json like RoBERTa's: bytes, and a mask that takes the space before it."""
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(CORPUS, 399, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], show_progress=False)
    made.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True, special=True)])
    made.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    folder.mkdir(parents=True)
    made.save(str(folder / "tokenizer.json"))
    names = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>"}
    mask = {"content": "<mask>", "lstrip": True, "__type": "AddedToken"}
    settings = {f"{role}_token": name for role, name in names.items()} | {"mask_token": mask}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "RobertaTokenizer", **settings}))
    (folder / "config.json").write_text(json.dumps({"model_type": "roberta"}))


MAKE = {"bert": bert, "bert cased": lambda folder: bert(folder, lower=False), "roberta": roberta, "t5": t5}


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
    with pytest.raises(UserError, match=r"must hold tokenizer.json, tokenizer.model, spiece.model, vocab.txt, tekken"):
        load(tmp_path)


def test_t5_from_its_sentencepiece_model(tmp_path: Path):
    t5(tmp_path / "t5")
    tokenizer = load(tmp_path / "t5")
    laws(tokenizer)
    assert roles(tokenizer) == {"<|end|>": 1, "<|pad|>": 0}
    assert (tokenizer.vocab, tokenizer.specials["<extra_id_0>"], tokenizer.specials["<extra_id_99>"]) == (400, 399, 300)
    assert tokenizer.decode([*tokenizer.encode("the decoder"), 399, 1]) == "the decoder"
    save(tokenizer, tmp_path / "json", context=None, append_eos=True)
    again = load(tmp_path / "json")
    laws(again)
    assert (again.vocab, dict(again.specials)) == (tokenizer.vocab, dict(tokenizer.specials))
    assert again.encode_batch(AWKWARD) == tokenizer.encode_batch(AWKWARD)


@pytest.mark.torch
@THEIRS
@pytest.mark.parametrize("kind", MAKE)
def test_ids_are_those_of_transformers(kind: str, tmp_path: Path):
    """From the oldest files, from what `transformers` writes, from that alone, and from what we write."""
    transformers = pytest.importorskip("transformers")
    MAKE[kind](tmp_path / "old")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "old")
    theirs.save_pretrained(tmp_path / "new")
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "new" / "tokenizer.json", tmp_path / "alone")
    save(load(tmp_path / "new"), tmp_path / "ours", context=64, append_eos=True)
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
        before = "a" if tokenizer.strips(tokenizer.specials[mask])[0] else "a "
        whole = [*begin, *tokenizer.encode(before), tokenizer.specials[mask], *tokenizer.encode("."), tokenizer.eos]
        assert theirs(f"a {mask}.").input_ids == whole
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    for text in [*AWKWARD, f"a {mask} b"]:
        assert ours(text).input_ids == theirs(text).input_ids
    unknown = () if kind == "roberta" else ("unk_token",)  # bytes are never unknown
    for role in ("cls_token", "sep_token", "mask_token", "pad_token", *unknown):
        assert getattr(ours, role) == getattr(theirs, role), role


BERT = {
    "vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 48,
}  # fmt: skip
ROBERTA = {**BERT, "max_position_embeddings": 50, "pad_token_id": 1}
T5 = {
    "vocab_size": 400, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
TEXTS = ["Return the [MASK] of a naïve [MASK].", "日本 it's", "the decoder, or the encoder; self.x = 1"]
RULES = ShardingRules(embed="fsdp", heads="tensor", kv_heads="tensor", ffn="tensor", vocab="tensor", batch="data")
# Sums of 48 float32 terms at most, through 2 layers of 2 or 3 parts.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Kind -> a folder as `transformers` writes it, of a random model whose logits are far apart."""
    torch = pytest.importorskip("torch", reason="compares with PyTorch: pip install -e '.[torch]'")
    transformers = pytest.importorskip("transformers", reason="compares with it: pip install -e '.[torch]'")
    path = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for kind, write, fields in (("bert", bert, BERT), ("roberta", roberta, ROBERTA), ("t5", t5, T5)):
        write(path / f"{kind} tokenizer")
        auto = transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForMaskedLM
        model = auto.from_config(transformers.AutoConfig.for_model(kind, **fields))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.3)
        model.save_pretrained(path / kind)
        transformers.AutoTokenizer.from_pretrained(path / f"{kind} tokenizer").save_pretrained(path / kind)
    return path


def theirs(folder):
    import transformers

    auto = transformers.AutoModelForSeq2SeqLM if "t5" in folder.name else transformers.AutoModelForMaskedLM
    return auto.from_pretrained(folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)


def filled_by_them(folder, text):
    """Logits [T, V] and ids [T]."""
    import torch

    model, tokenizer = theirs(folder)
    inputs = tokenizer(text, return_tensors="pt")
    with torch.inference_mode():
        return model(**inputs).logits[0].numpy(), inputs["input_ids"][0].numpy()


def written_by_them(folder, texts):
    import torch

    model, tokenizer = theirs(folder)
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.inference_mode():
        rows = model.generate(**inputs, do_sample=False, max_new_tokens=20).tolist()
    return [row[1 : row.index(1) + 1] if 1 in row else row[1:] for row in rows]


@pytest.mark.torch
@THEIRS
@pytest.mark.parametrize(("kind", "mask"), [("bert", "[MASK]"), ("roberta", "<mask>")])
def test_an_encoder_fills_in_what_transformers_does(folders, kind, mask, tmp_path):
    text = TEXTS[0].replace("[MASK]", mask)
    model = gptjax.load(folders / kind, kind=gptjax.EncoderModel)
    logits, ids = filled_by_them(folders / kind, text)
    np.testing.assert_allclose(model.logits(ids[None])[0], logits, **CLOSE)
    (places,) = np.nonzero(ids == model.tokenizer.specials["<|mask|>"])
    expected = np.asarray(jax.nn.softmax(logits[places]))
    filled = model.fill(text, top=3)
    assert [[c.id for c in candidates] for candidates in filled] == np.argsort(-expected)[:, :3].tolist()
    for candidates, row in zip(filled, expected, strict=True):
        np.testing.assert_allclose([c.probability for c in candidates], row[[c.id for c in candidates]], rtol=1e-3)
        assert [c.text for c in candidates] == [model.tokenizer.decode([c.id]) for c in candidates]
    model.save_hf(tmp_path / "hf")
    again, ids_again = filled_by_them(tmp_path / "hf", text)
    np.testing.assert_array_equal(ids_again, ids)
    np.testing.assert_array_equal(again, logits)
    if kind == "roberta":
        others = model.tokenizer.with_specials(["<|pad|>"])
        others = dataclasses.replace(others, specials={**others.specials, "<|pad|>": 3})
        with pytest.raises(UserError, match=r"^tokenizer: got one that pads with 3, must be 1, from which"):
            save_hf(tmp_path / "other", model.config, model.params, others)
        assert not (tmp_path / "other").exists()
    with pytest.raises(UserError, match=rf"^text: got none of <\|mask\|> or {re.escape(mask)} in it"):
        model.fill("nothing")
    with pytest.raises(UserError, match=r"^tokens: got 302, must be at most 48"):
        model.fill(mask * 300)


@pytest.mark.torch
@THEIRS
def test_vectors_are_pooled_over_the_texts_own_tokens(folders):
    import torch

    model = gptjax.load(folders / "bert", kind=gptjax.EncoderModel)
    reader, tokenizer = theirs(folders / "bert")
    together = model.embed(TEXTS, normalise=False, batch=2)
    assert together.shape == (3, 32)
    assert together.dtype == np.float32
    for text, mean in list(zip(TEXTS, together, strict=True))[1:]:  # in the first, [MASK] is text for us
        inputs = tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            states = reader.bert(**inputs).last_hidden_state[0].numpy()
        np.testing.assert_allclose(mean, states.mean(0), **CLOSE)
        for pooling, state in ((First(), states[0]), (Last(), states[-1])):
            (vector,) = model.embed(text, pooling)
            np.testing.assert_allclose(vector, state / np.linalg.norm(state), **CLOSE)


@pytest.mark.torch
@THEIRS
def test_a_model_of_sentences_needs_no_head(folders, tmp_path):
    """`BertModel`, which most of them are."""
    reader, tokenizer = theirs(folders / "bert")
    for part in (reader.bert, tokenizer):
        part.save_pretrained(tmp_path / "headless")
    model = gptjax.load(tmp_path / "headless", kind=gptjax.EncoderModel)
    vectors = model.embed(TEXTS)
    np.testing.assert_array_equal(vectors, gptjax.load(folders / "bert", kind=gptjax.EncoderModel).embed(TEXTS))
    model.save_hf(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["architectures"] == ["BertModel"]
    np.testing.assert_array_equal(gptjax.load(tmp_path / "again", kind=gptjax.EncoderModel).embed(TEXTS), vectors)


@pytest.mark.torch
@THEIRS
def test_t5_writes_what_transformers_does(folders, tmp_path):
    model = gptjax.load(folders / "t5", kind=gptjax.TextToText)
    texts = TEXTS[1:]
    expected = written_by_them(folders / "t5", texts)
    written = model.generate(texts, max_tokens=20, temperature=0)
    assert [list(completion.ids) for completion in written] == expected
    _, tokenizer = theirs(folders / "t5")
    for completion in written:
        known = [i for i in completion.ids if i != 2]  # they leave out what stands for the unknown
        assert completion.text.replace("\ufffd", "") == tokenizer.decode(known, skip_special_tokens=True)
        assert completion.finish == ("stop" if completion.ids[-1] == 1 else "length")
    assert (model.decoder_start_token_id, model.stop_token_ids) == (0, (1,))
    model.save_hf(tmp_path / "t5")
    assert written_by_them(tmp_path / "t5", texts) == expected


def same(model, other):
    if isinstance(model, gptjax.EncoderModel):
        np.testing.assert_allclose(other.embed(TEXTS), model.embed(TEXTS), **CLOSE)
        ids = np.full((2, 6), 7)
        np.testing.assert_allclose(other.logits(ids), model.logits(ids), **CLOSE)
    else:
        texts = [completion.text for completion in model.generate(TEXTS, 8, temperature=0)]
        assert [completion.text for completion in other.generate(TEXTS, 8, temperature=0)] == texts


@pytest.mark.sampled
@pytest.mark.torch
@THEIRS
@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_on_a_mesh_the_parameters_are_sharded_and_the_answers_the_same(folders, kind):
    model = gptjax.load(folders / kind, kind=gptjax.Model)
    with jax.set_mesh(MeshConfig(data=2, fsdp=2, tensor=2).make()):
        sharded = gptjax.load(folders / kind, rules=RULES, kind=gptjax.Model)
    assert sharded.params["embedding"].sharding.spec == PartitionSpec("tensor", "fsdp")
    assert sharded.params["embedding"].addressable_shards[0].data.shape == (200, 16)
    same(model, sharded)


@pytest.mark.torch
@THEIRS
@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_in_our_own_format_and_converted(folders, kind, tmp_path, capsys):
    model = gptjax.load(folders / kind, kind=gptjax.Model)
    model.save(tmp_path / "ours")
    again = gptjax.load(tmp_path / "ours", kind=type(model))
    assert again.config == model.config
    if isinstance(again, gptjax.TextToText):
        assert (again.decoder_start_token_id, again.stop_token_ids) == (0, (1,))
    same(model, again)
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    half = gptjax.load(tmp_path / "half", kind=type(model))
    assert half.config == model.config.with_dtype("bfloat16")
    assert half.params["embedding"].dtype == "bfloat16"
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "x.gguf"), "--to", "gguf"]) == 2
    assert f"to: got gguf for a {type(model).__name__}, must be hf or gptjax" in capsys.readouterr().err


@pytest.mark.torch
@THEIRS
def test_another_kind_is_refused_and_the_right_one_named(folders):
    with pytest.raises(UserError, match=r"^kind: got LanguageModel, must be EncoderModel for .*, kind=gptjax.EncoderM"):
        gptjax.load(folders / "bert")
    with pytest.raises(UserError, match=r"^kind: got EncoderModel, must be TextToText for the model in .*t5: "):
        gptjax.load(folders / "t5", kind=gptjax.EncoderModel)
    assert main(["generate", str(folders / "bert"), "--prompt", "a"]) == 2
