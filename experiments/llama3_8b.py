"""A model of Llama 3's shape (8B) on C4, for a v5p-128 slice: `python -m experiments llama3_8b`.

64 chips share out the parameters. Not run; `gptjax plan llama3_8b --on v5p:4x4x4` says: 8.03 billion parameters, 1
million tokens a step, 12.4 GiB of 95 a chip; 6.07e16 FLOPs a step and 8.27e16 with what is computed again, so at least
2.8 s, without what chips send each other, which this version of jaxlib could not read: at most 32 billion tokens a day,
at least 3.3 days and $21,000 ($4.20 a chip and hour) for 100,000 steps.
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
