"""Reinforcement learning on an environment of reasoning-gym: words spelled backward.

    pip install 'gptjax[gym]'
    python -m experiments gym

As in `arithmetic`, `sft` fine-tunes on answers of which 15 % are right, so that the model can spell, but seldom says
so: in the others the last two letters are exchanged. `rl` then rewards the answers that the library's verifier accepts.
The words have three or four letters.

Answers to the first 300 held-out questions (237 words, which are the interval's clusters), drawn at temperature 1, with
95 % intervals; one run:

                                        right                   right but for the exchange
    the word's letters in any order      8.3 %
    after sft, 16 answers to each       12.1 % [10.5, 13.8]     85 %
    after rl, one answer to each        98.7 % [97.4, 100 ]      0 %

At least one of the 16 answers after `sft` is right in 73.3 %. The mean reward of ten steps of `rl` rises from 37 % in
the first to 79 % in the second and 97 % in the tenth, the last. Other wrong letters are in 3 % of the answers before
`rl` and in 1 % after it: it teaches the model which answer to give, not to spell. 11 % of the questions differ from a
trained word by the case of a letter alone.

The run took 5.6 CPU minutes on one core of a shared server. The fine-tuning sets the limit: with 3,000 items, of
2,400 words in place of 5,543, and 600 steps it left 9 % of the answers with wrong letters, and 60 steps of `rl`
raised the right ones from 10.2 % to 86.0 % [81.4, 90.7]; with the items of now and 700 steps, 5 % and, again with 60
steps, 91.3 % [87.6, 95.0]. After 1,200 steps of AdamW, in place of 600 of Muon, it left 30 %, and 100 steps of `rl`
ended at 56.1 % [49.6, 62.7]. If any two neighbours may be exchanged, AdamW has hardly begun to learn the letters after
600 steps.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from gptjax import Expect, Experiment, Stage, data, evals, objectives, optim
from gptjax.data.chat import Conversation, Message
from gptjax.inference.sampling import Sampling
from gptjax.nn import TransformerConfig
from gptjax.tasks import HeldOut, ReasoningGym, TaskConversations
from gptjax.train.rollouts import Rollouts


@dataclasses.dataclass(frozen=True)
class Misspelled(TaskConversations):
    """Source of a task's conversations of which this share has the right answer; in the others, its last two letters
    are exchanged."""

    right: float = 0.15
    """Share of right answers."""
    repeats: int = 2
    """Answers to each item."""

    def keyed(self) -> Iterator[tuple[str, Conversation]]:
        for repeat in range(self.repeats):
            for i, (cluster, (*asked, answer)) in enumerate(super().keyed()):
                word = answer.text
                if np.random.default_rng([repeat, i]).random() > self.right:
                    word = word[:-2] + word[:-3:-1]
                yield cluster, (*asked, Message("assistant", word))

    def fingerprint(self) -> str:
        return f"{super().fingerprint()} {self}"


WORDS = ReasoningGym("spell_backward", size=12_000, config={"min_word_len": 3, "max_word_len": 4})
HELD_OUT = HeldOut(WORDS)
SAMPLING = Sampling(temperature=1.0)
experiment = Experiment(
    model=TransformerConfig(vocab=280, layers=3, width=96, heads=4),
    tokenizer=data.Bytes(),
    stages={
        "sft": Stage(
            data=data.Chat(Misspelled(WORDS), length=128, batch=16),
            objective=objectives.NextToken(),
            optimizer=optim.Muon(learning_rate=5e-3, schedule=optim.Linear(warmup=50), clip=1.0),
            steps=1_000,
            evaluate_every=500,
            save_every=500,
            prompts=(),
            evaluations=(evals.Generative(HELD_OUT, items=300, samples=16, sampling=SAMPLING, rows=64, max_tokens=8),),
        ),
        "rl": Stage(
            data=Rollouts(WORDS, length=72, batch=256, group=8, rows=64, max_tokens=8),
            objective=objectives.GRPO(kl=0.0),
            optimizer=optim.AdamW(learning_rate=5e-4, schedule=optim.Linear(warmup=5), clip=1.0),
            steps=100,
            evaluate_every=50,
            eval_sequences=128,
            save_every=50,
            log_every=1,
            prompts=(),
            evaluations=(evals.Generative(HELD_OUT, items=300, sampling=SAMPLING, rows=64, max_tokens=8),),
        ),
    },
    expect=(
        Expect("sft/spell_backward/accuracy", above=0.05, below=0.2),
        Expect("sft/spell_backward/pass@16", above=0.5),
        Expect("rl/spell_backward/accuracy", above=0.95),
    ),
)
