"""Conversations as a model's own chat template writes them: the targets are what it writes when it is asked."""

from __future__ import annotations

import json

import numpy as np
import pytest

import gptjax
from gptjax import Experiment, Stage, data, optim
from gptjax.data.chat import ConversationEncoder, Message, conversation, render
from gptjax.data.tokenizers.tokenizer import add_bos_eos
from gptjax.interop import tokenizers
from gptjax.interop.templates import ChatTemplate
from gptjax.nn import TransformerConfig
from gptjax.objectives import NextToken
from gptjax.types import UserError

MESSAGE = (
    "{%- if message.role == 'assistant' %}<|assistant|>\n"
    "{% generation %}{{ message.content or '' }}"
    "{%- for call in message.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|end|>"
    "{% endgeneration %}{{ '\n' }}"
    "{%- else %}<|{{ 'user' if message.role == 'tool' else message.role }}|>\n{{ message.content }}<|end|>\n{% endif %}"
)
HERMES = (
    "{{ bos_token }}{%- if tools %}<|system|>{{ tools | tojson }}<|end|>\n{% endif %}"
    "{%- for message in messages %}" + MESSAGE + "{% endfor %}"
    "{%- if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
FORGETFUL = (  # as Qwen 3, an answer loses its reasoning when others follow
    "{%- for message in messages %}<|{{ message.role }}|>"
    "{%- if message.reasoning_content and loop.last %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
TALK = [
    {"role": "system", "content": "Be  brief."},
    {"role": "user", "content": "1+2 é?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "It is 3, \u2713."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": " Bye\n"},
]


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> data.Tokenizer:
    texts = iter(["What does it do?\n\nIt gives the sum. {}" * 20] * 20)
    return {"bytes": data.Bytes(), "sentencepiece": data.TrainSentencePiece(vocab=300)}[request.param].build(texts)


@pytest.mark.torch
def test_targets_are_the_generations_of_transformers(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    template = ChatTemplate(HERMES, {"bos_token": "<|bos|>"})
    tokenizers.save(tokenizer, tmp_path, 512, template)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(TALK, tools=TOOLS, return_dict=True, return_assistant_tokens_mask=True)
    (row,) = template.rows(conversation(TALK, TOOLS), tokenizer)
    ids, weights = template.render(row, tokenizer)
    assert ids == list(expected["input_ids"])
    assert weights == [float(mask) for mask in expected["assistant_masks"]]
    assert sum(weights) > 20


def test_every_answer_follows_its_prompt(tokenizer):
    """The prompt of a chat is how the trained row begins, and a message of weight 0 is context."""
    template = ChatTemplate(HERMES, {"bos_token": "<|bos|>"})
    talk = conversation([message | {"weight": int(i != 2)} for i, message in enumerate(TALK)], TOOLS)
    (row,) = template.rows(talk, tokenizer)
    ids, weights = template.render(row, tokenizer)
    starts = np.flatnonzero(np.diff(weights, prepend=0) > 0)
    assert len(starts) == 2
    for start, count in zip(starts, (4, 6), strict=True):
        assert template.prompt(talk[:count], tokenizer) == ids[:start]
    assert [ids[i] for i in np.flatnonzero(np.diff(weights) < 0)] == [tokenizer.eos] * 2


def test_an_answer_that_is_written_otherwise_later_is_trained_alone(tokenizer):
    template = ChatTemplate(FORGETFUL)
    talk = conversation(
        [m | ({"reasoning_content": "Hm."} if m["role"] == "assistant" else {}) for m in (TALK[1], *TALK[4:])]
    )
    rows = template.rows(talk, tokenizer)
    assert [len(row) for row in rows] == [2, 4]
    for row in rows:
        ids, weights = template.render(row, tokenizer)
        start = weights.index(1.0)
        assert ids[:start] == template.prompt(row[:-1], tokenizer)
        assert all(weights[start:])
        assert tokenizer.decode(ids[start:]) == f"<think>Hm.</think>{row[-1].content}"
    assert template.rows(talk[:2], tokenizer) == [talk[:2]]


@pytest.mark.parametrize("length", [64, 128, 400])
def test_long_conversations_lose_their_oldest_turns_but_no_tools(tokenizer, length):
    template = ChatTemplate(HERMES, {"bos_token": "<|bos|>"})
    talk = conversation([*TALK[1:], *TALK[5:], *TALK[1:]], TOOLS)
    (found,) = ConversationEncoder(length, "truncate", template)(iter([talk]), tokenizer)
    whole, _ = template.render(talk, tokenizer)
    suffixes = [
        template.render((Message("user", talk[i].content, tools=talk[0].tools), *talk[i + 1 :]), tokenizer)
        for i, message in enumerate(talk)
        if message.role == "user"
    ]
    expected = [suffix for suffix in suffixes if len(suffix[0]) <= length]
    assert (found.ids, found.weights) == (expected[0] if expected else ([], None))
    assert (found.note is None) == (len(whole) <= length)


def test_a_run_learns_and_chats_in_the_template(tokenizer, tmp_path):
    source = tmp_path / "chats.jsonl"
    source.write_text("\n".join(json.dumps({"messages": TALK, "tools": TOOLS}) for _ in range(3)))
    template = ChatTemplate(HERMES, {"bos_token": "<|bos|>"})
    chat = data.Chat(data.ChatJsonl(str(source), 0.0), length=512, batch=1, template=template)
    batches = chat.batches(tokenizer, "train", 0, tmp_path / "tokens")
    shown = [piece for piece in data.pieces(next(batches), tokenizer) if piece.segment == 1]
    batches.close()
    assert [piece.target for piece in shown] == [False, True] * 3 + [False]
    assert shown[1].text == '<call>{"name": "add", "arguments": {"a": 1, "b": 2}}</call><|end|>'
    assert shown[0].text.startswith(f"<|bos|><|system|>{json.dumps(TOOLS)}<|end|>\n<|system|>\nBe  brief.<|end|>")
    assert str(shown[5]) == r"1 target  ' Bye\n<|end|>'"
    ids = chat.prompt(tokenizer, "Hi")
    assert ids == template.prompt([Message("user", "Hi")], tokenizer)
    other = data.Chat(chat.source, length=512, batch=1, template=ChatTemplate("{# other #}" + HERMES))
    changed = other.batches(tokenizer, "train", 0, tmp_path / "tokens")
    assert changed.fingerprint != batches.fingerprint


@pytest.mark.alone
def test_a_trained_model_has_the_template(tmp_path):
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": TALK[-2:]}) for _ in range(3)))
    template = ChatTemplate(HERMES, {"bos_token": "<|bos|>"})
    chat = data.Chat(data.ChatJsonl(str(tmp_path / "chats.jsonl"), 0.0), length=64, batch=8, template=template)
    stage = Stage(chat, NextToken(), optim.AdamW(), steps=1, prompts=("Hi",))
    model = TransformerConfig(vocab=264, layers=1, width=16, heads=2)
    assert Experiment(model, data.Bytes(), {"chat": stage}).run(tmp_path / "run") == 0
    lm = gptjax.load(tmp_path / "run", kind=gptjax.LanguageModel)
    assert lm.template == template
    assert isinstance(lm.chat([{"role": "user", "content": "Hi"}], max_tokens=3).content, str)
    lm.save_hf(tmp_path / "hf")
    assert gptjax.load(tmp_path / "hf", kind=gptjax.LanguageModel).template.source == HERMES


def test_a_template_whose_prompt_is_another_is_refused(tokenizer):
    other = ChatTemplate(HERMES.replace("prompt %}<|assistant|>\n", "prompt %}<|system|>"))
    encode = ConversationEncoder(512, "truncate", other)
    with pytest.raises(UserError, match=r"^source: conversation 1: template: got one whose prompt is not how"):
        list(encode(iter([conversation(TALK)]), tokenizer))
    refusing = ConversationEncoder(9, "drop", ChatTemplate("{{ raise_exception('no robots') }}"))
    with pytest.raises(UserError, match=r"^source: conversation 2: messages: refused .* no robots"):
        list(refusing(iter(["text", conversation(TALK[4:])]), tokenizer))


def test_a_template_that_ends_no_answer_or_reads_no_reasoning_is_refused(tokenizer):
    """A model that was trained so would not stop, or not reason, without a word."""
    endless = ChatTemplate("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    (row,) = endless.rows(conversation(TALK[5:]), tokenizer)
    prompted = ChatTemplate(endless.source + "{% if add_generation_prompt %}[assistant]{% endif %}")
    with pytest.raises(UserError, match=r"^template: got one that ends an answer without a special token"):
        prompted.render(row, tokenizer)
    tagged = prompted.source.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
    with pytest.raises(UserError, match=r"^template: got one that ends an answer without a special token"):
        ChatTemplate(tagged).render(row, tokenizer)
    nothing = "{% generation %}{% endgeneration %}"
    unmarked = HERMES.replace("{% generation %}", "").replace("{% endgeneration %}", nothing)
    with pytest.raises(UserError, match=r"^template: .* leave out message 2, an assistant's"):
        ChatTemplate(unmarked).render(row, tokenizer)
    thinking = conversation([TALK[5], TALK[6] | {"reasoning_content": "Hm."}])
    with pytest.raises(UserError, match=r"^reasoning_content: got some, which the model's chat template does not read"):
        ChatTemplate(HERMES).rows(thinking, tokenizer)
    ids, weights = render(thinking, tokenizer)  # our own format writes it as text
    assert tokenizer.decode(np.array(ids)[np.array(weights) > 0]) == "<think>\nHm.\n</think>\n\n Bye\n"


def test_content_reaches_a_template_that_reads_parts_alone(tokenizer):
    """As Idefics 3's, which leaves a text out."""
    parts = ChatTemplate(
        "{% for m in messages %}<|{{ m.role }}|>{% for part in m.content %}{{ part.text }}{% endfor %}<|end|>"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    ids, weights = parts.render(conversation(TALK[5:]), tokenizer)
    assert tokenizer.decode(ids) == "Thanks Bye\n"
    assert tokenizer.decode(np.array(ids)[np.array(weights) > 0]) == " Bye\n"


@pytest.mark.parametrize("says", ["template", "own format", "text"])
def test_there_is_one_bos_by_every_road(tokenizer, says):
    """Also where a text spells it out."""
    talk = conversation([{"role": "user", "content": "a<|bos|>b"}, *TALK[4:]])
    roads = {
        "template": lambda: ChatTemplate(HERMES, {"bos_token": "<|bos|>"}).render(talk, tokenizer)[0],
        "own format": lambda: render(talk, tokenizer)[0],
        "text": lambda: add_bos_eos(tokenizer.encode("a<|bos|>b"), tokenizer),
    }
    ids = roads[says]()
    assert ids[0] == tokenizer.bos
    assert ids.count(tokenizer.bos) == 1
    assert ids.count(tokenizer.eos) == (1 if says == "text" else len(talk))
