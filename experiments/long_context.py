"""Llama 3's shape (8B) with rows of 131,072 tokens, on a v5p-128 slice: `python -m experiments long_context`.

Each row is cut over 16 chips and attention goes round them in a ring; 4 such groups share out the parameters. Not run;
`gptjax plan long_context --on v5p:4x4x4` says: 1 million tokens and 2.6e17 FLOPs a step, 3.8e17 with what is computed
again; 103 GiB of 96 a chip without `accumulate`; with 2 it fits.
"""

import dataclasses

from experiments.llama3_8b import experiment as llama
from gptjax.nn import RoPE, TransformerConfig
from gptjax.sharding import Mesh

assert isinstance(llama.model, TransformerConfig)
stage = llama.stages["pretrain"]

experiment = dataclasses.replace(
    llama,
    model=dataclasses.replace(llama.model, positions=RoPE(theta=8_000_000.0)),
    stages={
        "pretrain": dataclasses.replace(
            stage,
            data=dataclasses.replace(stage.data, length=131_072, batch=8),
            accumulate=2,
            evaluate_rows=64,
        )
    },
    mesh=Mesh(data=1, fsdp=4, context=-1),
)
