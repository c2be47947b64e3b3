"""`gptjax compare`: people, or a model as a judge, choose between the replies of models."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from gptjax.cli.access import check_address
from gptjax.io import API_KEY

# Nothing heavier up here: --help must not wait for jax.
if TYPE_CHECKING:
    from gptjax.data.chat import Conversation
    from gptjax.evals.comparison import Comparison
    from gptjax.models.language_model import LanguageModel

Models = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL...")]


def compare(
    models: Models,
    prompts: Path,
    out: Path,
    max_tokens: int = 256,
    temperature: float | None = None,
    seed: int = 0,
    rows: int = 8,
    judge: str | None = None,
    judge_model: str | None = None,
    report: bool = False,
    host: str = "127.0.0.1",
    port: int = 8001,
) -> None:
    """Compare models blind: each replies to the prompts, and people choose the better reply of two on a page, side by
    side. Replies and votes are kept in a folder; the same command goes on there. Ctrl-C ends with the report.

    Args:
        models: Two or more: run folders, folders that gptjax.load reads, or files of JSON lines with a "prompt" and a
            "reply" of another system. NAME=PATH gives a name; else it is that of the folder or file.
        prompts: Text file with one prompt per line, or JSON lines with a text in "prompt" or a list in "messages".
        out: Folder for replies, votes and the report.
        max_tokens: Maximum length of a reply, in tokens.
        temperature: Sampling temperature. 0: greedy. None: as the model's authors recommend, or 0.8.
        seed: Random seed of the replies.
        rows: Number of replies that are written at a time.
        judge: Server with OpenAI's interface whose model votes in place of people, on each pair in both orders.
        judge_model: Model of that server. None: its first. Its API key is read from GPTJAX_API_KEY.
        report: Only report on the votes so far.
        host: Address of the page. Others than this machine's own need the code that is then printed with the address.
        port: Port of the page.
    """
    from gptjax.evals.comparison import Comparison, read_prompts
    from gptjax.io import atomic
    from gptjax.types import UserError

    paths = dict(map(_named, models))
    if len(paths) < len(models):
        raise UserError(f"models: got {' '.join(models)}, must have different names; give them as NAME=PATH")
    if not prompts.is_file():
        raise UserError(f"prompts: got {prompts}, which is no file")
    if not report and judge is None:
        check_address(host, port)
    settings = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    asked = read_prompts(prompts)
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(atomic.lock(out / ".lock", wait=False))
        except BlockingIOError:
            raise UserError(f"out: got {out}, which another `gptjax compare` is using; wait for it") from None
        comparison = Comparison(out, asked, list(paths))
        if not report:
            for name, path in paths.items():
                comparison.bind(name, {"path": str(path.resolve()), **({} if path.is_file() else settings)})
                _reply(comparison, name, path, rows, max_tokens, temperature, seed)
            if judge is not None:
                _judge(comparison, judge, judge_model)
            else:
                _serve(comparison, host, port)
    if not comparison.votes:
        raise UserError(f"out: got {out}, where nobody has voted; open the page, or give a --judge")
    text = comparison.report()
    (out / "report.md").write_text(text, encoding="utf-8")
    print(text)


def _named(model: str) -> tuple[str, Path]:
    from gptjax.types import UserError

    name, equals, path = model.partition("=")
    found = Path(path if equals else model).expanduser()
    name = name if equals else found.stem if found.is_file() else found.resolve().name
    if not found.exists():
        raise UserError(f"models: got {found}, which does not exist")
    if not re.fullmatch(r"[\w.+-]+", name):
        raise UserError(f"models: got the name {name!r}, must have letters, digits, and . + - _ alone; give NAME=PATH")
    return name, found


def _reply(
    comparison: Comparison, name: str, path: Path, rows: int, max_tokens: int, temperature: float | None, seed: int
) -> None:
    """Write the replies that a model has not written."""
    from gptjax.evals.comparison import read_replies
    from gptjax.models.language_model import LanguageModel
    from gptjax.models.loading import load
    from gptjax.types import UserError

    missing = comparison.missing(name)
    if not missing:
        return
    if path.is_file():
        replies = read_replies(path)
        if absent := [item for item in missing if item not in replies]:
            raise UserError(f"models: got {path}, which has no reply to {len(absent)} of the prompts")
        for item in missing:
            comparison.add_reply(name, item, replies[item])
        return
    model = load(path)
    if not isinstance(model, LanguageModel):
        raise UserError(f"models: got {path}, a {type(model).__name__}, must be a language model")
    _generate(comparison, name, model, missing, rows, max_tokens, temperature, seed)


def _generate(
    comparison: Comparison,
    name: str,
    model: LanguageModel,
    missing: dict[str, Conversation],
    rows: int,
    max_tokens: int,
    temperature: float | None,
    seed: int,
) -> None:
    """Let a model reply. One that has learnt no conversations continues the text of a prompt."""
    import dataclasses

    from rich.console import Console
    from rich.progress import track

    from gptjax.evals.replies import Prompt, form_of, write
    from gptjax.inference.sampling import Sampling
    from gptjax.tasks.task import Generation
    from gptjax.types import UserError

    sampling, form = model.sampling or Sampling(temperature=0.8, top_p=0.95), form_of(model)
    if temperature is not None:
        sampling = dataclasses.replace(sampling, temperature=temperature)
    names, asked = {int(item, 16): item for item in missing}, []
    for number, item in names.items():
        prompt = missing[item]
        text = "\n".join(message.text for message in prompt)
        ids = model.encode_chat(prompt) if form == "chat" else model.encode_prompt(text)
        asked.append((Prompt(number, tuple(ids), prompt), 0))
    # The seed is the item's, so that a reply does not depend on which others are missing.
    written = write(model, asked, Generation(max_tokens, text_stop=()), sampling, form, seed, rows)
    console = Console(stderr=True)
    for one in track(written, f"{name}: replying", len(asked), console=console, disable=not console.is_terminal):
        if not one.fits:
            raise UserError(f"prompts: got one of {len(one.prompt.ids)} tokens, which leaves {name} no room to reply")
        comparison.add_reply(name, names[one.prompt.item], one.reply.text)


def _judge(comparison: Comparison, url: str, model: str | None) -> None:
    """Let a model vote on each pair in both orders. Verdicts that cannot be read are counted."""
    from rich.console import Console
    from rich.progress import track

    from gptjax.cli.chat_models import ServedModels
    from gptjax.evals.comparison import MODEL_JUDGE
    from gptjax.evals.judge import as_messages, verdict
    from gptjax.evals.ratings import Vote
    from gptjax.types import UserError

    served = ServedModels(url, model, os.environ.get(API_KEY))
    name = MODEL_JUDGE + served.name
    done = {(vote.item, vote.left, vote.right) for vote in comparison.votes if vote.judge == name}
    todo = [
        (unit, left, right)
        for unit in comparison.units(name)
        for left, right in (unit.pair, unit.pair[::-1])
        if (unit.item, left, right) not in done
    ]
    console, unread = Console(stderr=True), 0
    for unit, left, right in track(todo, f"{served.name} judges", console=console, disable=not console.is_terminal):
        first, second = (comparison.replies[side][unit.item] for side in (left, right))
        messages = as_messages(comparison.prompts[unit.item], first, second)
        _, pieces = served.reply(messages, {"temperature": 0.0, "template": {}})
        choice = verdict("".join(pieces))
        if choice is None:
            unread += 1
        else:
            comparison.add_vote(Vote(unit.item, left, right, choice, name))
    if unread:
        _say(f"{unread} of {len(todo)} replies of the judge had no verdict; they are no votes, and are asked again")
    if todo and unread == len(todo):
        raise UserError(f"judge: got no verdict from {served.name} in {unread} replies, must end with [[A]] to [[D]]")


def _serve(comparison: Comparison, host: str, port: int) -> None:
    """Serve the page until Ctrl-C."""
    from gptjax.types import UserError

    try:
        import uvicorn

        from gptjax.serve.compare import make_app
    except ModuleNotFoundError as error:
        raise UserError(f"compare: {error.name} is not installed; pip install 'gptjax[serve]'") from None
    code = "" if host in ("127.0.0.1", "localhost", "::1") else secrets.token_urlsafe(12)
    pairs = len(comparison.units(""))
    if not pairs:
        raise UserError("models: got equal replies to all prompts, must differ somewhere; is it the same model twice?")
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/{f'#{code}' if code else ''}"
    _say(f"{pairs:,} pairs of replies to compare. Judge: {address}      Ctrl-C ends with the report.")
    app = make_app(comparison, code, lambda vote: _say(f"votes: {len(comparison.votes):,}, the last by {vote.judge}"))
    config = uvicorn.Config(app, host, port, log_level="warning", ws="none", limit_concurrency=200)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
