"""API of a reward model, or of another model of one number per text:

judge = gptjax.load("runs/reward", kind=gptjax.RegressorModel)
judge.scores([[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]])     # [float]
judge.score("Hi", "Hello!")                                   # float, of one reply
judge.predict(["What a film!", "I left."])                    # float32 [2], of texts: a regression
judge.save_hf("for/transformers")
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptjax.config import from_json
from gptjax.data import chat
from gptjax.data.chat import Message
from gptjax.data.tokenizers import Tokenizer
from gptjax.data.tokenizers.tokenizer import add_bos_eos
from gptjax.models.model import TextEncoder
from gptjax.nn import BackboneConfig, ModelConfig, RegressorConfig
from gptjax.types import UserError

if TYPE_CHECKING:
    from gptjax.interop.templates import ChatTemplate

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class RegressorModel(TextEncoder):
    """A model of one number per text: a reward model, or a regression. The number is read at the last token of the
    text, after its end token, as in training, if the pooling is `Last()`. Raises UserError if configuration, parameters
    and tokenizer do not match."""

    config: RegressorConfig
    context: int | None = None
    """Context length of training, in tokens: maximum length of a conversation. None: `max_positions`."""
    template: ChatTemplate | None = None
    """Chat template. None: the format of `gptjax.data.chat`."""
    append_eos: bool = True
    """Append the tokenizer's `eos` to a text, as training here does."""

    def scores(self, conversations: Iterable[Iterable[Message | Mapping[str, Any]]], batch: int = 32) -> list[float]:
        """Reward of the reply that ends each conversation.

        conversations  messages, or dicts with a "role" and a "content"; the last is the assistant's
        batch          conversations per forward pass: changes speed and memory only

        Raises UserError, with its number, for a conversation that does not end with the assistant, or is too long."""
        ids = [self._encode(number, messages) for number, messages in enumerate(conversations)]
        return self._forward_ids(self._module, ids, batch)[:, 0].tolist() if ids else []

    def score(self, prompt: str | Iterable[Message | Mapping[str, Any]], reply: str) -> float:
        """Reward of one reply to a prompt: a text of the user, or the messages so far."""
        before = [Message("user", prompt)] if isinstance(prompt, str) else [*prompt]
        return self.scores([[*before, Message("assistant", reply)]])[0]

    def predict(self, texts: str | Sequence[str], batch: int = 32, length: int | None = None) -> np.ndarray:
        """The number of each text, float32 [n].

        batch   texts per forward pass: changes speed and memory only
        length  number of tokens read of each text, from its start: `length` of training. None: all
        """
        return self._forward_texts(self._module, texts, batch, length)[:, 0]

    def _encode(self, number: int, messages: Iterable[Message | Mapping[str, Any]]) -> list[int]:
        said = chat.conversation(messages)
        if not said or said[-1].role != "assistant":
            last = f"the {said[-1].role}'s message last" if said else "no message"
            raise UserError(f"conversations: {number}: got {last}, must end with the assistant's reply")
        render = chat.render if self.template is None else self.template.render
        ids, _ = render(said, self.tokenizer)
        limit = min((n for n in (self.config.max_positions, self.context) if n is not None), default=len(ids))
        if len(ids) > limit:
            raise UserError(
                f"conversations: {number}: got {len(ids)} tokens, must be at most {limit}, the model's context; leave "
                "out the oldest turns"
            )
        return ids

    @property
    def _backbone(self) -> BackboneConfig:
        return self.config.backbone

    @property
    def _settings(self) -> dict[str, Any]:
        return {"context": self.context, "template": self.template, "append_eos": self.append_eos}

    @classmethod
    def settings_of_hf(cls, path: Path, config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
        from gptjax.interop import huggingface, tokenizers

        fields = huggingface.read_config(path)
        if tokenizer.eos is not None and fields.get("pad_token_id") == tokenizer.eos:
            log.warning(
                "%s pads with its end token %d: `transformers` reads the number before the end token, gptjax at it",
                path,
                tokenizer.eos,
            )
        stated = fields.get("max_position_embeddings") if config.max_positions is None else None
        return {
            "context": stated,
            "template": tokenizers.load_template(path),
            "append_eos": huggingface.read_append_eos(path, tokenizer),
        }

    @classmethod
    def settings_of_run(cls, data: dict[str, Any]) -> dict[str, Any]:
        return {"context": data.get("length"), "template": from_json(data.get("template"))}

    def _add_bos_eos(self, ids: Sequence[int]) -> list[int]:
        return add_bos_eos(ids, self.tokenizer, self.append_eos)
