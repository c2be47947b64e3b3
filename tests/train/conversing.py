"""Tools, templates and a scripted engine for conversations with tools."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from gptjax import data
from gptjax.config import allow
from gptjax.data import chat
from gptjax.data.chat import Conversation, Message
from gptjax.inference.engine import Generation, Request, Token
from gptjax.inference.sampling import Sampling
from gptjax.interop.templates import ChatTemplate
from gptjax.interop.tokenizer_json import reader
from gptjax.tasks import Calculate, ChatTools, Function
from gptjax.train.episodes import Asked, Episode, Writing, write

allow(sys.modules[__name__])


@dataclasses.dataclass(frozen=True)
class Add(Function):
    """Sum of two numbers."""

    def run(self, a: int, b: int = 0) -> int:
        if a == 13:
            raise ValueError("an unlucky\nnumber")
        return a + b


TOOLS = ChatTools((Add(), Calculate()))
TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>"}
MISTRAL = (  # that of Mistral 7B Instruct v0.3, shortened
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}"
    "{% if tools and loop.first %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST] {{ m.content }}[/INST]"
    "{% elif m.tool_calls %}[TOOL_CALLS] [{% for call in m.tool_calls %}"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}, "id": "{{ call.id }}"}'
    "{% if call.id | length != 9 %}{{ raise_exception('ids must have nine letters') }}{% endif %}"
    "{% if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}"
    "{% elif m.role == 'tool' %}"
    '[TOOL_RESULTS] {"content": {{ m.content }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]'
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}"
    "<|end_header_id|>\n\n"
    '{% if m.tool_calls %}{"name": "{{ m.tool_calls[0].function.name }}", '
    '"parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% if m.tool_calls | length > 1 %}{{ raise_exception('This model only supports single tool-calls at once!') }}"
    "{% endif %}{% else %}{{ m.content }}{% endif %}<|eot_id|>{% endfor %}{# <|python_tag|> {{ tools }} #}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN = (  # as Qwen 3: an answer's reasoning stands while no user has spoken after it, and an empty one in the last
    "{%- set ns = namespace(asked=0) %}{%- for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{%- if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{%- for m in messages %}{%- if m.role == 'tool' %}"
    "{%- if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>{{ '\n' }}{% endif %}"
    "{%- elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > ns.asked and (loop.last or m.reasoning_content) %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{{ m.content or '' }}"
    "{%- for call in m.tool_calls or [] %}{{ '\n' if m.content or not loop.first }}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n"
    "{%- else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"mistral": MISTRAL, "llama": LLAMA, "qwen": QWEN, "ours": None}
SPECIALS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>")
SPECIALS += ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]")
SPECIALS += ("[/TOOL_RESULTS]", "<think>", "</think>", "<tool_call>", "</tool_call>")


def special(tokenizer: data.Tokenizer, names: Sequence[str] = SPECIALS[:-4]) -> data.Tokenizer:
    return tokenizer.with_specials((*TOKENS.values(), *names))


def template_of(name: str) -> ChatTemplate | None:
    return None if (source := TEMPLATES[name]) is None else ChatTemplate(source, TOKENS)


ASKED = (Message("user", "1+2 é, then 2*(3+4)?"),)


class Script:
    """An engine that writes these ids, one turn after the other, at a log-probability of -1."""

    def __init__(self, tokenizer: data.Tokenizer, turns: Sequence[Sequence[int]], context: int = 4_096):
        self.tokenizer, self.turns, self.context = tokenizer, list(turns), context
        self.rows, self.waiting = 4, 0
        self.requests: list[Request] = []
        self._begun: list[Generation] = []

    def submit(self, request: Request) -> Generation:
        self.requests.append(request)
        self._begun.append(Generation(request, self.tokenizer, None))
        return self._begun[-1]

    def run_round(self) -> None:
        for generation in self._begun:
            generation.extend([Token(i, -1.0) for i in self.turns.pop(0)])
        self._begun = []


def played(
    tokenizer: data.Tokenizer,
    template: ChatTemplate | None,
    turns: Sequence[Sequence[int] | str],
    tools: ChatTools = TOOLS,
    max_tokens: int = 2_000,
    **fields: int,
) -> Episode:
    """The episode of a model that writes these turns."""
    ids = [reader(tokenizer).encode(t, add_special_tokens=False).ids if isinstance(t, str) else t for t in turns]
    writing = Writing.of(max_tokens, Sampling(temperature=1.0), (), tools, tokenizer, template)
    asked = Asked(0, 0, tuple(prompt(tokenizer, template, tools.offered(ASKED))), 0)
    engine = Script(tokenizer, ids, **fields)
    (episode,) = write(engine, [asked], writing)  # pyright: ignore[reportArgumentType]
    assert all(r.prompt == (*asked.prompt, *episode.ids)[: len(r.prompt)] for r in engine.requests)
    assert len(episode.ids) == len(episode.drawn) == len(episode.logprobs) <= max_tokens
    assert episode.logprobs == [-1.0 if drawn else 0.0 for drawn in episode.drawn]
    return episode


def prompt(tokenizer: data.Tokenizer, template: ChatTemplate | None, messages: Conversation) -> list[int]:
    return chat.prompt(messages, tokenizer) if template is None else template.prompt(messages, tokenizer)


def call(number: int, name: str, **arguments: object) -> dict:
    return {"id": f"call{number:05d}", "type": "function", "function": {"name": name, "arguments": arguments}}


def result(number: int, name: str, text: str) -> Message:
    return Message("tool", text, fields={"tool_call_id": f"call{number:05d}", "name": name})
