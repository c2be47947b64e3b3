"""llama2.c's files: what a model was written from comes back bit for bit."""

import json
import struct

import numpy as np
import pytest

from gptjax.interop import llama2c
from gptjax.types import UserError

SIZES = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 20, "seq_len": 16}


def model(sizes, tied):
    """Random tensors under Hugging Face's names."""
    rng = np.random.default_rng(0)
    D, F, V = sizes["dim"], sizes["hidden_dim"], sizes["vocab_size"]
    K = D // sizes["n_heads"] * sizes["n_kv_heads"]
    shapes = {"model.embed_tokens": (V, D), "model.norm": (D,)} | ({} if tied else {"lm_head": (V, D)})
    for i in range(sizes["n_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {layer + "input_layernorm": (D,), layer + "post_attention_layernorm": (D,)}
        shapes |= {
            layer + f"self_attn.{k}_proj": s for k, s in zip("qkvo", ((D, D), (K, D), (K, D), (D, D)), strict=True)
        }
        shapes |= {layer + "mlp.gate_proj": (F, D), layer + "mlp.up_proj": (F, D), layer + "mlp.down_proj": (D, F)}
    return {f"{name}.weight": rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def quantize(w, group):
    """The bytes of a matrix in version 2, and its dequantised values."""
    blocks = w.reshape(-1, group)
    scales = np.abs(blocks).max(1) / np.float32(127)
    values = np.rint(blocks / scales[:, None]).astype(np.int8)
    return values.tobytes() + scales.tobytes(), (values * scales[:, None]).reshape(w.shape)


def to_meta(w, heads):
    """Row by row: channel j of a head goes to 2 j, channel j + H/2 to 2 j + 1."""
    H = len(w) // heads
    out = np.empty_like(w)
    for head in range(heads):
        for j in range(H // 2):
            out[head * H + 2 * j] = w[head * H + j]
            out[head * H + 2 * j + 1] = w[head * H + H // 2 + j]
    return out


def write(path, sizes, tensors, version, group=16):
    """A file as llama2.c's export.py lays it out."""
    L, H = sizes["n_layers"], sizes["dim"] // sizes["n_heads"]
    tied = "lm_head.weight" not in tensors

    def each(name):
        return [tensors[f"model.layers.{i}.{name}.weight"] for i in range(L)]

    q = [to_meta(w, sizes["n_heads"]) for w in each("self_attn.q_proj")]
    k = [to_meta(w, sizes["n_kv_heads"]) for w in each("self_attn.k_proj")]
    attention = [*q, *k, *each("self_attn.v_proj"), *each("self_attn.o_proj")]
    mlp = [*each("mlp.gate_proj"), *each("mlp.down_proj"), *each("mlp.up_proj")]
    norm_1, norm_2 = each("input_layernorm"), each("post_attention_layernorm")
    embedding, norm = tensors["model.embed_tokens.weight"], tensors["model.norm.weight"]
    head = [] if tied else [tensors["lm_head.weight"]]
    if version == 0:
        frequencies = np.full((sizes["seq_len"], H), np.nan, np.float32)
        data = struct.pack("<7i", *(sizes | {} if tied else sizes | {"vocab_size": -sizes["vocab_size"]}).values())
        arrays = [embedding, *norm_1, *attention, *norm_2, *mlp, norm, frequencies, *head]
    else:
        data = struct.pack("<Ii7iB", 0x616B3432, version, *sizes.values(), tied)
        data = (data + struct.pack("<i", group if version == 2 else 0)).ljust(256, b"\0")
        arrays = [*norm_1, *norm_2, norm, embedding, *attention, *mlp, *head]
    packed = [quantize(w, group)[0] if version == 2 and w.ndim == 2 else w.tobytes() for w in arrays]
    path.write_bytes(data + b"".join(packed))


@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_what_was_written_comes_back(tmp_path, version, tied):
    tensors = model(SIZES, tied)
    write(tmp_path / "model.bin", SIZES, tensors, version)
    config, found = llama2c.read(tmp_path / "model.bin")
    assert config["tie_word_embeddings"] is tied
    assert found.keys() == tensors.keys()
    for name, w in tensors.items():
        expected = quantize(w, 16)[1] if version == 2 and w.ndim == 2 else w
        np.testing.assert_array_equal(found[name], expected, err_msg=name, strict=True)


def test_tensors_are_views_of_the_file(tmp_path):
    write(tmp_path / "model.bin", SIZES, model(SIZES, True), 0)
    _, tensors = llama2c.read(tmp_path / "model.bin")
    copied = {name for name, tensor in tensors.items() if tensor.flags.writeable}
    assert {name.split(".")[-2] for name in copied} == {"q_proj", "k_proj"}


def rewrite(path, at, value, form="<i"):
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, at, value)
    path.write_bytes(data)


@pytest.mark.parametrize("version", [0, 1, 2])
def test_bad_files_are_refused(tmp_path, version):
    file = tmp_path / "model.bin"
    fields = 8 if version else 0
    write(file, SIZES, model(SIZES, True), version)
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match=f"got {size - 4:,} bytes, must be {size:,} for .* dim 32"):
        llama2c.read(file)
    for field, value, message in [
        (2, 2**31 - 1, "n_layers 2147483647"),  # refused at once, whatever it claims
        (3, 0, "n_heads 0.* must have sizes above 0"),
        (3, 5, "n_heads divides"),
        (4, 3, "n_kv_heads divides"),
        (6, -1, "seq_len -1.* must have sizes above 0"),
    ]:
        write(file, SIZES, model(SIZES, True), version)
        rewrite(file, fields + 4 * field, value)
        with pytest.raises(UserError, match=message):
            llama2c.read(file)
    file.write_bytes(b"\0" * 20)
    with pytest.raises(UserError, match="got 20 bytes, must be at least the 28"):
        llama2c.read(file)
    if version:
        write(file, SIZES, model(SIZES, True), version)
        rewrite(file, 4, 3)
        with pytest.raises(UserError, match="got version 3, must be"):
            llama2c.read(file)
    if version == 2:
        write(file, SIZES, model(SIZES, True), version)
        rewrite(file, 37, 15)
        with pytest.raises(UserError, match=r"group size \(got 15\) that divides dim"):
            llama2c.read(file)


@pytest.mark.real
def test_stories_is_what_hugging_face_has(shared, tmp_path):
    load_file = pytest.importorskip("safetensors.numpy").load_file
    folder = shared / "models" / "stories260k"
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    sizes = {
        "dim": config["hidden_size"],
        "hidden_dim": config["intermediate_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "vocab_size": config["vocab_size"],
        "seq_len": config["max_position_embeddings"],
    }
    write(tmp_path / "stories260K.bin", sizes, tensors, 0)
    found_config, found = llama2c.read(tmp_path / "stories260K.bin")
    assert found_config == config
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name, strict=True)
