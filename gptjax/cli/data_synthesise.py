"""`gptjax data synthesise FILE... OUT`: a model's replies to prompts made from rows, as JSON lines.

    gptjax data synthesise a.jsonl out.jsonl --model models/qwen3 --form text --prompt "Say in other words: {text}"
    gptjax data synthesise gsm8k.jsonl chats.jsonl --url http://localhost:8000 --prompt "{question}" --text question \\
        --samples 8 --most 2 --keep right.py                   rejection sampling: right.py defines keep(row, reply)

The model is one of this machine, or of a server with OpenAI's interface. Replies that were cut off, are empty or repeat
another of the row are left out, and counted. All replies are kept in OUT.replies: an interrupted command is resumed,
and another filter asks nothing again.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import http.client
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gptjax.cli.access import KEY

# Nothing heavier up here: --help must not wait for jax.
if TYPE_CHECKING:
    from gptjax.data.prepare.synthesise import Asked, Keep, Replied, Write

SECONDS = 600.0
"""Seconds after which a reply of a server counts as lost."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the command."""

    prompt: str
    """Prompt, with columns of the row in braces: "Paraphrase: {text}"."""
    model: str | None = None
    """Model of this machine: a run folder, a folder, or a name on the Hugging Face hub."""
    url: str | None = None
    """Server with OpenAI's interface, in place of a model. The environment's GPTJAX_API_KEY is its key."""
    name: str | None = None
    """Name of the server's model."""
    text: str = "text"
    """Column that must hold a text."""
    form: Literal["messages", "text"] = "messages"
    """Rows to write: conversations in `messages`, or the reply in `text`."""
    samples: int = 1
    """Replies to each prompt."""
    most: int | None = None
    """Maximum number of replies kept of a row. None: all."""
    keep: Path | None = None
    """Python file that defines keep(row, reply) -> bool."""
    temperature: float = 1.0
    """Sampling temperature."""
    top_p: float = 1.0
    """Sample from the smallest set of most likely tokens with this total probability."""
    max_tokens: int = 512
    """Maximum length of a reply, in tokens."""
    seed: int = 0
    """Random seed."""
    rows: int = 16
    """Replies that are written at a time."""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit code. Raises UserError."""
    from gptjax.cli.options import describe_options, parse_options

    if not arguments or {"-h", "--help"} & {*arguments}:
        print(f"{__doc__}\n{describe_options(Options(''))}")
        return 0
    options, files = parse_options(Options(""), arguments)

    from gptjax.data.prepare.output import source_of
    from gptjax.data.prepare.pipeline import documents_of
    from gptjax.data.prepare.synthesise import Synthesis, synthesise
    from gptjax.types import UserError

    if unknown := [word for word in files if word.startswith("--")]:
        raise UserError(f"no option {unknown[0].partition('=')[0]}; see gptjax data synthesise --help")
    if len(files) < 2:
        raise UserError("files: got fewer than two, must be files to read, then the file to write")
    if not options.prompt:
        raise UserError('prompt: got none, must be a text with columns in braces, such as "Paraphrase: {text}"')
    if (options.model is None) == (options.url is None):
        raise UserError("model: got none or a url too, must be --model or --url")
    if options.url is not None and options.name is None:
        raise UserError("name: got none, must be the name of the server's model")
    *paths, out = files
    sources = [source_of(path, options.text) for path in paths]
    synthesis = Synthesis(options.prompt, options.samples, options.most, options.form)
    sampling = {name: getattr(options, name) for name in ("temperature", "top_p", "max_tokens", "seed")}
    settings = {"model": options.model or [options.url, options.name], **sampling}
    write = _server(options) if options.model is None else _model(options)
    counts = synthesise(
        lambda: (document for source in sources for document in documents_of(source, "train")),
        options.text,
        synthesis,
        settings,
        _shown(write),
        Path(out),
        *([] if options.keep is None else [_keep(options.keep)]),
    )
    print(f"{out}: {', '.join(f'{count:,} {treatment}' for treatment, count in sorted(counts.items()))}")
    return 0


def _keep(path: Path) -> Keep:
    """The filter that a Python file defines."""
    from gptjax.data.prepare.parts import load_module
    from gptjax.types import UserError, one_line

    if not path.is_file():
        raise UserError(f"keep: got {path}, which does not exist, must be a Python file with keep(row, reply)")
    try:
        keep = getattr(load_module(path.resolve()), "keep", None)
    except Exception as error:
        raise UserError(f"keep: {path} cannot be run: {type(error).__name__}: {one_line(error)}") from error
    if not callable(keep):
        raise UserError(f"keep: got {path}, must define the function keep(row, reply)")

    def checked(row: Mapping[str, Any], reply: str) -> bool:
        try:
            return bool(keep(row, reply))
        except Exception as error:
            name = type(error).__name__
            raise UserError(f"keep: {path} fails at the reply {reply[:60]!r}: {name}: {one_line(error)}") from error

    return checked


def _shown(write: Write) -> Write:
    """The same, with the number of replies so far on a terminal."""

    def written(asked: Sequence[Asked]) -> Iterator[Replied]:
        for count, reply in enumerate(write(asked), 1):
            if sys.stderr.isatty():
                print(f"\r{count:,} of {len(asked):,} replies", end="", file=sys.stderr)
            yield reply

    return written


def _model(options: Options) -> Write:
    """Replies of a model of this machine, over its engine."""
    from gptjax.data.chat import Message
    from gptjax.data.prepare.synthesise import Replied
    from gptjax.evals.replies import Prompt, form_of, write
    from gptjax.inference.sampling import Sampling
    from gptjax.models.loading import load
    from gptjax.tasks.task import Generation
    from gptjax.types import UserError

    sampling = Sampling(temperature=options.temperature, top_p=options.top_p)
    model = load(str(options.model))
    form = form_of(model)

    def replies(asked: Sequence[Asked]) -> Iterator[Replied]:
        keys, prompts = {}, []
        for one in asked:
            messages = [Message("user", one.prompt)]
            ids = model.encode_chat(messages) if form == "chat" else model.encode_prompt(one.prompt)
            keys[one.seed, one.sample] = one.key
            prompts.append((Prompt(one.seed, tuple(ids), ()), one.sample))
        generation = Generation(max_tokens=options.max_tokens, text_stop=())
        for written in write(model, prompts, generation, sampling, form, options.seed, options.rows):
            if not written.fits:
                raise UserError(f"prompt: of {len(written.prompt.ids)} tokens leaves no room in the model's context")
            yield Replied(keys[written.prompt.item, written.sample], written.reply.text, written.reply.finished)

    return replies


def _server(options: Options) -> Write:
    """Replies of a server with OpenAI's interface."""
    from gptjax.data.prepare.synthesise import Replied
    from gptjax.io import retry
    from gptjax.types import UserError, one_line

    url = str(options.url).rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
    if not url.startswith(("http://", "https://")):
        raise UserError(f"url: got {options.url}, must begin with http:// or https://")
    key = os.environ.get(KEY)
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})

    def ask(one: Asked) -> Replied:
        fields = {name: getattr(options, name) for name in ("temperature", "top_p", "max_tokens")}
        said = [{"role": "user", "content": one.prompt}]
        body: dict[str, Any] = {"model": options.name, "messages": said, "seed": one.seed, **fields}
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)

        def fetch() -> Any:
            with urllib.request.urlopen(request, timeout=SECONDS) as response:
                return json.load(response)

        try:
            (choice,) = retry.call(fetch, f"reply of {url}")["choices"]
            return Replied(one.key, choice["message"]["content"] or "", choice["finish_reason"] != "length")
        except urllib.error.HTTPError as error:
            reason = error.read().decode(errors="replace")[:300] or str(error)
            raise UserError(f"url: got status {error.code} of {url}: {reason}") from None
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"url: got {options.url}, which does not answer as OpenAI's does: {one_line(error)}"
            ) from None

    def replies(asked: Sequence[Asked]) -> Iterator[Replied]:
        pool = concurrent.futures.ThreadPoolExecutor(options.rows)
        try:
            left, waiting = iter(asked), set()
            while True:
                while len(waiting) < 2 * options.rows and (one := next(left, None)) is not None:
                    waiting.add(pool.submit(ask, one))
                if not waiting:
                    return
                done, waiting = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    return replies
