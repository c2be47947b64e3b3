"""Weights of four and eight bits are read as the numbers that they stand for, and take no memory beside those."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gptjax.distributed.sharding import MeshConfig, ShardingRules
from gptjax.interop.huggingface import from_tensors, to_tensors
from gptjax.interop.quantised import dequantised
from gptjax.nn import ClampedSwiGLU, MixtureOfExperts, MultiHeadAttention, Softmax, TransformerConfig
from gptjax.types import UserError

NUMBERS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
FOUR = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
EIGHT = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 8]}


def four_bits(draw, experts, inputs, outputs):
    """A tensor's blocks and scales, and the tensor [experts, inputs, outputs]."""
    blocks = draw.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8)
    scales = draw.integers(100, 130, blocks.shape[:-1], np.uint8)
    numbers = np.stack([NUMBERS[blocks & 15], NUMBERS[blocks >> 4]], -1) * 2.0 ** (scales[..., None, None] - 127.0)
    return blocks, scales, numbers.reshape(experts, outputs, inputs).transpose(0, 2, 1)


def eight_bits(draw, shape, block, dtype):
    """A tensor's codes and scales, and the tensor."""
    bits = draw.integers(0, 256, shape, np.uint8)
    codes = np.where(bits & 0x7F == 0x7F, 0, bits).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
    scales = draw.uniform(1e-4, 2e-4, [-(-n // size) for n, size in zip(shape, block, strict=True)]).astype(dtype)
    wide = np.kron(scales.astype(np.float32), np.ones(block, np.float32))[: shape[0], : shape[1]]
    return codes, scales, codes.astype(np.float32) * wide


def test_four_bits_are_those_of_the_format():
    blocks, scales, expected = four_bits(np.random.default_rng(0), 3, 64, 6)
    plain = np.ones(3, np.float32)
    tensors = dequantised({"x_blocks": blocks, "x_scales": scales, "y_scales": plain}, FOUR)
    assert set(tensors) == {"x", "y_scales"}
    assert tensors["y_scales"] is plain
    assert (tensors["x"].shape, tensors["x"].dtype) == (expected.shape, jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(tensors["x"]), expected)
    with pytest.raises(
        UserError, match=r"^tensors: x: got uint8 \(3, 6, 2, 16\) with scales \(2, 6, 2\), must be uint8"
    ):
        dequantised({"x_blocks": blocks, "x_scales": scales[1:]}, FOUR)["x"]


@pytest.mark.torch
def test_transformers_reads_the_same_from_four_bits():
    torch = pytest.importorskip("torch", reason="compares with PyTorch: pip install -e '.[torch]'")
    theirs = pytest.importorskip("transformers.integrations.mxfp4")
    blocks, scales, _ = four_bits(np.random.default_rng(1), 2, 96, 10)
    expected = theirs._convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales)).float().numpy()
    ours = np.asarray(dequantised({"x_blocks": blocks, "x_scales": scales}, FOUR)["x"])
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(32, 24), (36, 21)])
def test_eight_bits_are_multiplied_block_by_block(shape, dtype):
    """The last blocks of DeepSeek's latents are not whole."""
    codes, scales, expected = eight_bits(np.random.default_rng(0), shape, (16, 8), dtype)
    tensors = dequantised({"x.weight": codes, "x.weight_scale_inv": scales}, EIGHT)
    assert set(tensors) == {"x.weight"}
    assert (tensors["x.weight"].shape, tensors["x.weight"].dtype) == (shape, jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(tensors["x.weight"]), expected.astype(jnp.bfloat16))
    with pytest.raises(
        UserError, match=r"^tensors: x.weight: got int8 .*, must be float8_e4m3fn with one for each \(16"
    ):
        dequantised({"x.weight": codes.view(np.int8), "x.weight_scale_inv": scales}, EIGHT)["x.weight"]


def gpt_oss():
    moe = MixtureOfExperts(4, 2, ClampedSwiGLU(), Softmax(bias=True))
    attention = MultiHeadAttention(bias=True, sinks=True)
    return TransformerConfig(16, 2, 32, 2, head_size=8, hidden=64, mlp=moe, attention=attention, bias=True)


