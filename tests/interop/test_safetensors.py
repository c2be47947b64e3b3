"""Tensors come back bit for bit, damaged files are refused, and a leaf is placed in the memory it needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gptjax.interop import safetensors as room
from gptjax.interop.safetensors import DTYPES, INDEX, SINGLE, Tensors, place, write
from gptjax.types import UserError


def tensors_of_every_kind() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(), (0, 3), (5,), (3, 4, 5), (7, 1)]
    bits = {
        (code, shape): rng.integers(0, 2 if code == "BOOL" else 64, (*shape, dtype.itemsize), np.uint8)
        for code, dtype in DTYPES.items()
        for shape in shapes
    }
    return {f"{code}.{shape}": x.view(DTYPES[code]).reshape(shape) for (code, shape), x in bits.items()}


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@pytest.mark.parametrize("max_shard", [10**9, 700])
def test_what_is_written_is_read(max_shard: int, tmp_path: Path):
    arrays = tensors_of_every_kind()
    arrays["transposed"] = np.arange(12, dtype=np.float32).reshape(3, 4).T
    write(tmp_path, arrays, arrays.__getitem__, max_shard)
    tensors = Tensors(tmp_path)
    assert {name: (x.shape, x.dtype) for name, x in tensors.shapes.items()} == {
        name: (x.shape, x.dtype) for name, x in arrays.items()
    }
    views = dict(tensors)
    assert all(same(views[name], array) for name, array in arrays.items())
    assert not any(view.flags.writeable for view in views.values())
    files = sorted(path.name for path in tmp_path.iterdir())
    if max_shard == 10**9:
        assert files == [SINGLE]
        assert dict(Tensors(tmp_path / SINGLE)).keys() == arrays.keys()
    else:
        assert len(files) > 3
        assert files[0] == f"model-00001-of-{len(files) - 1:05}.safetensors"
        for file in files[:-1]:
            assert sum(x.nbytes for x in Tensors(tmp_path / file).values()) <= max_shard
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in arrays.values())
    with pytest.raises(UserError, match=r"which already has model.*safetensors"):
        write(tmp_path, arrays, arrays.__getitem__)


@pytest.mark.torch
def test_the_published_library_agrees(tmp_path: Path):
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("safetensors.torch")
    codes = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "I64": "int64", "U8": "uint8", "BOOL": "bool"}
    codes |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
    arrays = {name: x for name, x in tensors_of_every_kind().items() if name.split(".")[0] in codes}
    write(tmp_path, arrays, arrays.__getitem__)
    theirs = library.load_file(tmp_path / SINGLE)
    for name, array in arrays.items():
        assert theirs[name].dtype == getattr(torch, codes[name.split(".")[0]])
        # torch has no view of 0-d arrays as bytes
        assert theirs[name].reshape(-1).view(torch.uint8).numpy().tobytes() == array.tobytes()
    again = tmp_path / "again"
    again.mkdir()
    library.save_file(theirs, again / SINGLE, {"format": "pt"})
    assert all(same(Tensors(again)[name], array) for name, array in arrays.items())


def test_a_write_cut_short_leaves_no_model(tmp_path: Path):
    arrays = {"a": np.zeros(3, np.float32), "b": np.zeros(3, np.float32)}

    def fails(name: str) -> np.ndarray:
        if name == "b":
            raise RuntimeError("full")
        return arrays[name]

    with pytest.raises(RuntimeError, match="full"):
        write(tmp_path, arrays, fails)
    with pytest.raises(UserError, match=f"must hold {SINGLE}"):
        Tensors(tmp_path)
    write(tmp_path, arrays, arrays.__getitem__)
    with pytest.raises(UserError, match="dtype: got complex64 for a"):
        write(tmp_path / "other", {"a": np.zeros(1, np.complex64)}, arrays.__getitem__)


def file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(encoded) if length is None else length).to_bytes(8, "little") + encoded + data


def entry(begin: Any, end: int, shape: Any = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it has 0 bytes"),
        (b"1234567", "it has 7 bytes"),
        (file({}, length=1 << 60), "says that its header has 1152921504606846976"),
        (file(b"{oops"), "not JSON"),
        (file(b"\xff\xfe{}"), "not JSON"),
        (file([]), "not a JSON object"),
        (file({"w": entry(0, 8)}, b"1234567"), "it has .* bytes instead of"),
        (file({"w": entry(0, 8)}, b"123456789"), "it has .* bytes instead of"),
        (file({"w": entry(0, 8), "v": entry(4, 12)}, b"." * 12), "v begins at"),
        (file({"w": entry(0, 8), "v": entry(0, 8)}, b"." * 8), "v begins at"),
        (file({"w": entry(4, 12)}, b"." * 12), "w begins at"),
        (file({"w": entry(0, 12)}, b"." * 12), r"w has 12 bytes, F32 \[2\] takes 8"),
        (file({"w": entry(8, 0)}, b"." * 8), "w has -8 bytes"),
        (file({"w": entry(-8, 0)}, b""), "'w' is malformed"),
        (file({"w": entry(0, 8, (-1, -2))}, b"." * 8), "'w' is malformed"),
        (file({"w": entry(0.0, 8)}, b"." * 8), "'w' is malformed"),
        (file({"w": entry(0, 8, 2)}, b"." * 8), "'w' is malformed"),
        (file({"w": {"dtype": "F32"}}), "'w' is malformed"),
        (file({"w": entry(0, 8, dtype="F3")}, b"." * 8), "where w has dtype F3, must be one of BOOL"),
    ],
)
def test_damaged_files(content: bytes, says: str, tmp_path: Path):
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(UserError, match=says) as error:
        Tensors(tmp_path)
    assert "\n" not in str(error.value)
    assert SINGLE in str(error.value)


def test_damaged_folders(tmp_path: Path):
    def refused(says: str) -> None:
        with pytest.raises(UserError, match=says):
            Tensors(tmp_path)

    refused(f"must hold {SINGLE}")
    trap = tmp_path / "trap"
    (tmp_path / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch " + bytes(trap) + b"'\ntR.")
    refused("weights are pickles .pytorch_model.bin., .*; if you trust them")
    assert not trap.exists()
    write(tmp_path, {"a": np.zeros(2)}, lambda _: np.zeros(2), 1)
    index: dict[str, Any] = {"weight_map": {"a": SINGLE, "b": SINGLE, "c": "two.safetensors", "d": "3.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    refused("lacks 3.safetensors, two.safetensors of its index")
    index["weight_map"] = {"a": SINGLE, "b": SINGLE}
    (tmp_path / INDEX).write_text(json.dumps(index))
    refused(f"names b in {SINGLE}, where they are missing")
    for bad in ({"a": f"../{tmp_path.name}/{SINGLE}"}, {"a": 1}, {}, []):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": bad}))
        refused(f"{INDEX} is damaged")


def test_a_leaf_has_its_values_on_every_mesh(tmp_path: Path):
    """A stack of layers and experts, transposed and cast, however it is sharded."""
    L, E, D, N, H = 2, 4, 24, 2, 20
    rng = np.random.default_rng(0)
    names = [f"{i}.{e}" for i in range(L) for e in range(E)]
    arrays = {name: rng.standard_normal((N * H, D)).astype(ml_dtypes.bfloat16) for name in names}
    write(tmp_path, arrays, arrays.__getitem__, 9_000)
    tensors = Tensors(tmp_path)
    want = np.stack([arrays[n].T.reshape(D, N, H) for n in names]).reshape(L, E, D, N, H).astype(np.float32)
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    for spec in [(), ("x", "y"), (None, None, "y", "x"), (None, ("x", "y")[0], None, None, "y"), (None, "y")]:
        asked: set[int] = set()

        def part(i: int, asked: set[int] = asked) -> np.ndarray:
            asked.add(i)
            return tensors[names[i]].T.reshape(D, N, H)

        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        leaf = place(jax.ShapeDtypeStruct(want.shape, jnp.float32, sharding=sharding), part)
        assert leaf.sharding == sharding
        assert asked == set(range(L * E))
        np.testing.assert_array_equal(leaf, want)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    for sharding in (None, one):
        leaf = place(jax.ShapeDtypeStruct((D, N, H), jnp.bfloat16, sharding=sharding), part)
        assert leaf.dtype == jnp.bfloat16
        assert leaf.devices() == {jax.devices()[0 if sharding is None else 3]}
        np.testing.assert_array_equal(leaf.astype(jnp.float32), want[0, 0])
    with pytest.raises(ValueError, match="part 0 has shape"):
        place(jax.ShapeDtypeStruct((2, N, D, H), jnp.float32), part)


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0), (0, 2, 1)])
def test_copy_is_assignment(axes: tuple[int, ...]):
    values = np.random.default_rng(0).standard_normal((33, 18, 50)).transpose(axes)
    for view in (values, values[1:, ::2, 3:], values[::-1]):
        to = np.empty(view.shape, np.float32)
        room._copy(to, view)
        np.testing.assert_array_equal(to, view.astype(np.float32))


def test_loading_takes_little_more_memory_than_the_file(tmp_path: Path):
    """Stacked and transposed; what is donated later may not harm the file."""
    shape, layers = (2048, 1024), 16
    arrays = {str(i): np.full(shape, i, np.float32) for i in range(layers)}
    write(tmp_path, arrays, arrays.__getitem__)
    program = f"""
import jax, jax.numpy as jnp
from gptjax.interop.safetensors import Tensors, place
from pathlib import Path

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

jnp.zeros(1).block_until_ready()
before = peak()
tensors = Tensors({str(tmp_path)!r})
leaf = place(jax.ShapeDtypeStruct(({layers}, *{shape[::-1]}), jnp.float32), lambda i: tensors[str(i)].T)
print(peak() - before)
"""
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    # Two or three tensors of the file are there at a time, of sixteen.
    assert int(printed) <= 1.3 * (tmp_path / SINGLE).stat().st_size
