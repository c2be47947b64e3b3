"""Laws of filters: a stream, however it is divided, is filtered as the whole text; masks know numbers from others."""

import itertools
import json
import random

import httpx
import pytest
from test_serve import TALK, Server, model

from gptjax.data.chat import Message
from gptjax.data.masks import Mask
from gptjax.serve.access import Policy
from gptjax.serve.filters import Filters, FilterStream, Refuse, Refused

MASKED = [
    ("Write to jane.doe+x@mail.example.com, please", "Write to [e-mail], please"),
    ("call +1 (650) 253-0000 or 650-253-0000.", "call [telephone] or [telephone]."),
    ("电话:+86 10 6552 9988。", "电话:[telephone]。"),
    ("card 4111 1111 1111 1111, old 378282246310005", "card [card], old [card]"),
    ("in 2024 4111-1111-1111-1111 was", "in 2024 [card] was"),
    ("IBAN DE89 3704 0044 0532 0130 00 and GB29NWBK60161331926819.", "IBAN [bank account] and [bank account]."),
]
KEPT = [
    "4111 1111 1111 1112 is no card",
    "DE89 3704 0044 0532 0130 01 is no account",
    "in 1969, 3.14159265358979 and 10 000 000 people; 2026-11-27 10:00",
    "def f(x): return x[0] @ y  # a.b@c",
    "",
]


@pytest.mark.parametrize(("text", "masked"), MASKED + [(text, text) for text in KEPT])
def test_masks(text, masked):
    assert Mask()(text) == masked


def streamed(filters: tuple, pieces: list[str]) -> tuple[str, bool]:
    stream, shown = FilterStream(filters), ""
    try:
        for piece in pieces:
            shown += stream.push(piece)
        return shown + stream.end(), False
    except Refused as error:
        return shown + error.kept, True


def divided(text: str, draw: random.Random) -> list[str]:
    sizes = [draw.randrange(1, 9) for _ in text]
    ends = [0, *itertools.accumulate(sizes)]
    return [text[a:b] for a, b in itertools.pairwise(ends)]


def test_a_stream_is_filtered_as_the_whole_text():
    draw = random.Random(0)
    words = [text for text, _ in MASKED] + KEPT
    words += [*" -7é\n", "  ", "   ", "ABCD", "Forbidden", "forb", "bid", "x" * 500, "1 " * 300]
    refuse = Refuse(("forbidden", "bidden", "den"))
    for _ in range(60):
        text = "".join(draw.choice(words) for _ in range(draw.randrange(6)))
        for filters in ((Mask(),), (refuse,), (Mask(), Refuse(("card",))), (Refuse(("jane",)), Mask("DE"))):
            assert streamed(filters, divided(text, draw)) == streamed(filters, [text]), text
        assert streamed((Mask(),), divided(text, draw)) == (Mask()(text), False), text


def test_only_what_can_become_a_match_is_held():
    stream = FilterStream((Mask(), Refuse(("secret word",))))
    assert stream.push("This is a long reply, ") == "This is a long reply, "
    assert stream.push("with a sec") == "with a "
    assert stream.push("ond part. ") == "second part. "
    assert stream.push("Call 650 253 ") == "Call "
    with pytest.raises(Refused) as refused:
        stream.push("0000! The SECRET word is")
    assert refused.value.kept == "[telephone]! The "


class Swap:
    """Writes pairs of characters the other way round: a filter of one's own."""

    def border(self, text: str) -> int:
        return len(text) // 2 * 2

    def __call__(self, text: str) -> str:
        return "".join(text[i : i + 2][::-1] for i in range(0, len(text), 2))


def test_what_is_read_and_written_is_filtered():
    said = [Swap()(model().chat(TALK, max_tokens=30, seed=seed).content) for seed in (1, 2)]
    phrase = next(said[1][i : i + 3] for i in range(10, 30) if said[1][i : i + 3] not in said[0])
    filters = Filters(inputs=(Mask(), Refuse(("forbidden",))), outputs=(Swap(), Refuse((phrase,))))
    server = Server(policy=Policy(filters=filters))

    def ask(path: str = "/v1/chat/completions", **body) -> httpx.Response:
        return httpx.post(server.url + path, json=body, timeout=60)

    try:
        for seed, (shown, end) in enumerate([(said[0], "length"), (said[1].partition(phrase)[0], "content_filter")], 1):
            body = {"messages": TALK, "max_tokens": 30, "seed": seed}
            (choice,) = ask(**body).json()["choices"]
            assert (choice["message"]["content"], choice["finish_reason"]) == (shown, end)
            streamed, ends = "", set()
            for event in ask(**body, stream=True).text.split("\n\n")[:-2]:
                (choice,) = json.loads(event[6:])["choices"]
                streamed += choice["delta"].get("content", "")
                ends.add(choice["finish_reason"])
            assert (streamed, ends | {None}) == (shown, {None, end})  # a short one may come in one piece
        assert ask(messages=TALK, logprobs=True).json()["error"]["param"] == "logprobs"
        assert ask("/v1/completions", prompt=[1, 2]).json()["error"]["param"] == "prompt"
        for path, body in (("/v1/completions", {"prompt": "FORBIDDEN"}), ("/page/replies", {"messages": FORBIDDEN})):
            assert ask(path, **body).json()["error"]["code"] == "content_filter"
        masked = [Message("user", "Call [telephone]")]
        usage = ask(messages=[{"role": "user", "content": "Call 650-253-0000"}], max_tokens=1).json()["usage"]
        assert usage["prompt_tokens"] == len(model().encode_chat(masked))
    finally:
        server.close()


FORBIDDEN = [{"role": "user", "content": "Something forbidden"}]


def test_calls_and_reasoning_of_a_conversation_are_read_too():
    call = {"id": "call_650-253-0000", "type": "function", "function": {"name": "f", "arguments": '{"a": "x@y.com"}'}}
    said = Message("assistant", None, tool_calls=(call,), fields={"reasoning_content": "x@y.com", "name": "n"})
    (read,) = Filters(inputs=(Mask(),)).read_messages([said])
    assert read.fields == {"reasoning_content": "[e-mail]", "name": "n"}
    assert read.tool_calls == ({**call, "function": {"name": "f", "arguments": '{"a": "[e-mail]"}'}},)
