"""Laws of every tokenizer: text comes back, text cannot forge special tokens, a saved one is the same one."""

import itertools
import json
import pickle
import random
from pathlib import Path

import pytest

from gptjax.data.tokenizers import (
    CHAT_SPECIALS,
    Bytes,
    HuggingFaceTokenizer,
    LoadTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    TrainCharacters,
    TrainSentencePiece,
    load_tokenizer,
    report,
)
from gptjax.data.tokenizers import tiktoken as tiktoken_module
from gptjax.types import UserError

LIBRARY = [Path(json.__file__).with_name(name).read_text(encoding="utf-8") for name in ("decoder.py", "encoder.py")]
AWKWARD = [
    "",
    " ",
    "   leading and trailing   ",
    "\n\n\n\t\r\n\v\f\x00\x01\x7f",
    "def f(x):\n\tif x:\n        return 'a  b'\n",
    "\u2581",
    " \u2581 \u2581\u2581x\u2581 ",  # SentencePiece's space
    "\u2585\u2047 ⁇ <unk> <0x41>",  # its other marks
    "ÀÉ ﬁ ＡＢＣ ① e\u0301 \u200b\ufeff\u202e",  # what normalisation would change
    "日本語 العربية 👩‍👩‍👧‍👦 \U0010ffff\U00100000\ue000\ufffe\ufffd",
    "<|bos|><|system|><|user|>hi<|end|><|assistant|><|endoftext|><s></s>",
    "12345678901234567890",
    "a" * 5_000,
    " " * 5_000,
    "word " * 1_000 + "\u2581",
]


def random_text(random_: random.Random) -> str:
    kinds = [(0, 0x80), (0x80, 0xD800), (0xE000, 0x110000), (0x2580, 0x2586), (0x20, 0x21), (0x0A, 0x0B)]
    return "".join(chr(random_.randrange(*random_.choice(kinds))) for _ in range(random_.randrange(40)))


RANDOM = [random_text(random.Random(seed)) for seed in range(100)]


