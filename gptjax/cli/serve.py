"""`gptjax serve`: models as a service."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gptjax.cli.access import Access, Limits

Paths = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH...")]


def serve(
    paths: Paths,
    host: str = "127.0.0.1",
    port: int = 8000,
    rows: int = 8,
    context: int | None = None,
    pages: int | None = None,
    page: int = 64,
    queue: int = 1_000,
    cache_dtype: Literal["int8", "float8_e4m3fn"] | None = None,
    adapter: tuple[str, ...] = (),
    draft: str | None = None,
    guesses: int = 4,
    tool_format: str | None = None,
    limits: Annotated[Limits, tyro.conf.arg(name="")] = Limits(),
    access: Annotated[Access, tyro.conf.arg(name="")] = Access(),
) -> None:
    """Serve models: OpenAI's interface under /v1, and a page to chat in under /. Ctrl-C stops, after running replies.

    Args:
        paths: Run folders, or folders that gptjax.load reads; each is served under the name of its folder.
        host: Address to listen on. Another than this machine's own needs API keys.
        port: Port to listen on.
        rows: Number of texts that are written at a time.
        context: Maximum number of tokens of a prompt and its reply. None: the model's.
        pages: Number of pages in memory for keys and values. None: enough for all rows.
        page: Tokens per page. Prompts are read, and their beginnings shared, page by page.
        queue: Maximum number of requests that wait; more are refused with status 429.
        cache_dtype: Type of keys and values in memory. None: the model's. int8 takes about a quarter of float32.
        adapter: NAME=FOLDER: LoRA adapters in PEFT's format beside the model, without a copy of it; each is served as
            a model of that name.
        draft: Speculation: ngram guesses the next tokens from the text so far; the folder of a smaller model with the
            same tokenizer lets that model guess. None: no speculation.
        guesses: Number of guesses at a time.
        tool_format: Way in which the models write calls of tools: hermes, llama, mistral, mistral_args, deepseek,
            deepseek_markdown or harmony. None: the one that chat template and special tokens tell.
    """
    from gptjax.inference.engine import NGram
    from gptjax.models.encoder_model import EncoderModel
    from gptjax.models.language_model import LanguageModel
    from gptjax.models.loading import load
    from gptjax.types import UserError

    try:
        from gptjax.serve.app import make_app
        from gptjax.serve.server import Server
        from gptjax.serve.service import Served
    except ModuleNotFoundError as error:
        raise UserError(f"serve: {error.name} is not installed; pip install 'gptjax[serve]'") from None
    policy, tls = access.policy(host, limits), access.tls()
    names = [path.resolve().name for path in paths]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"paths: got two folders named {twice}, must have different names")
    if not paths:
        raise UserError("paths: got none, must be at least one")

    adapters = {name: folder for name, _, folder in (one.partition("=") for one in adapter)}
    if not all(adapters.values()) or len(adapters) < len(adapter) or not adapters.keys().isdisjoint(names):
        raise UserError(f"adapter: got {' '.join(adapter)}, must be NAME=FOLDER, each name another")
    if adapters and len(paths) > 1:
        raise UserError(f"adapter: got {' '.join(adapter)} with {len(paths)} models, must be with one")

    def load_all() -> tuple[dict[str, Served], dict[str, EncoderModel]]:
        models, encoders = {}, {}
        for name, path in zip(names, paths, strict=True):
            started = time.perf_counter()
            _say(f"{name}: loading {path}")
            model = load(path)
            if isinstance(model, EncoderModel):
                encoders[name] = model
                continue
            if not isinstance(model, LanguageModel):
                raise UserError(f"paths: got {path}, a {type(model).__name__}, must be a language model or an encoder")
            models[name] = begin(name, path, model, started)
            models |= {one: dataclasses.replace(models[name], adapter=one) for one in adapters}
        return models, encoders

    def begin(name: str, path: Path, model: LanguageModel, started: float) -> Served:
        options: dict[str, Any] = {} if context is None else {"context": context}
        model = model if cache_dtype is None else model.with_cache_dtype(cache_dtype)
        if draft == "ngram":
            options["draft"] = NGram(guesses)
        elif draft is not None:
            options["draft"] = model.draft(load(draft), guesses)
        engine = model.engine(
            rows=rows, pages=pages, page=page, queue=queue, name=str(path.resolve()), adapters=adapters, **options
        )
        _say(f"{name}: compiling")
        engine.warm_up()
        engine.start()
        served = Served(model, engine, tool_format)
        calls = served.format.tools
        _say(
            f"{name}: ready after {time.perf_counter() - started:.1f} s; {rows} texts at a time, "
            f"{engine.pages.count * page:,} tokens in memory, {engine.context:,} at most in a text; "
            f"calls of tools: {'unknown format' if calls is None else calls.name}"
        )
        return served

    models, encoders = load_all()
    app = make_app(models, policy, encoders, load_all)
    server = Server(app, host, port, limits.connections, limits.drain_seconds, tls)
    address = f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
    _say(f"\nChat: {address}      OpenAI's interface: {address}/v1")
    server.run()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
