"""A model of Llama 3's shape (8B) on C4, for a v5p-128 or a v6e-256 slice: `python -m experiments llama3_8b`.

The chips share out the parameters. Not run. 2 million tokens, 1.21e17 FLOPs a step, 1.65e17 with what is computed
again. Of 100,000 steps `gptjax plan llama3_8b --on ...` says, at best (all overlapping) and at worst (nothing):

    v5p:4x4x4   20.3 of 95 GiB   5.6 to 6.2 s a step     6.5 to 7.1 days      $42,000 to $46,000 ($4.20 a chip and hour)
    v6e:16x16    6.6 of 32 GiB   0.70 to 1.06 s a step   19.5 to 29.5 hours   $13,500 to $20,400 ($2.70)
"""

from gptjax import data, objectives, optim
from gptjax.experiment import Experiment, Stage
from gptjax.nn import RoPE, TransformerConfig
from gptjax.sharding import Mesh

experiment = Experiment(
    model=TransformerConfig(
        vocab=128_256,
        layers=32,
        width=4_096,
        heads=32,
        kv_heads=8,
        hidden=14_336,
        positions=RoPE(theta=500_000.0),
        tied=False,
        remat="nothing_saveable",
        dtype="bfloat16",
    ),
    tokenizer=data.LoadTokenizer("meta-llama/Meta-Llama-3-8B"),
    stages={
        "pretrain": Stage(
            data=data.Pretrain(data.TFDS("c4/en"), length=8_192, batch=256),
            objective=objectives.NextToken(),
            optimizer=optim.AdamW(
                peak=3e-4,
                schedule=optim.Cosine(warmup=2_000, floor=0.1),
                weight_decay=0.1,
                b2=0.95,
                clip=1.0,
            ),
            steps=100_000,
            evaluate_every=1_000,
            evaluate_rows=1_024,
            save_every=1_000,
        )
    },
    mesh=Mesh(data=1, fsdp=-1),
)
