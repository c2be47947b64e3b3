"""A model of Llama 3's shape (8B) on C4, for a v5p-128 or a v6e-256 slice: `python -m experiments llama3_8b`.

Parameters are sharded over all chips. Not run. 2 million tokens per step; 1.21e17 FLOPs of the model and 1.65e17
executed. `gptjax plan llama3_8b --on ...`, from best case (everything overlaps) to worst (nothing does):

                                      v5p:4x4x4                     v6e:16x16
    memory per chip                   29.8 of 95 GiB                9.0 of 32 GiB
    time per step                     5.6 to 6.7 s                  0.70 to 1.30 s
    MFU                               62 to 73 %                    40 to 73 %
    tokens per day                    27 to 32 billion              139 to 258 billion
    100,000 steps                     6.5 to 7.7 days               19.5 to 36.2 hours
    price ($4.20, $2.70 an hour)      $42,000 to $50,000            $13,500 to $25,000
"""

from gptjax import Experiment, MeshConfig, Stage, data, objectives, optim
from gptjax.nn import RoPE, TransformerConfig

experiment = Experiment(
    model=TransformerConfig(
        vocab=128_256,
        layers=32,
        width=4_096,
        heads=32,
        kv_heads=8,
        hidden=14_336,
        positions=RoPE(theta=500_000.0),
        tie_embeddings=False,
        remat="nothing_saveable",
        dtype="bfloat16",
    ),
    tokenizer=data.LoadTokenizer("meta-llama/Meta-Llama-3-8B"),
    stages={
        "pretrain": Stage(
            data=data.Pretrain(data.TFDS("c4/en"), length=8_192, batch=256),
            objective=objectives.NextToken(),
            optimizer=optim.AdamW(
                learning_rate=3e-4,
                schedule=optim.Cosine(warmup=2_000, final_fraction=0.1),
                weight_decay=0.1,
                b2=0.95,
                clip=1.0,
            ),
            steps=100_000,
            evaluate_every=1_000,
            eval_sequences=1_024,
            save_every=1_000,
        )
    },
    mesh=MeshConfig(data=1, fsdp=-1),
)
