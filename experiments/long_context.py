"""Llama 3's shape (8B) with sequences of 131,072 tokens, on a v5p-128 slice: `python -m experiments long_context`.

Each sequence is sharded over 16 chips, which all-gather the keys and compute equal shares of the queries (splash
attention); parameters are sharded over 4 such groups. Not run. 1 million tokens and 2.63e17 FLOPs of the model per
step, four fifths of them in attention; 3.8e17 executed. The plan, from best case (everything overlaps) to worst:

    gptjax plan long_context --on v5p:4x4x4

    memory per chip                   49.5 of 95 GiB
    time per step                     13.0 to 14.8 s
    MFU                               61 to 69 %
    tokens per day                    6.1 to 7.0 billion
    100,000 steps                     15 to 17 days, $97,000 to $110,000 ($4.20 per chip-hour)

The plan counts scores that the causal mask hides. Splash skips half of them, so a step may be faster.
"""

import dataclasses

from gptjax.experiments.llama3_8b import experiment as llama  # pyright: ignore[reportMissingImports]

from gptjax import MeshConfig
from gptjax.nn import RoPE, TransformerConfig

assert isinstance(llama.model, TransformerConfig)
stage = llama.stages["pretrain"]

experiment = dataclasses.replace(
    llama,
    model=dataclasses.replace(llama.model, positions=RoPE(theta=8_000_000.0), remat="attention_saveable"),
    stages={
        "pretrain": dataclasses.replace(
            stage,
            data=dataclasses.replace(stage.data, length=131_072, batch=8),
            accumulate=2,
            eval_sequences=64,
        )
    },
    mesh=MeshConfig(data=1, fsdp=4, context=-1),
)
