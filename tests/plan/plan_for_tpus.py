"""Plans tiny steps for TPUs that are elsewhere; prints what the tests look at, as JSON.

A program of its own, as libtpu reads its environment once.
"""

import dataclasses
import functools
import json

from experiments.quickstart import experiment as quickstart
from gptjax.distributed.sharding import MeshConfig
from gptjax.nn import GELU, MixtureOfExperts, TransformerConfig
from gptjax.objectives import NextToken
from gptjax.optim import AdamW
from gptjax.plan.collectives import sent
from gptjax.plan.compiled import Step, compile_step
from gptjax.plan.estimate import estimate
from gptjax.plan.topology import Target

LAYERS, WIDTH, LENGTH = 1, 256, 1024
DENSE = TransformerConfig(
    vocab=512, layers=LAYERS, width=WIDTH, heads=2, hidden=512, mlp=GELU(), tie_embeddings=False, dtype="bfloat16"
)


def planned(on: str, mesh: MeshConfig, rows: int, model: TransformerConfig = DENSE) -> Step:
    stage = quickstart.stages["pretrain"]
    data = dataclasses.replace(stage.data, length=LENGTH, batch=rows)
    stage = dataclasses.replace(
        stage, data=data, objective=NextToken(), optimizer=AdamW(learning_rate=1e-3), accumulate=1
    )
    experiment = dataclasses.replace(quickstart, model=model, stages={"pretrain": stage}, mesh=mesh)
    return Target.parse(on).call(functools.partial(compile_step, experiment, "pretrain"))


def work(step: Step, devices: int, rows: int, model: TransformerConfig = DENSE) -> float:
    """FLOPs of a step over those it must have: six for each token and weight; splash has 9 products of T x T, where the
    model's count has 6."""
    return step.flops * devices / (rows * LENGTH * (model.flops(LENGTH) + 6 * LAYERS * LENGTH * WIDTH))


def found() -> dict:
    experts = dataclasses.replace(DENSE, mlp=MixtureOfExperts(experts=8, top_k=2, expert=GELU()))
    mixture = planned("v5p:2x2x1", MeshConfig(data=1, fsdp=2, expert=2), 32, experts)
    slices = planned("v6e:2x2*2", MeshConfig(data=2, fsdp=2, tensor=2), 8)
    return {
        "mixture": work(mixture, 4, 32, experts),
        "dense": work(slices, 8, 8),
        "parameters": slices.count,
        "between slices": sent([c for c in slices.collectives if c.between_slices]),
        "network": estimate(slices, Target.parse("v6e:2x2*2"), 8).network,
    }


if __name__ == "__main__":
    Target.parse("v5e:2x2").prepare()
    print(json.dumps(found()))
