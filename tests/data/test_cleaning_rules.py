"""Rules that judge and repair one text: the reasons of datatrove on its own tests' texts, and equations by hand."""

import pytest

from gptjax.data.prepare import (
    C4Quality,
    ChineseQuality,
    ChineseRepetition,
    Drop,
    Edit,
    FineWebQuality,
    FixEncoding,
    GopherQuality,
    GopherRepetition,
    Language,
    Length,
    MaskPersonal,
    Normalise,
    WordList,
)
from gptjax.data.prepare.words import count_sentences, normal_words, words
from gptjax.types import UserError

FRODO = (
    "I wish it need not have happened in my time,' said Frodo. 'So do I,' said Gandalf, 'and so do all who live to see "
    "such times. But that is not for them to decide. All we have to decide is what to do with the time that is given "
    "us.'"
)
SMALL = GopherQuality(min_words=10, max_words=1000)
PROSE = "The cat sat with the dog and looked at the rain that fell on the roof of the old house by the river. "
ZH = "北京是中华人民共和国的首都，也是全国的政治中心。这座城市有三千多年的历史，保留了许多古老的建筑。"
DATATROVE = [
    (GopherRepetition(), "I am your father.\n" * 4, "dup_line_frac"),
    (GopherRepetition(), "I am your father.\n\n" * 4, "dup_para_frac"),
    (
        GopherRepetition(),
        "I am groot.\n\nYou are a wizard.\n\nI am Luke.\n\n" + "I am your father.\n\n" * 2 + f"{'x' * 40}.\n\n" * 2,
        "dup_para_char_frac",
    ),
    (
        GopherRepetition(),
        "I am groot.\nYou are a wizard.\nI am your father.\n" + f"{'x' * 40}.\n" * 2,
        "dup_line_char_frac",
    ),
    (GopherRepetition(), "I am Frank, I am Frank, I am Frank", "top_2_gram"),
    (GopherRepetition(), "I am Frank, you are Jhon. I am Frank. I am Frank you are Jhon", "top_3_gram"),
    (GopherRepetition(), "I am a solo traveller " * 4 + FRODO, "duplicated_5_n_grams"),
    (SMALL, "I am too small...", "gopher_short_doc"),
    (SMALL, "I am " * 20, "gopher_below_avg_threshold"),
    (SMALL, "interconnection " * 20, "gopher_above_avg_threshold"),
    (SMALL, "# comment " * 20, "gopher_too_many_hashes"),
    (SMALL, "... comment " * 20, "gopher_too_many_ellipsis"),
    (SMALL, "./!*?<><> apple orange interconnection " * 20, "gopher_below_alpha_threshold"),
]
BY_HAND = [
    (SMALL, PROSE * 60, "gopher_long_doc"),
    (SMALL, "- the cat and the dog\n" * 10, "gopher_too_many_bullets"),
    (SMALL, "\n".join(["the cat and the dog ran over the hill..."] * 4 + [PROSE] * 6), "gopher_too_many_end_ellipsis"),
    (SMALL, "Cats chase small mice through green gardens every sunny morning", "gopher_enough_stop_words"),
    (C4Quality(), PROSE * 4, "too_few_sentences"),
    (C4Quality(), PROSE * 6 + "Lorem ipsum dolor sit amet.", "lorem_ipsum"),
    (C4Quality(), PROSE * 6 + "if (x) { return y. }.", "curly_bracket"),
    (FineWebQuality(), "\n".join(["a line that is not so short but has no mark"] * 3), "line_punct_ratio"),
    (FineWebQuality(), "Short line.\n" * 3 + PROSE, "short_line_ratio"),
    (FineWebQuality(), PROSE.strip() + "\n" + PROSE.strip(), "char_dup_ratio"),
    (FineWebQuality(short_line_ratio=1), "One\nTwo.\nThree\nFour.", "list_ratio"),
    (FineWebQuality(), " \n ", "empty"),
    (ChineseQuality(), "你好。", "chinese_short_doc"),
    (ChineseQuality(), ZH * 3 + "This is English text. " * 30, "chinese_fraction"),
    (ChineseQuality(), (ZH[:20] + "……") * 8, "chinese_too_many_ellipsis"),
    (ChineseQuality(), "\n".join([ZH[:18]] * 9), "chinese_line_punct_ratio"),
    (ChineseQuality(), "\n".join(["今天天气真好。"] * 20), "chinese_short_line_ratio"),
    (ChineseRepetition(), ZH * 2 + "一二三四五六七八九十" * 2, "duplicated_10_n_grams"),
    (ChineseRepetition(), "我们去吧" * 20, "top_4_gram"),
    (Length(), "short", "too_short"),
    (Language(), ZH, "language zh"),
    (Language(("zh",)), PROSE, "language en"),
]
KEPT = [
    (GopherRepetition(), FRODO),
    (SMALL, FRODO),
    (C4Quality(), (PROSE * 5).strip()),
    (FineWebQuality(), PROSE.strip()),
    (ChineseQuality(), ZH * 3),
    (ChineseRepetition(), ZH),
    (Language(), FRODO),
    (Language(("en", "zh")), ZH),
]


