"""EleutherAI's evaluation harness, lm-eval, over gptjax: its tasks, prompts and figures, our models and scorer.

gptjax lm-eval --model_args path=runs/gpt2_124m --tasks arc_easy,hellaswag --num_fewshot 5
python -m gptjax.cli.lm_eval --model gptjax --model_args path=...,max_length=1024 --tasks mine --include_path tasks

All options are lm-eval's; `--model gptjax` is the default. Options of `--model_args` are the arguments of `GptjaxLM`.
From Python: `lm_eval.simple_evaluate(GptjaxLM("runs/gpt2_124m"), tasks=["arc_easy"])`.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from gptjax.types import UserError

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    raise UserError("lm-eval: the harness is not installed; pip install 'gptjax[lm-eval]'") from None

from gptjax.data.tokenizers.huggingface import HuggingFaceTokenizer
from gptjax.distributed import processes
from gptjax.evals.likelihood import Continuation, cut, score
from gptjax.inference.engine import Request
from gptjax.inference.sampling import Sampling
from gptjax.interop.tokenizer_json import reader
from gptjax.models.language_model import CONTEXT, LanguageModel
from gptjax.models.loading import load

log = logging.getLogger(__name__)
Tokens = tuple[tuple[str, str] | None, list[int], list[int]]
"""lm-eval's request: texts, ids of the context, ids of the continuation."""
MAX_TOKENS = 256
"""Length of a reply if a task says none, as in lm-eval's `hf`."""


