"""Chat templates: Jinja templates that render a conversation as a published model's prompt.

    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    template.prompt(messages, tokenizer)    # in place of gptjax.data.chat.prompt(messages, tokenizer)

Templates come with a model from the network, so they run in Jinja's sandbox, in a process with limits of time, memory
and output (`template_worker.py`). It is started once, and renders all templates.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptjax.config import digest
from gptjax.data.chat import Conversation, Message, calling
from gptjax.data.tokenizers import CHAT_SPECIALS, Tokenizer
from gptjax.data.tokenizers.huggingface import no_panic
from gptjax.interop.spelled import harmless
from gptjax.interop.tokenizer_json import canonical, reader
from gptjax.io.worker import Worker
from gptjax.types import Json, UserError

NATIVE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""The format of `gptjax.data.chat`, as a template."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names by which templates read the reasoning of a message."""
_PROBE = "gptjax_probe"
_ENDLESS = (
    "template: got one that ends an answer without a special token, so that the model would not learn to stop; write "
    "one after it"
)
_ELSEWHERE = (
    "template: got one that writes a turn with calls otherwise once their results follow, so that results cannot "
    "follow what the model wrote; give another"
)


def jinja_source(template: ChatTemplate | None, tokenizer: Tokenizer) -> str | None:
    """The Jinja of a model's conversations: its template's, else our own format's if the tokenizer has its special
    tokens, else None."""
    if template is not None:
        return template.source
    return NATIVE if set(CHAT_SPECIALS) <= tokenizer.specials.keys() else None


