"""`gptjax serve`: models as a service."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

# Nothing heavier up here: --help must not wait for jax.
from gptjax.cli.access import Access, Limits, check_address

if TYPE_CHECKING:
    from gptjax.inference.engine import Engine
    from gptjax.models.encoder_model import EncoderModel
    from gptjax.models.language_model import LanguageModel
    from gptjax.serve.service import Served

Paths = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH...")]


@dataclasses.dataclass(frozen=True)
class Writing:
    """Engines of the language models."""

    rows: int = 8
    """Number of texts that are written at a time."""
    context: int | None = None
    """Maximum number of tokens of a prompt and its reply. None: the model's."""
    pages: int | None = None
    """Number of pages in memory for keys and values. None: enough for all rows."""
    page: int = 64
    """Tokens per page. Prompts are read, and their beginnings shared, page by page."""
    queue: int = 1_000
    """Maximum number of requests that wait; more are refused with status 429."""
    cache_dtype: Literal["int8", "float8_e4m3fn"] | None = None
    """Type of keys and values in memory. None: the model's. int8 takes about a quarter of float32."""
    adapter: tuple[str, ...] = ()
    """NAME=FOLDER: LoRA adapters in PEFT's format beside the model, without a copy of it; each is served as a model of
    that name."""
    draft: str | None = None
    """Speculation: ngram guesses the next tokens from the text so far; heads are the model's own, for later tokens,
    trained by objectives.MultiToken; the folder of a smaller model with the same tokenizer lets that model guess. None:
    no speculation."""
    guesses: int | None = None
    """Number of guesses at a time. None: 4, or one of each extra head."""
    tool_format: str | None = None
    """Way in which the models write calls of tools: hermes, llama, mistral, mistral_args, deepseek, deepseek_markdown
    or harmony. None: the one that chat template and special tokens tell."""

    def adapters(self, models: Collection[str]) -> dict[str, str]:
        """Name -> folder of the adapters beside these models."""
        from gptjax.types import UserError

        adapters = {name: folder for name, _, folder in (one.partition("=") for one in self.adapter)}
        if not all(adapters.values()) or len(adapters) < len(self.adapter) or not adapters.keys().isdisjoint(models):
            raise UserError(f"adapter: got {' '.join(self.adapter)}, must be NAME=FOLDER, each name another")
        if adapters and len(models) > 1:
            raise UserError(f"adapter: got {' '.join(self.adapter)} with {len(models)} models, must be with one")
        return adapters

    def engine(self, model: LanguageModel, path: Path, adapters: Mapping[str, str]) -> Engine:
        """An engine for a model, compiled and started."""
        from gptjax.inference.engine import NGram
        from gptjax.models.loading import load

        options: dict[str, Any] = {} if self.context is None else {"context": self.context}
        if self.draft == "ngram":
            options["draft"] = NGram() if self.guesses is None else NGram(self.guesses)
        elif self.draft == "heads":
            options["draft"] = model.draft(guesses=self.guesses)
        elif self.draft is not None:
            options["draft"] = model.draft(load(self.draft), self.guesses)
        sizes = {"rows": self.rows, "pages": self.pages, "page": self.page, "queue": self.queue}
        engine = model.engine(**sizes, name=str(path.resolve()), adapters=adapters, **options)
        engine.warm_up()
        engine.start()
        return engine


def serve(
    paths: Paths,
    host: str = "127.0.0.1",
    port: int = 8000,
    writing: Annotated[Writing, tyro.conf.arg(name="")] = Writing(),
    limits: Annotated[Limits, tyro.conf.arg(name="")] = Limits(),
    access: Annotated[Access, tyro.conf.arg(name="")] = Access(),
) -> None:
    """Serve models: OpenAI's interface under /v1, and a page to chat in under /. Ctrl-C stops, after running replies.

    Args:
        paths: Run folders, or folders that gptjax.load reads; each is served under the name of its folder.
        host: Address to listen on. Another than this machine's own needs API keys.
        port: Port to listen on.
    """
    from gptjax.types import UserError

    try:
        from gptjax.serve.app import make_app
        from gptjax.serve.server import Server
    except ModuleNotFoundError as error:
        raise UserError(f"serve: {error.name} is not installed; pip install 'gptjax[serve]'") from None
    policy, tls = access.policy(host, limits), access.tls()
    names = [path.resolve().name for path in paths]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"paths: got two folders named {twice}, must have different names")
    if not paths:
        raise UserError("paths: got none, must be at least one")
    check_address(host, port)
    load_all = functools.partial(_load, dict(zip(names, paths, strict=True)), writing, writing.adapters(names))
    models, encoders = load_all()
    app = make_app(models, policy, encoders, load_all)
    server = Server(app, host, port, limits.connections, limits.drain_seconds, tls)
    address = f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
    _say(f"\nChat: {address}      OpenAI's interface: {address}/v1")
    server.run()


def _load(
    paths: Mapping[str, Path], writing: Writing, adapters: Mapping[str, str]
) -> tuple[dict[str, Served], dict[str, EncoderModel]]:
    """Language models and encoders by name. Each adapter is a model beside the one that it belongs to."""
    from gptjax.models.encoder_model import EncoderModel
    from gptjax.models.language_model import LanguageModel
    from gptjax.models.loading import load
    from gptjax.types import UserError

    models, encoders = {}, {}
    for name, path in paths.items():
        started = time.perf_counter()
        _say(f"{name}: loading {path}")
        model = load(path)
        if isinstance(model, EncoderModel):
            encoders[name] = model
        elif isinstance(model, LanguageModel):
            models[name] = _begin(name, path, model, writing, adapters, started)
            models |= {one: dataclasses.replace(models[name], adapter=one) for one in adapters}
        else:
            raise UserError(f"paths: got {path}, a {type(model).__name__}, must be a language model or an encoder")
    return models, encoders


def _begin(
    name: str, path: Path, model: LanguageModel, writing: Writing, adapters: Mapping[str, str], started: float
) -> Served:
    """A model with its running engine. `started`: the time at which its loading began."""
    from gptjax.serve.service import Served

    model = model if writing.cache_dtype is None else model.with_cache_dtype(writing.cache_dtype)
    _say(f"{name}: compiling")
    engine = writing.engine(model, path, adapters)
    served = Served(model, engine, writing.tool_format)
    calls = served.format.tools
    _say(
        f"{name}: ready after {time.perf_counter() - started:.1f} s; {writing.rows} texts at a time, "
        f"{engine.pages.count * writing.page:,} tokens in memory, {engine.context:,} at most in a text; "
        f"attention: {engine.attention}; "
        f"calls of tools: {'unknown format' if calls is None else calls.name}"
    )
    return served


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
