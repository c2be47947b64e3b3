"""The whole road to an assistant, on a laptop: pretraining, mid-training, fine-tuning, preferences, rewards.

    python -m experiments assistant
    gptjax chat runs/assistant

Text and questions are the documentation that comes with every Python. `pretrain` reads it; `mid` mixes it with
conversations about it; `sft` answers questions, with a quarter of text against forgetting; `dpo` prefers the answer to
a question to that of another one; `rl` rewards replies that end and share words with the documentation's answer.

Each stage has a number that must move, from the value before it, and one that may get at most 5 % worse:

    pretrain  bits per byte of held-out text       3.5, which is chance, to 1.575 (`xz -9`: 2.511)
    mid       perplexity of held-out answers       138.9 to 38.5      bits per byte         1.575 to 1.617
    sft       perplexity of held-out answers       38.5 to 34.1       bits per byte         1.617 to 1.650
    dpo       share of held-out pairs whose margin
              grew                                 0.50 to 0.83       perplexity            34.1 to 34.9
    rl        F1 of words of sampled replies       0.192 to 0.240     bits per byte         1.654 to 1.717

The F1 is that of 256 replies drawn at temperature 1: intervals of 95 % are [0.162, 0.222] before `rl` and
[0.208, 0.272] after it. `rl` narrows what the model says: the perplexity of the documentation's own answers rises from
34.9 to 47.1.
The replies are English about Python, and mostly wrong: the model has 2.6 million parameters.

One run without a break, with twice as many validation losses as now, took 17.2 minutes of processor time, so that 30
minutes suffice on one idle core; not timed so. It ended after 49 minutes on two cores that other work shared (load 1 to
29, in the median 17). An earlier run, stopped after `mid` and resumed, has the same figures.

`--variant 1b` is the same road for 1.1 billion parameters on public data, with pairs and GSM8K as files. Not run.
`gptjax plan assistant --variant 1b --on v5e:4x4`, without the time in which `rl` writes its replies:

    stage     memory per chip      a step, expected    steps     all of them             price, at $1.20 per chip-hour
    pretrain  2.9 of 16 GiB        2.54 s              40,000    18.9 to 42.9 hours      $363 to $823
    mid       2.9                  2.54 s              2,000     57 to 128 minutes       $18 to $41
    sft       3.3                  0.63 s              2,000     14 to 32 minutes        $5 to $10
    dpo       2.5                  0.91 s              500       8 to 10 minutes         $2 to $3
    rl        2.3                  1.86 s              500       16 to 26 minutes        $5 to $8

In `rl` each of the four hosts writes a quarter of the replies, 32 at a time, which by arithmetic takes 6 to 7 GiB more
of each chip: 1 for a quarter of the parameters in float32, another 1 while they are replaced, and 5 for keys and
values. A plan for eight GPUs is missing.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from functools import cached_property

from gptjax import Expect, Experiment, MeshConfig, Stage, data, evals, objectives, optim
from gptjax.data.chat import Conversation
from gptjax.inference.sampling import Sampling
from gptjax.nn import TransformerConfig
from gptjax.protocols import Evaluation, Split
from gptjax.tasks import Generation, Gsm8k, Reply, Score, Task
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
        """Questions with answers of at most 160 characters."""
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
ANSWERS = evals.ReplyLikelihood(data.PyDocsChat(), documents=256)
REPLIES = evals.Generative(Explain("validation"), items=256, sampling=Sampling(temperature=1.0), rows=64)
PROMPTS = ("What does textwrap.dedent do?",)
LENGTH, BATCH = 256, 8


def stage(data: data.Dataset | Rollouts, steps: int, rate: float, *evaluations: Evaluation, **fields) -> Stage:
    """A stage trained by Muon, with a warm-up of 10 steps."""
    return Stage(
        data=data,
        optimizer=optim.Muon(learning_rate=rate, schedule=optim.Linear(warmup=10)),
        steps=steps,
        save_every=steps,
        prompts=PROMPTS,
        evaluations=evaluations,
        **{"objective": objectives.NextToken(), "evaluate_every": steps // 2, "eval_sequences": 64} | fields,
    )


def conversations(text: float, chat: float) -> data.Chat:
    """Text and conversations, mixed by these weights."""
    return data.Chat(data.Mix((data.PyDocs(), data.PyDocsChat()), (text, chat)), length=LENGTH, batch=BATCH)


laptop = Experiment(
    model=TransformerConfig(vocab=4_096, layers=4, width=192, heads=6),
    tokenizer=data.TrainSentencePiece(vocab=4_096),
    stages={
        "pretrain": stage(data.Pretrain(data.PyDocs(), length=LENGTH, batch=BATCH), 500, 5e-3, TEXT, ANSWERS),
        "mid": stage(conversations(1, 1), 150, 3e-3, TEXT, ANSWERS),
        "sft": stage(conversations(1, 3), 200, 2e-3, TEXT, ANSWERS, REPLIES),
        "dpo": stage(
            data.Preferences(OtherAnswers(), length=128, batch=16),
            *(40, 2e-4, TEXT, ANSWERS, REPLIES),
            objective=objectives.DPO(),
            evaluate_every=40,
        ),
        "rl": stage(
            Rollouts(Explain(), length=112, batch=64, group=8, rows=64),
            *(40, 1e-3, TEXT, ANSWERS, REPLIES),
            objective=objectives.GRPO(kl=0.01),
            log_every=1,
        ),
    },
    expect=(
        Expect("pretrain/Held-out text/bits_per_byte", above=1.5, below=1.65),
        Expect("mid/Replies/perplexity_per_token", below=42),
        Expect("mid/Held-out text/bits_per_byte", below=1.70),
        Expect("sft/Replies/perplexity_per_token", below=36),
        Expect("sft/Held-out text/bits_per_byte", below=1.70),
        Expect("dpo/validation_accuracy", above=0.7),
        Expect("dpo/Replies/perplexity_per_token", below=36.5),
        Expect("rl/Explain/accuracy", above=0.2),
        Expect("rl/Held-out text/bits_per_byte", below=1.75),
    ),
)


def billion() -> Experiment:
    """The same road for a billion parameters, on public data."""
    web = data.HFDataset("HuggingFaceFW/fineweb-edu", config="sample-100BT", validation=1e-4)
    told = data.Conversations(data.HFDataset("HuggingFaceTB/smoltalk", config="all", validation=0.01))
    both = data.Mix((web, told), (3, 1))

    def stage(data: data.Dataset | Rollouts, steps: int, rate: float, **fields) -> Stage:
        optimizer = optim.AdamW(learning_rate=rate, schedule=optim.Cosine(warmup=100), weight_decay=0.1, clip=1.0)
        fields = {"objective": objectives.NextToken(), "evaluate_every": steps // 10, "prompts": PROMPTS} | fields
        return Stage(data=data, optimizer=optimizer, steps=steps, eval_sequences=512, save_every=500, **fields)

    return Experiment(
        model=TransformerConfig(
            vocab=50_304,  # GPT-2's 50,257 and the markers of conversations, padded so that meshes divide it
            layers=20,
            width=2_048,
            heads=16,
            hidden=5_632,
            remat="nothing_saveable",
            dtype="bfloat16",
        ),
        tokenizer=data.LoadTokenizer("gpt2"),
        stages={
            "pretrain": stage(data.Pretrain(web, length=2_048, batch=256), 40_000, 4e-4, accumulate=8),
            "mid": stage(data.Chat(both, length=2_048, batch=256), 2_000, 2e-4, accumulate=8),
            "sft": stage(data.Chat(told, length=2_048, batch=64), 2_000, 2e-5, accumulate=2),
            "dpo": stage(
                data.Preferences(data.PreferencesJsonl("preferences.jsonl"), length=1_024, batch=64),
                *(500, 1e-6),
                objective=objectives.DPO(),
                evaluate_every=250,
                accumulate=4,
            ),
            "rl": stage(
                Rollouts(Gsm8k("gsm8k/train.jsonl"), length=1_024, batch=256, group=8, rows=32),
                *(500, 1e-6),
                objective=objectives.GRPO(kl=0.0),
                accumulate=8,
            ),
        },
        mesh=MeshConfig(data=1, fsdp=-1),
    )


variants = {"laptop": laptop, "1b": billion()}
experiment = variants["laptop"]
