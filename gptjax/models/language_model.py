"""API of a language model; `gptjax.load` returns one:

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

from gptjax.config import from_json
from gptjax.data.chat import Message, conversation
from gptjax.data.chat import prompt as chat_prompt
from gptjax.data.tokenizers import Tokenizer
from gptjax.data.tokenizers.tokenizer import add_bos_eos
from gptjax.distributed.sharding import on_mesh_of, reshard
from gptjax.inference.generate import DEFAULT_TOKENS, Completion, generate, round_up, stream
from gptjax.inference.sampling import Sampling
from gptjax.models.model import TextEncoder, forward
from gptjax.nn import ModelConfig, RoPE, TransformerConfig, unstack
from gptjax.protocols import Module
from gptjax.types import Array, Params, UserError

if TYPE_CHECKING:
    from gptjax.inference.engine import Engine
    from gptjax.inference.engine.speculation import Draft
    from gptjax.inference.formats import ReplyFormat
    from gptjax.interop.templates import ChatTemplate
    from gptjax.nn import LongRoPE
    from gptjax.train.stage import QAT

CONTEXT = 2_048
"""Context of an engine in tokens, if the model says none."""
Messages = Iterable[Message | Mapping[str, Any]]
"""`Message`s, or dicts with a "role" and a "content"."""


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel(TextEncoder):
    """A decoder that generates text. Raises UserError if configuration, parameters and tokenizer do not match.

    The fields of `sampling` are keyword arguments too: `lm.generate("Hi", temperature=0)`. The default is the model's
    own `sampling`.
    """

    context: int | None = None
    """Context length of training, in tokens: maximum length of a conversation. None: `max_positions`."""
    template: ChatTemplate | None = None
    """Chat template. None: the format of `gptjax.data.chat`."""
    stop_token_ids: tuple[int, ...] | None = None
    """Tokens that end a text. None: all special tokens."""
    sampling: Sampling | None = None
    """Sampling settings recommended by the model's authors, or None."""
    quantisation: QAT | None = None
    """Rounding that the weights were trained for. None: for none."""

    def logits(self, tokens: Array | np.ndarray | Sequence[Sequence[int]]) -> Array:
        """tokens int [B, T] -> logits [B, T, V] of the next token, in the compute dtype."""
        self._check_ids(tokens)
        ids = jnp.asarray(tokens, jnp.int32)
        with on_mesh_of(self.params):
            return forward(self._module, self.params, ids)[0]

    def logprobs(self, text: str | Sequence[int]) -> np.ndarray:
        """Log-probability, in nats, of each token given the previous ones: float32 [n - 1] for n ids. The first token
        of a text counts too if the tokenizer has `bos`."""
        ids = self.encode_prompt(text) if isinstance(text, str) else list(text)
        if len(ids) < 2:
            return np.zeros(0, np.float32)
        self._check_ids(ids)
        size = min(round_up(len(ids)), self.config.max_positions or sys.maxsize)
        padded = np.zeros((1, size), np.int32)  # padding after the text changes nothing and limits recompilation
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
        """Continue each prompt: `samples` completions of the first, then of the second, ... See
        `gptjax.inference.generate`."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        sampling = self._sampling(sampling, **fields)
        ids = [self.encode_prompt(prompt) for prompt in prompts]
        return generate(
            *(self._module, self._decode_params, self.tokenizer, ids, max_tokens, sampling, samples, seed, stop),
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
        """Stream the text of `generate` in pieces. The generator's return value is the completion."""
        sampling = self._sampling(sampling, **fields)
        return self._stream(self.encode_prompt(prompt), max_tokens, seed, stop, sampling)

    def chat(
        self,
        messages: Messages,
        max_tokens: int | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
        sampling: Sampling | None = None,
        template: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        **fields: Any,
    ) -> Message:
        """Reply as the assistant. Messages beyond the context are dropped as in `trim`.

        template  variables of the chat template: `template={"enable_thinking": False}`
        tools     JSON schemas of tools, as in OpenAI's API; the message's `tool_calls` are the calls of them

        Reasoning, such as between <think> and </think>, is the message's field "reasoning_content"."""
        ids, max_tokens = self._chat_prompt(conversation(messages, tools), max_tokens, template)
        sampling, plain = self._sampling(sampling, **fields), self.template is None and not tools
        (done,) = generate(
            *(self._module, self._decode_params, self.tokenizer, [ids], max_tokens, sampling, 1, seed, stop),
            stop_token_ids=self.stop_token_ids,
            marks=None if plain else self.reply_format.marks,
        )
        if plain and not done.text.lstrip().startswith("<"):  # there is nothing to take apart
            return Message("assistant", done.text)
        thinking = self.reply_format.thinking(ids, self.tokenizer)
        return self.reply_format.message(done.text, bool(tools), thinking)

    @functools.cached_property
    def reply_format(self) -> ReplyFormat:
        """Format of the model's calls and reasoning, as its chat template and special tokens tell."""
        from gptjax.inference.formats import reply_format

        return reply_format(None if self.template is None else self.template.source, self.tokenizer)

    def stream_chat(
        self,
        messages: Messages,
        max_tokens: int | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
        sampling: Sampling | None = None,
        template: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> Generator[str, None, Completion]:
        """Stream the reply of `chat` in pieces. The generator's return value is the completion."""
        ids, max_tokens = self._chat_prompt(messages, max_tokens, template)
        return self._stream(ids, max_tokens, seed, stop, self._sampling(sampling, **fields))

    def _stream(
        self, ids: Sequence[int], max_tokens: int | None, seed: int, stop: Sequence[str], sampling: Sampling
    ) -> Generator[str, None, Completion]:
        return stream(
            *(self._module, self._decode_params, self.tokenizer, ids, max_tokens, sampling, seed, stop),
            self.stop_token_ids,
        )

    def _chat_prompt(
        self, messages: Messages, max_tokens: int | None, template: Mapping[str, Any] | None
    ) -> tuple[list[int], int | None]:
        """Token ids of the messages that fit, and the maximum number of tokens of a reply."""
        ids = self.encode_chat(self.trim(messages, max_tokens, template)[0], template)
        if self.max_length is not None:
            max_tokens = min(max_tokens or DEFAULT_TOKENS, self.max_length - len(ids))
        return ids, max_tokens

    def trim(
        self, messages: Messages, max_tokens: int | None = None, template: Mapping[str, Any] | None = None
    ) -> tuple[list[Message], int]:
        """Drop the oldest messages until an answer of `max_tokens` (None: half of the context, at most 256) fits.
        Returns the rest and the number dropped. System messages and the last one are kept; raises UserError if they do
        not fit."""
        kept = list(conversation(messages))
        if not kept:
            raise UserError("messages: got none, must be at least one")
        total = len(kept)
        window = self.max_length
        if window is None:
            return kept, 0
        room = window - (max_tokens or min(DEFAULT_TOKENS, window // 2))
        while (length := len(self.encode_chat(kept, template))) > room:
            oldest = next((i for i, message in enumerate(kept[:-1]) if message.role != "system"), None)
            if oldest is None:
                raise UserError(
                    f"messages: got {length} tokens that cannot be dropped, must be at most {max(room, 0)} to leave "
                    f"room for an answer in the model's context of {window}; shorten them or max_tokens"
                )
            tools = kept[0].tools
            del kept[oldest]
            # An answer is dropped with its question, with its calls of tools and their results.
            while oldest < len(kept) - 1 and kept[oldest].role in ("assistant", "tool"):
                del kept[oldest]
            kept[0] = dataclasses.replace(kept[0], tools=tools)
        return kept, total - len(kept)

    def _check_length(self, length: int) -> None:
        super()._check_length(length)
        scaling = _long_rope(self.config)
        if scaling is not None and (scaling.length or length) < length:
            raise UserError(
                f"tokens: got {length}, must be at most {scaling.length}, for which this model's LongRoPE is set; "
                f"use lm.for_context_length({length})"
            )

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a document that starts with `text`."""
        ids = add_bos_eos(self.tokenizer.encode(text), self.tokenizer, append_eos=False)
        if not ids:
            raise UserError("prompt: got an empty text, must have at least one character for this tokenizer")
        return ids

    def encode_chat(self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None) -> list[int]:
        """Token ids of a conversation, up to the assistant's turn. variables: of the chat template."""
        if self.template is not None:
            return self.template.prompt(messages, self.tokenizer, variables)
        if variables:
            raise UserError(f"template: got {', '.join(variables)}, must not be given: the model has no chat template")
        return chat_prompt(messages, self.tokenizer)

    def engine(self, **options: Any) -> Engine:
        """An engine that writes many texts of this model at a time; see `gptjax.inference.engine.Engine`.

        `adapters` may be folders in PEFT's format: `lm.engine(adapters={"pirate": "adapters/pirate"})`."""
        from gptjax.inference.engine import Engine
        from gptjax.interop import peft

        adapters: dict[str, Any] = dict(options.pop("adapters", {}))
        for name, adapter in adapters.items():
            if isinstance(adapter, (str, Path)):
                adapters[name] = peft.read(adapter, self._decoder_config("take an adapter"))
        options = {"adapters": adapters, **options}
        options = {"context": self.max_length or CONTEXT, "stop_token_ids": self.stop_token_ids, **options}
        return Engine(self._module, self._decode_params, self.tokenizer, **options)

    def draft(self, smaller: Any = None, guesses: int | None = None) -> Draft:
        """A smaller language model that guesses tokens for this one's engine: `lm.engine(draft=lm.draft(smaller))`.
        None: this model's own extra heads. guesses: number at a time; None: 4, or one of each head. Raises UserError
        for another tokenizer."""
        from gptjax.inference.engine import DraftModel, Heads

        if smaller is None:
            return Heads(getattr(self.config, "ahead", 1) if guesses is None else guesses)
        if not isinstance(smaller, LanguageModel):
            raise UserError(f"draft: got a {type(smaller).__name__}, must be a language model")
        if smaller.tokenizer.fingerprint != self.tokenizer.fingerprint:
            raise UserError("draft: got a model with another tokenizer, must have the same one")
        return DraftModel(smaller._module, smaller._decode_params, 4 if guesses is None else guesses)

    def for_context_length(self, context: int) -> LanguageModel:
        """This model for a longer context than it was loaded for, in tokens: LongRoPE (Phi-3) has other frequencies
        beyond the original length."""
        config = self._decoder_config("read longer texts").for_context_length(context)
        return dataclasses.replace(self, config=config, context=context)

    def _decoder_config(self, use: str) -> TransformerConfig:
        if not isinstance(self.config, TransformerConfig):
            raise UserError(f"model: got {type(self.config).__name__}, must be TransformerConfig to {use}")
        return self.config

    def quantised(
        self, bits: int | None = None, group: int | None = None, embeddings: bool | None = None
    ) -> LanguageModel:
        """This model with quantised weights; see `gptjax.inference.quantise.quantise_params`. None: what the weights
        were trained for, else 8 bits, a scale per output, and embeddings too. Raises UserError for another rounding
        than they were trained for."""
        from gptjax.inference.quantise import quantise_params

        if (trained := self.quantisation) is not None:
            trained.check_rounding(bits=bits, group=group, embeddings=embeddings)
            bits, group, embeddings = trained.bits, trained.group, trained.embeddings
        bits = 8 if bits is None else bits
        params = quantise_params(self.config, self.params, bits, group, embeddings is not False)
        return dataclasses.replace(self, params=params, quantisation=None)

    def without_extra_heads(self) -> LanguageModel:
        """This model without the extra heads of a `MultiTokenConfig`, which writes the same texts."""
        if (remove := getattr(self.config, "without_extra_heads", None)) is None:
            return self
        config, params = remove(self.params)
        return dataclasses.replace(self, config=config, params=params)

    def with_cache_dtype(self, dtype: str | None) -> LanguageModel:
        """This model with keys and values cached in int8 or float8_e4m3fn. None: in the compute dtype."""
        if not isinstance(self.config, TransformerConfig):
            raise UserError(f"model: got {type(self.config).__name__}, must be TransformerConfig to have a cache")
        return dataclasses.replace(self, config=dataclasses.replace(self.config, cache_dtype=dtype))

    def with_adapter(self, folder: str | Path) -> LanguageModel:
        """This model with a PEFT adapter merged into its parameters; see `gptjax.interop.peft`."""
        from gptjax.inference.quantise import is_quantised
        from gptjax.interop import peft

        if is_quantised(self.params):
            raise UserError("adapter: got one for quantised weights, must be merged first; then quantise the result")
        lora, adapters = peft.read(folder, self._decoder_config("take an adapter"))
        return dataclasses.replace(self, params=lora.merge(self.params, adapters))

    def save_gguf(self, path: str | Path, dtype: str = "f16") -> None:
        """Write a file for llama.cpp; see `gptjax.interop.gguf.write.write`."""
        from gptjax.inference.quantise import is_quantised
        from gptjax.interop import huggingface
        from gptjax.interop.gguf.write import write
        from gptjax.interop.templates import jinja_source

        if is_quantised(self.params):
            raise UserError('params: got quantised weights, must be floats; GGUF has types of its own: dtype="q8_0"')
        fields, tensors = huggingface.to_tensors(self.config, self.params)
        fields = {"max_position_embeddings": self.max_length or 2_048, **fields}
        source = jinja_source(self.template, self.tokenizer)
        write(path, fields, tensors, self.tokenizer, dtype, source)

    @property
    def _settings(self) -> dict[str, Any]:
        return {"quantisation": self.quantisation, **self._hf_settings}

    @property
    def _hf_settings(self) -> dict[str, Any]:
        names = ("context", "template", "stop_token_ids", "sampling")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def settings_of_hf(cls, path: Path, config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
        from gptjax.interop import generation, huggingface, tokenizers

        stated = huggingface.read_config(path).get("max_position_embeddings")
        if config.max_positions is not None:  # the field is the size of the table then
            stated = tokenizers.load_max_length(path)
        return {
            "context": loaded_context(config, stated),
            "template": tokenizers.load_template(path),
            "stop_token_ids": generation.read_stop_token_ids(path, config.vocab),
            "sampling": generation.read_sampling(path),
        }

    @classmethod
    def settings_of_run(cls, data: dict[str, Any]) -> dict[str, Any]:
        return {"context": data.get("length"), "template": from_json(data.get("template"))}

    def _sampling(self, sampling: Sampling | None, **fields: Any) -> Sampling:
        return dataclasses.replace(sampling or self.sampling or Sampling(), **fields)

    @functools.cached_property
    def _decode_params(self) -> Params:
        """Parameters with unstacked layers, for decoding."""
        with on_mesh_of(self.params):
            return unstack(self.config, self.params)

    @property
    def max_length(self) -> int | None:
        """Maximum number of tokens of a text: of its positions and of `context`. None: no limit."""
        return min((n for n in (self.config.max_positions, self.context) if n is not None), default=None)


def loaded_context(config: ModelConfig, stated: int | None) -> int | None:
    """Context of a model that is just loaded, in tokens: that which its files state, or the shorter one that a LongRoPE
    was trained with first, which `LanguageModel.for_context_length` extends."""
    scaling = _long_rope(config)
    return stated if scaling is None else scaling.length


def _long_rope(config: ModelConfig) -> LongRoPE | None:
    """The LongRoPE of a model that has one."""
    positions = getattr(config, "positions", None)
    if not isinstance(positions, RoPE) or positions.scaling is None:
        return None
    from gptjax.nn import LongRoPE

    return positions.scaling if isinstance(positions.scaling, LongRoPE) else None


@functools.partial(jax.jit, static_argnums=0)
def _logprobs(model: Module, params: Params, tokens: Array) -> Array:
    """Log-probabilities of tokens[:, 1:], [B, T] -> [B, T - 1]."""
    logits = reshard(forward(model, params, tokens)[0], model.rules(None, None, None))[:, :-1].astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
