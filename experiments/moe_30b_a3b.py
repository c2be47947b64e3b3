"""A mixture of experts of Qwen3-30B-A3B's shape on C4, for a v5p-256 slice: `python -m experiments moe_30b_a3b`.

30.5 billion parameters, of which a token uses 3.3; 8 of 128 experts. All devices share out all parameters. Not run;
`gptjax plan moe_30b_a3b --on v5p:4x4x8` says: 4.2 million tokens a step, 28 GiB of 95 a chip; 1.17e17 FLOPs a step of
the model, 1.74e17 of all that chips compute; 4.5 TiB to and from HBM and 340 GiB sent by a chip; 3.0 s a step, bound by
compute, to 6.8 s were nothing to overlap, 29 to 67 % MFU, 54 to 122 billion tokens a day; 100,000 steps in 3.4 to 7.8
days for $44,000 to $101,000 ($4.20 a chip and hour, not verified).

With `--mesh.expert 16 --pretrain.accumulate 4` it is 16.5 to 23 s, bound by HBM: as nothing is dropped, every one of 16
devices that share out the experts keeps room for the rows of all of them.
"""

from gptjax import Experiment, MeshConfig, Stage, data, objectives, optim
from gptjax.nn import MixtureOfExperts, MultiHeadAttention, RMSNorm, RoPE, Softmax, TransformerConfig

experiment = Experiment(
    model=TransformerConfig(
        vocab=151_936,
        layers=48,
        width=2_048,
        heads=32,
        kv_heads=4,
        head_size=128,
        hidden=768,
        positions=RoPE(theta=1_000_000.0),
        attention=MultiHeadAttention(qk_norm=RMSNorm()),
        mlp=MixtureOfExperts(experts=128, top_k=8, router=Softmax(load_balance=1e-3)),
        tie_embeddings=False,
        remat="nothing_saveable",
        dtype="bfloat16",
    ),
    tokenizer=data.LoadTokenizer("Qwen/Qwen3-30B-A3B"),
    stages={
        "pretrain": Stage(
            data=data.Pretrain(data.TFDS("c4/en"), length=4_096, batch=1_024),
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
