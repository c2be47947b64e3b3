"""A model that uses a calculator: products of two numbers of three digits, in the form of GSM8K.

    python -m experiments calculator

The model writes "<<123*456=", the calculator "56088>>", and the model the answer after it. `sft` shows that; `rl`
rewards right answers, with the calculator at hand. Both are measured with the calculator and without it, where the
model has to multiply by itself.

Replies to 256 held-out products, drawn at temperature 1, with 95 % intervals, one run:

                  with the calculator      without it
    after sft     95.7 % [92.5, 97.6]      0 % [0, 1.5]
    after rl      94.1 % [90.6, 96.4]      0 % [0, 1.5]

So long a fine-tuning leaves `rl` little to teach. After 400 of its 700 steps there were 76.6 % [71.0, 81.3], and after
`rl` 81.3 % [76.0, 85.6]; 80 steps at a learning rate of 1e-3 gave 83.6 %. Not timed on an idle machine.
"""

import dataclasses

import numpy as np

from gptjax import Expect, Experiment, Stage, data, evals, objectives, optim
from gptjax.data.chat import Conversation, Message
from gptjax.inference.sampling import Sampling
from gptjax.nn import TransformerConfig
from gptjax.tasks import Calculator, Generation, HeldOut, Reply, Score, Task, TaskConversations
from gptjax.train.rollouts import Rollouts


@dataclasses.dataclass(frozen=True)
class Products(Task):
    """Products of two random numbers of three digits. Item i is a pure function of i."""

    count: int = 20_000
    """Number of items."""

    def __len__(self) -> int:
        return self.count

    def numbers(self, i: int) -> tuple[int, int]:
        a, b = np.random.default_rng(i).integers(100, 1_000, 2)
        return int(a), int(b)

    def example(self, i: int) -> Conversation:
        a, b = self.numbers(i)
        return Message("user", f"{a}*{b}"), Message("assistant", f"<<{a}*{b}={a * b}>>{a * b}")

    def score(self, i: int, reply: Reply) -> Score:
        a, b = self.numbers(i)
        return Score(float(reply.finished and reply.text.rpartition(">>")[2] == str(a * b)))

    @property
    def generation(self) -> Generation:
        return Generation(max_tokens=32)


def answers(**fields) -> evals.Generative:
    """Replies to 256 held-out items, drawn at temperature 1."""
    return evals.Generative(HeldOut(Products()), items=256, sampling=Sampling(temperature=1.0), rows=64, **fields)


WITH, WITHOUT = answers(tools=(Calculator(),)), answers()
SFT = Stage(
    data=data.Chat(TaskConversations(Products()), length=128, batch=16),
    objective=objectives.NextToken(),
    optimizer=optim.AdamW(learning_rate=3e-3, schedule=optim.Linear(warmup=50), clip=1.0),
    steps=700,
    evaluate_every=350,
    save_every=350,
    prompts=("123*456",),
    evaluations=(WITH, WITHOUT),
)
RL = Stage(
    data=Rollouts(Products(), length=48, batch=128, group=8, tools=(Calculator(),), rows=64),
    objective=objectives.GRPO(kl=0.0),
    optimizer=optim.AdamW(learning_rate=3e-4, schedule=optim.Linear(warmup=5), clip=1.0),
    steps=40,
    evaluate_every=20,
    eval_sequences=128,
    save_every=40,
    log_every=1,
    prompts=(),
    evaluations=(WITH, WITHOUT),
)
experiment = Experiment(
    model=TransformerConfig(vocab=280, layers=3, width=96, heads=4),
    tokenizer=data.Bytes(),
    stages={"sft": SFT, "rl": RL},
    expect=(
        Expect("sft/Products, with Calculator/accuracy", above=0.9),
        Expect("sft/Products/accuracy", below=0.1),
        Expect("rl/Products, with Calculator/accuracy", above=0.88),
    ),
)
