"""`gptjax data synthesise FILE... OUT`: a model's replies to prompts made from rows, as JSON lines.

    gptjax data synthesise a.jsonl out.jsonl --model models/qwen3 --form text --prompt "Say in other words: {text}"
    gptjax data synthesise gsm8k.jsonl chats.jsonl --url http://localhost:8000 --prompt "{question}" --text question \\
        --samples 8 --most 2 --keep right.py                   rejection sampling: right.py defines keep(row, reply)
    gptjax data synthesise chats.jsonl --model runs/sft --task gsm8k=train.jsonl --samples 8 --most 2
                                                               the same by a task: prompts and scores are its own

The model is one of this machine, or of a server with OpenAI's interface. Replies that were cut off, are empty or repeat
another of the row are left out, and counted. All replies are kept in OUT.replies: an interrupted command is resumed,
and another filter asks nothing again.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

# Nothing heavier up here: --help must not wait for jax.
if TYPE_CHECKING:
    from gptjax.data.prepare.synthesise import Asked, Keep, Replied, Write


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
    task: str | None = None
    """Task whose prompts are asked and whose scores decide, in place of files and a filter: gsm8k=train.jsonl, as for
    `gptjax eval --tasks`."""
    least: float = 1.0
    """Outcome of a task from which a reply is kept."""
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
    if options.task is not None:
        return _by_task(options, options.task, files)
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


def _by_task(options: Options, task: str, files: Sequence[str]) -> int:
    """Rejection sampling by a task's score."""
    from gptjax.cli.eval import parse_task, shown_progress
    from gptjax.evals.generative import Generative
    from gptjax.evals.rejection import rejection_sampled
    from gptjax.inference.sampling import Sampling
    from gptjax.io import atomic
    from gptjax.models.identity import content_digest
    from gptjax.models.loading import load
    from gptjax.types import UserError

    default = Options("")
    others = [name for name in ("prompt", "url", "keep", "form") if getattr(options, name) != getattr(default, name)]
    if others:
        raise UserError(f"{others[0]}: got {getattr(options, others[0])} beside a task, must be left out")
    if options.model is None:
        raise UserError("model: got none, must be the model of this machine that answers the task")
    if len(files) != 1:
        raise UserError(f"files: got {len(files)}, must be the file to write alone, as the prompts are the task's")
    out = Path(files[0])
    if out.exists():
        raise UserError(f"out: got {out}, which exists already; choose another file")
    chosen, sampling = parse_task(task), Sampling(temperature=options.temperature, top_p=options.top_p)
    evaluation = Generative(
        chosen,
        samples=options.samples,
        sampling=sampling,
        max_tokens=options.max_tokens,
        seed=options.seed,
        rows=options.rows,
    )
    model = load(options.model)
    evaluation.check(model.tokenizer)
    log = out.with_name(out.name + ".replies")
    result = evaluation.run(model, log, shown_progress(chosen.name), content_digest(options.model)[:16])
    rows, counts = rejection_sampled(chosen, result.items, options.most, options.least)
    atomic.write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
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
    from gptjax.io.chat_server import ChatServer, in_parallel

    server = ChatServer(str(options.url), str(options.name))
    fields = {name: getattr(options, name) for name in ("temperature", "top_p", "max_tokens")}

    def ask(one: Asked) -> Replied:
        said = [{"role": "user", "content": one.prompt}]
        return Replied(one.key, *server.reply(said, seed=one.seed, **fields))

    return lambda asked: in_parallel(ask, asked, options.rows)
