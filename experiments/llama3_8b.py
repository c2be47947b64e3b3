"""A model of Llama 3's shape (8B) on C4, for a v5p-128 or a v6e-256 slice: `python -m experiments llama3_8b`.

Parameters are sharded over 16 chips. Not run. 2 million tokens per step; 1.21e17 FLOPs of the model and 1.45e17
executed. `gptjax plan llama3_8b --on ...`, from best case (everything overlaps) to worst (nothing does):

                                      v5p:4x4x4                     v6e:16x16
    memory per chip                   74.1 of 95 GiB                25.9 of 32 GiB
    sent per chip                     45 GiB                        46 GiB
    time per step                     4.9 to 5.8 s                  0.62 to 1.18 s
    MFU                               71 to 84 %                    44 to 84 %
    tokens per day                    31 to 37 billion              153 to 293 billion
    100,000 steps                     5.7 to 6.7 days               17.2 to 32.8 hours
    price ($4.20, $2.70 an hour)      $36,900 to $43,400            $11,900 to $22,700

With parameters sharded over all chips and `--model.remat nothing_saveable` the MFU is 61 to 73 % on v5p, in 18 GiB, and
88 GiB are sent, as every collective over the whole slice becomes an all-reduce; on v6e 38 to 73 %, in 6 GiB.
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
        remat=("queries", "keys", "values", "attention", "mlp_up"),
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
    mesh=MeshConfig(data=-1, fsdp=16),
)
