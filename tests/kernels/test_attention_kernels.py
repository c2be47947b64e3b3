"""The kernels behind `attention` against its reference, and the choice between them."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from gptjax.kernels import target
from gptjax.kernels.attention import Mask, attention
from gptjax.kernels.attention.reference import reference
from gptjax.nn import MultiHeadAttention
from gptjax.types import UserError

B, T, N, K, H = 2, 384, 4, 2, 8
SEGMENTS = jnp.cumsum(jax.random.bernoulli(jax.random.key(9), 0.02, (B, T)), axis=1)
SEGMENTED = Mask(query_segments=SEGMENTS, key_segments=SEGMENTS)
PREFIX = Mask(prefix=jnp.arange(T) < jnp.array([[100], [150]]))
# Sums of up to 384 products of float32, in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}

CASES = {
    "causal": (Mask(), {}),
    "both ways": (Mask(causal=False), {}),
    "window": (Mask(window=100), {}),
    "window both ways": (Mask(causal=False, window=200), {}),
    "segments": (SEGMENTED, {}),
    "scale, softcap, sinks": (Mask(), {"scale": 0.7, "softcap": 1.5, "sinks": True}),
    "window, segments, sinks": (dataclasses.replace(SEGMENTED, window=100), {"sinks": True}),
    "prefix": (PREFIX, {}),
    "bias": (Mask(), {"bias": True}),
}
CANNOT = {
    "chunked": (),
    "splash": ("prefix", "bias"),
    "xla": ("scale, softcap, sinks", "window, segments, sinks"),
}


def inputs(options, dtype=jnp.float32, heads=(N, K), length=T, size=H):
    """Random arrays by the names of attention's arguments, and its options that are no arrays."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = {"q": (B, length, heads[0], size), "k": (B, length, heads[1], size), "v": (B, length, heads[1], size)}
    shapes |= {"sinks": (heads[0],)} if "sinks" in options else {}
    shapes |= {"bias": (heads[0], length, length)} if "bias" in options else {}
    arrays = {
        name: jax.random.normal(key, shape, dtype) for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    return arrays, {name: value for name, value in options.items() if name not in arrays}


def values_and_gradients(function, arrays, **rest):
    """[y, *gradients by name] of a loss that gives every element of y a gradient of its own."""

    def loss(arrays):
        y = function(**arrays, **rest)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return {"y": y} | gradients


def assert_close(actual, expected, **close):
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], err_msg=name, **close)


@pytest.mark.sampled
@pytest.mark.parametrize("case", CASES)
def test_every_implementation_is_the_reference_or_refuses(case):
    """Values and gradients of grouped queries; splash is interpreted."""
    mask, options = CASES[case]
    arrays, options = inputs(options)
    expected = values_and_gradients(reference, arrays, mask=mask, **options)
    for name, cannot in CANNOT.items():
        if case in cannot:
            with pytest.raises(UserError, match=f"got '{name}', which cannot do this: it (needs|has no) "):
                attention(**arrays, mask=mask, implementation=name, **options)
        else:
            actual = values_and_gradients(attention, arrays, mask=mask, implementation=name, **options)
            assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("name", ["plain", "chunked", "splash"])