def byte_level() -> HuggingFaceTokenizer:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(LIBRARY, vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.enable_truncation(3)  # ours reads all the text, whatever the file says
    return HuggingFaceTokenizer(tokenizer.to_str().encode(), {"<|endoftext|>": 0})


def ranks() -> TiktokenTokenizer:
    pytest.importorskip("tiktoken")
    tokens = [bytes([byte]) for byte in range(256)] + [b"he", b"ll", b"hell", b" w"]
    return TiktokenTokenizer(
        tiktoken_module._lines({token: i for i, token in enumerate(tokens)}), {"<|endoftext|>": 260}
    )


MAKE = {
    "bpe": lambda: TrainSentencePiece(vocab=420).build(iter(LIBRARY)),
    "unigram": lambda: TrainSentencePiece(vocab=400, kind="unigram").build(text[:5_000] for text in LIBRARY),
    "characters": lambda: TrainCharacters().build(iter([*AWKWARD, *RANDOM, *LIBRARY])),
    "bytes": lambda: Bytes().build(iter([])),
    "huggingface": byte_level,
    "tiktoken": ranks,
}


@pytest.fixture(scope="module", params=MAKE)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return MAKE[request.param]()


def test_text_comes_back(tokenizer: Tokenizer):
    texts = [*AWKWARD, *RANDOM, *LIBRARY]
    batch = tokenizer.encode_batch(texts)
    for text, ids in zip(texts, batch, strict=True):
        assert ids == tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert all(0 <= i < tokenizer.vocab for i in ids)
    first, second = batch[4], batch[9]
    assert tokenizer.decode_bytes(first + second) == tokenizer.decode_bytes(first) + tokenizer.decode_bytes(second)


def test_text_cannot_forge_specials(tokenizer: Tokenizer):
    chat = tokenizer.with_specials()
    assert set(CHAT_SPECIALS) <= set(chat.specials)
    forbidden = set(chat.specials.values())
    assert max(forbidden) < chat.vocab
    names = [*chat.specials, "<|endoftext|>", "<s>", "</s>"]
    for text in [*names, "".join(names), *(f"a {name}\n" for name in names), *(name[:-1] for name in names), *RANDOM]:
        ids = chat.encode(text)
        assert not forbidden & set(ids)
        assert ids == tokenizer.encode(text)
    assert chat.decode([*forbidden, *chat.encode("hi"), *forbidden, chat.vocab + 7, -1]) == "hi"
    assert chat.with_specials().fingerprint == chat.fingerprint


def test_what_is_not_utf8(tokenizer: Tokenizer):
    if not tokenizer.file.startswith("characters"):
        ids = tokenizer.encode("😀")
        if len(ids) > 1:
            assert tokenizer.decode(ids[:-1]) == "\ufffd"
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("😀")


def test_saved_is_the_same(tokenizer: Tokenizer, tmp_path: Path):
    chat = tokenizer.with_specials()
    chat.save(tmp_path / "run" / "tokenizer")
    for again in (
        load_tokenizer(tmp_path / "run" / "tokenizer"),
        load_tokenizer(tmp_path / "run"),
        pickle.loads(pickle.dumps(chat)),
    ):
        assert type(again) is type(chat)
        assert again.fingerprint == chat.fingerprint != tokenizer.with_specials(["<|other|>"]).fingerprint
        assert (again.vocab, dict(again.specials)) == (chat.vocab, dict(chat.specials))
        assert again.encode_batch(AWKWARD) == chat.encode_batch(AWKWARD)


def test_damage_is_noticed(tmp_path: Path):
    MAKE["bpe"]().save(tmp_path)
    model = tmp_path / "tokenizer.model"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    with pytest.raises(UserError, match="missing or changed"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_again_gives_the_same(kind):
    train = TrainSentencePiece(vocab=400, kind=kind)
    assert train.build(iter([LIBRARY[0]])).fingerprint == train.build(iter([LIBRARY[0]])).fingerprint


def test_training():
    trained = MAKE["bpe"]()
    assert trained.vocab == 420
    assert {trained.specials[name] for name in CHAT_SPECIALS} == {1, 2, 3, 4, 5}
    assert any(b"\n" in piece and len(piece) > 1 for piece in trained.pieces), "documents, not lines, are sentences"
    assert len(trained.encode(LIBRARY[0])) < 0.6 * len(LIBRARY[0])
    # Long text is encoded in parts, to the same ids.
    assert isinstance(trained, SentencePieceTokenizer)
    assert trained._divisible
    assert trained.encode(LIBRARY[0]) == trained._processor.encode(LIBRARY[0])


def test_sample_is_spread_and_bounded():
    train = TrainSentencePiece(characters=1_000, read=50_000)
    sample = train.sample(f"{i:010}" for i in range(10**9))
    assert 500 <= sum(map(len, sample)) <= 1_000
    numbers = [int(text) for text in sample]
    assert {b - a for a, b in itertools.pairwise(numbers)} == {64}
    assert numbers[0] == 0
    assert numbers[-1] > 4_900
    assert train.sample(["x" * 5_000]) == ["x" * 1_000]


def test_characters():
    trained = TrainCharacters(specials=()).build(iter(["hello", "world"]))
    assert trained.vocab == len(set("helloworld")) + 1
    assert trained.decode(trained.encode("hexe")) == "he\ufffde"
    assert (trained.bos, trained.eos) == (None, None)


def test_report():
    result = report(MAKE["bpe"](), ["return €\n"] * 300)
    assert (result.bytes, result.characters) == (300 * 11, 300 * 9)
    assert result.fallback == 300 * 3  # the euro sign
    assert result.bytes_per_token == pytest.approx(result.bytes / result.tokens)
    assert 0 < result.used < 20
    assert "bytes per token" in str(result)
    with pytest.raises(UserError, match="texts"):
        report(MAKE["bytes"](), [""])


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: TrainSentencePiece(vocab=100).build(LIBRARY), "vocab: got 100, must be at least [0-9]{3}"),
        (lambda: TrainSentencePiece(kind="words").build(LIBRARY), "kind: got 'words'"),  # type: ignore[arg-type]
        (lambda: TrainSentencePiece().build([]), "texts: got no text"),
        (lambda: TrainSentencePiece().build(["", "\0"]), "texts: got no text"),
        (lambda: TrainCharacters().build(iter([""])), "texts: got no text"),
        (lambda: load_tokenizer("no/such/file"), "no such file"),
    ],
)
def test_mistakes(build, says):
    with pytest.raises(UserError, match=says) as error:
        build()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.model", "not a model"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "not json"),
        ("tokenizer.json", '{"added_tokens": [], "decoder": {"type": "CTC"}}'),
        ("cl100k_base.tiktoken", "YQ== 0\n"),
        ("cl100k_base.tiktoken", "<html>"),
        ("mine.tiktoken", "YQ== 0\n"),
        ("encoder.json", '{"a": 0}'),
        ("gptjax_tokenizer.json", '{"kind": "bytes"}'),
        ("words.txt", "a b c"),
    ],
)
def test_wrong_files(name, content, tmp_path: Path):
    (tmp_path / name).write_text(content)
    (tmp_path / "vocab.bpe").write_text("#version\na b\n")
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(UserError, match=r"^tokenizer: got .*must") as error:
            load_tokenizer(path)
        assert "\n" not in str(error.value)


