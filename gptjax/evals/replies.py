"""Replies of a model to prompts, written by its engine, many at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from gptjax.data.chat import Conversation
from gptjax.distributed import processes
from gptjax.inference.sampling import Sampling
from gptjax.tasks.functions import ChatTools
from gptjax.tasks.task import Generation, Reply, Task
from gptjax.tasks.tools import Tool
from gptjax.types import Json, UserError

Form = Literal["chat", "text"]
"""Form of a prompt: the model's conversation format, or a text to continue, or to be read by an encoder."""


def form_of(model: Any) -> Form:
    """ "chat" for a model with a chat template or our markers, else "text"."""
    if _has_encoder(model):
        return "text"
    return "chat" if model.template is not None or "<|assistant|>" in model.tokenizer.specials else "text"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Prompt of an item."""

    item: int
    ids: tuple[int, ...]
    messages: Conversation


@dataclasses.dataclass(frozen=True)
class Written:
    """A reply that was written."""

    prompt: Prompt
    sample: int
    reply: Reply
    tokens: int
    """Number of tokens, that of the end included."""
    calls: int = 0
    """Number of answers of tools."""
    errors: int = 0
    """Number of those that are errors, in a conversation with tools."""
    fits: bool = True
    """False: the prompt leaves no room for a reply in the model's context."""


def prompts(
    model: Any, task: Task, items: Sequence[int], form: Form, tools: tuple[Tool, ...] | ChatTools = ()
) -> list[Prompt]:
    """Prompts of items, as the model reads them. Raises UserError, with the item, for one that it cannot read."""
    found = []
    for i in items:
        messages = task.prompt(i)
        try:
            if isinstance(tools, ChatTools):
                messages = tools.offered(messages)
            ids = model.encode_chat(messages) if form == "chat" else model.encode_prompt(task.text(i))
        except UserError as error:
            raise UserError(f"task: item {i} of {task.name}: {error}") from None
        found.append(Prompt(i, tuple(ids), messages))
    return found


def write(
    model: Any,
    asked: Sequence[tuple[Prompt, int]],
    generation: Generation,
    sampling: Sampling,
    form: Form,
    seed: int = 0,
    rows: int = 16,
    tools: tuple[Tool, ...] | ChatTools = (),
) -> Iterator[Written]:
    """Replies to (prompt, sample) in the order in which they end. A reply does not depend on the others: its draws are
    those of the seed, the item and the sample."""
    if _has_encoder(model):
        yield from _write_targets(model, asked, generation, sampling, seed, rows)
        return
    from gptjax.train import episodes

    rows = max(1, min(rows, len(asked)))
    engine = model.engine(rows=rows, queue=2 * rows)
    stop = generation.stop if form == "chat" else generation.text_stop
    template = model.template if form == "chat" else None
    writing = episodes.Writing.of(generation.max_tokens, sampling, stop, _of_job(tools), model.tokenizer, template)
    writing.check(asked[0][0].messages)
    prompts = {prompt.item: prompt for prompt, _ in asked}
    wanted = [episodes.Asked(p.item, sample, p.ids, (seed + p.item) % 2**32) for p, sample in asked]
    for episode in episodes.write(engine, wanted, writing):
        prompt, count = prompts[episode.asked.item], len(episode.ids)
        reply = episode.reply
        if count and writing.turns is None:
            reply = dataclasses.replace(reply, text=_said(model, prompt, episode.text, form))
        yield Written(prompt, episode.asked.sample, reply, count, episode.calls, episode.errors, fits=count > 0)


def _of_job(tools: tuple[Tool, ...] | ChatTools) -> tuple[Tool, ...] | ChatTools:
    """Tools that only the first process of a job uses: what they say, such as a program's output, may differ."""
    if isinstance(tools, ChatTools):
        return _ChatToolsOfJob(**{field.name: getattr(tools, field.name) for field in dataclasses.fields(tools)})
    return tuple(map(_ToolOfJob, tools))


class _ChatToolsOfJob(ChatTools):
    def call(self, name: str, arguments: Json) -> tuple[str, bool]:
        text, right = processes.on_first(functools.partial(super().call, name, arguments))
        return text, right


@dataclasses.dataclass(frozen=True)
class _ToolOfJob(Tool):
    tool: Tool

    @property
    def mark(self) -> str:
        return self.tool.mark

    def answer(self, text: str) -> str | None:
        return processes.on_first(functools.partial(self.tool.answer, text))


def _has_encoder(model: Any) -> bool:
    return model.config.architecture == "encoder-decoder"


def _write_targets(
    model: Any, asked: Sequence[tuple[Prompt, int]], generation: Generation, sampling: Sampling, seed: int, rows: int
) -> Iterator[Written]:
    """Replies of an encoder-decoder, greedy, `rows` at a time."""
    if not sampling.greedy:
        raise UserError(f"sampling: got temperature {sampling.temperature} for an encoder-decoder, must be 0")
    limit = model.config.encoder.max_positions
    for first in range(0, len(asked), rows):
        group = []
        for prompt, sample in asked[first : first + rows]:
            if limit is not None and len(prompt.ids) > limit:
                yield Written(prompt, sample, Reply("", finished=False), 0, fits=False)
            else:
                group.append((prompt, sample))
        targets = model.generate_ids([prompt.ids for prompt, _ in group], generation.max_tokens, seed, sampling)
        for (prompt, sample), target in zip(group, targets, strict=True):
            yield Written(prompt, sample, Reply(target.text, target.finish == "stop"), len(target.ids))


def _said(model: Any, prompt: Prompt, text: str, form: Form) -> str:
    """The text of a reply, without reasoning."""
    if form == "text" or (model.template is None and not text.lstrip().startswith("<")):
        return text
    thinking = model.reply_format.thinking(prompt.ids, model.tokenizer)
    return model.reply_format.message(text, False, thinking).text
