"""Llama 3's shape (8B) with rows of 131,072 tokens, on a v5p-128 slice: `python -m experiments long_context`.

Each row is cut over 16 chips, which gather one another's keys and share out the queries evenly (splash attention); 4
such groups share out the parameters. Not run. 1 million tokens, 2.63e17 FLOPs a step, four fifths of them attention's;
3.8e17 of all that chips compute. `gptjax plan long_context --on v5p:4x4x4` says, from best (all overlapping) to worst:

    63.2 of 95 GiB, 13.0 to 15.0 s a step, 60 to 69 % MFU, 6.1 to 7.0 billion tokens a day
    100,000 steps in 15 to 17 days for $97,000 to $112,000 ($4.20 a chip and hour)

It counts scores that a causal mask hides, and splash skips half of them: a step may be faster than that.
"""

import dataclasses

from experiments.llama3_8b import experiment as llama
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
