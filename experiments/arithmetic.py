"""Reinforcement learning on sums: a model that knows the answer learns to say it.

    python -m experiments arithmetic
    python -m experiments arithmetic --variant ppo --out runs/ppo

`sft` fine-tunes on sums of which 15 % are right and the others are off by one, so that the model can add, but seldom
says so: one of 16 replies is right much more often than the first. `rl` then rewards right replies, for 150 steps.
`random` and `format` reward replies by chance, and all that are numbers: neither may raise the share of right ones.
`more_sft` spends the same compute on more of the same fine-tuning: 900 steps on the same conversations, with a new
optimizer and schedule. A step of `rl`, its replies included, took 5.5 to 5.8 times the CPU time of one of `sft`; the
processes that score are not counted.

Replies to 255 held-out sums, drawn at temperature 1, with 95 % intervals; the seed is that of all stages:

              after sft, 16 replies to a sum             after grpo, 4 replies; seed 1: one
    seed 0    16.3 % [15.1, 17.5], one of 16: 91.8 %     96.8 % [95.1, 98.4]
    seed 1    15.9 % [14.7, 17.0], one of 16: 94.1 %     98.8 % [96.6, 99.6]
    seed 2    15.2 % [14.0, 16.4], one of 16: 89.0 %     99.4 % [98.9, 99.9]

    compute spent          0      33 %    67 %    100 %
    grpo, seed 0         16.3 %  64.3 %  94.5 %  96.8 %
    grpo, seed 1         15.9 %  74.5 %  92.5 %  98.8 %
    grpo, seed 2         15.2 %  82.0 %  94.1 %  99.4 %
    more_sft, seed 0     16.3 %  17.8 %  15.8 %  15.0 % [13.9, 16.2]

At 33 and 67 %, `grpo` wrote one reply to each sum, `more_sft` four.

Other arms with seed 0, one run each, four replies to each sum:

    rloo                 96.5 % [95.0, 98.0]
    ppo                  96.2 % [94.3, 98.0]
    reward random         0   % [ 0.0,  1.5]: it says 1 to all sums
    reward format         0.4 % [ 0.0,  1.0], when all replies are numbers, as nearly all were before

A run took 5.5 to 6.2 CPU minutes on one core of a shared server, 3.0 of them for `sft`, with a load of 4 to 23.
"""

import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np

from gptjax import Expect, Experiment, Stage, data, evals, objectives, optim
from gptjax.data.chat import Conversation, Message
from gptjax.data.sources import held_out
from gptjax.inference.sampling import Sampling
from gptjax.nn import TransformerConfig
from gptjax.protocols import Objective, Split
from gptjax.tasks import Generation, HeldOut, Reply, Score, Task
from gptjax.train.rollouts import Rollouts


@dataclasses.dataclass(frozen=True)
class Sums(Task):
    """Sums of two numbers below `size`. Item i is i // size + i % size."""

    size: int = 50
    reward: str = "right"
    """Reward: for the "right" number, for any number ("format"), or for a random half of all replies ("random")."""

    def __len__(self) -> int:
        return self.size**2

    def numbers(self, i: int) -> tuple[int, int]:
        return divmod(i, self.size)

    def example(self, i: int) -> Conversation:
        a, b = self.numbers(i)
        return Message("user", f"{a}+{b}"), Message("assistant", str(a + b))

    def score(self, i: int, reply: Reply) -> Score:
        right = float(reply.finished and reply.text == str(sum(self.numbers(i))))
        digest = hashlib.sha256(f"{i} {reply.text}".encode()).digest()
        rewards = {"right": right, "format": float(reply.text.isdecimal()), "random": float(digest[0] % 2)}
        return Score(right, value=rewards[self.reward])

    @property
    def generation(self) -> Generation:
        return Generation(max_tokens=6)


@dataclasses.dataclass(frozen=True)
class Answers:
    """Source of sums with answers of which this share is right; the others are off by one."""

    task: Sums = Sums()
    right: float = 0.15
    repeats: int = 16
    """Answers to each sum."""
    validation: float = 0.1

    def documents(self, split: Split) -> Iterator[Conversation]:
        for repeat in range(self.repeats if split == "train" else 1):
            for i in range(len(self.task)):
                if held_out(self.task.cluster(i), self.validation) == (split == "validation"):
                    draw, total = np.random.default_rng([repeat, i]), sum(self.task.numbers(i))
                    wrong = 0 if draw.random() < self.right else int(draw.choice([-1, 1] if total else [1]))
                    yield self.task.prompt(i)[-1], Message("assistant", str(total + wrong))

    def fingerprint(self) -> str:
        return f"{self.task.fingerprint()} {self}"


HELD_OUT = HeldOut(Sums())
SFT = Stage(
    data=data.Chat(Answers(), length=128, batch=16),
    objective=objectives.NextToken(),
    optimizer=optim.Muon(learning_rate=5e-3, schedule=optim.Linear(warmup=50), clip=1.0),
    steps=1_000,
    evaluate_every=250,
    save_every=500,
    prompts=("12+34",),
    evaluations=(evals.Generative(HELD_OUT, samples=16, sampling=Sampling(temperature=1.0), rows=64),),
)


def arithmetic(expect: tuple[Expect, ...] = (), **stages: Stage) -> Experiment:
    """Fine-tuning, and what follows it."""
    return Experiment(
        model=TransformerConfig(vocab=280, layers=3, width=96, heads=4),
        tokenizer=data.Bytes(),
        stages={"sft": SFT, **stages},
        expect=(Expect("sft/Sums/accuracy", above=0.1, below=0.2), Expect("sft/Sums/pass@16", above=0.6), *expect),
    )


def reinforcement(objective: Objective, reward: str = "right") -> Experiment:
    """Fine-tuning, then reinforcement with this objective and reward. Only the reward for right replies may raise their
    share above that in the fine-tuning's data."""
    share = "rl/Sums/accuracy"
    expected = Expect(share, above=0.95) if reward == "right" else Expect(share, below=Answers.right)
    rl = Stage(
        data=Rollouts(Sums(reward=reward), length=32, batch=256, group=8, rows=64),
        objective=objective,
        optimizer=optim.AdamW(learning_rate=1e-3, schedule=optim.Linear(warmup=5), clip=1.0),
        steps=150,
        evaluate_every=50,
        save_every=50,
        log_every=1,
        prompts=(),
        evaluations=(evals.Generative(HELD_OUT, samples=4, sampling=Sampling(temperature=1.0), rows=64),),
    )
    return arithmetic((expected,), rl=rl)


variants = {
    "grpo": reinforcement(objectives.GRPO(kl=0.0)),
    "rloo": reinforcement(objectives.RLOO(kl=0.0)),
    "ppo": reinforcement(objectives.PPO(kl=0.0)),
    "random": reinforcement(objectives.GRPO(kl=0.0), "random"),
    "format": reinforcement(objectives.GRPO(kl=0.0), "format"),
    "more_sft": arithmetic(
        (Expect("more/Sums/accuracy", below=0.2),),
        more=dataclasses.replace(SFT, steps=900, evaluate_every=300, save_every=300, max_to_keep=3),
    ),
}
experiment = variants["grpo"]
