"""A GPT of 1.5 billion parameters on C4, for one v5e-16 slice: `python -m experiments gpt_1b5`.

Not run; `gptjax plan gpt_1b5 --on v5e:4x4` says: 1.54 billion parameters, 1 million tokens a step, 5.6 GiB of 16 a
chip; 1.12e16 FLOPs a step of the model, 1.47e16 of all that chips compute; 2.3 TiB to and from HBM and 74 GiB sent by a
chip; 4.7 s a step, bound by compute, to 9.5 s were nothing to overlap, 38 to 76 % MFU, 10 to 19 billion tokens a day;
30,000 steps in 39 to 79 hours for $750 to $1,510 ($1.20 a chip and hour, not verified). A roofline: runs take longer.
"""

from gptjax import Experiment, MeshConfig, Stage, data, objectives, optim
from gptjax.nn import TransformerConfig

experiment = Experiment(
    model=TransformerConfig(
        vocab=50_304,  # GPT-2's 50,257, rounded up to what meshes divide
        layers=28,
        width=2_048,
        heads=16,
        hidden=5_632,
        remat="nothing_saveable",
        dtype="bfloat16",
    ),
    tokenizer=data.LoadTokenizer("gpt2"),
    stages={
        "pretrain": Stage(
            data=data.Pretrain(data.TFDS("c4/en"), length=2_048, batch=512),
            objective=objectives.NextToken(),
            optimizer=optim.AdamW(
                learning_rate=3e-4,
                schedule=optim.Cosine(warmup=2_000, final_fraction=0.1),
                weight_decay=0.1,
                b2=0.95,
                clip=1.0,
            ),
            steps=30_000,
            accumulate=8,
            evaluate_every=1_000,
            eval_sequences=1_024,
            save_every=1_000,
        )
    },
    mesh=MeshConfig(data=1, fsdp=-1),
)