@pytest.mark.parametrize(("step", "text", "reason"), DATATROVE + BY_HAND)
def test_a_rule_drops_with_its_reason(step, text, reason):
    assert step(text) == Drop(reason)


@pytest.mark.parametrize(("step", "text"), KEPT)
def test_a_rule_keeps(step, text):
    assert step(text) == text


def test_c4_removes_lines_and_counts_them():
    removed = "A menu\nToo few.\nEnable JavaScript to read this.\nSee our privacy policy here."
    page = f"{PROSE * 5}\n{removed}\nA fact.[2] So. So."
    edit = C4Quality()(page)
    assert isinstance(edit, Edit)
    assert edit.text == f"{(PROSE * 5).strip()}\nA fact. So. So."
    assert edit.reasons == {
        "line: no_terminal_punc": 1,
        "line: too_few_words": 1,
        "line: javascript": 1,
        "line: policy": 1,
    }


def test_words_and_sentences():
    assert " ".join(words("They don't pay $3.14, e.g. Mr. Li's...")) == "They do n't pay $ 3.14 , e.g. Mr. Li 's ..."
    assert words("你好 world") == ["你", "好", "world"]
    assert count_sentences('"Stop!" he said. Mr. Li of the U.S. did... not?!') == 3
    assert count_sentences(ZH) == 2
    assert normal_words("Ｈｅｌｌｏ, WORLD—naïve\n你好！") == ["hello", "world", "naïve", "你", "好"]


def test_repair():
    assert FixEncoding()("It donâ€™t matter: “quoted”").text == "It don’t matter: “quoted”"
    assert FixEncoding()("ﬁne ＡＢＣ") == "ﬁne ＡＢＣ"
    assert Normalise()("cafe\u0301\u200b  \r\n\n\n\n\tx\n").text == "café\n\n\tx"
    for step in (Normalise(), Normalise("NFKC", indentation=False)):
        once = step("  e\u0301 \t ﬁ \u00ad\r\n\r\n\r\nb \n").text
        assert step(once) == once


def test_personal_data_has_the_masks_of_the_service():
    edit = MaskPersonal()("Write to a.b@mail.example.com or [e-mail], call 650-253-0000.")
    assert edit == Edit("Write to [e-mail] or [e-mail], call [telephone].", {"e-mail": 1, "telephone": 1}, private=True)


def test_word_lists(tmp_path):
    (tmp_path / "words.txt").write_text("Badger\n秘密\nred apple\n")
    step = WordList(str(tmp_path / "words.txt"))
    assert step("badgers run") == "badgers run"
    for text in ("A BADGER!", "这是秘密吗", "one Red apple"):
        assert step(text) == Drop("word_list")


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"^languages: got xx, must be of "):
        Language(("xx",))("text")
    with pytest.raises(UserError, match=r"^probability: got 2"):
        Language(probability=2)
