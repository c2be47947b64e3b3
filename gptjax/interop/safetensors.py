"""The safetensors format: read tensors straight into jax arrays, without a second copy in memory, and write them.

    tensors = Tensors(folder)                         # one file or shards; nothing is read yet
    tensors.shapes["lm_head.weight"]                  # ShapeDtypeStruct
    leaf = jax.ShapeDtypeStruct((L, D, F), jnp.float32, sharding=sharding)
    place(leaf, lambda i: tensors[f"layers.{i}.up.weight"].T)
    write(other, tensors.shapes, tensors.__getitem__)

A file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape, offsets) and the
tensors, one after the other (https://huggingface.co/docs/safetensors). `safetensors`' own numpy reader copies
what it reads; this one maps the file, so that a transposed slice of a tensor is a view too.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import json
import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from gptjax.io import atomic
from gptjax.io.json_file import read_object
from gptjax.types import Array, UserError

INDEX = "model.safetensors.index.json"
"""Index of a sharded model: tensor -> file."""
SINGLE = "model.safetensors"
LONGEST_HEADER = 100_000_000
"""Bytes; the format's own limit."""
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
"""The format's name -> dtype."""
THREADS = 2
"""Threads that read pieces of a leaf."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclasses.dataclass(frozen=True)
class _Tensor:
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Tensors(Mapping[str, np.ndarray]):
    """Name -> tensor of a `.safetensors` file or of a model's folder, as a read-only numpy view of the mapped file.

    Accessing a tensor starts reading it from disk and releases the memory of the one before the previous one (which is
    read again if used again), so that iterating over all tensors holds two in memory, or three with two threads.

    Raises UserError for a folder without such files, a damaged file, or an index that does not match its files.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        files = _files(path)
        headers = {file: _header(file) for file in dict.fromkeys(files.values() if files else [path])}
        self._files = files or dict.fromkeys(headers[path], path)
        if lacking := [name for name, file in self._files.items() if name not in headers[file]]:
            raise UserError(
                f"path: got {path}, whose index names {_some(lacking)} in {self._files[lacking[0]].name}, where they "
                "are missing; download the folder again"
            )
        self._headers = {name: headers[file][name] for name, file in self._files.items()}
        self._maps = {file: _map(file) for file in headers}
        self._recent: collections.deque[tuple[mmap.mmap, int, int]] = collections.deque(maxlen=4 * THREADS)

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Name -> shape and dtype, without reading."""
        return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in self._headers.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        tensor, data = self._headers[name], self._maps[self._files[name]]
        start = tensor.start // mmap.PAGESIZE * mmap.PAGESIZE
        extent = data, start, tensor.start + tensor.bytes - start
        if tensor.bytes and extent not in [*self._recent][-THREADS:]:
            data.madvise(mmap.MADV_WILLNEED, *extent[1:])
            self._recent.append(extent)
            for old, *pages in [*self._recent][:-THREADS]:  # repeatedly, as another thread may still be reading there
                old.madvise(mmap.MADV_DONTNEED, *pages)
        return np.ndarray(tensor.shape, tensor.dtype, data, tensor.start)

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def __len__(self) -> int:
        return len(self._headers)


@dataclasses.dataclass(frozen=True)
class Renamed(Mapping[str, np.ndarray]):
    """Tensors of another mapping under new names."""

    whole: Mapping[str, np.ndarray]
    names: Mapping[str, str]
    """Name -> name in `whole`."""

    def __getitem__(self, name: str) -> np.ndarray:
        return self.whole[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def place(leaf: jax.ShapeDtypeStruct, part: Callable[[int], np.ndarray]) -> Array:
    """Build the array of this shape, dtype and sharding (None: one default device) from the values of `part`.

    leaf     [*stack, *shape]
    part(i)  [*shape]: entry i of the stack, in row-major order if the stack has several axes (layers, experts); the
             whole leaf if it has none. Preferably a view of `Tensors`: then only what this process's devices hold is
             read, once, into the memory that becomes the array's (on CPU), and the host keeps no other copy. A computed
             part exists while it is copied.

    Raises ValueError if a part has another shape.
    """
    part = functools.lru_cache(maxsize=1)(part)  # called for its shape too, and twice if it is the only part

    def read(index: Any) -> np.ndarray:
        ranges = [range(*axis.indices(size)) for axis, size in zip(index, leaf.shape, strict=True)]
        values = _aligned([len(r) for r in ranges], np.dtype(leaf.dtype))
        stack = leaf.shape[: leaf.ndim - part(0).ndim]
        numbers = np.arange(math.prod(stack)).reshape(stack)[index[: len(stack)]]

        rows = leaf.shape[len(stack) :][:1]
        # One processor copies more slowly than a disk reads: copy two parts at a time, or two pieces of the only part.
        step = max(-(-rows[0] // THREADS), 1) if rows and numbers.size == 1 else None
        pieces = [...] if step is None else [slice(i, i + step) for i in range(0, rows[0], step)]

        def fill(job: tuple[tuple[int, ...], Any]) -> None:
            entry, piece = job
            tensor = part(int(numbers[entry]))
            if tensor.shape != leaf.shape[len(stack) :]:
                raise ValueError(f"part {numbers[entry]} has shape {tensor.shape}, must be {leaf.shape[len(stack) :]}")
            _copy(values[*entry, ...][piece], tensor[index[len(stack) :]][piece])

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(fill, itertools.product(np.ndindex(numbers.shape), pieces)))
        return values

    if leaf.sharding is None:
        array = jax.device_put(read((slice(None),) * leaf.ndim))
    else:
        array = jax.make_array_from_callback(leaf.shape, leaf.sharding, read)
    return jax.block_until_ready(array)  # frees the host's memory before the next leaf is read


def write(
    folder: str | Path,
    shapes: Mapping[str, Any],
    read: Callable[[str], np.ndarray],
    max_shard: int = 5_000_000_000,
    single: str = SINGLE,
) -> None:
    """Write tensors to `folder`, as `transformers` reads them: one file, or an index and several files of at most
    `max_shard` bytes (a tensor is never split). Each file is written atomically.

    shapes  name -> anything with a shape and a dtype
    read    returns the tensor of a name; called once per tensor, when it is written
    single  name of the file if there is only one

    Raises UserError for a dtype that the format lacks, and for a folder that already has a model.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if found := sorted(path.name for path in folder.glob("model*.safetensors*") if path.suffix != atomic.SUFFIX):
        raise UserError(f"path: got {folder}, which already has {_some(found)}; choose another or delete it")
    tensors = {name: _Tensor(np.dtype(x.dtype), tuple(x.shape), 0) for name, x in shapes.items()}
    shards = _shards(tensors, max_shard)
    width = len(shards)
    names = [single] if width == 1 else [f"model-{i + 1:05}-of-{width:05}.safetensors" for i in range(width)]
    for file, shard in zip(names, shards, strict=True):
        _write_file(folder / file, {name: tensors[name] for name in shard}, read)
    if width > 1:
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        size = sum(tensor.bytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
        atomic.write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _files(path: Path) -> dict[str, Path]:
    """Tensor -> file, from a folder's index. Empty if `path` is a file."""
    if not path.is_dir():
        return {}
    if (path / INDEX).is_file():
        try:
            names: dict[str, str] = read_object(path / INDEX)["weight_map"]
            files = {name: path / file for name, file in names.items() if file == Path(file).name}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            names, files = {}, {}
        if not names or len(files) < len(names):
            raise UserError(f"path: got {path}, whose {INDEX} is damaged; download the folder again")
        if missing := sorted({file.name for file in files.values() if not file.is_file()}):
            raise UserError(f"path: got {path}, which lacks {_some(missing)} of its index; download the folder again")
        return files
    if (path / SINGLE).is_file():
        return dict.fromkeys(_header(path / SINGLE), path / SINGLE)
    if pickles := sorted(file.name for file in path.iterdir() if file.suffix in PICKLES):
        raise UserError(
            f"path: got {path}, whose weights are pickles ({_some(pickles)}), which can run any code when loaded; "
            "if you trust them, convert them with transformers: AutoModel.from_pretrained(path).save_pretrained(new)"
        )
    raise UserError(f"path: got {path}, must hold {SINGLE} or {INDEX}")


def _header(path: Path) -> dict[str, _Tensor]:
    """The tensors of a file, after a check that they cover every byte of it."""

    def damaged(reason: str) -> UserError:
        return UserError(f"path: got {path}, not a complete safetensors file: {reason}; download or write it again")

    try:
        if not path.is_file():
            raise damaged("it is not a regular file")
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                raise damaged(f"it has {size} bytes, and says that its header has {length}")
            header = json.loads(file.read(length))
    except OSError as error:
        raise UserError(f"path: got {path}, which cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, UserError) else damaged("the header is not JSON") from None
    if not isinstance(header, dict):
        raise damaged("the header is not a JSON object")
    header.pop("__metadata__", None)
    tensors: dict[str, _Tensor] = {}
    for name, entry in header.items():
        try:
            code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
                raise TypeError
        except (KeyError, TypeError, ValueError):
            raise damaged(f"the header's entry of {name!r} is malformed") from None
        if code not in DTYPES:
            raise UserError(f"path: got {path}, where {name} has dtype {code}, must be one of {', '.join(DTYPES)}")
        tensors[name] = tensor = _Tensor(DTYPES[code], shape, 8 + length + begin)
        if tensor.bytes != end - begin:
            raise damaged(f"{name} has {end - begin} bytes, {code} {list(shape)} takes {tensor.bytes}")
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].bytes)):
        if tensor.start != end:
            raise damaged(f"{name} begins at byte {tensor.start}, the tensor before it ends at {end}")
        end += tensor.bytes
    if end != size:
        raise damaged(f"it has {size} bytes instead of {end}")
    return tensors


