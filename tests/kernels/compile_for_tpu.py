"""Compiles attention, a training step around it, and the products of experts for TPUs that are elsewhere; prints the
kernels in the programs.

    python compile_for_tpu.py          # JSON: {what: [names of kernels], "experts": {topology: {dtype: work}}}

A program of its own, as libtpu wants its environment set before jax starts.
"""

import json
import os
import re

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_LOG_DIR": "disabled",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # there is no TPU that only one program could hold
}

import functools

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.distributed.parameters import parameter_info
from gptjax.distributed.sharding import DEFAULT_RULES, MeshConfig
from gptjax.kernels.attention import Mask, attention
from gptjax.kernels.experts import grouped_dot
from gptjax.nn import LayerOverrides, Transformer, TransformerConfig
from gptjax.nn.remat import rematerialised
from gptjax.objectives.next_token import NextToken
from gptjax.optim.optimizers import AdamW
from gptjax.train import state as train_state
from gptjax.train.step import make_step
from gptjax.types import Batch


def kernels(lowered: jax.stages.Lowered) -> list[str]:
    text = lowered.compile().as_text()
    assert text is not None
    assert "tpu_custom_call" in text
    return sorted(re.findall(r"%splash_m[hq]a_(fwd|dq|dkv)\S* = .*custom-call\(", text))


def mesh_of(topology: str, shape: MeshConfig = MeshConfig(fsdp=2, tensor=2)) -> jax.sharding.Mesh:
    return shape.make(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def gradient(mesh: jax.sharding.Mesh, size: int, dtype: str, mask: Mask, policy=None, **options) -> list[str]:
    """Grouped queries, forward and backward."""
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, DEFAULT_RULES("batch", "sequence", "heads") or PartitionSpec())
        q, k, v = (jax.ShapeDtypeStruct((mesh.size, 1024, heads, size), dtype, sharding=place) for heads in (4, 2, 2))

        def loss(q, k, v):
            attend = rematerialised(functools.partial(attention, mask=mask, **options), policy)
            return jnp.sin(attend(q, k, v).astype(jnp.float32)).sum()

        return kernels(jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v))


def training_step(topology: str, shape: MeshConfig, layers: int = 2) -> list[str]:
    """Every other layer with a window; packed documents; parameters and heads, or layers, shared out."""
    pattern = (LayerOverrides(window=100), LayerOverrides())
    config = TransformerConfig(
        vocab=256,
        layers=layers,
        width=128,
        heads=4,
        kv_heads=2,
        pattern=pattern,
        dtype="bfloat16",
        remat="nothing_saveable",
    )
    model = Transformer(config, DEFAULT_RULES)
    optimizer = AdamW(learning_rate=1e-3).build(10, parameter_info(model))
    mesh = mesh_of(topology, shape)
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, DEFAULT_RULES("batch") or PartitionSpec())
    ids, weights = (jax.ShapeDtypeStruct((4, 256), dtype, sharding=rows) for dtype in (jnp.int32, jnp.float32))

    def create(ids):
        return train_state.create(model.init(jax.random.key(0), ids)["params"], optimizer, jax.random.key(1))

    def on_mesh(x):
        spec = PartitionSpec() if x.sharding is None else x.sharding.spec
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        step = make_step(NextToken(), model.apply, optimizer)
        state = jax.tree.map(on_mesh, jax.eval_shape(create, ids))
        return kernels(step.lower(state, Batch(ids, ids, weights, ids, ids)))


def expert_products(topology: str, dtype: str) -> float:
    """FLOPs of the product and both gradients, by the compiler, over those that there are to do."""
    E, R, D, F = 16, 2_048, 384, 2_048
    mesh = jax.make_mesh((4,), ("expert",), devices=topologies.get_topology_desc(topology, "tpu").devices)

    def gradients(x, w, sizes):
        return jax.grad(lambda x, w: jnp.sum(grouped_dot(x, w, sizes).astype(jnp.float32) ** 2), (0, 1))(x, w)

    with jax.set_mesh(mesh):
        each, shapes = jax.P("expert"), (((4 * R, D), dtype), ((E, D, F), dtype), ((E,), jnp.int32))
        inputs = (jax.ShapeDtypeStruct(*shape, sharding=NamedSharding(mesh, each)) for shape in shapes)
        on_each = jax.shard_map(gradients, in_specs=(each, each, each), out_specs=each, check_vma=False)
        compiled = jax.jit(on_each).lower(*inputs).compile()
    flops = compiled.cost_analysis()["flops"]  # pyright: ignore[reportOptionalSubscript]
    return round(flops / (3 * 2 * R * D * F), 2)


if __name__ == "__main__":
    results = {
        "v5e": gradient(mesh_of("v5e:2x2"), 64, "bfloat16", Mask()),
        "v6e": gradient(mesh_of("v6e:2x2"), 256, "bfloat16", Mask(window=200), softcap=50.0),
        "v5p": gradient(mesh_of("v5p:2x2x1"), 128, "float32", Mask(causal=False)),
        "cut rows": gradient(mesh_of("v5p:2x2x1", MeshConfig(context=2, tensor=2)), 128, "bfloat16", Mask()),
        "nothing kept": gradient(mesh_of("v5e:2x2"), 128, "bfloat16", Mask(), "nothing_saveable"),
        "attention kept": gradient(mesh_of("v5e:2x2"), 128, "bfloat16", Mask(), "attention_saveable"),
        "training step": training_step("v5e:2x2", MeshConfig(fsdp=2, tensor=2)),
        "stages": training_step("v5e:2x2", MeshConfig(pipeline=2, fsdp=2), layers=4),
        "experts": {
            topology: {dtype: expert_products(topology, dtype) for dtype in ("bfloat16", "float32")}
            for topology in ("v5e:2x2", "v5p:2x2x1")
        },
    }
    print(json.dumps(results))
