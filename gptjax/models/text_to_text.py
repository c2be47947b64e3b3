"""API of an encoder-decoder: text in, text out:

t5 = gptjax.load("google/flan-t5-small", kind=gptjax.TextToText)
t5.generate("translate English to German: The house is small.", temperature=0)[0].text
t5.save_hf("for/transformers")
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptjax.data.tokenizers import Tokenizer
from gptjax.data.tokenizers.tokenizer import add_bos_eos, decoder_start
from gptjax.distributed.sharding import on_mesh_of
from gptjax.inference.generate import Completion
from gptjax.inference.sampling import Sampling
from gptjax.inference.sequence_to_sequence import generate_targets
from gptjax.models.model import Model
from gptjax.nn import EncoderDecoderConfig, ModelConfig, unstack
from gptjax.types import Params


@dataclasses.dataclass(frozen=True, eq=False)
class TextToText(Model):
    """An encoder-decoder such as T5. Raises UserError if configuration, parameters and tokenizer do not match.

    Sources are read between the tokenizer's `bos` and `eos`, if it has them. T5 has `eos` only.
    """

    config: EncoderDecoderConfig
    decoder_start_token_id: int | None = None
    """First token of every target. None: the tokenizer's `bos`, or else its padding, as in T5."""
    stop_token_ids: tuple[int, ...] | None = None
    """Tokens that end a target. None: the tokenizer's `eos`."""

    def generate(
        self,
        sources: str | Sequence[str],
        max_tokens: int | None = None,
        seed: int = 0,
        sampling: Sampling = Sampling(),
        **fields: Any,
    ) -> list[Completion]:
        """Generate a target for each source; see `gptjax.inference.sequence_to_sequence`. The fields of `sampling` are
        keyword arguments too: `t5.generate("...", temperature=0)`."""
        texts = [sources] if isinstance(sources, str) else sources
        ids = [self.encode_prompt(text) for text in texts]
        return self.generate_ids(ids, max_tokens, seed, dataclasses.replace(sampling, **fields))

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a source, as the encoder reads it."""
        return add_bos_eos(self.tokenizer.encode(text), self.tokenizer)

    def generate_ids(
        self,
        sources: Sequence[Sequence[int]],
        max_tokens: int | None = None,
        seed: int = 0,
        sampling: Sampling = Sampling(),
    ) -> list[Completion]:
        """Generate a target for each source, given as token ids."""
        return generate_targets(
            self._module,
            self._decode_params,
            self.tokenizer,
            sources,
            self._decoder_start_token_id,
            self._stop_token_ids,
            max_tokens,
            sampling,
            seed,
        )

    @property
    def _decoder_start_token_id(self) -> int:
        given = self.decoder_start_token_id
        return decoder_start(self.tokenizer) if given is None else given

    @property
    def _stop_token_ids(self) -> tuple[int, ...]:
        end = self.tokenizer.eos
        return self.stop_token_ids if self.stop_token_ids is not None else () if end is None else (end,)

    @property
    def _settings(self) -> dict[str, Any]:
        return {"decoder_start_token_id": self._decoder_start_token_id, "stop_token_ids": self._stop_token_ids}

    @classmethod
    def settings_of_hf(cls, path: Path, config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
        from gptjax.interop import generation

        return {
            "decoder_start_token_id": generation.read_decoder_start_token_id(path),
            "stop_token_ids": generation.read_stop_token_ids(path, config.vocab),
        }

    @functools.cached_property
    def _decode_params(self) -> Params:
        """Parameters with unstacked layers, for decoding."""
        with on_mesh_of(self.params):
            return unstack(self.config, self.params)