def tensors_of(config):
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(config.build().init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    params = jax.tree.map(lambda x: draw.normal(size=x.shape).astype("f"), shapes)
    fields, tensors = to_tensors(config, params, "bfloat16")
    return fields, dict(tensors), draw


@pytest.mark.parametrize("case", ["gpt-oss", "eight bits"])
def test_a_quantised_model_is_the_one_it_stands_for(case):
    """On one device and on several; in bfloat16, or in float32 where that is asked for."""
    fields, whole, draw = tensors_of(gpt_oss() if case == "gpt-oss" else TransformerConfig(16, 2, 32, 2, hidden=40))
    packed = dict(whole)
    for name, x in whole.items():
        if case == "gpt-oss" and name.endswith("_proj"):
            packed[f"{name}_blocks"], packed[f"{name}_scales"], whole[name] = four_bits(draw, *x.shape)
            del packed[name]
        elif case != "gpt-oss" and "_proj" in name:
            packed[name], packed[f"{name}_scale_inv"], whole[name] = eight_bits(draw, x.shape, (16, 8), np.float32)
        whole[name] = whole[name].astype(jnp.bfloat16)
    assert packed.keys() != whole.keys()
    fields_packed = {**fields, "quantization_config": FOUR if case == "gpt-oss" else EIGHT}
    for dtype in (None, "float32"):
        config, params = from_tensors(fields_packed, packed, dtype)
        config_whole, expected = from_tensors(fields, whole, dtype)
        assert config == config_whole
        assert config.dtype == (dtype or "bfloat16")
        jax.tree.map(np.testing.assert_array_equal, params, expected)
    with jax.set_mesh(MeshConfig(fsdp=4, tensor=2).make()):
        _, sharded = from_tensors(fields_packed, packed, "float32", ShardingRules(embed="fsdp", ffn="tensor"))
        assert "tensor" in sharded["blocks"]["mlp"]["up"].sharding.spec
        jax.tree.map(np.testing.assert_array_equal, sharded, params)


def test_other_methods_are_refused():
    for config in ({"quant_method": "hqq", "bits": 4}, {"quant_method": "fp8"}, {"bits": 4}):
        with pytest.raises(
            UserError, match=r"^config.json: quantization_config: got .*, must be .*mxfp4.* bfloat16 version"
        ):
            dequantised({}, config)


@pytest.mark.parametrize("method", ["mxfp4", "fp8"])
def test_loading_takes_little_more_memory_than_the_model(method, tmp_path):
    """A stack of 32 layers, of which three are there beside it at a time, and the files of two or three."""
    program = f"""
import jax, jax.numpy as jnp, ml_dtypes, numpy as np
from pathlib import Path
from gptjax.interop.quantised import dequantised
from gptjax.interop.safetensors import Tensors, place, write

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

if {method!r} == "mxfp4":
    arrays = {{"blocks": np.ones((1, 1024, 64, 16), np.uint8), "scales": np.ones((1, 1024, 64), np.uint8)}}
    names = "{{}}_blocks", "{{}}_scales"
else:
    arrays = {{"x": np.ones((1024, 2048), ml_dtypes.float8_e4m3fn), "s": np.ones((8, 16), np.float32)}}
    names = "{{}}", "{{}}_scale_inv"
shapes = {{name.format(i): x for i in range(32) for name, x in zip(names, arrays.values())}}
write({str(tmp_path)!r}, shapes, shapes.__getitem__)
tensors = dequantised(Tensors({str(tmp_path)!r}), {{"quant_method": {method!r}, "weight_block_size": [128, 128]}})
np.asarray(tensors["0"])
jnp.zeros(1).block_until_ready()
before = peak()
shape = tensors["0"].shape
leaf = place(jax.ShapeDtypeStruct((32, *shape), jnp.bfloat16), lambda i: np.asarray(tensors[str(i)]))
print((peak() - before) / leaf.nbytes)
"""
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert float(printed) <= 1.3
