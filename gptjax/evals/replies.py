"""Replies of a model to prompts, written by its engine, many at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from gptjax.data.chat import Conversation
from gptjax.inference.sampling import Sampling
from gptjax.tasks.task import Generation, Reply, Task
from gptjax.types import UserError

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
    fits: bool = True
    """False: the prompt leaves no room for a reply in the model's context."""


def prompts(model: Any, task: Task, items: Sequence[int], form: Form) -> list[Prompt]:
    """Prompts of items, as the model reads them. Raises UserError, with the item, for one that it cannot read."""
    found = []
    for i in items:
        messages = task.prompt(i)
        try:
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
) -> Iterator[Written]:
    """Replies to (prompt, sample) in the order in which they end. A reply does not depend on the others: its draws are
    those of the seed, the item and the sample."""
    if _has_encoder(model):
        yield from _write_targets(model, asked, generation, sampling, seed, rows)
        return
    from gptjax.inference.engine import Request

    rows = max(1, min(rows, len(asked)))
    engine = model.engine(rows=rows, queue=2 * rows)
    stop = generation.stop if form == "chat" else generation.text_stop
    marks = model.reply_format.marks if form == "chat" and model.template is not None else {}
    active, left = [], list(reversed(asked))
    while left or active:
        while left and engine.waiting < rows:
            prompt, sample = left.pop()
            room = min(generation.max_tokens, engine.context - len(prompt.ids))
            if room < 1:
                yield Written(prompt, sample, Reply("", finished=False), 0, fits=False)
                continue
            request = Request(
                prompt.ids,
                max_tokens=room,
                sampling=sampling,
                seed=(seed + prompt.item) % 2**32,
                choice=sample,
                stop=stop,
                marks=marks,
            )
            active.append((prompt, sample, engine.submit(request)))
        engine.run_round()
        for entry in [entry for entry in active if entry[2].finish is not None]:
            active.remove(entry)
            prompt, sample, text = entry
            if text.finish == "error":
                raise UserError(f"task: item {prompt.item}: the engine failed: {text.error}")
            reply = Reply(_said(model, prompt, text.text, form), text.finish == "stop")
            yield Written(prompt, sample, reply, len(text.tokens))


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