def test_on_a_mesh_each_device_takes_its_rows_and_heads(name, kv_heads):
    """A single key head is on all of them."""
    arrays, _ = inputs({"sinks": True}, heads=(N, kv_heads))
    expected = values_and_gradients(attention, arrays, mask=SEGMENTED)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), (AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        keys = PartitionSpec("data", None, "tensor" if kv_heads > 1 else None)
        specs = {"q": PartitionSpec("data", None, "tensor"), "k": keys, "v": keys, "sinks": PartitionSpec("tensor")}
        arrays = {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in arrays.items()}
        segments = jax.device_put(SEGMENTS, NamedSharding(mesh, PartitionSpec("data")))
        mask = Mask(query_segments=segments, key_segments=segments)
        assert_close(values_and_gradients(attention, arrays, mask=mask, implementation=name), expected, **CLOSE)
        arrays["q"] = jax.device_put(arrays["q"], NamedSharding(mesh, PartitionSpec(None, "data")))
        if name != "plain":
            with pytest.raises(UserError, match="needs whole sequences and heads on each device"):
                attention(**arrays, mask=mask, implementation=name)


KERNELS = {"tpu": "pallas_call", "gpu": "dot_product_attention_fwd"}
CHOSEN = {  # platform -> the cases that its kernel is chosen for
    "cpu": (),
    "tpu": [case for case in CASES if case not in CANNOT["splash"]],
    "gpu": ("causal", "both ways", "window", "segments", "prefix", "bias"),
}


@pytest.fixture
def cudnn(monkeypatch):
    """As if cuDNN were installed: jax asks for its version when a program is made."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91_000)


def kernels(platform, arrays, mask, **rest):
    """The kernels that attention calls on a mesh of devices of that platform, which need not be there. The mask is an
    argument of the program: what is an array in it is unknown when the program is made."""
    device = AbstractDevice(device_kind=platform, num_cores=None, platform=platform)
    mesh = AbstractMesh((2, 2), ("data", "tensor"), (AxisType.Explicit,) * 2, abstract_device=device)
    rows, heads = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data", None, "tensor"), ("tensor",)))
    with jax.sharding.use_abstract_mesh(mesh):
        shapes = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows if x.ndim == 4 else heads)
            for name, x in arrays.items()
        }
        text = str(jax.make_jaxpr(lambda arrays, mask: attention(**arrays, mask=mask, **rest))(shapes, mask))
    return {platform for platform, kernel in KERNELS.items() if kernel in text}


@pytest.mark.parametrize("platform", CHOSEN)
def test_the_device_the_mask_and_the_options_choose(cudnn, platform):
    for case, (mask, options) in CASES.items():
        arrays, options = inputs(options, jnp.bfloat16)
        expected = {platform} if case in CHOSEN[platform] else set()
        assert kernels(platform, arrays, mask=mask, **options) == expected, case


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_what_a_kernel_cannot_do_is_left_to_the_plain_form(cudnn, platform):
    arrays, _ = inputs({}, jnp.bfloat16)
    assert kernels(platform, arrays, mask=Mask(offset=jnp.int32(0))) == set()
    assert kernels(platform, arrays, mask=Mask(), dropout=0.1, key=jax.random.key(0)) == set()
    assert kernels(platform, arrays, mask=Mask(), dropout=0.1) == {platform}  # no key, no dropout
    assert kernels(platform, inputs({}, jnp.bfloat16, length=100)[0], mask=Mask(window=3)) == {platform} - {"tpu"}
    assert kernels(platform, inputs({}, jnp.float32)[0], mask=Mask()) == {platform} - {"gpu"}
    assert kernels(platform, inputs({}, jnp.bfloat16, size=20)[0], mask=Mask()) == {platform} - {"gpu"}


def test_long_sequences_go_by_chunks():
    """On a CPU, in memory that does not hold the scores."""
    for length, chunked in ((1_920, False), (2_048, True)):
        x = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        grad = jax.grad(lambda q, k, v: attention(q, k, v, Mask()).sum(), argnums=(0, 1, 2))
        used = jax.jit(grad).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes
        assert (used < 4 * 2 * length**2) == chunked


def test_cudnn_is_called_with_its_mask(cudnn, monkeypatch):
    """Lowered for CUDA, forward and backward, without a GPU."""
    monkeypatch.setattr(target, "backend", lambda: "gpu")
    calls = {"": ("causal", "both ways", "window"), "ScaleBias": ("segments", "prefix", "bias")}
    masks = {"both ways": "NO_MASK", "prefix": "NO_MASK"}
    for kind, cases in calls.items():
        for case in cases:
            arrays, _ = inputs(CASES[case][1], jnp.bfloat16)
            loss = jax.grad(lambda arrays, mask=CASES[case][0]: attention(**arrays, mask=mask).astype("float32").sum())
            text = jax.jit(loss).trace(arrays).lower(lowering_platforms=("cuda",)).as_text()
            assert f"__cudnn$fmha{kind}Softmax(" in text, case
            assert f"__cudnn$fmha{kind}SoftmaxBackward(" in text, case
            assert masks.get(case, "CAUSAL") in text, case
            assert case != "window" or "sliding_window_length\\22: 100," in text


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason=f"needs a GPU; jax runs on {jax.default_backend()}")
@pytest.mark.parametrize("case", CHOSEN["gpu"])
def test_cudnn_is_the_reference(case):
    mask, options = CASES[case]
    arrays, options = inputs(options, jnp.bfloat16, size=64)
    exact = {name: x.astype(jnp.float32) for name, x in arrays.items()}
    expected = values_and_gradients(reference, exact, mask=mask, **options)
    actual = values_and_gradients(attention, arrays, mask=mask, implementation="cudnn", **options)
    for name in expected:  # bfloat16 has 8 bits; probabilities, their products and the result are rounded to it
        error = jnp.abs(actual[name].astype(jnp.float32) - expected[name]).max() / jnp.abs(expected[name]).max()
        assert error < 2**-6, name


def test_a_name_goes_through_the_module():
    x, positions = jnp.ones((1, 128, 8)), jnp.arange(128)[None]
    part = MultiHeadAttention(heads=2, head_size=4)
    params = part.init(jax.random.key(0), x, positions)

    def program(name):
        layer = dataclasses.replace(part, implementation=name)
        return str(jax.make_jaxpr(layer.apply)(params, x, positions))

    assert "pallas_call" in program("splash")
    assert "pallas_call" not in program(None)
    with pytest.raises(UserError, match=r"got 'fast', must be None or one of plain, chunked, xla, cudnn, flash"):
        program("fast")
    with pytest.raises(UserError, match="got 'cudnn', which cannot do this: it needs a GPU, got cpu"):
        program("cudnn")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[plan]'")
def test_kernels_compile_for_tpus():
    """Splash for three generations, rows that a mesh cuts, policies of what to keep, and training steps of two kinds
    of layer on four chips, one in stages; experts, whose products do no more than they must, 1% for all the rest. None
    of the chips is here."""
    program = Path(__file__).with_name("compile_for_tpu.py")
    run = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert [work for of in found.pop("experts").values() for work in of.values()] == pytest.approx([1.0] * 4, abs=0.01)
    once, again = ["dkv", "dq", "fwd"], ["dkv", "dq", "fwd", "fwd"]
    expected = dict.fromkeys(("v5e", "v6e", "v5p", "cut rows", "attention kept"), once) | {"nothing kept": again}
    assert found == expected | dict.fromkeys(("training step", "stages"), sorted(2 * again))
