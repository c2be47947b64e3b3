"""Compiles the engine's programs for TPUs that are elsewhere; prints, as JSON, the calls of a kernel for attention in
each, and the bytes that it takes beside its arguments over those of a layer's pages.

A program of its own, as libtpu wants its environment set before jax starts.
"""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.distributed.sharding import DEFAULT_RULES, MeshConfig
from gptjax.inference.engine import programs
from gptjax.nn import LayerOverrides, MultiHeadAttention, TransformerConfig, unstack
from gptjax.plan import hlo
from gptjax.plan.compiled import on_mesh
from gptjax.plan.kernels import attention
from gptjax.plan.topology import Target

ROWS, PAGE, PAGES = 32, 64, 32
"""Pages of a row of 2,048 tokens."""
CONFIG = TransformerConfig(
    vocab=256,
    layers=2,
    width=512,
    heads=8,
    kv_heads=4,
    head_size=64,
    pattern=(LayerOverrides(window=100), LayerOverrides()),
    dtype="bfloat16",
)


def compiled(on: str, shape: MeshConfig, implementation: str | None, program: str) -> list[float]:
    """Calls of a kernel for attention, and temporary bytes over those of a layer's pages."""
    config = dataclasses.replace(CONFIG, attention=MultiHeadAttention(implementation=implementation))
    mesh = shape.make(Target.parse(on).devices()[: shape.fsdp])
    everywhere = NamedSharding(mesh, PartitionSpec())

    def array(*size: int, dtype: str = "int32") -> Any:
        return jax.ShapeDtypeStruct(size, dtype, sharding=everywhere)

    with jax.set_mesh(mesh):
        model = config.build(dataclasses.replace(DEFAULT_RULES, batch=None, sequence=None))
        params = jax.eval_shape(
            lambda: unstack(config, model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"])
        )
        models = programs.Models(model, on_mesh(params, mesh))
        idle = jax.eval_shape(lambda: programs.idle(models, ROWS, ROWS * PAGES + 1, PAGE, config.vocab))
        chunks, size = programs.CHUNKS, programs.CHUNK
        arguments = {
            "decode": (
                *(array(ROWS, PAGES), array(ROWS), array(ROWS, programs.STEPS)),
                *(array(ROWS, config.vocab // 32, dtype="uint32"), array(ROWS, dtype="bool"), array()),
            ),
            "prefill": (programs.Chunks(array(chunks, size), array(chunks), array(chunks, PAGES), array(chunks)),),
        }
        lowered = getattr(programs, program).lower(models, on_mesh(idle, mesh), *arguments[program])
        found = lowered.compile()
    pool = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(idle.layers[0]))
    calls = attention(hlo.Program.parse(found.as_text()))
    return [sum(calls.values()), found.memory_analysis().temp_size_in_bytes / pool]


if __name__ == "__main__":
    Target.parse("v5e:2x2").prepare()
    one = MeshConfig(data=1)
    results = {
        "v5e decode": compiled("v5e:2x2", one, None, "decode"),
        "v5e prefill": compiled("v5e:2x2", one, None, "prefill"),
        "v6e decode": compiled("v6e:2x2", one, None, "decode"),
        "four chips": compiled("v6e:2x2", MeshConfig(data=1, fsdp=4), None, "prefill"),
        "without": compiled("v5e:2x2", one, "paged", "decode"),
    }
    print(json.dumps(results))
