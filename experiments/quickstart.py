"""From raw text to a chat model on a laptop: `python -m experiments quickstart`.

Reads the documentation that comes with every Python (no network), trains a tokenizer and a small GPT on it, fine-tunes
it on questions and answers, evaluates it on held-out documentation, and writes runs/quickstart:

    python -m experiments quickstart
    gptjax chat runs/quickstart

On two CPU cores: 5 to 9 minutes in total; 1.45 bits per byte on held-out documentation (`xz -9`: 2.51); answers have
the right style but made-up content.
"""

from gptjax import Expect, Experiment, Stage, data, evals, objectives, optim
from gptjax.nn import TransformerConfig

experiment = Experiment(
    model=TransformerConfig(vocab=4_096, layers=4, width=128, heads=4),
    tokenizer=data.TrainSentencePiece(vocab=4_096),
    stages={
        "pretrain": Stage(
            data=data.Pretrain(data.PyDocs(), length=256, batch=8),
            objective=objectives.NextToken(),
            optimizer=optim.Muon(learning_rate=5e-3, schedule=optim.Linear(warmup=20)),
            steps=1_200,
            evaluate_every=240,
            eval_sequences=64,
            save_every=240,
            prompts=("# textwrap.dedent",),
            evaluations=(evals.BitsPerByte(data.PyDocs()),),
        ),
        "chat": Stage(
            data=data.Chat(data.PyDocsChat(), length=256, batch=8),
            objective=objectives.NextToken(),
            optimizer=optim.Muon(learning_rate=2e-3, schedule=optim.Linear(warmup=10)),
            steps=250,
            evaluate_every=125,
            eval_sequences=64,
            save_every=125,
            prompts=("What does textwrap.dedent do?",),
            evaluations=(evals.Answers(data.PyDocsChat()),),
        ),
    },
    expect=(Expect("bits_per_byte", above=1.38, below=1.5),),
)
