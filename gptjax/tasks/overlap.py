"""Texts that are compared with references by overlap: summaries by ROUGE, translations by BLEU and chrF."""

from __future__ import annotations

import abc
import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from gptjax.data.chat import Conversation, Message
from gptjax.data.files import Where, field
from gptjax.tasks.rows import read_items
from gptjax.tasks.task import Generation, Reply, Score, Task, unanswered
from gptjax.types import Json, UserError

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
HAN = r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"


class Summaries(Task):
    """Summaries of texts. Base class; a subclass defines `__len__` and `pair`.

    The outcome is ROUGE-Lsum F1, with each sentence on a line of its own, without which it is another figure. The
    library's words are Latin letters and digits, of which other languages have none."""

    graded = True
    words: Literal["en", "zh"] = "en"

    @abc.abstractmethod
    def pair(self, i: int) -> tuple[str, str]:
        """(text, summary) of item `i`."""

    @property
    def figure(self) -> str:
        return "rougeLsum"

    @property
    def scorer(self) -> str:
        import importlib.metadata

        return f"rouge-score {importlib.metadata.version('rouge-score')}"

    def example(self, i: int) -> Conversation:
        text, summary = self.pair(i)
        return Message("user", f"Summarise this text.\n\n{text}"), Message("assistant", summary)

    def text(self, i: int) -> str:
        return f"{self.pair(i)[0]}\n\nSummary:"

    def score(self, i: int, reply: Reply) -> Score:
        reference = self.pair(i)[1]
        if not (tokenizer := _Words(self.words)).tokenize(reference):
            raise UserError(f"words: got {self.words}, which finds none in the summary of item {i}; set another")
        if not tokenizer.tokenize(reply.text):
            return unanswered(reply, dict.fromkeys(ROUGE, 0.0))
        found = _rouge(self.words).score(_lines(reference), _lines(reply.text))
        parts = {name: float(found[name].fmeasure) for name in ROUGE}
        return Score(parts["rougeLsum"], parts=parts)

    @property
    def generation(self) -> Generation:
        return Generation(max_tokens=256, text_stop=("\n\n",))


@dataclasses.dataclass(frozen=True)
class Summarise(Summaries):
    """Summaries in a file: rows with "document" (or "article", "dialogue", "text") and "summary" (or "highlights")."""

    path: str
    """File of the texts, a glob or a URL."""
    words: Literal["en", "zh"] = "en"
    """Words of ROUGE: "en", those of rouge-score; "zh", also each Chinese character."""

    def __post_init__(self) -> None:
        if self.words not in ("en", "zh"):
            raise UserError(f"words: got {self.words!r}, must be en or zh")

    @functools.cached_property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """(text, summary). Raises UserError, with file and line, for a row without them."""
        return read_items(self.path, _summary)

    def __len__(self) -> int:
        return len(self.pairs)

    def pair(self, i: int) -> tuple[str, str]:
        return self.pairs[i]


class Translations(Task):
    """Translations of texts. Base class; a subclass defines `__len__` and `pair`.

    The figures are BLEU and chrF of all replies together, from sacrebleu; the outcome of an item is its chrF / 100."""

    graded = True
    language: str = "English"
    tokenize: str = "13a"

    @abc.abstractmethod
    def pair(self, i: int) -> tuple[str, str]:
        """(source, target) of item `i`."""

    @property
    def figure(self) -> str:
        return "sentence_chrf"

    @property
    def scorer(self) -> str:
        bleu = _bleu(self.tokenize)
        bleu.corpus_score(["a"], [["a"]])
        return f"sacrebleu {bleu.get_signature()}".replace("|", ";")

    def example(self, i: int) -> Conversation:
        source, target = self.pair(i)
        return Message("user", f"Translate into {self.language}.\n\n{source}"), Message("assistant", target)

    def text(self, i: int) -> str:
        return f"{self.pair(i)[0]}\n{self.language}:"

    def score(self, i: int, reply: Reply) -> Score:
        said, right = reply.text.strip(), self.pair(i)[1]
        parts = {"exact_match": float(said == right)}
        if not said:
            return unanswered(reply, parts)
        return Score(min(_chrf().sentence_score(said, [right]).score / 100, 1.0), parts=parts)

    def figures(self, replies: Mapping[int, Sequence[str]]) -> Mapping[str, float]:
        said = [text.strip() for texts in replies.values() for text in texts]
        right = [self.pair(i)[1] for i, texts in replies.items() for _ in texts]
        bleu, chrf = _bleu(self.tokenize), _chrf()
        return {"bleu": bleu.corpus_score(said, [right]).score, "chrf": chrf.corpus_score(said, [right]).score}

    @property
    def generation(self) -> Generation:
        return Generation(max_tokens=256, text_stop=("\n",))


@dataclasses.dataclass(frozen=True)
class Translate(Translations):
    """Translations in a file: rows with a source and a target, perhaps inside of "translation"."""

    path: str
    """File of the pairs, a glob or a URL."""
    source: str = "source"
    """Field with the text: "de"."""
    target: str = "target"
    """Field with its translation: "en"."""
    language: str = "English"
    """Name of the target's language, in the prompt."""
    tokenize: str = "13a"
    """Tokenizer of BLEU: "13a", for Chinese "zh", for Japanese "ja-mecab", "flores200", ... The same Chinese texts have
    34 with one and 60 with another."""

    @functools.cached_property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """(source, target). Raises UserError, with file and line, for a row without them, and for a target that the
        tokenizer does not fit."""
        rows = read_items(self.path, _row)
        found = tuple((field(row, self.source), field(row, self.target)) for row in rows)
        if self.tokenize == "13a" and any(len(re.findall(HAN, target)) > len(target) / 4 for _, target in found):
            raise UserError("tokenize: got 13a, which takes a sentence of Chinese for a word; must be zh or ja-mecab")
        return found

    def __len__(self) -> int:
        return len(self.pairs)

    def pair(self, i: int) -> tuple[str, str]:
        return self.pairs[i]


class _Words:
    """Words in lower case."""

    def __init__(self, kind: str):
        self._word = re.compile("[a-z0-9]+" + (f"|{HAN}" if kind == "zh" else ""))

    def tokenize(self, text: str) -> list[str]:
        return self._word.findall(text.lower())


def _lines(text: str) -> str:
    """A sentence a line."""
    return re.sub(r"(?<=[.!?])\s+|(?<=[。！？])\s*", "\n", text.strip())


@functools.lru_cache(maxsize=2)
def _rouge(words: str) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UserError("task: ROUGE needs the rouge-score library; pip install 'gptjax[eval]'") from None
    return RougeScorer(list(ROUGE), tokenizer=_Words(words))


def _bleu(tokenize: str) -> Any:
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise UserError("task: BLEU and chrF need the sacrebleu library; pip install 'gptjax[eval]'") from None
    if tokenize not in BLEU.TOKENIZERS:
        raise UserError(f"tokenize: got {tokenize}, must be one of {', '.join(BLEU.TOKENIZERS)}")
    return BLEU(tokenize=tokenize)


def _chrf() -> Any:
    _bleu("13a")
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


def _summary(where: Where, row: Json) -> tuple[str, str]:
    return field(row, "document", "article", "dialogue", "text"), field(row, "summary", "highlights")


def _row(where: Where, row: Json) -> Any:
    return row["translation"] if isinstance(row, Mapping) and "translation" in row else row