def test_no_network(monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")

    def get_encoding(name):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    with pytest.raises(UserError, match=r"'gpt2'.*ConnectionError.*give the path") as error:
        LoadTokenizer("gpt2").build(iter([]))
    assert "\n" not in str(error.value)


def test_encodings_are_tiktokens(monkeypatch):
    public = pytest.importorskip("tiktoken_ext.openai_public")
    monkeypatch.setattr(public, "load_tiktoken_bpe", lambda *_, **__: {})
    monkeypatch.setattr(public, "data_gym_to_mergeable_bpe_ranks", lambda *_, **__: {})
    for name, (pattern, specials) in tiktoken_module.ENCODINGS.items():
        theirs = public.ENCODING_CONSTRUCTORS[name]()
        assert (pattern, specials) == (theirs["pat_str"], theirs["special_tokens"])


def test_huggingface_config_names_first_and_last(tmp_path: Path):
    made = byte_level()
    (tmp_path / "tokenizer.json").write_bytes(made.data)
    assert load_tokenizer(tmp_path).bos == load_tokenizer(tmp_path).eos == 0
    spec = json.loads(made.data)
    spec["added_tokens"].append(spec["added_tokens"][0] | {"id": made.vocab, "content": "<|im_end|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": None, "eos_token": {"content": "<|im_end|>"}, "model_max_length": 3})
    )
    loaded = LoadTokenizer(str(tmp_path), specials=("<|user|>",)).build(iter([]))
    assert (loaded.bos, loaded.eos) == (None, made.vocab)
    assert (loaded.specials["<|user|>"], loaded.vocab) == (made.vocab + 1, made.vocab + 2)


def test_huggingface_file_made_from_sentencepiece(tmp_path: Path):
    tokenizers = pytest.importorskip("tokenizers")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581abc", "\u2581a", "ab"]
    bpe = tokenizers.models.BPE(
        {piece: i for i, piece in enumerate(pieces)},
        [("\u2581", "a"), ("a", "b")],
        unk_token="<unk>",
        byte_fallback=True,
    )
    made = tokenizers.Tokenizer(bpe)
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json").with_specials()
    assert len(loaded.encode("a b")) == 3  # "_a", "_", "b"
    for text in [*AWKWARD, *RANDOM]:
        assert loaded.decode(loaded.encode(text)) == text.replace("\u2581", " ")
        assert not {1, 2} & set(loaded.encode(text))


@pytest.mark.real
@pytest.mark.parametrize("path", ["gpt2", "gpt2/tokenizer.json", "cl100k_base.tiktoken"])
def test_published_ids(path, shared: Path):
    name = path.partition("/")[0].removesuffix(".tiktoken")
    loaded = load_tokenizer(shared / "tokenizers" / path)
    oracle = shared / "tokenizers" / "oracle"
    cases = dict(json.loads((oracle / "published_tiktoken_expected.json").read_text())[name])
    cases |= {case["text"]: case[name] for case in json.loads((oracle / "token_ids_public.json").read_text())["cases"]}
    assert len(cases) > 10
    for text, ids in cases.items():
        assert loaded.encode(text) == ids
        assert loaded.decode(ids) == text
    assert {loaded.bos, loaded.eos, loaded.specials["<|endoftext|>"]} == {{"gpt2": 50_256}.get(name, 100_257)}
    for text in [*AWKWARD, *RANDOM]:
        assert loaded.decode(loaded.encode(text)) == text
        assert not set(loaded.specials.values()) & set(loaded.encode(text))


@pytest.mark.real
def test_published_counts(shared: Path):
    text = (shared / "data" / "tinyshakespeare.txt").read_text()
    gpt2 = load_tokenizer(shared / "tokenizers" / "gpt2")
    assert (len(gpt2.encode(text[:1_003_854])), len(gpt2.encode(text[1_003_854:]))) == (301_966, 36_059)


@pytest.mark.real
@pytest.mark.parametrize("path", ["tokenizers/mistral_v1.sentencepiece.model", "models/stories260k"])
def test_sentencepiece_models(path, shared: Path):
    loaded = load_tokenizer(shared / path)
    assert (loaded.bos, loaded.eos) == (1, 2)
    assert isinstance(loaded, SentencePieceTokenizer)
    for text in [*AWKWARD, *RANDOM]:
        ids = loaded.encode(text)
        assert loaded.decode(ids) == text
        assert not {1, 2} & set(ids)
        if "\u2581" not in text:
            assert ids == loaded._processor.encode(text)
    assert loaded.decode_bytes(loaded.encode("a")) == b" a"  # the space it puts before all text
    chat = loaded.with_specials()
    assert (chat.vocab, chat.specials["<|user|>"]) == (loaded.vocab + 3, loaded.vocab + 1)
