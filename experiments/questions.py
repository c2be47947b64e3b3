"""Questions about passages, by a model that finds the answer and by one that writes it: `python -m experiments
questions`.

    python -m experiments questions
    python -m experiments questions --variant generative

The passages are planted: three of four facts about a person, in any order and in one of two wordings. A question asks
for one of the four, so a quarter has no answer. Two facts are cities and two are jobs, and they are others in every
passage: they cannot be learnt by heart, and the first city is often the wrong one. A file of SQuAD takes their place:
`data.QuestionsJsonl("train-v2.0.json")` and `tasks.Squad("dev-v2.0.json")`.

Exact match with the right answer, or with none, on the first 300 held-out questions, of which 75 have no answer; one
run of each on two cores of a shared server:

                                                     exact match, %       CPU seconds
    the first city or job of the passage             48.0 [42.4, 53.6]
    extractive: an encoder, 400 steps                94.0 [90.7, 96.2]    36
    generative: an encoder-decoder, 500 steps       100 [98.7, 100]       80
    the same model, asked about another passage      11.0 [ 7.9, 15.0]

The model that writes has one word to learn from in a question, and must find out how to copy, which it does in 300
steps of Muon. With AdamW at 3e-3 it said "unanswerable" to all after 500 steps, which is right in 25.0 % [20.4, 30.2];
after 200 steps at 2e-3 it could not copy from passages of one fact. A decoder that learnt whole texts by AdamW, with
800 steps, had 31.7 % [26.7, 37.1].
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from gptjax import Expect, Experiment, Stage, data, evals, objectives, optim
from gptjax.data.sources import check_fraction, of_split
from gptjax.nn import EncoderConfig, EncoderDecoderConfig, MultiHeadAttention, SpanExtractorConfig, TransformerConfig
from gptjax.protocols import Evaluation, ModelConfig, Objective, Split
from gptjax.tasks import HeldOut, OtherPassage, Reading, TaskPairs
from gptjax.tasks.squad import Passage

NAMES = "Alice Ben Carla David Emma Frank Grace Henry Irene Jack Kate Leo Mary Nina Oscar Paul Quentin Rosa Simon Tina"
CITIES = "London Paris Rome Vienna Oslo Madrid Dublin Athens Prague Lisbon"
JOBS = "baker teacher doctor farmer painter lawyer singer pilot nurse gardener"
FACTS = {
    "home": (("{name} lives in {value}.", "The house of {name} is in {value}."), "Where does {name} live?", CITIES),
    "birth": (("{name} was born in {value}.", "{name} grew up in {value}."), "Where is {name} from?", CITIES),
    "work": (("{name} works as a {value}.", "By day {name} is a {value}."), "What does {name} do?", JOBS),
    "wish": (("{name} wants to be a {value}.", "{name} would rather be a {value}."), "What is {name}'s wish?", JOBS),
}
"""Kind of fact -> sentences, question and values."""


@functools.lru_cache(maxsize=1 << 16)
def drawn(seed: int, i: int) -> tuple[data.Question, str]:
    """A question about a passage, and the guess of a reader who looks for a city or a job alone: the first of them."""
    random = np.random.default_rng([seed, i])
    name, asked = str(random.choice(NAMES.split())), str(random.choice([*FACTS]))
    context, answers, starts, guess = "", (), (), ""
    for kind in random.permutation([*FACTS])[:3]:
        sentences, _, values = FACTS[kind]
        value = str(random.choice([value for value in values.split() if value not in context]))
        before, after = str(random.choice(sentences)).format(name=name, value="\0").split("\0")
        if kind == asked:
            answers, starts = (value,), (len(context) + len(before),)
        guess = guess or (value if values == FACTS[asked][2] else "")
        context += f"{before}{value}{after} "
    return data.Question(context.strip(), FACTS[asked][1].format(name=name), answers, starts), guess


@dataclasses.dataclass(frozen=True)
class Facts(Reading):
    """Questions about planted facts. Item i is a pure function of `seed` and i."""

    count: int = 20_000
    """Number of items."""
    seed: int = 0
    """Random seed."""

    def __len__(self) -> int:
        return self.count

    def passage(self, i: int) -> Passage:
        found, _ = drawn(self.seed, i)
        return Passage(found.context, found.question, found.answers)

    @property
    def unanswerable(self) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class Asked:
    """The questions of `Facts` with the places of their answers, in the splits of `TaskPairs`."""

    task: Facts = Facts()
    """The task."""
    validation: float = 0.1
    """Fraction of the passages held out for validation, chosen by a hash."""

    def __post_init__(self) -> None:
        check_fraction(self.validation)

    def documents(self, split: Split) -> Iterator[data.Question]:
        keyed = ((self.task.cluster(i), drawn(self.task.seed, i)[0]) for i in range(len(self.task)))
        return of_split(keyed, split, self.task.name, self.validation)

    def fingerprint(self) -> str:
        return f"{self.task.fingerprint()}-{self.validation:g}"


VOCAB = 640
TASK = Facts()


def reader(
    figure: str,
    model: ModelConfig,
    read: data.Dataset,
    objective: Objective,
    optimizer: optim.Optimizer,
    steps: int,
    *evaluations: Evaluation,
) -> Experiment:
    """An experiment with either kind of model, and the figure that must get over 85 %."""
    return Experiment(
        model=model,
        tokenizer=data.TrainSentencePiece(vocab=VOCAB),
        stages={
            "read": Stage(
                data=read,
                objective=objective,
                optimizer=dataclasses.replace(optimizer, schedule=optim.Linear(warmup=30), weight_decay=0.0, clip=1.0),
                steps=steps,
                evaluate_every=200,
                eval_sequences=128,
                save_every=200,
                prompts=(),
                evaluations=evaluations,
            )
        },
        expect=(Expect(figure, above=0.85),),
    )


variants = {
    "extractive": reader(
        "exact_match",
        SpanExtractorConfig(EncoderConfig(vocab=VOCAB, layers=2, width=64, heads=4, token_types=2)),
        data.ExtractAnswers(Asked(), length=48, batch=32, question_length=16),
        objectives.SpanExtraction(),
        optim.AdamW(learning_rate=4e-3),
        400,
        evals.ExtractedAnswers(Asked(), documents=300),
    ),
    "generative": reader(
        "read/Facts/exact_match",
        EncoderDecoderConfig(
            encoder=EncoderConfig(vocab=VOCAB, layers=2, width=96, heads=4),
            decoder=TransformerConfig(vocab=VOCAB, layers=2, width=96, heads=4, cross_attention=MultiHeadAttention()),
        ),
        data.Pairs(TaskPairs(TASK), length=32, source_length=128, batch=16),
        objectives.SequenceToSequence(),
        optim.Muon(learning_rate=5e-3),
        500,
        evals.Generative(HeldOut(TASK), items=300),
        evals.Generative(HeldOut(OtherPassage(TASK)), items=300),
    ),
}
experiment = variants["extractive"]
