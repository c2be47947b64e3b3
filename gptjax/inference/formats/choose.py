"""The format of a model's replies, from its chat template and special tokens."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence

from gptjax.data.chat import Message
from gptjax.data.tokenizers import Tokenizer
from gptjax.inference.constraints import Compound, Grammar, JsonSchema
from gptjax.inference.formats.deepseek import DeepSeek, DeepSeekMarkdown
from gptjax.inference.formats.harmony import Harmony
from gptjax.inference.formats.hermes import Hermes
from gptjax.inference.formats.llama import Llama
from gptjax.inference.formats.mistral import Mistral, MistralArguments
from gptjax.inference.formats.reader import Reader
from gptjax.inference.formats.reasoning import KINDS, Reasoning
from gptjax.inference.formats.tool_format import ToolFormat
from gptjax.types import UserError

TOOLS: dict[str, ToolFormat] = {
    form.name: form
    for form in (Harmony(), MistralArguments(), Mistral(), DeepSeekMarkdown(), DeepSeek(), Hermes(), Llama())
}
"""By name, in the order in which they are looked for."""
RESULTS = "<tool_response>", "</tool_response>", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"
"""Marks of the results of calls."""
TAIL = 64
"""Number of tokens of a prompt's end that are read."""


@dataclasses.dataclass(frozen=True)
class ReplyFormat:
    """Format of a model's calls and reasoning."""

    tools: ToolFormat | None
    """None: it is not known."""
    reasoning: Reasoning
    marks: Mapping[int, str]
    """Special tokens that are part of a reply, and their texts."""
    reasons: bool = False
    """True: chat template or special tokens have the marks of the reasoning."""

    def thinking(self, prompt: Sequence[int], tokenizer: Tokenizer) -> bool:
        """True: the reply to this prompt begins inside of the reasoning, which the template has opened."""
        return self.reasoning.opened(self._end(prompt, tokenizer))

    def _end(self, prompt: Sequence[int], tokenizer: Tokenizer) -> str:
        """The end of a prompt, with its special tokens, which no text of a message stands for."""
        specials = dict.fromkeys(tokenizer.specials.values(), b"\x00")
        specials |= {i: mark.encode() for i, mark in self.marks.items()}
        parts = [specials.get(i) or tokenizer.decode_bytes([i]) for i in prompt[-TAIL:]]
        return b"".join(parts).decode("utf-8", "replace")

    def reader(self, tools: bool, thinking: bool) -> Reader:
        """A reader of one reply. tools: the model may call some."""
        if isinstance(self.tools, Harmony):
            return self.tools.reader(tools)
        return Reader(self.tools if tools else None, self.reasoning, thinking)

    def held(
        self, answer: Grammar | None, calls: Grammar | None, prompt: Sequence[int], tokenizer: Tokenizer
    ) -> Grammar | None:
        """The grammar of a reply to this prompt. Its reasoning is free: what the prompt has opened is closed first, and
        a model that reasons may do so unless the prompt has closed it.

        answer  grammar of an answer. None: there is none, or any, if there are no calls either
        calls   grammar of the calls that may take its place, as `calls` makes it
        """
        if answer is None and calls is None:
            return None
        kinds = {"answer": answer, "calls": calls}
        parts = {name: grammar for name, grammar in kinds.items() if grammar is not None}
        before = "" if self.tools is None else self._literal(self.tools.answer)
        either = " | ".join(f"{before if name == 'answer' else ''} @{name}" for name in parts)
        begin, close = (self.tools and self.tools.thought) or dataclasses.astuple(self.reasoning)
        end = self._end(prompt, tokenizer)
        if self.reasoning.opened(end):
            start = "thought reply"
        else:
            may = self.reasons and not end.rstrip().endswith(self.reasoning.close)
            start = f"({self._literal(begin)} thought)? reply" if may else "reply"
        lark = f"start: {start}\nreply: {either}\n"
        if "thought" not in start:
            return Compound(lark, parts)
        return Compound(lark + self._thought(close), parts)

    def _thought(self, close: str) -> str:
        """Rules of free text up to a mark."""
        first = next((mark for mark in self.marks.values() if close.startswith(mark)), None)
        if first is not None:
            return f"thought: text {self._literal(close)} space?\ntext: /(?s:.*)/\nspace: /\\n{{1,2}}/"
        mark = re.escape(close).replace("/", r"\/")
        return f"thought: text space?\ntext[lazy]: /(?s:.*){mark}/\nspace: /\\n{{1,2}}/"

    def message(self, text: str, tools: bool, thinking: bool) -> Message:
        """The message of a whole reply."""
        reader = self.reader(tools, thinking)
        deltas = [reader.feed(text), reader.close()]
        content, reasoning = "".join(d.content for d in deltas), "".join(d.reasoning for d in deltas)
        functions = ({"name": name, "arguments": arguments} for name, arguments in reader.calls)
        # Nine letters and digits, as Mistral's templates ask.
        calls = [{"id": f"call{i:05d}", "type": "function", "function": f} for i, f in enumerate(functions)]
        fields = {"reasoning_content": reasoning} if reasoning else {}
        return Message("assistant", content or (None if calls else ""), tool_calls=tuple(calls), fields=fields)

    def attempts(self, text: str) -> bool:
        """True: a reply without a call that can be read has the beginning of one."""
        form = self.tools
        if form is None:
            return False
        return any(mark in text for mark in form.begin) or (form.bare and text.lstrip().startswith('{"name"'))

    def calls(self, tools: Mapping[str, Mapping | None], parallel: bool) -> Grammar:
        """Replies that are calls of these tools, each with the JSON schema of its arguments; one call if not
        `parallel`. Raises UserError if the format is not known."""
        if self.tools is None:
            raise UserError("tools: got some for a model whose format of calls is not known; give one by --tool_format")
        first, middle, last = map(self._literal, self.tools.between)
        more = f"({middle} one)*" if parallel and not self.tools.single else ""
        each = []
        for i, name in enumerate(tools):
            before, after = map(self._literal, self.tools.around(name))
            each.append(f"{before} @arguments{i} {after}")
        lark = f"start: {first} one {more} {last}\none: " + "\n  | ".join(each)
        schemas = {f"arguments{i}": {"type": "object", **(schema or {})} for i, schema in enumerate(tools.values())}
        return Compound(lark, {name: JsonSchema(schema) for name, schema in schemas.items()})

    def _literal(self, text: str) -> str:
        """A text in Lark, with its special tokens as such."""
        ids = {mark: i for i, mark in self.marks.items()}
        parts = re.split("(" + "|".join(map(re.escape, ids)) + ")", text) if ids else [text]
        found = [f"<[{ids[part]}]>" if part in ids else json.dumps(part, ensure_ascii=False) for part in parts if part]
        return " ".join(found)