@dataclasses.dataclass(frozen=True, repr=False)
class ChatTemplate:
    """A model's own conversation format. Raises UserError for a source that is not a Jinja template."""

    source: str
    tokens: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)
    """Special tokens that the template names by role: "bos_token", "eos_token" and others -> their text."""

    def __post_init__(self):
        if not isinstance(self.source, str):
            raise UserError(f"template: got {type(self.source).__name__}, must be the text of a Jinja template")
        _check_jinja()
        _ask({"template": self.source})

    def __repr__(self) -> str:
        """By its content: names of stored tokens have it."""
        return f"ChatTemplate({digest([self.source, dict(self.tokens)])[:16]})"

    def text(self, messages: Iterable[Message], variables: Mapping[str, Any] | None = None) -> str:
        """The prompt of the assistant's next message. Raises UserError for messages that the template refuses, such as
        a system message or two consecutive messages of one role, for tools that it does not read, and for a template
        that exceeds its limits.

        variables  values of the template's own variables, such as enable_thinking, and of tools and documents"""
        ((text, _),) = self._written([(tuple(messages), True)], self._checked(variables or {}))
        return text

    def _written(
        self, asked: Sequence[tuple[Conversation, bool]], given: Mapping[str, Any] | None = None
    ) -> list[tuple[str, list[tuple[int, int]]]]:
        """Texts of conversations, each with True to write it up to the assistant's next message, and the spans of
        their generation blocks."""
        variables = [self._variables(*each) | dict(given or {}) for each in asked]
        found = _ask({"template": self.source, "variables": variables})
        return list(zip(found["texts"], found["spans"], strict=True))

    def _variables(self, conversation: Conversation, answering: bool) -> dict[str, Any]:
        turns = [self._turn(message) for message in conversation]
        tools = [tool for message in conversation[:1] for tool in message.tools] or None
        for name, used in (("tools", tools), ("tool_calls", any(message.tool_calls for message in conversation))):
            if used and not self._reads(name):
                raise UserError(f"{name}: got some, which the model's chat template does not read")
        standard = {"messages": turns, "tools": tools, "documents": None, "add_generation_prompt": answering}
        return standard | dict(self.tokens)

    def _turn(self, message: Message) -> dict[str, Any]:
        """A message as the template reads it: arguments of calls are objects, or texts for a template that wants them.
        A text that is no JSON object stands in one, so that it does not spoil the rest of the conversation. Content is
        a list of parts for a template that leaves out texts."""
        turn = message.as_json()
        if (thought := turn.get("reasoning_content")) is not None:
            turn |= {name: thought for name in REASONING if self._reads(name)}
        if isinstance(message.content, str) and self._wants_parts:
            turn["content"] = [{"type": "text", "text": message.content}]
        if message.tool_calls:
            turn["content"] = "" if message.content is None and self._wants_content else message.content
            dump = json.dumps if self._wants_text else dict
            turn["tool_calls"] = [_with_arguments(call, dump) for call in message.tool_calls]
        return turn

    @functools.cached_property
    def _marks(self) -> tuple[str, ...]:
        """Marks of reasoning, calls and results that the template has. They need not be special tokens."""
        from gptjax.inference.formats import marks

        return tuple(mark for mark in marks() if mark in self.source)

    @functools.cached_property
    def _tagged(self) -> bool:
        """True: the template marks what the assistant writes."""
        return re.search(r"{%[-+]?\s*generation\b", self.source) is not None

    @functools.cached_property
    def _reasons(self) -> bool:
        """True: the template reads the reasoning of a message."""
        return any(map(self._reads, REASONING))

    @functools.cached_property
    def _wants_parts(self) -> bool:
        """True: the template writes content that is a list of parts, but refuses texts or leaves them out, as Idefics
        3's does."""

        def writes(content: object) -> bool:
            variables = {"messages": [{"role": "user", "content": content}], "tools": None, "documents": None}
            asked = [variables | {"add_generation_prompt": True} | dict(self.tokens)]
            (text,) = _worker.ask({"template": self.source, "variables": asked}).get("texts", [""])
            return _PROBE in text

        return not writes(_PROBE) and writes([{"type": "text", "text": _PROBE}])

    @functools.cached_property
    def _wants_text(self) -> bool:
        """True: the template refuses arguments of calls that are objects, but not texts, as DeepSeek's does."""
        return any(not self._calls({"a": 1}, c) and self._calls('{"a": 1}', c) for c in ("", None))

    @functools.cached_property
    def _wants_content(self) -> bool:
        """True: the template refuses calls without content, but not with an empty text, as Qwen 3 VL's does."""
        arguments = '{"a": 1}' if self._wants_text else {"a": 1}
        return not self._calls(arguments, None) and self._calls(arguments, "")

    def _calls(self, arguments: Json, content: str | None) -> bool:
        """True: the template writes a message with such a call and content."""
        call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": arguments}}
        said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": content, "tool_calls": [call]}]
        variables = {"messages": said, "tools": None, "documents": None, "add_generation_prompt": False}
        return "texts" in _worker.ask({"template": self.source, "variables": [variables | dict(self.tokens)]})

    def rows(self, conversation: Conversation, tokenizer: Tokenizer) -> list[Conversation]:
        """Conversations to train in place of one. A template that writes an answer otherwise once others follow, such
        as without its reasoning, has each answer trained alone, after what it is asked then."""
        ends = _ends(conversation)
        if not ends:
            return [conversation]
        if any(m.target and m.fields.get("reasoning_content") for m in conversation) and not self._reasons:
            raise UserError(
                "reasoning_content: got some, which the model's chat template does not read; leave it out, or write it "
                "into the content"
            )
        names = _names(tokenizer)
        texts = [text for text, _ in self._written([(conversation[:end], False) for end in ends])]
        if all(self._end(text, texts[-1], names) is not None for text in texts):
            return [conversation[: ends[-1]]]
        quiet = [dataclasses.replace(message, weight=0.0) for message in conversation]
        return [(*quiet[: end - 1], conversation[end - 1]) for end in ends]

    def render(self, conversation: Conversation, tokenizer: Tokenizer) -> tuple[list[int], list[float]]:
        """Token ids of one of `rows`, and their loss weights: the message's for what the assistant writes, 0 for
        all else.

        A template with generation blocks says so itself. Without them it is what follows each prompt, up to the special
        token that ends it; where none does, up to the special token with which the next turn begins, as in GLM 4.5.
        Raises UserError for an answer that no special token ends, and for one that does not begin as its prompt."""
        turns = harmless(conversation, tokenizer, self._marks)
        text, spans = self._blocks(turns, tokenizer) if self._tagged else self._answers(turns, tokenizer)
        with no_panic():
            encoded = reader(tokenizer).encode(text, add_special_tokens=False)
        weights = [0.0] * len(text)
        for start, end, weight in spans:
            weights[start:end] = [weight] * (end - start)
        found = [weights[at] for at, _ in encoded.offsets]
        if spans and not any(found):
            raise UserError("template: got one that leaves no token of the answers to train; give another")
        return encoded.ids, found

    def _answers(self, turns: Conversation, tokenizer: Tokenizer) -> tuple[str, list[tuple[int, int, float]]]:
        """The text, and the span and weight of each answer that is a target."""
        names, ends = _names(tokenizer), _ends(turns)
        asked = [(turns[: end - answering], bool(answering)) for end in ends for answering in (1, 0)]
        (text, _), *parts = self._written([(turns, False), *asked])
        spans = []
        for end, (before, _), (after, _) in zip(ends, parts[::2], parts[1::2], strict=True):
            start, stop = _start(before, text, end), self._end(after, text, names)
            if stop is None:
                raise _other_prompt(end)
            answer = text[start:stop].rstrip()
            if answer.endswith(names):
                spans.append((start, start + len(answer), turns[end - 1].weight))
                continue
            if stop == len(text):
                text += self._next_turn(turns[end - 1], names)
            following = next((name for name in names if text.startswith(name, stop)), None)
            if following is None:
                raise UserError(_ENDLESS)
            spans.append((start, stop + len(following), turns[end - 1].weight))
        return text, spans

    def _blocks(self, turns: Conversation, tokenizer: Tokenizer) -> tuple[str, list[tuple[int, int, float]]]:
        """The text, and its generation blocks of the answers that are targets, with their weights."""
        names = _names(tokenizer)
        ends = [i for i, message in enumerate(turns, 1) if message.role == "assistant"]
        asked = [(turns[: end - answering], bool(answering)) for end in ends for answering in (1, 0)]
        (text, blocks), *parts = self._written([(turns, False), *asked])
        stops = [self._end(after, text, names) for after, _ in parts[1::2]]
        kept, first = [], 0
        for end, (before, _), stop in zip(ends, parts[::2], [*stops[:-1], len(text)], strict=True):
            message = turns[end - 1]
            if stop is None:
                if any(m.target for m in turns[:end]):
                    raise _other_prompt(end)
                continue
            own, first = [block for block in blocks if first <= block[0] < stop], stop
            if not message.target:
                continue
            _start(before, text, end)
            if not any(end > start for start, end in own):
                raise UserError(f"template: got one whose generation blocks leave out message {end}, an assistant's")
            if not text[own[-1][0] : own[-1][1]].rstrip().endswith(names):
                raise UserError(_ENDLESS)
            kept += [(*block, message.weight) for block in own]
        return text, kept

    def _next_turn(self, message: Message, names: tuple[str, ...]) -> str:
        """The special token with which the turn after this message begins, or ""."""
        asked = Message("user", "x"), Message("assistant", "y", tool_calls=message.tool_calls)
        follower = Message("tool" if message.tool_calls else "user", "z")
        (before, _), (after, _) = self._written([(asked, False), ((*asked, follower), False)])
        return next((name for name in names if after.startswith(before + name)), "")

    def _end(self, part: str, text: str, names: tuple[str, ...]) -> int | None:
        """Length of the part of a conversation in the text of all of it, without a token that ends only the last
        message, after its own end. None: the whole begins otherwise."""
        if text.startswith(part):
            return len(part)
        for tail in self.tokens.values():
            rest = part.removesuffix(tail)
            if tail and rest != part and text.startswith(rest) and rest.rstrip().endswith(names):
                return len(rest)
        return None

    def _checked(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """The variables. Raises UserError for one that the template does not read, or that is not JSON."""
        for name, value in variables.items():
            if name in ("messages", "add_generation_prompt") or not self._reads(str(name)):
                raise UserError(f"template: got {name}, which is no variable of the model's chat template")
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError):
                raise UserError(f"template: {name}: got {str(value)[:80]!r}, must be a value of JSON") from None
        return dict(variables)

    def _reads(self, name: str) -> bool:
        return re.search(rf"\b{re.escape(name)}\b", self.source) is not None

    def prompt(
        self, messages: Iterable[Message], tokenizer: Tokenizer, variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """The ids of `text`. A message cannot end its own turn: a special token that its content spells out is split by
        a word joiner (U+2060)."""

        text = self.text(harmless(messages, tokenizer, self._marks), variables)
        with no_panic():
            return reader(tokenizer).encode(text, add_special_tokens=False).ids

    def results(
        self, messages: Conversation, tokenizer: Tokenizer, before: Conversation = (Message("user", "x"),)
    ) -> list[int]:
        """Token ids of the results of calls and of the beginning of the assistant's next turn, which follow the token
        that ended the calls. Nothing else is encoded: neither `before`, any conversation that the calls may follow, nor
        the calls. Raises UserError if the template does not write results behind calls as they were."""
        call, refused = calling(messages), UserError(_ELSEWHERE)
        for fields in ({}, *[{"reasoning_content": "x"}] * self._reasons):  # Qwen 3 forgets that there was none
            try:
                return self._after((*before, dataclasses.replace(call, fields=fields)), messages, tokenizer)
            except UserError as error:
                refused = error
        raise refused

    def _after(self, called: Conversation, messages: Conversation, tokenizer: Tokenizer) -> list[int]:
        """Token ids that follow the end of the last message of `called` if these come next."""
        from gptjax.inference.formats import reply_format

        within = reply_format(self.source, tokenizer).marks.values()
        names = tuple(name for name in _names(tokenizer) if name not in within)
        turns = harmless((*called, *messages), tokenizer, self._marks)
        (part, _), (text, _) = self._written([(turns[: len(called)], False), (turns, True)])
        if (stop := self._end(part, text, names)) is None:
            raise UserError(_ELSEWHERE)
        start = len(text[:stop].rstrip())
        if not text[:start].endswith(names):
            if not (following := next((name for name in names if text.startswith(name, stop)), "")):
                raise UserError(_ENDLESS)
            start = stop + len(following)
        with no_panic():
            head, whole = (reader(tokenizer).encode(t, add_special_tokens=False).ids for t in (text[:start], text))
        if whole[: len(head)] != head:
            raise UserError(_ELSEWHERE)
        return whole[len(head) :]


def _with_arguments(call: Mapping[str, Any], dump: Callable[[Any], Any]) -> dict[str, Any]:
    """A call whose arguments are an object, or what `dump` makes of it."""
    function = call.get("function")
    if not isinstance(function, Mapping) or "arguments" not in function:
        return dict(call)
    arguments = function["arguments"]
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    if not isinstance(arguments, Mapping):
        arguments = {"invalid_arguments": arguments} if arguments else {}
    return {**call, "function": {**function, "arguments": dump(arguments)}}


def _names(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Texts of the special tokens, longer ones first."""
    return tuple(sorted(canonical(tokenizer).values(), key=len, reverse=True))


def _other_prompt(end: int) -> UserError:
    return UserError(
        f"template: got one whose prompt is not how its conversation begins, up to message {end}, so that the answer "
        "cannot be trained"
    )


def _start(prompt: str, text: str, end: int) -> int:
    """Length of a prompt in the text that has its answer, message `end`; without the reasoning that it opens, or leaves
    empty, if the answer reasons otherwise. Raises UserError if the text begins otherwise."""
    from gptjax.inference.formats.reasoning import KINDS

    for kind in (None, *KINDS):
        opened = "" if kind is None else rf"(?:{re.escape(kind.open)}\s*)?(?:{re.escape(kind.close)}\s*)?"
        head = re.sub(f"(?:{opened})$", "", prompt)
        if text.startswith(head):
            return len(head)
    raise _other_prompt(end)


def _ends(conversation: Conversation) -> list[int]:
    """Number of messages up to each of the assistant's that is a target."""
    return [i for i, message in enumerate(conversation, 1) if message.target]


_worker = Worker(Path(__file__).with_name("template_worker.py"))


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    """The worker's answer. Raises UserError for an invalid template, refused messages or an exceeded limit."""
    found = {
        kind: found if kind in ("texts", "spans") else " ".join(found.split())[:300]
        for kind, found in _worker.ask(request).items()
    }
    if "invalid" in found:
        raise UserError(f"template: got one that is not a Jinja template ({found['invalid']})")
    if "refused" in found:
        raise UserError(f"messages: refused by the model's chat template: {found['refused']}")
    if "limit" in found:
        raise UserError(f"template: got one that {found['limit']}; give the model another chat template")
    return found


def _check_jinja() -> None:
    """Raise UserError without a Jinja that is safe."""
    try:
        version = importlib.metadata.version("jinja2")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("template: a chat template needs the jinja2 library; pip install 'gptjax[hf]'") from None
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < (3, 1, 6):
        raise UserError(
            f"template: got jinja2 {version}, from whose sandbox templates escape, must be 3.1.6 or newer; "
            "pip install -U jinja2"
        )
