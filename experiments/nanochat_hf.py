"""nanochat (github.com/karpathy/nanochat) as first published, at depth 4, in the form that `transformers` has a class
for, on Python's documentation, without a network:

    python -m experiments nanochat_hf
    gptjax convert runs/nanochat_hf nanochat-4 --to hf

The second command writes a folder for `AutoModelForCausalLM.from_pretrained`. Differences from `nanochat_d4`: no
windows, value embeddings and scalars of the residual stream, scores that are not scaled, a rotary base of 10,000, and
angles of the sign that nanochat has.

400 steps: a validation loss of 3.75, and 1.55 bits per byte on held-out documentation (`xz -9`: 2.51).
"""

from gptjax import Expect, Experiment, Stage, data, evals, objectives, optim
from gptjax.nn import MultiHeadAttention, ReLUSquared, RMSNorm, RoPE, TransformerConfig

VOCAB = 4_096
NORM = RMSNorm(eps=1e-6, scale=False)

experiment = Experiment(
    model=TransformerConfig(
        vocab=VOCAB,
        layers=4,
        width=256,  # 64 x depth
        heads=2,  # of 128
        positions=RoPE(clockwise=True),
        norm=NORM,
        attention=MultiHeadAttention(qk_norm=NORM),
        mlp=ReLUSquared(),
        tie_embeddings=False,
        embedding_norm=NORM,
        logit_softcap=15.0,
    ),
    tokenizer=data.TrainSentencePiece(vocab=VOCAB),
    stages={
        "pretrain": Stage(
            data=data.Pretrain(data.PyDocs(), length=256, batch=8),
            objective=objectives.NextToken(),
            optimizer=optim.Muon(learning_rate=5e-3, schedule=optim.Linear(warmup=20)),
            steps=400,
            evaluate_every=200,
            eval_sequences=64,
            save_every=200,
            prompts=("# textwrap.dedent",),
            evaluations=(evals.BitsPerByte(data.PyDocs()),),
        ),
    },
    expect=(
        Expect("pretrain/validation_loss", above=3.6, below=3.9),
        Expect("pretrain/Held-out text/bits_per_byte", above=1.48, below=1.62),
    ),
)
