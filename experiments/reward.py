"""A reward model: positive sentences of film reviews over negative ones.

    python -m experiments reward

10,662 sentences (Pang and Lee 2005, arXiv:cs/0506075), downloaded or read from the zip file
`--train.data.source.path` (and `--train.evaluations.0.source.path`). Each of 5,331 pairs has a positive and a negative
one as replies to one request; a sentence is in one pair. A decoder of 0.2 M parameters from scratch, whose reward is
read at the last token. Chance is 50 %.

Expected: 77.7 % of 488 held-out pairs, 95 % interval 73.8 to 81.1, promised above 70 %. Not timed on an idle machine.
"""

import dataclasses
from collections.abc import Iterator

from gptjax import Experiment, Stage, data, evals, objectives, optim
from gptjax.data.files import file_state
from gptjax.data.sources import check_fraction, fingerprint, of_split
from gptjax.experiment.report import Expect
from gptjax.nn import RegressorConfig, TransformerConfig
from gptjax.protocols import Split
from gptjax.tasks.polarity import SentencePolarity

URL = "https://raw.githubusercontent.com/nltk/nltk_data/gh-pages/packages/corpora/sentence_polarity.zip"
ASKED = (data.Message("user", "Review a film."),)
VOCAB, LENGTH = 2_048, 160


@dataclasses.dataclass(frozen=True)
class PolarityPairs:
    """Sentences of film reviews in pairs: a positive one is preferred to a negative one."""

    path: str = URL
    """The zip file with rt-polarity.neg and rt-polarity.pos, or its URL."""
    validation: float = 0.1
    """Fraction of the pairs held out for validation, chosen by a hash of the positive sentence."""

    def __post_init__(self) -> None:
        check_fraction(self.validation)

    def documents(self, split: Split) -> Iterator[data.Preference]:
        sentences = SentencePolarity(self.path).sentences
        good, bad = ([data.Message("assistant", text) for text, label in sentences if label == side] for side in (1, 0))
        pairs = (data.Preference(ASKED, *pair) for pair in zip(good, bad, strict=True))
        yield from of_split(((pair.chosen.text, pair) for pair in pairs), split, self.path, self.validation)

    def fingerprint(self) -> str:
        return fingerprint(self, *file_state(self.path))


experiment = Experiment(
    model=RegressorConfig(TransformerConfig(vocab=VOCAB, layers=2, width=64, heads=4, dropout=0.2)),
    tokenizer=data.TrainSentencePiece(vocab=VOCAB),
    stages={
        "train": Stage(
            data=data.Preferences(PolarityPairs(), length=LENGTH, batch=32),
            objective=objectives.BradleyTerry(centering=0.01),
            optimizer=optim.AdamW(
                learning_rate=2e-3,
                schedule=optim.Linear(warmup=50),
                weight_decay=0.1,
                decay_embeddings=True,
                clip=1.0,
            ),
            steps=600,
            evaluate_every=300,
            eval_sequences=512,
            save_every=600,
            prompts=(),
            evaluations=(evals.RewardAccuracy(PolarityPairs()),),
        )
    },
    expect=(Expect("reward_accuracy", above=0.70),),
)