def _some(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    data.madvise(mmap.MADV_SEQUENTIAL)  # read far ahead
    return data


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Empty array with the alignment that lets jax on CPU adopt its memory; otherwise jax copies it."""
    size, alignment = math.prod(shape) * dtype.itemsize, 64
    memory = np.empty(size + alignment, np.uint8)
    start = -memory.ctypes.data % alignment
    return memory[start : start + size].view(dtype).reshape(shape)


def _copy(to: np.ndarray, values: np.ndarray) -> None:
    """`to[...] = values`. A transposed matrix is copied in tiles, whose cache lines stay in the cache: numpy's own copy
    takes ten times as long."""
    for axis in range(1, to.ndim):
        rows = math.prod(to.shape[:axis])
        try:
            flat = values.reshape(rows, -1, copy=False)
        except ValueError:
            continue
        if flat.strides[0] == values.itemsize < flat.strides[1]:
            target = to.reshape(flat.shape, copy=False)
            for i in range(0, flat.shape[1], 16):
                target[:, i : i + 16] = flat[:, i : i + 16]
            return
    to[...] = values


def _shards(tensors: Mapping[str, _Tensor], limit: int) -> list[list[str]]:
    """The names, in order, grouped so that a group's tensors take at most `limit` bytes."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.bytes
    return shards


def _write_file(path: Path, tensors: Mapping[str, _Tensor], read: Callable[[str], np.ndarray]) -> None:
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # required by transformers
    start = 0
    # Large items first, so that every tensor is aligned to its item size.
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    for name, tensor in tensors.items():
        if tensor.dtype not in codes:
            raise UserError(f"dtype: got {tensor.dtype} for {name}, must be one of {', '.join(map(str, codes))}")
        offsets = [start, start + tensor.bytes]
        header[name] = {"dtype": codes[tensor.dtype], "shape": tensor.shape, "data_offsets": offsets}
        start = offsets[1]
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with atomic.new(path) as partial, partial.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in tensors.items():
            value = np.asarray(read(name))
            if (value.dtype, value.shape) != (tensor.dtype, tensor.shape):
                raise ValueError(f"{name} is {value.dtype} {value.shape}, must be {tensor.dtype} {tensor.shape}")
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
