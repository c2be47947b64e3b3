"""Chat templates: how a model of another program reads a conversation, as a Jinja template makes it text.

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
"""A character without width or meaning, that divides what would be read as a special token."""


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A model's own format of conversations. Raises UserError for a source that is not a Jinja template."""

    source: str = dataclasses.field(repr=False)
    tokens: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)
    """The special tokens that the template calls by role: "bos_token", "eos_token" and others -> their text."""

    def __post_init__(self):
        _ = self._template

    def text(self, messages: Iterable[Message]) -> str:
        """What the model reads before the assistant speaks. Raises UserError for messages that the template refuses:
        a system's, perhaps, or two of one speaker in a row."""
        import jinja2

        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._template.render(messages=turns, add_generation_prompt=True, **self.tokens)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UserError(f"messages: got some that the model's chat template refuses: {error}") from None

    def prompt(self, messages: Iterable[Message], tokenizer: Tokenizer) -> list[int]:
        """The ids of `text`. What a speaker says can't end their turn: where it spells out a special token, a word
        joiner (U+2060) divides it."""

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
            """{% generation %} ... {% endgeneration %}: what the assistant says; here, what is in it."""

            tags = {"generation"}  # noqa: RUF012

            def parse(self, parser: Any) -> Any:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        # As transformers sets it up: templates count on it.
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
