"""A GPT of 1.5 billion parameters on C4, for one v5e-16 slice: `python -m experiments gpt_1b5`.

Not run. The plan, a roofline, from best case (everything overlaps) to worst (nothing does); real runs take longer:

    gptjax plan gpt_1b5 --on v5e:4x4

    parameters                        1.54 billion
    tokens per step                   1 million
    FLOPs per step                    1.12e16 of the model, 1.47e16 executed
    memory per chip                   5.6 of 16 GiB
    per chip and step                 2.3 TiB to and from HBM, 74 GiB sent
    time per step                     4.7 s (bound by compute) to 9.5 s
    MFU                               38 to 76 %
    tokens per day                    10 to 19 billion
    30,000 steps                      39 to 79 hours, $750 to $1,510 ($1.20 per chip-hour, not verified)
"""

from gptjax import Experiment, MeshConfig, Stage, data, objectives, optim
from gptjax.nn import TransformerConfig

experiment = Experiment(
    model=TransformerConfig(
        vocab=50_304,  # GPT-2's 50,257, padded so that meshes divide it
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
