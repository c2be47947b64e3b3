"""Fine-tuning on private text with differential privacy, and what the model remembers with and without it.

    python -m experiments private
    python -m experiments private --variant open

A small GPT is pretrained on one half of Python's documentation, which stands for public text, and then trained on the
other half, the private text, where random numbers are hidden: nine canaries, three of them once, three 4 times and
three 16 times. `private` trains with (epsilon 8, delta 1e-5)-differential privacy of each page, `open` without. The
exposure of a canary is 1.44 bits on average if the model knows nothing of it, and 9 at most.

One run each, means of three canaries; bits per byte on 364 held-out pages of the private half:

                   bits per byte     exposure in bits of what is there once, 4 and 16 times
    public only        2.645             2.3       1.9       0.5
    private            2.639             1.8       2.7       1.1
    open               2.410             1.2       2.3       4.0

3,395 pages are few: noise of 0.69 times the clipping norm hides the canaries, and most of what there is to learn too.
Run beside each other on two cores, `private` took 11 minutes and `open` 4.5: a private step takes about three times as
long, as it has a gradient of each page.
"""

import dataclasses
from collections.abc import Iterator

from gptjax import Experiment, Stage, data, evals, objectives, optim
from gptjax.data.sources import fingerprint
from gptjax.experiment.report import Expect
from gptjax.nn import TransformerConfig
from gptjax.protocols import Split
from gptjax.train.privacy import DifferentialPrivacy


@dataclasses.dataclass(frozen=True)
class Half:
    """Every other page of Python's documentation."""

    private: bool
    """The pages of odd number. False: the others."""

    def documents(self, split: Split) -> Iterator[str]:
        pages = enumerate(data.PyDocs().documents(split))
        return (page for number, page in pages if number % 2 == self.private)

    def fingerprint(self) -> str:
        return fingerprint(self, data.PyDocs().fingerprint())


CANARIES = data.WithCanaries(Half(private=True))
PUBLIC = Stage(
    data=data.Pretrain(Half(private=False), length=128, batch=16),
    objective=objectives.NextToken(),
    optimizer=optim.AdamW(learning_rate=3e-3, schedule=optim.Linear(warmup=20)),
    steps=150,
    evaluate_every=50,
    eval_sequences=64,
    save_every=150,
    prompts=("# textwrap.dedent",),
    evaluations=(evals.BitsPerByte(Half(private=True)), evals.Exposure(CANARIES)),
)
PRIVATE = Stage(
    data=data.Pretrain(CANARIES, length=64, batch=256, packing=data.NoPacking()),
    objective=objectives.NextToken(),
    optimizer=optim.AdamW(learning_rate=2e-3, schedule=optim.Linear(warmup=5), weight_decay=0.0),
    steps=100,
    accumulate=8,
    evaluate_every=25,
    eval_sequences=64,
    save_every=50,
    prompts=("# textwrap.dedent",),
    evaluations=(evals.BitsPerByte(Half(private=True)), evals.Exposure(CANARIES)),
    privacy=DifferentialPrivacy(epsilon=8.0, delta=1e-5),
)


def trained(private: Stage) -> Experiment:
    """Public pretraining, then this stage."""
    return Experiment(
        model=TransformerConfig(vocab=2_048, layers=2, width=128, heads=4),
        tokenizer=data.TrainSentencePiece(vocab=2_048),
        stages={"public": PUBLIC, "private": private},
    )


variants = {
    "private": trained(PRIVATE),
    "open": trained(dataclasses.replace(PRIVATE, privacy=None)),
}
EXPECT = Expect("private/Exposure of canaries/exposure_bits_16x", below=3.0)
experiment = dataclasses.replace(variants["private"], expect=(EXPECT,))
