"""nanoGPT's character model of Shakespeare on a CPU: 4 layers, width 128, 2,000 steps; validation loss 1.88 or lower.

    python -m experiments shakespeare_char
    python -m experiments shakespeare_char --pretrain.data.source.path tinyshakespeare.txt     # without a network

At most four minutes on two CPU cores. The setting is that of nanoGPT's README for a computer without a GPU: context 64,
batch 12, no dropout, 90 % of the text for training and the rest for validation. nanoGPT publishes a loss of 1.88; here
it is 1.77, with a learning rate of 3e-3 (with nanoGPT's own, 1e-3, it is 1.92 over the whole validation text).
"""

from gptjax import Expect, Experiment, Stage, data, objectives, optim
from gptjax.nn import GELU, LayerNorm, LearnedPositions, TransformerConfig

experiment = Experiment(
    model=TransformerConfig(
        vocab=66,  # 65 characters, and one for all characters that are not in the training text
        layers=4,
        width=128,
        heads=4,
        positions=LearnedPositions(64),
        norm=LayerNorm(bias=False),
        mlp=GELU(),
    ),
    tokenizer=data.TrainCharacters(specials=()),
    stages={
        "pretrain": Stage(
            data=data.Pretrain(
                data.Text("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"),
                length=64,
                batch=12,
            ),
            objective=objectives.NextToken(),
            optimizer=optim.AdamW(
                learning_rate=3e-3,
                schedule=optim.Cosine(warmup=100, final_fraction=0.1),
                weight_decay=0.1,
                decay_embeddings=True,
                b2=0.99,
                clip=1.0,
            ),
            steps=2_000,
            evaluate_every=1_000,
            eval_sequences=1_740,  # the whole validation text
            save_every=1_000,
            prompts=("\n",),
        )
    },
    expect=(Expect("pretrain/validation_loss", below=1.88),),
)
