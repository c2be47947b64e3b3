"""The command line. `gptjax COMMAND --help` describes a command.

gptjax run          train an experiment, or resume it
gptjax plan         memory, time and price of an experiment on chips that you need not have
gptjax chat         talk with a model
gptjax generate     continue a prompt
gptjax serve        answer over HTTP: OpenAI's interface, and a page to chat in
gptjax keys         add, list and revoke the API keys of a server
gptjax store        export and delete the conversations that a server keeps
gptjax eval         measure a model on texts and tasks, or compare two
gptjax compare      let people, or a model, choose between the replies of models, blind
gptjax leaderboard  write a page of runs with their sizes, times, figures and curves
gptjax scaling      fit the scaling law of a series of runs, and choose a size for a budget
gptjax lm-eval      measure a model with lm-eval's tasks; the options are lm-eval's
gptjax convert      write a model in another format: Hugging Face, GGUF or ours
gptjax quantize     write a model with weights of 8 or 4 bits, and report what that costs
gptjax prune        write a model without its smallest weights, and report what that costs
gptjax tokenizer    train a tokenizer, or report on one
gptjax data         clean texts, and look at training data
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from gptjax.cli import data, keys, plan, run, store
from gptjax.cli.chat import Chat, note, show
from gptjax.cli.compare import compare
from gptjax.cli.convert import convert
from gptjax.cli.eval import evaluate
from gptjax.cli.leaderboard import leaderboard
from gptjax.cli.prune import prune
from gptjax.cli.quantize import quantize
from gptjax.cli.scaling import scaling
from gptjax.cli.serve import serve
from gptjax.distributed import processes
from gptjax.io import API_KEY

# Nothing heavier up here: --help must not wait for jax.
if TYPE_CHECKING:
    from gptjax.models.language_model import LanguageModel

Model = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
OptionalModel = Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[PATH]")]
Step = int | Literal["latest", "best"]
Files = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE...")]


def _later(function: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """The function, called with its arguments when its result is called: its errors are not those of the parser."""

    @functools.wraps(function)
    def later(*arguments: Any, **options: Any) -> Callable[[], None]:
        return functools.partial(function, *arguments, **options)

    return later


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """Sampling options. Filters apply in this order, after the penalties. None: as recommended by the model's
    authors; without a recommendation, temperature 0.8 and top-p 0.95."""

    temperature: float | None = None
    """Divisor of the logits. 0: greedy, the most likely token."""
    top_k: int | None = None
    """Sample from the k most likely tokens."""
    top_p: float | None = None
    """Sample from the smallest set of most likely tokens with this total probability (nucleus)."""
    min_p: float | None = None
    """Sample from tokens with at least this fraction of the highest probability."""
    repetition_penalty: float | None = None
    """Above 1: tokens of the prompt and of the text so far become less likely."""
    frequency_penalty: float | None = None
    """Subtracted from a token's logit for each time that the text so far, without the prompt, has it."""
    presence_penalty: float | None = None
    """Subtracted from the logits of all tokens in the text so far, without the prompt."""
    seed: int = 0
    """Random seed; the same seed gives the same text."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it."""
    max_tokens: int | None = None
    """Maximum number of tokens. None: 256, or fewer if the model's context ends before."""

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `LanguageModel.stream` and similar methods."""
        from gptjax.inference import Sampling

        fields = dataclasses.asdict(self)
        sampling = {field.name: fields.pop(field.name) for field in dataclasses.fields(Sampling)}
        given = {name: value for name, value in sampling.items() if value is not None}
        Sampling(**given)  # raises UserError before the model is loaded
        return {**fields, **given}


def generate(
    path: Model,
    prompt: str | None = None,
    samples: int = 1,
    step: Step = "latest",
    sampling: Annotated[SamplingOptions, tyro.conf.arg(name="")] = SamplingOptions(),
) -> None:
    """Continue a prompt, showing the text as it is generated.

    Args:
        path: Run folder, or a folder written by LanguageModel.save.
        prompt: Text to continue. None: standard input.
        samples: Number of continuations.
        step: Checkpoint of a run: latest, best (lowest validation loss), or a step.
    """
    options = sampling.options()
    text = sys.stdin.read().removesuffix("\n") if prompt is None else prompt
    model = _with_sampling(_load(path, step))
    if samples == 1:
        show(model.stream(text, **options))
        return
    for i, completion in enumerate(model.generate(text, samples=samples, **options)):
        print(f"--- {i + 1} ---\n{completion.text}")


def chat(
    path: OptionalModel = None,
    url: str | None = None,
    model: str | None = None,
    key: str | None = None,
    system: str | None = None,
    template: tuple[str, ...] = (),
    context: int | None = None,
    step: Step = "latest",
    sampling: Annotated[SamplingOptions, tyro.conf.arg(name="")] = SamplingOptions(),
) -> None:
    """Chat with a model, line by line. Ctrl-C stops an answer, Ctrl-D leaves; /help lists the commands.

    Args:
        path: Run folder, or a folder written by LanguageModel.save.
        url: Server to talk with, in place of a path: gptjax serve, or another with OpenAI's interface.
        model: Model of the server. None: its first.
        key: API key of the server. None: that of GPTJAX_API_KEY, which is not in the list of processes.
        system: System prompt.
        template: Variables of the model's chat template, as NAME=VALUE with a value of JSON: enable_thinking=false.
        context: Maximum number of tokens of the conversation; older messages are left out. None: the model's, at most
            8,192. Not with --url.
        step: Checkpoint of a run: latest, best (lowest validation loss), or a step.
    """
    from gptjax.cli.chat_models import LocalModel, ServedModels
    from gptjax.types import UserError

    options = {**sampling.options(), "template": _variables(template)}
    if url is not None:
        if path is not None:
            raise UserError(f"url: got {url} and the path {path}, must be one of them")
        if context is not None or step != "latest":
            name = "step" if context is None else "context"
            raise UserError(f"{name}: got one with --url, must be given to the server")
        Chat(ServedModels(url, model, key or os.environ.get(API_KEY)), system, options).run()
        return
    if path is None:
        raise UserError("path: got none, must be a path, or --url for a server")
    if model is not None or key is not None:
        raise UserError(f"{'key' if model is None else 'model'}: got one without --url, the server that it is for")
    if context is not None and context < 1:
        raise UserError(f"context: got {context}, must be at least 1")
    local = LocalModel(path, lambda path: _with_sampling(_load(path, step)), context)
    if _learned_no_chat(path):
        note(f"{path} was trained on text, not on conversations: its answers continue yours, as gptjax generate does")
    Chat(local, system, options).run()


def _learned_no_chat(path: Path) -> bool:
    """True for a run without a stage of conversations. A stage whose data or initial model are not ours may have had
    some."""
    try:
        experiment = json.loads((path / "config.json").read_bytes())["experiment"]
        kinds = {stage["data"]["class"] for stage in experiment["stages"].values()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # no run
        return False
    known = all(kind.startswith("gptjax.data.") and kind != "gptjax.data.Chat" for kind in kinds)
    return known and experiment["init_from"] is None


def _variables(given: Sequence[str]) -> dict[str, Any]:
    """The variables of NAME=VALUE; a value that is not JSON is text."""
    from gptjax.types import UserError

    variables: dict[str, Any] = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not name or not equals:
            raise UserError(f"template: got {item!r}, must be NAME=VALUE, such as enable_thinking=false")
        try:
            variables[name] = json.loads(value)
        except ValueError:
            variables[name] = value
    return variables


def train_tokenizer(files: Files, out: Path, vocab: int = 4_096, kind: Literal["bpe", "unigram"] = "bpe") -> None:
    """Train a lossless SentencePiece tokenizer.

    Args:
        files: Text files or globs; each file is a document.
        out: Folder to write; it must not exist.
        vocab: Vocabulary size: special tokens, 256 bytes and learned pieces.
        kind: Algorithm; bpe trains much faster.
    """
    from gptjax.data import TrainSentencePiece
    from gptjax.types import UserError

    if out.exists():
        raise UserError(f"out: got {out}, which exists already; choose another folder")
    trained = TrainSentencePiece(vocab, kind).build(_documents(files))
    trained.save(out)
    print(f"{trained.vocab:,} ids in {out}")


def report_tokenizer(path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")], files: Files) -> None:
    """Report a tokenizer's bytes per token, byte fallback and speed on some text.

    Args:
        path: Tokenizer to load: a folder, a file, or a published name such as gpt2.
        files: Text files or globs; each file is a document.
    """
    from gptjax.data.tokenizers import load_tokenizer
    from gptjax.data.tokenizers import report as measure

    print(measure(load_tokenizer(path), _documents(files)))


def _documents(files: Sequence[str]) -> Generator[str]:
    from gptjax.data import Text

    for file in files:
        yield from Text(file, validation=0.0).documents("train")


def _load(path: Path, step: Step) -> LanguageModel:
    from gptjax.models.loading import load

    return load(path, step=step)


def _with_sampling(model: LanguageModel) -> LanguageModel:
    """The model, with default sampling settings if its authors recommend none."""
    from gptjax.inference import Sampling

    return dataclasses.replace(model, sampling=model.sampling or Sampling(temperature=0.8, top_p=0.95))


COMMANDS: dict[str, Any] = {
    "chat": chat,
    "generate": generate,
    "serve": serve,
    "eval": evaluate,
    "compare": compare,
    "leaderboard": leaderboard,
    "scaling": scaling,
    "convert": convert,
    "quantize": quantize,
    "prune": prune,
}
"""Commands whose arguments are those of a function."""
GROUPS: dict[str, dict[str, Any]] = {
    "tokenizer": {"train": train_tokenizer, "report": report_tokenizer},
    "store": {"key": store.key, "export": store.export, "delete": store.delete},
    "keys": {"add": keys.add, "list": keys.list_keys, "revoke": keys.revoke},
}
"""Commands of commands."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 done, 1 a plan that does not fit, 2 user error, 130 interrupted;
    for `gptjax run`, also those of `gptjax.cli.run.main`."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    processes.configure()
    try:
        with run.Outcome(rest) as outcome:
            return _run(name, rest)
        return outcome.code
    except KeyboardInterrupt:
        return 130


def _run(name: str, arguments: Sequence[str]) -> int:
    if name in ("-h", "--help"):
        print(__doc__, end="")
        return 0
    if name == "run":
        return run.main(arguments)
    if name == "plan":
        return plan.main(arguments)
    if name == "data":
        return data.main(arguments)
    if name == "lm-eval":
        from gptjax.cli import lm_eval

        return lm_eval.main(arguments)
    if name not in COMMANDS and name not in GROUPS:
        near = difflib.get_close_matches(name, ("run", "plan", "data", "lm-eval", *COMMANDS, *GROUPS), n=1)
        return run.fail(f"no command {name!r}{f'; the nearest: {near[0]}' if near else ''}; see gptjax --help")
    if name in GROUPS:
        subcommands = {word: _later(function) for word, function in GROUPS[name].items()}
        command = functools.partial(tyro.extras.subcommand_cli_from_dict, subcommands)
    else:
        command = functools.partial(tyro.cli, _later(COMMANDS[name]))
    from gptjax.cli.options import parsed

    parsed(lambda: command(prog=f"gptjax {name}", args=arguments))()
    return 0


if __name__ == "__main__":
    sys.exit(main())
