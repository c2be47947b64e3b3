"""FLOPs and peak memory of a fine-tuning step with LoRA, beside a step of all parameters, as a markdown table.

    python benchmarks/lora.py

GPT-2's 124M parameters in float32, AdamW, 512 tokens a step, rank 8 on all matrices. Nothing is run: both are the
compiler's figures for this machine's platform. XLA counts the FLOPs of a loop once, so they are of unrolled layers and
all logits at once. Memory is that of a loop over layers, with the logits in chunks of 128 tokens, too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from gptjax.distributed import processes

processes.configure()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import gptjax.nn.scan  # noqa: E402
from gptjax.distributed.parameters import parameter_info  # noqa: E402
from gptjax.nn import GELU, LayerNorm, LearnedPositions, LoRA, Transformer, TransformerConfig  # noqa: E402
from gptjax.objectives import NextToken  # noqa: E402
from gptjax.optim import AdamW  # noqa: E402
from gptjax.train.state import create  # noqa: E402
from gptjax.train.step import make_step  # noqa: E402
from gptjax.types import Batch, Metrics  # noqa: E402

TOKENS = 512
GPT2 = TransformerConfig(
    50_257, 12, 768, 12, positions=LearnedPositions(1_024), norm=LayerNorm(bias=True), mlp=GELU(), bias=True
)
ARMS = {"all parameters": None, "LoRA": LoRA(), "QLoRA, 4 bits": LoRA(bits=4)}
PROGRAMS = {
    "unrolled": (12, None, None),
    "loops": (0, 128, None),
    "loops, `remat=nothing_saveable`": (0, 128, "nothing_saveable"),
}
"""Name -> layers that are unrolled, tokens in a chunk of logits, rematerialisation policy."""


def cost(config: TransformerConfig, chunk: int | None, lora: LoRA | None) -> tuple[float, int]:
    """FLOPs, and bytes of arguments and temporaries, of a compiled step."""
    model = Transformer(config)
    info = parameter_info(model)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    objective: Callable[..., Metrics] = NextToken(chunk=chunk)
    trained, frozen = params, ()
    if lora is not None:
        frozen = (jax.eval_shape(functools.partial(lora.freeze, info=info), params),)
        trained = jax.eval_shape(functools.partial(lora.init, info=info), jax.random.key(0), *frozen)
        objective, info = lora.objective(objective), lora.info(info)
    optimizer = AdamW(learning_rate=1e-3).build(100, info)
    state = jax.eval_shape(functools.partial(create, optimizer=optimizer, key=jax.random.key(0)), trained)
    kinds = jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32
    batch = Batch(*(jax.ShapeDtypeStruct((1, TOKENS), kind) for kind in kinds))
    step = make_step(objective, model.apply, optimizer).lower(state, batch, *frozen).compile()
    memory = step.memory_analysis()
    return step.cost_analysis()["flops"], memory.argument_size_in_bytes + memory.temp_size_in_bytes


def main() -> None:
    print("| program | trained | GFLOP | of all | peak memory, MB | of all |\n|---|---|---:|---:|---:|---:|")
    for program, (unrolled, chunk, remat) in PROGRAMS.items():
        gptjax.nn.scan.MAX_UNROLL = unrolled
        config, whole = dataclasses.replace(GPT2, remat=remat), None
        for name, lora in ARMS.items():
            flops, memory = cost(config, chunk, lora)
            whole = whole or (flops, memory)
            counted = f"{flops / 1e9:,.0f} | {flops / whole[0]:.2f}" if unrolled else " | "
            print(f"| {program} | {name} | {counted} | {memory / 1e6:,.0f} | {memory / whole[1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
