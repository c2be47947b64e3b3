"""A mixture of experts of Qwen3-30B-A3B's shape on C4, for a v5p-256 slice: `python -m experiments moe_30b_a3b`.

30.5 billion parameters, of which a token uses 3.3; 8 of 128 experts. 16 devices share out the experts, and each of the
8 such groups the rest of the parameters. Not run; `gptjax plan moe_30b_a3b --on v5p:4x4x8` says: 4.2 million tokens a
step, 31.6 GiB of 95 a chip; 1.17e17 FLOPs and 1.76e17 with what is computed again; 3.8 s a step, bound by what chips
send each other, to 6.8 s were nothing to overlap: 100,000 steps take 4.4 to 7.9 days and $57,000 to $102,000 ($4.20 a
chip and hour).
"""

from gptjax import data, objectives, optim
from gptjax.experiment import Experiment, Stage
from gptjax.nn import MixtureOfExperts, MultiHeadAttention, RMSNorm, RoPE, Softmax, TransformerConfig
from gptjax.sharding import Mesh

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
        tied=False,
        remat="nothing_saveable",
        dtype="bfloat16",
    ),
    tokenizer=data.LoadTokenizer("Qwen/Qwen3-30B-A3B"),
    stages={
        "pretrain": Stage(
            data=data.Pretrain(data.TFDS("c4/en"), length=4_096, batch=1_024),
            objective=objectives.NextToken(),
            optimizer=optim.AdamW(
                peak=3e-4,
                schedule=optim.Cosine(warmup=2_000, floor=0.1),
                weight_decay=0.1,
                b2=0.95,
                clip=1.0,
            ),
            steps=100_000,
            accumulate=4,
            evaluate_every=1_000,
            evaluate_rows=1_024,
            save_every=1_000,
        )
    },
    mesh=Mesh(data=1, fsdp=-1, expert=16),
)
