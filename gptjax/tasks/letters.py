"""Letters of words, generated: spelling and counting, which a model of word pieces does not see."""

from __future__ import annotations

import dataclasses

import numpy as np

from gptjax.data.chat import Conversation, Message
from gptjax.tasks import extract
from gptjax.tasks.task import Generation, Reply, Score, Task, unanswered
from gptjax.types import UserError

WORDS = (  # noqa: SIM905, as a list has a line for each
    "apple bicycle blossom bottle butterfly candle castle cherry cinnamon committee coffee copper cousin cricket "
    "dolphin dragon elephant engine feather ferry flower forest garden giraffe glacier grammar hammer harbour "
    "holiday island jacket jungle kettle kitchen ladder language lemon library lizard machine marble meadow "
    "melody mirror mountain museum necklace needle number ocean orange orchestra oxygen paddle parrot pepper "
    "piano pillow planet pocket possession pumpkin puzzle rabbit rainbow raspberry ribbon river rocket saddle "
    "sailor school scissors shadow silver spider squirrel station strawberry summer sunflower teacher telescope "
    "thunder tomato tunnel umbrella valley village violin volcano walnut weather whistle window winter wizard "
    "yellow zebra "
).split()


@dataclasses.dataclass(frozen=True)
class Letters(Task):
    """Questions about words. Base class. Item i is a pure function of `seed` and i."""

    count: int = 256
    """Number of items."""
    seed: int = 0
    """Random seed of the words."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"count: got {self.count}, must be at least 1")

    def __len__(self) -> int:
        return self.count

    def draw(self, i: int) -> tuple[str, str]:
        """(word, letter) of an item. Every other letter is one that the word has."""
        random = np.random.default_rng([self.seed, i])
        word = str(random.choice(WORDS))
        return word, str(random.choice(list(word if i % 2 else "abcdefghijklmnopqrstuvwxyz")))

    @property
    def generation(self) -> Generation:
        return Generation(max_tokens=64, text_stop=("\n",))


@dataclasses.dataclass(frozen=True)
class Spelling(Letters):
    """Spelling of a word, its letters parted by hyphens. The reply is nothing else."""

    def example(self, i: int) -> Conversation:
        word, _ = self.draw(i)
        asked = f'Spell the word "{word}", with a hyphen between two letters. Reply with nothing else.'
        return Message("user", asked), Message("assistant", "-".join(word))

    def score(self, i: int, reply: Reply) -> Score:
        word, _ = self.draw(i)
        said = reply.text.strip().strip("\"'.").lower()
        if not said:
            return unanswered(reply)
        return Score(float(said == "-".join(word)), extracted=said)

    def cluster(self, i: int) -> str:
        return self.draw(i)[0]


@dataclasses.dataclass(frozen=True)
class CountLetters(Letters):
    """Number of times that a word has a letter, after "####"."""

    def example(self, i: int) -> Conversation:
        word, letter = self.draw(i)
        spelled = ", ".join(f"{c} {word[: at + 1].count(letter)}" for at, c in enumerate(word))
        asked = f'How many times does the word "{word}" have the letter "{letter}"? Write the number after "####".'
        return Message("user", asked), Message("assistant", f"{spelled}\n#### {word.count(letter)}")

    def score(self, i: int, reply: Reply) -> Score:
        word, letter = self.draw(i)
        if (found := extract.strict_number(reply.text)) is None:
            return unanswered(reply)
        return Score(float(found == word.count(letter)), extracted=str(found))

    def cluster(self, i: int) -> str:
        return " ".join(self.draw(i))

    @property
    def generation(self) -> Generation:
        return Generation(max_tokens=96)
