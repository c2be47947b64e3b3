"""The recipe of nanochat (github.com/karpathy/nanochat) at depth 4, on Python's documentation, without a network:

    python -m experiments nanochat_d4

Differences from a Llama: QK-norm with scores scaled by 1.2², a rotary base of 100,000, ReLU² in the MLP, norms without
parameters, one of them after the embedding, an untied head with logits soft-capped at 15, a window of a quarter of the
context in three of four layers, learned scalars that add the embeddings to each layer's input, and value embeddings in
every other layer. Muon trains the matrices, Adam the rest.

Not included: nanochat's smearing of the previous token into each token, its subtraction of the middle layer from the
last, initial scalars that differ by layer, and a learning rate for each kind of parameter.

It stays here: the class of `transformers` has neither the windows, the scalars, the value embeddings nor the scaled
scores. `nanochat_hf` is the form that can be exported.

Depth is the one dial: `--depth 8` sets width, heads, tokens, batch and learning rate, and
`--sweep depth=4,8,12,16` trains a series for `gptjax scaling`.

400 steps: a validation loss of 3.77, and 1.56 bits per byte on held-out documentation (`xz -9`: 2.51).
"""

from gptjax import Expect, Experiment, Stage, data, evals, objectives, optim
from gptjax.experiment.dial import Dial
from gptjax.nn import (
    LayerOverrides,
    MultiHeadAttention,
    ReLUSquared,
    RMSNorm,
    RoPE,
    ScaledStream,
    TransformerConfig,
    ValueEmbedding,
)

VOCAB = 4_096
NORM = RMSNorm(eps=1e-6, scale=False)
ATTENTION = MultiHeadAttention(qk_norm=NORM, scale=1.2**2 / 128**0.5)
VALUES = MultiHeadAttention(qk_norm=NORM, scale=1.2**2 / 128**0.5, values=ValueEmbedding(VOCAB))
STREAM = ScaledStream(stream_scale=1.1, input_scale=0.125)  # means of nanochat's 1.15 .. 1.05 and 0.20 .. 0.05
BASE = Dial(depth=4, width=256, heads=2, steps=400, batch=8, learning_rate=5e-3)
WINDOWED = (
    LayerOverrides(window=64),
    LayerOverrides(window=64, attention=VALUES),
    LayerOverrides(window=64),
    LayerOverrides(attention=VALUES),
)
EXPECTED = (
    Expect("pretrain/validation_loss", above=3.6, below=3.9),
    Expect("pretrain/Held-out text/bits_per_byte", above=1.48, below=1.62),
)


def at_depth(depth: int) -> Experiment:
    """The experiment at another depth, a multiple of four: width, tokens, batch and learning rate follow from it."""
    dial = BASE.at(depth, VOCAB)
    return Experiment(
        model=TransformerConfig(
            vocab=VOCAB,
            layers=dial.depth,
            width=dial.width,  # 64 x depth
            heads=dial.heads,  # of 128
            positions=RoPE(theta=100_000),
            norm=NORM,
            attention=ATTENTION,
            mlp=ReLUSquared(),
            residual=STREAM,
            pattern=WINDOWED,
            tie_embeddings=False,
            embedding_norm=NORM,
            logit_softcap=15.0,
        ),
        tokenizer=data.TrainSentencePiece(vocab=VOCAB),
        stages={
            "pretrain": Stage(
                data=data.Pretrain(data.PyDocs(), length=256, batch=dial.batch),
                objective=objectives.NextToken(),
                optimizer=optim.Muon(learning_rate=dial.learning_rate, schedule=optim.Linear(warmup=20)),
                steps=dial.steps,
                evaluate_every=200,
                eval_sequences=64,
                save_every=200,
                prompts=("# textwrap.dedent",),
                evaluations=(evals.BitsPerByte(data.PyDocs()),),
            ),
        },
        expect=EXPECTED if depth == BASE.depth else (),
    )


experiment = at_depth(BASE.depth)