@register_model("gptjax")
class GptjaxLM(TemplateLM):
    """A gptjax language model for lm-eval. Token ids are those of lm-eval's `hf` with the same model.

    path           run folder, folder of `LanguageModel.save` or of transformers, GGUF file; or a `LanguageModel`
    dtype          float32 or bfloat16. None: that of the files
    max_length     context length, in tokens. None: the model's
    add_bos_token  begin every text with `bos`. None: as the model's tokenizer file says; True if it says nothing
    batch_size     not used: the scorer chooses the shapes of its batches
    """

    def __init__(
        self,
        path: str | Path | LanguageModel,
        dtype: str | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        if device not in (None, "cuda:0"):  # lm-eval's default
            raise UserError(f"device: got {device}, must be none; JAX_PLATFORMS chooses the kind of device")
        if str(batch_size) not in ("None", "1", "auto") or max_batch_size is not None:
            log.warning("batch_size is not used: the scorer chooses the shapes of its batches")
        self.lm = path if isinstance(path, LanguageModel) else load(path, dtype)
        limit = self.lm.max_length or CONTEXT
        self.max_length = limit if max_length is None else max_length
        if not 1 <= self.max_length <= limit:
            raise UserError(f"max_length: got {max_length}, must be 1 to {limit}, the model's context length")
        tokenizer = self.lm.tokenizer
        if add_bos_token is None:
            said = not isinstance(tokenizer, HuggingFaceTokenizer) or tokenizer.bos in tokenizer.post_processor_ids[0]
            add_bos_token = said and tokenizer.bos is not None
        if add_bos_token and tokenizer.bos is None:
            raise UserError("add_bos_token: got True, must be False: the tokenizer has no bos")
        self.add_bos_token = add_bos_token
        self._encode = functools.lru_cache(1 << 16)(self._encode_text)

    @property
    def eot_token_id(self) -> int:
        if (found := self.lm.tokenizer.eos) is None:
            raise UserError("tokenizer: got one without eos, must have one for this task")
        return found

    @property
    def prefix_token_id(self) -> int:
        bos = self.lm.tokenizer.bos
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.lm.tokenizer.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        if chat_template not in (True, False, None):
            raise UserError(f"apply_chat_template: got {chat_template!r}, must be without a name: a model has one")
        return self._template.source if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        from gptjax.data.chat import conversation

        if not add_generation_prompt:
            raise UserError("apply_chat_template: got a prefill of the reply, must be a prompt without one")
        return self._template.text(conversation(chat_history))

    @property
    def _template(self) -> Any:
        if self.lm.template is None:
            raise UserError("apply_chat_template: got a model without a chat template, must have one")
        return self.lm.template

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        """Ids of a text in which special tokens may be spelt out, as chat templates do. add_special_tokens=None: with
        `bos`, if the model has it, exactly once."""
        ids = list(self._encode(string))
        add = self.add_bos_token if add_special_tokens is None else add_special_tokens
        bos = self.lm.tokenizer.bos
        begun = add_special_tokens is None and ids[:1] == [self.prefix_token_id]
        return [cast(int, bos), *ids] if add and bos is not None and not begun else ids

    def _encode_text(self, string: str) -> tuple[int, ...]:
        tokenizer = self.lm.tokenizer
        if any(name in string for name in tokenizer.specials):
            return tuple(reader(tokenizer).encode(string, add_special_tokens=False).ids)
        return tuple(tokenizer.encode(string))

    def _loglikelihood_tokens(self, requests: Sequence[Tokens], **kwargs: object) -> list[tuple[float, bool]]:
        asked = [cut(Continuation(tuple(context), tuple(ids)), self.max_length) for _, context, ids in requests]
        if shortened := sum(len(new.context) < len(old[1]) for new, old in zip(asked, requests, strict=True)):
            log.warning("%d of %d contexts are cut on the left to fit %d", shortened, len(asked), self.max_length)
        found = [(each.logprob, each.greedy) for each in score(self.lm.config, self.lm.params, asked, self.lm.rules)]
        for (texts, _, _), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows that do not overlap. As in `hf`, `bos` is predicted too, after
        another one, by a model that adds it."""
        windows: list[Tokens] = []
        ends = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            pairs = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            ends.append(len(windows))
        values = [logprob for logprob, _ in self._loglikelihood_tokens(windows)]
        found = [sum(values[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
        for request, value in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return found

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations by the engine, up to the first of a task's `until`."""
        asked = [self._request(*request.args) for request in requests]
        engine = self.lm.engine(context=self.max_length, queue=max(len(asked), 1))
        written = [engine.submit(request) for request in asked]
        engine.run()
        found = []
        for request, text in zip(requests, written, strict=True):
            if text.finish == "error":
                raise UserError(f"lm-eval: the engine failed: {text.error}")
            reply = self.lm.tokenizer.decode(token.id for token in text.tokens)  # without a first space, as `hf`
            for stop in text.request.stop:
                reply = reply.split(stop)[0]
            found.append(reply)
            self.cache_hook.add_partial("generate_until", request.args, reply)
        return found

    def _request(self, context: str, options: dict[str, Any]) -> Request:
        options = dict(options)
        aliases = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        given = [options.pop(name) for name in aliases if name in options]
        max_tokens = int(given[0]) if given else MAX_TOKENS
        until = options.pop("until", None) or ()
        temperature = float(options.pop("temperature", None) or 0)
        if not options.pop("do_sample", temperature > 0):
            temperature = 0.0
        names = ("top_p", "top_k", "min_p", "repetition_penalty")
        sampling = Sampling(temperature, **{name: options.pop(name) for name in names if name in options})
        if options:
            raise UserError(f"generation_kwargs: got {', '.join(options)}, must be among until, {aliases[0]}, {names}")
        if max_tokens >= self.max_length:
            raise UserError(f"max_gen_toks: got {max_tokens}, must be less than the context of {self.max_length}")
        ids = self.tok_encode(context)[-(self.max_length - max_tokens) :]
        stop = (until,) if isinstance(until, str) else tuple(until)
        return Request(tuple(ids), max_tokens, sampling, stop=tuple(filter(None, stop)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run lm-eval's own command line, with `--model gptjax` unless it names another, and return the exit code."""
    from lm_eval.__main__ import cli_evaluate

    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] not in (["ls"], ["validate"], ["-h"], ["--help"], []):
        given = given[1:] if given[0] == "run" else given
        named = any(word.split("=")[0] in ("--model", "-M", "--config", "-C") for word in given)
        given = ["run", *([] if named else ["--model", "gptjax"]), *given]
    sys.argv = ["lm_eval", *given]
    cli_evaluate()
    return 0


if __name__ == "__main__":
    processes.configure()
    sys.exit(main())
