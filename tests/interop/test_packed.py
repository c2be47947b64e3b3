"""Integer weights of other programs, against those programs or, one number at a time, against their rules."""

from __future__ import annotations

import numpy as np
import pytest

from gptjax.interop.packed import unpack
from gptjax.types import UserError

GROUP = {"weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}}


def draw(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.torch
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_words_are_those_of_compressed_tensors(symmetric):
    torch = pytest.importorskip("torch")
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    lifecycle = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    from compressed_tensors.quantization import QuantizationArgs

    args = QuantizationArgs(**GROUP["weights"] | {"symmetric": symmetric})
    rng = np.random.default_rng(0)
    codes = torch.tensor(rng.integers(-8, 8, (24, 32)), dtype=torch.int8)
    scales = torch.tensor(rng.uniform(0.1, 1, (24, 2)), dtype=torch.float32)
    zeros = torch.tensor(rng.integers(-8, 8, (24, 2)), dtype=torch.int8) * (not symmetric)
    want = lifecycle.dequantize(codes, scales, zeros, args)
    tensors = {
        "a.weight_packed": helpers.pack_to_int32(codes, 4).numpy(),
        "a.weight_scale": scales.numpy(),
        "a.weight_shape": np.array([24, 32]),
        "b.weight": draw(3, 4),
    }
    if not symmetric:
        tensors["a.weight_zero_point"] = helpers.pack_to_int32(zeros, 4, packed_dim=0).contiguous().numpy()
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": GROUP}}
    found = unpack(tensors, config)
    assert set(found) == {"a.weight", "b.weight"}
    np.testing.assert_array_equal(np.asarray(found["a.weight"]), want.numpy())
    assert (found["a.weight"].integers is not None) == symmetric
    np.testing.assert_array_equal(found["b.weight"], tensors["b.weight"])


def words(numbers, order=tuple(range(8))):
    """Words of eight 4-bit numbers along the last axis, one at a time; `order` from the lowest bits."""
    rows = [
        [sum(int(row[i + k]) << 4 * n for n, k in enumerate(order)) for i in range(0, len(row), 8)] for row in numbers
    ]
    return np.array(rows, np.uint32).view(np.int32)


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_gptq_follows_its_rule(form):
    """w_oi = s_go (q_io - z_go - 1) with g the group of input i, which need not be in order."""
    rng, inputs, outputs, groups = np.random.default_rng(1), 16, 8, 2
    q, z = rng.integers(0, 16, (inputs, outputs)), rng.integers(0, 15, (groups, outputs))
    s = rng.uniform(0.1, 1, z.shape).astype(np.float16)
    index = rng.permutation(np.arange(inputs) % groups).astype(np.int32)
    tensors = {"a.qweight": words(q.T).T.copy(), "a.qzeros": words(z), "a.scales": s, "a.g_idx": index}
    found = unpack(tensors, {"quant_method": "gptq", "bits": 4, "group_size": 8, "checkpoint_format": form})["a.weight"]
    want = s[index].astype(np.float32) * (q - z[index] - (form == "gptq"))
    assert found.shape == (outputs, inputs)
    np.testing.assert_array_equal(np.asarray(found), want.T.astype(np.float16))


def test_awq_follows_its_rule():
    """The eight outputs of a word are in the order 0, 2, 4, 6, 1, 3, 5, 7, from the lowest bits."""
    rng, order = np.random.default_rng(2), (0, 2, 4, 6, 1, 3, 5, 7)
    q, z = rng.integers(0, 16, (12, 16)), rng.integers(0, 16, (3, 16))
    s = rng.uniform(0.1, 1, z.shape).astype(np.float16)
    tensors = {"a.qweight": words(q, order), "a.qzeros": words(z, order), "a.scales": s}
    found = unpack(tensors, {"quant_method": "awq", "bits": 4, "group_size": 4, "version": "gemm"})["a.weight"]
    group = np.arange(12) // 4
    np.testing.assert_array_equal(
        np.asarray(found), (s[group].astype(np.float32) * (q - z[group])).T.astype(np.float16)
    )


@pytest.mark.torch
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_those_of_bitsandbytes(kind, nested):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    x = torch.tensor(draw(24, 128))
    q, state = functional.quantize_4bit(x, blocksize=64, quant_type=kind, compress_statistics=nested)
    tensors = {"a.weight": q.numpy()} | {f"a.weight.{k}": v.numpy() for k, v in state.as_dict(packed=True).items()}
    found = unpack(tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert set(found) == {"a.weight"}
    want = functional.dequantize_4bit(q, state).numpy()
    # The nested scales are a product and a sum, which may be fused.
    np.testing.assert_allclose(np.asarray(found["a.weight"]), want, rtol=1e-5)


def test_bytes_of_bitsandbytes_are_rows_of_their_largest_number():
    x = draw(6, 16)
    top = np.abs(x).max(1)
    codes = np.round(x / top[:, None] * 127).astype(np.int8)
    tensors = {"a.weight": codes, "a.SCB": top, "a.weight_format": np.array(0, np.uint8)}
    found = unpack(tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert set(found) == {"a.weight"}
    step = top[:, None] / 127
    assert np.all(np.abs(np.asarray(found["a.weight"], np.float32) - x) <= step / 2 + 2**-10 * top[:, None])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq", "bits": 3}, "GPTQ with 3 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "gemv"),
        ({"quant_method": "bitsandbytes"}, "without load_in_4bit"),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": GROUP | {"format": "marlin-24"}}}, "marlin-24"),
    ],
)
def test_an_unknown_scheme_is_refused_by_name(config, message):
    with pytest.raises(UserError, match=message):
        unpack({}, config)
