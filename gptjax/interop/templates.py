"""Chat templates: Jinja templates that render a conversation as a published model's prompt.

    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    template.prompt(messages, tokenizer)    # in place of gptjax.data.chat.prompt(messages, tokenizer)

Templates come with a model from the network, so they run in Jinja's sandbox.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from gptjax.data.chat import Message
from gptjax.data.tokenizers import Tokenizer
from gptjax.interop.tokenizer_json import reader
from gptjax.types import UserError

if TYPE_CHECKING:
    from jinja2 import Template

NATIVE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""The format of `gptjax.data.chat`, as a template."""
JOINER = "\u2060"
"""A character without width or meaning, inserted into text that spells out a special token."""


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A model's own conversation format. Raises UserError for a source that is not a Jinja template."""

    source: str = dataclasses.field(repr=False)
    tokens: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)
    """Special tokens that the template names by role: "bos_token", "eos_token" and others -> their text."""

    def __post_init__(self):
        _ = self._template

    def text(self, messages: Iterable[Message]) -> str:
        """The prompt of the assistant's next message. Raises UserError for messages that the template refuses, such as
        a system message or two consecutive messages of one role."""
        import jinja2

        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._template.render(messages=turns, add_generation_prompt=True, **self.tokens)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UserError(f"messages: refused by the model's chat template: {error}") from None

    def prompt(self, messages: Iterable[Message], tokenizer: Tokenizer) -> list[int]:
        """The ids of `text`. A message cannot end its own turn: a special token that its content spells out is split by
        a word joiner (U+2060)."""

        def harmless(text: str) -> str:
            for name in tokenizer.specials:
                text = text.replace(name, name[:1] + JOINER + name[1:])
            return text

        text = self.text(Message(message.role, harmless(message.content)) for message in messages)
        return reader(tokenizer).encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _template(self) -> Template:
        try:
            import jinja2.nodes
            from jinja2.ext import Extension, loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise UserError("template: a chat template needs the jinja2 library; pip install 'gptjax[hf]'") from None

        class Generation(Extension):
            """{% generation %} ... {% endgeneration %}, which marks the assistant's text; replaced by its content."""

            tags = {"generation"}  # noqa: RUF012

            def parse(self, parser: Any) -> Any:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        # The same environment as in transformers, which templates rely on.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            return environment.from_string(self.source)
        except jinja2.TemplateError as error:
            raise UserError(f"template: got one that is not a Jinja template ({error})") from None


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)
