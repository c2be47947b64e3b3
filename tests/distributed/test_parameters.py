"""Every parameter says what it is where it is declared, whatever the model."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from architectures import ARCHITECTURES

from gptjax.distributed import sharding
from gptjax.distributed.parameters import declared, flat, parameter_info
from gptjax.distributed.sharding import DEFAULT_RULES, MeshConfig
from gptjax.kernels.linear import linear
from gptjax.nn import LayerOverrides, MultiHeadAttention, ParamFactory
from gptjax.types import UserError

TOKENS = jnp.zeros((1, 1), jnp.int32)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_information_is_of_every_parameter(name):
    model = ARCHITECTURES[name].build()
    info = parameter_info(model)
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    assert jax.tree.structure(info) == jax.tree.structure(params)
    for path, i in flat(info).items():
        assert i.shape == flat(params)[path].shape
        assert len(i.axes) == len(i.shape)
        assert i.stacked == (i.axes[:1] == ("layers",))
        batch, inputs, outputs = i.split(i.axes)
        assert set(batch) <= {"layers", "experts"}
        assert not i.is_matrix or (inputs and outputs)


OWN_SIZES = LayerOverrides(attention=MultiHeadAttention(heads=6, head_size=4), hidden=20)
ODD = {"layers of their own sizes": dataclasses.replace(ARCHITECTURES["leading layer"], layers=2, pattern=(OWN_SIZES,))}


@pytest.mark.parametrize("name", [*ARCHITECTURES, *ODD])
def test_a_configuration_names_every_axis_that_a_mesh_may_shard(name):
    """And no other, so that what a mesh cannot shard is refused by the names of its options, and nothing else is."""
    config = (ARCHITECTURES | ODD)[name]
    sharded = {
        (axis, size)
        for info in flat(parameter_info(config.build())).values()
        for axis, size in zip(info.axes, info.shape, strict=True)
        if axis not in (None, "kv_heads")  # too few key/value heads are replicated
    }
    assert sharded == {(axis, size) for axis, _, size in config.axes if size}


@pytest.mark.parametrize("name", ["deepseek", "uneven pattern", "t5"])
def test_what_is_declared_is_what_is_initialised(name):
    """In shape, dtype and sharding, on a mesh; and callers may change the tree that they get."""
    parameter_info(ARCHITECTURES[name].build(DEFAULT_RULES)).clear()
    with sharding.use(MeshConfig(data=2, fsdp=2, tensor=2).make()):
        model = ARCHITECTURES[name].build(DEFAULT_RULES)
        tokens = sharding.global_array(jnp.zeros((4, 4), jnp.int32), DEFAULT_RULES)
        params = flat(jax.eval_shape(model.init, jax.random.key(0), tokens)["params"])
        found = declared(model)
    assert {k: (x.shape, x.dtype, x.sharding.spec) for k, x in found.items()} == {
        k: (x.shape, x.dtype, x.sharding.spec) for k, x in params.items()
    }


def test_kinds_and_sides():
    info = flat(parameter_info(ARCHITECTURES["deepseek"].build()))
    assert {path for path, i in info.items() if i.kind == "embedding"} == {"embedding"}
    others = {path for path, i in info.items() if i.kind == "other"}
    scales = {path for path in others if path.endswith("scale")}
    assert others - scales == {"blocks/mlp/router_logits", "blocks/mlp/router_balance"}
    assert {path for path, i in info.items() if not i.decays} == scales | {"blocks/mlp/router_balance", "embedding"}
    sides = {path.removeprefix("blocks/"): (i.batch, i.fan) for path, i in info.items() if i.is_matrix}
    assert sides["attention/o"] == (1, (4 * 6, 16))
    assert sides["attention/q"] == (1, (12, 4 * (4 + 4)))
    assert sides["mlp/up"] == (2, (16, 40 + 8))
    assert sides["leading_0/mlp/down"] == (0, (8, 16))
    assert flat(parameter_info(ARCHITECTURES["gpt2"].build()))["positions/table"].kind == "embedding"
    assert flat(parameter_info(ARCHITECTURES["classifier"].build()))["classifier"].kind == "head"


def test_initialisation_needs_no_rows_for_a_pipelines_microbatches():
    config = dataclasses.replace(ARCHITECTURES["plain"], layers=2, microbatches=4)
    with sharding.use(MeshConfig(pipeline=2, data=4).make()):
        info = parameter_info(config.build(DEFAULT_RULES))
    assert info["blocks"]["mlp"]["up"].shape == (2, 16, 48)


class Own(nn.Module):
    """A module of one's own, of which one parameter is declared by the factory and, perhaps, one is not."""

    undeclared: bool

    @nn.compact
    def __call__(self, x):
        y = linear(x, ParamFactory.for_module(self)("anything", (x.shape[-1], 3), ("embed", None)))
        return y + self.param("ours", nn.initializers.zeros, (3,)) if self.undeclared else y


def test_modules_of_ones_own():
    x = jnp.zeros((2, 4))
    assert list(Own(False).init(jax.random.key(0), x)) == ["params"], "information is there when it is asked for"
    assert parameter_info(Own(False), x)["anything"].fan == (4, 3)
    with pytest.raises(UserError, match="ours"):
        parameter_info(Own(True), x)
