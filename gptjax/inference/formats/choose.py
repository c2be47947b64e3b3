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
from gptjax.inference.formats.hermes import Hermes
from gptjax.inference.formats.llama import Llama
from gptjax.inference.formats.mistral import Mistral, MistralArguments
from gptjax.inference.formats.reader import Reader
from gptjax.inference.formats.reasoning import KINDS, Reasoning
from gptjax.inference.formats.tool_format import ToolFormat
from gptjax.types import UserError

TOOLS: dict[str, ToolFormat] = {
    form.name: form for form in (MistralArguments(), Mistral(), DeepSeekMarkdown(), DeepSeek(), Hermes(), Llama())
}
"""By name, in the order in which they are looked for."""
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

    def thinking(self, prompt: Sequence[int], tokenizer: Tokenizer) -> bool:
        """True: the reply to this prompt begins inside of the reasoning, which the template has opened."""
        parts = [self.marks.get(i, "").encode() or tokenizer.decode_bytes([i]) for i in prompt[-TAIL:]]
        return self.reasoning.opened(b"".join(parts).decode("utf-8", "replace"))

    def reader(self, tools: bool, thinking: bool) -> Reader:
        """A reader of one reply. tools: the model may call some."""
        return Reader(self.tools if tools else None, self.reasoning, thinking)

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

    def calls(self, tools: Mapping[str, Mapping | None], parallel: bool) -> Grammar:
        """Replies that are calls of these tools, each with the JSON schema of its arguments; one call if not
        `parallel`. Raises UserError if the format is not known."""
        if self.tools is None:
            raise UserError("tools: got some for a model whose format of calls is not known; give one by --tool_format")
        first, middle, last = map(self._literal, self.tools.between)
        more = f"({middle} one)*" if parallel else ""
        each = []
        for i, name in enumerate(tools):
            before, after = map(self._literal, self.tools.around(name))
            each.append(f"{before} @arguments{i} {after}")
        lark = f"start: {first} one {more} {last}\none: " + "\n  | ".join(each)
        schemas = {f"arguments{i}": {"type": "object", **(schema or {})} for i, schema in enumerate(tools.values())}
        return Compound(lark, {name: JsonSchema(schema) for name, schema in schemas.items()})

    def after_reasoning(self, grammar: Grammar) -> Grammar:
        """Replies whose reasoning, which the prompt has opened, is free, and whose answer is of this grammar."""
        close = self.reasoning.close
        if close in self.marks.values():
            rules = f"start: thought {self._literal(close)} space? @answer\nthought: /(?s:.*)/"
        else:
            mark = re.escape(close).replace("/", r"\/")
            rules = f"start: thought space? @answer\nthought[lazy]: /(?s:.*){mark}/"
        return Compound(rules + "\nspace: /\\n{1,2}/", {"answer": grammar})

    def _literal(self, text: str) -> str:
        """A text in Lark, with its special tokens as such."""
        ids = {mark: i for i, mark in self.marks.items()}
        parts = re.split("(" + "|".join(map(re.escape, ids)) + ")", text) if ids else [text]
        found = [f"<[{ids[part]}]>" if part in ids else json.dumps(part, ensure_ascii=False) for part in parts if part]
        return " ".join(found)


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
    reasoning = next((kind for kind in KINDS if any(kind.open in text for text in texts)), KINDS[0])
    marks = {reasoning.open, reasoning.close, *(form.marks if form is not None else ())}
    return ReplyFormat(form, reasoning, {i: name for name, i in tokenizer.specials.items() if name in marks})


def _known(source: str, tokenizer: Tokenizer) -> ToolFormat | None:
    for text in (source, " ".join(tokenizer.specials)):
        for form in TOOLS.values():
            if form.marks[0] in text and (not isinstance(form, DeepSeekMarkdown) or "```json" in source):
                return form
    return None
