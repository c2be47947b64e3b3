"""A mixture of experts of Qwen3-30B-A3B's shape on C4, for a v5p-256 slice: `python -m experiments moe_30b_a3b`.

30.5 billion parameters, of which 3.3 billion are active per token; 8 of 128 experts. Parameters are sharded over 16
devices. Not run. The plan, from best case (everything overlaps) to worst (nothing does):

    gptjax plan moe_30b_a3b --on v5p:4x4x8

    tokens per step                   4.2 million
    FLOPs per step                    1.17e17 of the model, 1.56e17 executed
    memory per chip                   67.6 of 95 GiB; with libtpu 0.0.52 (jax 0.11.2) 93.4
    per chip and step                 4.1 TiB to and from HBM, 167 GiB sent
    time per step                     2.7 s (bound by compute) to 5.3 s
    MFU                               38 to 75 %
    tokens per day                    69 to 136 billion
    100,000 steps                     3.1 to 6.1 days, $40,000 to $79,000 ($4.20 per chip-hour, not verified)

Queries are recomputed: if they are saved too, a step does not fit with libtpu 0.0.52 (106 GiB).

With parameters sharded over all 128 chips and `--model.remat nothing_saveable` the MFU is 30 to 67 %, in 21.1 GiB, and
341 GiB are sent. With `--mesh.data 1 --mesh.fsdp 8 --mesh.expert 16 --pretrain.accumulate 4 --model.remat
nothing_saveable` a step took 18.6 to 25 s in an older plan, bound by HBM: as no token is dropped, each of the 16
devices over which the experts are sharded has room for the rows of all 16.
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
        remat=("keys", "values", "attention", "attention_output"),
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
    mesh=MeshConfig(data=-1, fsdp=16),
)