def marks() -> set[str]:
    """Marks of all formats: of reasoning, calls of tools and their results."""
    reasoning = {mark for kind in KINDS for mark in dataclasses.astuple(kind)}
    return {*reasoning, *RESULTS, *(mark for form in TOOLS.values() for mark in form.marks)}


def reply_format(source: str | None, tokenizer: Tokenizer, tools: str | None = None) -> ReplyFormat:
    """The format of a model's replies.

    source  its chat template. None: the format of `gptjax.data.chat`
    tools   name of the format of calls, one of `TOOLS`. None: the one that template and special tokens tell
    """
    if tools is not None and tools not in TOOLS:
        raise UserError(f"tool_format: got {tools!r}, must be one of {', '.join(TOOLS)}")
    known = TOOLS["hermes"] if source is None else _known(source, tokenizer)
    form = TOOLS[tools] if tools is not None else known
    texts = (source or "", " ".join(tokenizer.specials))
    known_reasoning = next((kind for kind in KINDS if any(kind.open in text for text in texts)), None)
    reasoning, reasons = known_reasoning or KINDS[0], known_reasoning is not None or isinstance(form, Harmony)
    marks = {reasoning.open, reasoning.close, *(form.marks if form is not None else ())}
    return ReplyFormat(form, reasoning, {i: name for name, i in tokenizer.specials.items() if name in marks}, reasons)


def _known(source: str, tokenizer: Tokenizer) -> ToolFormat | None:
    for text in (source, " ".join(tokenizer.specials)):
        for form in TOOLS.values():
            if form.marks[0] in text and (not isinstance(form, DeepSeekMarkdown) or "```json" in source):
                return form
    return None
