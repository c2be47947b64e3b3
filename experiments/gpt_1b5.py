"""A GPT of 1.5 billion parameters on C4, for one v5e-16 slice: `python -m experiments gpt_1b5`.

Not run. The plan, a roofline, from best case (everything overlaps) to worst (nothing does); real runs take longer:

    gptjax plan gpt_1b5 --on v5e:4x4

    parameters                        1.54 billion
    tokens per step                   1 million
    FLOPs per step                    1.12e16 of the model, 1.35e16 executed
    memory per chip                   14.3 of 16 GiB
    per chip and step                 1.3 TiB to and from HBM, 36 GiB sent
    time per step                     4.3 s (bound by compute) to 6.9 s
    MFU                               51 to 83 %
    tokens per day                    13 to 21 billion
    30,000 steps                      36 to 58 hours, $690 to $1,110 ($1.20 per chip-hour, not verified)

With parameters sharded over all 16 chips, eight microbatches and `--model.remat nothing_saveable` a step takes 4.7 to
8.2 s in 4.3 GiB: 86 GiB are sent, as gradients are all-reduced instead of reduce-scattered. (XLA would split products
into loops that overlap with their communication, at twice the HBM traffic, 4.7 to 9.5 s: `distributed/xla.py`.)
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
        remat=("queries", "keys", "values", "attention"),
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
            accumulate=4,
            evaluate_every=1_000,
            eval_sequences=1_024,
            save_every=1_000,
        )
    },
    mesh=MeshConfig(data=-1, fsdp=8),
)
