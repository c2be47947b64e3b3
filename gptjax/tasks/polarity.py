"""Sentiment of sentences."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
import zipfile

from gptjax.data.chat import Conversation, Message
from gptjax.data.files import file_state, find_files
from gptjax.tasks import extract
from gptjax.tasks.task import Choices, ChoiceTask, Generation, Reply, Score, unanswered
from gptjax.types import UserError

WORDS = ("negative", "positive")
ASKED = "\n\nIs this review positive or negative? Answer with one word."


@dataclasses.dataclass(frozen=True)
class SentencePolarity(ChoiceTask):
    """Sentences of film reviews (Pang and Lee 2005, arXiv:cs/0506075): the zip file with rt-polarity.neg and
    rt-polarity.pos, a sentence a line in Latin-1. The classes alternate. A reply that names both has no answer."""

    path: str
    """The zip file, or a URL of it."""

    @functools.cached_property
    def sentences(self) -> tuple[tuple[str, int], ...]:
        """(sentence, index in `WORDS`). Raises UserError for a file of another kind."""
        return _read(self.path, json.dumps(file_state(self.path)))

    def __len__(self) -> int:
        return len(self.sentences)

    def example(self, i: int) -> Conversation:
        sentence, label = self.sentences[i]
        return Message("user", sentence + ASKED), Message("assistant", WORDS[label])

    def text(self, i: int) -> str:
        return f"Review: {self.sentences[i][0]}\nSentiment (positive or negative):"

    def score(self, i: int, reply: Reply) -> Score:
        said = extract.fold(reply.text)
        named = [word for word in WORDS if re.search(rf"\b{word}\b", said)]
        flexible = named[0] if len(named) == 1 else None
        strict = flexible if flexible and (said == flexible or f"answer is {flexible}" in said) else None
        right = WORDS[self.sentences[i][1]]
        parts = {"strict": float(strict == right), "flexible": float(flexible == right)}
        return unanswered(reply, parts) if strict is None else Score(parts["strict"], parts=parts, extracted=strict)

    def choices(self, i: int) -> Choices:
        sentence, label = self.sentences[i]
        context = f"Review: {sentence}\nSentiment:"
        return Choices(tuple((context, f" {word}") for word in WORDS), label, "Sentiment:")

    def cluster(self, i: int) -> str:
        return extract.fold(self.sentences[i][0])

    @property
    def generation(self) -> Generation:
        return Generation(max_tokens=8, text_stop=("\n",))


@functools.lru_cache(maxsize=4)
def _read(path: str, state: str) -> tuple[tuple[str, int], ...]:
    (file,) = find_files(path)[:1]
    each = []
    try:
        with zipfile.ZipFile(file) as archive:
            for ending in (".neg", ".pos"):
                names = [name for name in archive.namelist() if name.endswith(f"rt-polarity{ending}")]
                if len(names) != 1:
                    raise UserError(f"path: {file} has {len(names)} files rt-polarity{ending}, must have one")
                lines = archive.read(names[0]).decode("latin-1").splitlines()
                each.append([line.strip() for line in lines if line.strip()])
    except zipfile.BadZipFile as error:
        raise UserError(f"path: {file} is no zip file ({error}), must be that of the sentence polarity data") from None
    pairs = itertools.zip_longest(*each)
    return tuple((text, label) for pair in pairs for label, text in enumerate(pair) if text is not None)
