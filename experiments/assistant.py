"""The whole road to an assistant, on a laptop: pretraining, mid-training, fine-tuning, preferences, rewards.

    python -m experiments assistant
    gptjax chat runs/assistant

Text and questions are the documentation that comes with every Python. `pretrain` reads it; `mid` mixes it with
conversations about it; `sft` answers questions; `dpo` prefers the answer to a question to that of another one; `rl`
rewards replies that end and share words with the documentation's answer. Each stage names a number that must move, and
bits per byte, which must not get worse by more than 5 % after `sft`.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from functools import cached_property

from gptjax import Experiment, Stage, data, evals, objectives, optim
from gptjax.data.chat import Conversation
from gptjax.inference.sampling import Sampling
from gptjax.nn import TransformerConfig
from gptjax.protocols import Split
from gptjax.tasks import Generation, Reply, Score, Task
from gptjax.train.rollouts import Rollouts


@dataclasses.dataclass(frozen=True)
class OtherAnswers:
    """Source of preferences: the answer to a question over the answer to the question a hundred before it."""

    source: data.PyDocsChat = data.PyDocsChat()

    def documents(self, split: Split) -> Iterator[data.Preference]:
        asked = [chat[:2] for chat in self.source.documents(split)]
        for i, (question, answer) in enumerate(asked):
            other = asked[i - 100][1]
            if other != answer:
                yield data.Preference((question,), answer, other)

    def fingerprint(self) -> str:
        return f"{type(self).__name__} {self.source.fingerprint()}"


@dataclasses.dataclass(frozen=True)
class Explain(Task):
    """Questions about Python. The outcome is the F1 of the reply's words and the documentation's, if the reply ends."""

    graded = True
    split: str = "train"
    """Split of the documentation: "train" or "validation"."""

    @cached_property
    def items(self) -> tuple[Conversation, ...]:
        split: Split = "validation" if self.split == "validation" else "train"
        return tuple(chat[:2] for chat in data.PyDocsChat().documents(split) if len(chat[1].text) <= 160)

    def __len__(self) -> int:
        return len(self.items)

    def example(self, i: int) -> Conversation:
        return self.items[i]

    def score(self, i: int, reply: Reply) -> Score:
        said, right = (Counter(re.findall(r"\w+", text.lower())) for text in (reply.text, self.items[i][1].text))
        shared = (said & right).total()
        return Score(2 * shared / max(said.total() + right.total(), 1) if reply.finished else 0.0)

    def cluster(self, i: int) -> str:
        return self.items[i][1].text

    @property
    def generation(self) -> Generation:
        return Generation(max_tokens=48)


TEXT = evals.BitsPerByte(data.PyDocs())
REPLIES = evals.Generative(Explain("validation"), items=128, sampling=Sampling(temperature=1.0), rows=32)
PROMPTS = ("What does textwrap.dedent do?",)


def stage(data: data.Dataset | Rollouts, steps: int, rate: float, **fields) -> Stage:
    """A stage trained by Muon, with a warm-up of 10 steps."""
    own = {"objective": objectives.NextToken(), "prompts": PROMPTS, "eval_sequences": 64, "save_every": steps} | fields
    optimizer = optim.Muon(learning_rate=rate, schedule=optim.Linear(warmup=10))
    return Stage(data=data, optimizer=optimizer, steps=steps, evaluate_every=max(steps // 4, 1), **own)


def assistant(model: TransformerConfig, length: int, batch: int) -> Experiment:
    """The road for a model, with sequences of this length and batches of so many."""
    both = data.Mix((data.PyDocs(), data.PyDocsChat()), (1, 1))
    return Experiment(
        model=model,
        tokenizer=data.TrainSentencePiece(vocab=4_096),
        stages={
            "pretrain": stage(data.Pretrain(data.PyDocs(), length=length, batch=batch), 500, 5e-3, evaluations=(TEXT,)),
            "mid": stage(data.Chat(both, length=length, batch=batch), 150, 3e-3),
            "sft": stage(
                data.Chat(data.PyDocsChat(), length=length, batch=batch), 200, 2e-3, evaluations=(TEXT, REPLIES)
            ),
            "dpo": stage(
                data.Preferences(OtherAnswers(), length=length, batch=16),
                60,
                2e-4,
                objective=objectives.DPO(),
                evaluations=(TEXT,),
            ),
            "rl": stage(
                Rollouts(Explain(), length=112, batch=64, group=8, rows=32),
                40,
                5e-4,
                objective=objectives.GRPO(kl=0.02),
                log_every=1,
                evaluations=(TEXT, REPLIES),
            ),
        },
    )


experiment = assistant(TransformerConfig(vocab=4_096, layers=4, width=192, heads=6), length=256, batch=8)
