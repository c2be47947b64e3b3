"""A language model behind one door; `loading.py` has the key:

lm = gptjax.load("runs/quickstart")
lm.generate("Once upon", max_tokens=50, temperature=0.8)[0].text
lm.chat([Message("user", "What does textwrap.dedent do?")]).content
lm.embed(["A text.", "Another."], pooling=Last())             # float32 [2, D]
lm.save("somewhere/else")
lm.save_hf("for/transformers")
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.data.chat import Message, conversation
from gptjax.data.chat import prompt as chat_prompt
from gptjax.data.tokenizers.tokenizer import add_bos_eos
from gptjax.distributed.sharding import on_mesh_of, reshard
from gptjax.inference.generate import DEFAULT_TOKENS, Completion, generate, round_up, stream
from gptjax.inference.sampling import Sampling
from gptjax.models.model import TextEncoder, run
from gptjax.nn import TransformerConfig, unstack
from gptjax.types import Array, Params, UserError

if TYPE_CHECKING:
    from gptjax.interop.templates import ChatTemplate

Messages = Iterable[Message | Mapping[str, Any]]
"""Of `Message`s, or dicts with a "role" and a "content"."""


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel(TextEncoder):
    """A model that writes on. Raises UserError when it, its parameters and its tokenizer don't fit together.

    Wherever a `sampling` is taken, its fields are too: `lm.generate("Hi", temperature=0)`. What is not said is as the
    model's own has it.
    """

    context: int | None = None
    """Longest text that it was trained on, tokens; conversations are kept within."""
    template: ChatTemplate | None = None
    """How it reads conversations, if not as `gptjax.data.chat` writes them."""
    stop_token_ids: tuple[int, ...] | None = None
    """The tokens at which a text ends, if not at every special one."""
    sampling: Sampling | None = None
    """How its authors let it draw the next token, if they say."""

    def logits(self, tokens: Array | np.ndarray | Sequence[Sequence[int]]) -> Array:
        """tokens int [B, T] -> logits [B, T, V] of the token that follows each, in the compute dtype."""
        ids = jnp.asarray(tokens, jnp.int32)
        self._fits(ids.shape[-1])
        with on_mesh_of(self.params):
            return run(self._module, self.params, ids)[0]

    def logprobs(self, text: str | Sequence[int]) -> np.ndarray:
        """The log-probability, nats, of each token given those before it: float32 [n - 1] for n token ids. A text's
        first token counts too where the tokenizer has a mark for the start of a document."""
        ids = self._begin(text) if isinstance(text, str) else list(text)
        if len(ids) < 2:
            return np.zeros(0, np.float32)
        self._fits(len(ids))
        size = min(round_up(len(ids)), self.config.max_positions or sys.maxsize)
        padded = np.zeros((1, size), np.int32)  # what follows changes nothing, and programs stay few
        padded[0, : len(ids)] = ids
        with on_mesh_of(self.params):
            return np.asarray(_logprobs(self._module, self.params, padded))[0, : len(ids) - 1]

    def generate(
        self,
        prompts: str | Sequence[str],
        max_tokens: int | None = None,
        samples: int = 1,
        seed: int = 0,
        stop: Sequence[str] = (),
        sampling: Sampling | None = None,
        **fields: Any,
    ) -> list[Completion]:
        """How the model goes on after each prompt: `samples` completions of the first, then of the second, ... See
        `gptjax.inference.generate`."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        sampling = self._drawn(sampling, **fields)
        ids = [self._begin(prompt) for prompt in prompts]
        return generate(
            self._module,
            self._layers,
            self.tokenizer,
            ids,
            max_tokens,
            sampling,
            samples,
            seed,
            stop,
            stop_token_ids=self.stop_token_ids,
        )

    def stream(
        self,
        prompt: str,
        max_tokens: int | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
        sampling: Sampling | None = None,
        **fields: Any,
    ) -> Generator[str, None, Completion]:
        """The text of `generate`, in pieces as it is written. The generator's return value is the completion."""
        sampling = self._drawn(sampling, **fields)
        ids = self._begin(prompt)
        return stream(
            self._module, self._layers, self.tokenizer, ids, max_tokens, sampling, seed, stop, self.stop_token_ids
        )

    def chat(
        self,
        messages: Messages,
        max_tokens: int | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
        sampling: Sampling | None = None,
        **fields: Any,
    ) -> Message:
        """The assistant's answer. Messages that don't fit are left out as `trim` says."""
        pieces = self.stream_chat(messages, max_tokens, seed, stop, sampling, **fields)
        return Message("assistant", "".join(pieces))

    def stream_chat(
        self,
        messages: Messages,
        max_tokens: int | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
        sampling: Sampling | None = None,
        **fields: Any,
    ) -> Generator[str, None, Completion]:
        """The answer of `chat`, in pieces as it is written. The generator's return value is the completion."""
        messages, _ = self.trim(messages, max_tokens)
        sampling = self._drawn(sampling, **fields)
        ids = self._prompt(messages)
        if self._window is not None:
            max_tokens = min(max_tokens or DEFAULT_TOKENS, self._window - len(ids))
        return stream(
            self._module, self._layers, self.tokenizer, ids, max_tokens, sampling, seed, stop, self.stop_token_ids
        )

    def trim(self, messages: Messages, max_tokens: int | None = None) -> tuple[list[Message], int]:
        """The messages that leave room for an answer of `max_tokens` (None: half of the context, at most 256), and how
        many were left out: the oldest, but never a system message nor the last. Raises UserError if that won't do."""
        kept = list(conversation(messages))
        if not kept:
            raise UserError("messages: got none, must be at least one")
        total = len(kept)
        window = self._window
        if window is None:
            return kept, 0
        room = window - (max_tokens or min(DEFAULT_TOKENS, window // 2))
        while (length := len(self._prompt(kept))) > room:
            oldest = next((i for i, message in enumerate(kept[:-1]) if message.role != "system"), None)
            if oldest is None:
                raise UserError(
                    f"messages: got {length} tokens that can't be left out, must be at most {max(room, 0)} to leave "
                    f"room for an answer in the model's context of {window}; shorten them or max_tokens"
                )
            del kept[oldest]
            # An answer without its question would read as if nobody had asked.
            while oldest < len(kept) - 1 and kept[oldest].role == "assistant":
                del kept[oldest]
        return kept, total - len(kept)

    def for_context_length(self, context: int) -> LanguageModel:
        """This model for texts and conversations of up to so many tokens, where it can tell more apart than it was
        loaded for: Phi-3's, whose LongRoPE has other frequencies for texts beyond the original length."""
        if not isinstance(self.config, TransformerConfig):
            raise UserError(f"model: got {type(self.config).__name__}, must be TransformerConfig to read longer texts")
        return dataclasses.replace(self, config=self.config.for_context_length(context), context=context)

    def with_adapter(self, folder: str | Path) -> LanguageModel:
        """This model with a PEFT adapter merged into its parameters; see `gptjax.interop.peft`."""
        from gptjax.interop import peft

        if not isinstance(self.config, TransformerConfig):
            raise UserError(f"model: got {type(self.config).__name__}, must be TransformerConfig to take an adapter")
        lora, adapters = peft.read(folder, self.config)
        return dataclasses.replace(self, params=lora.merge(self.params, adapters))

    def save_gguf(self, path: str | Path, dtype: str = "f16") -> None:
        """Writes a file for llama.cpp; see `gptjax.interop.gguf.write`."""
        from gptjax.interop import gguf, huggingface

        fields, tensors = huggingface.to_tensors(self.config, self.params)
        fields = {"max_position_embeddings": self._window or 2_048, **fields}
        source = None if self.template is None else self.template.source
        gguf.write(path, fields, tensors, self.tokenizer, dtype, source)

    @property
    def _settings(self) -> dict[str, Any]:
        names = ("context", "template", "stop_token_ids", "sampling")
        return {name: getattr(self, name) for name in names}

    def _drawn(self, sampling: Sampling | None, **fields: Any) -> Sampling:
        return dataclasses.replace(sampling or self.sampling or Sampling(), **fields)

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids after which the assistant speaks."""
        if self.template is not None:
            return self.template.prompt(messages, self.tokenizer)
        return chat_prompt(messages, self.tokenizer)

    @functools.cached_property
    def _layers(self) -> Params:
        """The parameters, layer by layer, as decoding reads them."""
        with on_mesh_of(self.params):
            return unstack(self.config, self.params)

    @property
    def _window(self) -> int | None:
        return min((n for n in (self.config.max_positions, self.context) if n is not None), default=None)

    def _begin(self, text: str) -> list[int]:
        """The ids of a document that begins with `text`."""
        ids = add_bos_eos(self.tokenizer.encode(text), self.tokenizer, append_eos=False)
        if not ids:
            raise UserError("prompt: got an empty text, must have at least one character for this tokenizer")
        return ids


@functools.partial(jax.jit, static_argnums=0)
def _logprobs(model: Any, params: Params, tokens: Array) -> Array:
    """[B, T] -> [B, T-1]"""
    logits = reshard(run(model, params, tokens)[0], model.rules(None, None, None))[:, :-1].astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
