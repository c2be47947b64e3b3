"""Local checkpoints: every process writes its shards of the state to a folder of its host, in memory or on a disk.

They are cheaper than `Checkpoints`, so they can be saved more often, and they outlive the processes, not the host.
Each shard is on two hosts if there are two: those of its replicas, or the one that holds it and the next. So any one
host may be lost. After a restart the processes agree on the newest step of which all shards are somewhere, and send
one another what they lack, on any mesh.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import secrets
from collections import defaultdict
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import multihost_utils

from gptjax.checkpoint import shard_file
from gptjax.checkpoint.checkpoint import Restored, placed
from gptjax.checkpoint.placement import Placement, bounds_by_device, place, send
from gptjax.checkpoint.replicas import key_data, numbers
from gptjax.checkpoint.shard_file import Bounds, Shard, ShardFile
from gptjax.config import digest
from gptjax.distributed import processes
from gptjax.io import atomic
from gptjax.types import Json, PyTree, UserError, one_line

Source = tuple[int, str, int]
"""Host, name of the file, and number of a shard in it."""
Copies = dict[str, dict[Bounds, list[Source]]]
"""Array -> bounds of a shard -> where it is."""
Files = dict[str, ShardFile]
_log = logging.getLogger(__name__)


class LocalCheckpoints:
    """Local checkpoints of one stage of a run. All processes of a job must make the same calls.

    folder  of each host: such as /dev/shm/gptjax, in memory, or on a disk. Of a host that is replaced it may be empty
    of      identity of the stage, of JSON types; files of another one are never used
    every   steps between local checkpoints

    The last complete one is kept, and the one that is being written beside it. A disk that becomes full costs that one,
    with a warning. Raises UserError for a folder that cannot be written to.
    """

    def __init__(self, folder: str | os.PathLike[str], of: Json, every: int):
        self.every, self._of = every, digest(of)
        self._parent = Path(folder).expanduser().absolute()
        self.folder = self._parent / self._of[:16]
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="local checkpoint")
        self._pending: tuple[str, Future[None]] | None = None
        self._kept: str | None = None
        """Key of the last complete one."""
        self._saves = 0
        self._placements: dict[str, Placement] = {}
        self._shards: list[Shard] = []
        self.found = ""
        """Result of `restore` in words."""
        wrong = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic.write_text(self.folder / f"writable.{jax.process_index()}", "")
        except OSError as error:
            wrong = f"local_checkpoints: cannot write to {self._parent} on {platform.node()} ({one_line(error)})"
        found = processes.allgather([[platform.node(), str(self.folder)], secrets.token_hex(4), wrong])
        if wrong := next((one for *_, one in found if one), None):
            raise UserError(f"{wrong}; make it writable, or choose another folder")
        names = [name for name, *_ in found]
        self._hosts = [names.index(name) for name in names]
        """Host of each process: the number of its first process."""
        self._token = found[0][1]
        """Token of this start of the job: what it saves is not mixed with what an earlier one did."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self._thread.shutdown()

    @property
    def _host(self) -> int:
        return self._hosts[jax.process_index()]

    @property
    def _first(self) -> bool:
        """True on the first process of a host."""
        return self._host == jax.process_index()

    def save(self, step: int, state: PyTree, extra: Mapping[str, Any], loss: float | None = None) -> None:
        """Copy this process's shards to host memory and return; the file is written in the background. Arguments as of
        `Checkpoints.save`. Waits for the previous save."""
        self._saves += 1
        key = f"{step}-{self._token}-{self._saves}"
        self._settle()
        arrays = {name: key_data(leaf) for name, leaf in _leaves(state).items()}
        if not self._shards:
            self._lay_out(arrays)
        parts = self._fetch(arrays)
        content = {"step": step, "loss": None if loss is None else float(loss), "extra": json.loads(json.dumps(extra))}
        description = {"of": self._of, "content": content}
        self._pending = key, self._thread.submit(self._write, key, description, parts)

    def _write(self, key: str, description: dict[str, Any], parts: list[np.ndarray]) -> None:
        """Delete what is neither kept nor of this key, then write this process's file. Runs on the background
        thread."""
        self._delete({self._kept, key})
        shard_file.write(self.folder / f"{key}.{jax.process_index()}", description, self._shards, parts)

    def wait(self) -> OSError | None:
        """Wait for the save in progress on this process. Returns its error, of the disk."""
        error = self._pending[1].exception() if self._pending is not None else None
        if isinstance(error, OSError | None):
            return error
        raise error

    def clear(self) -> None:
        """Delete all: a later checkpoint was saved elsewhere, or an earlier one was restored."""
        self.wait()
        self._pending = self._kept = None
        processes.barrier("local checkpoints are written")
        self._delete()

    def restore(self, abstract_state: PyTree, newer_than: int) -> Restored | None:
        """Restore the newest step that is complete over all hosts, into the shardings of the abstract state. None: no
        step after `newer_than` is (-1: there is no other checkpoint). `found` says what there was."""
        leaves = {name: placed(leaf) for name, leaf in _leaves(abstract_state).items()}
        stored = {name: numbers(leaf) for name, leaf in leaves.items()}
        bits = {name: abstract for name, (abstract, _) in stored.items()}
        files, lacking = self._files(newer_than), []
        entries = {name: _entries(file, bits) for name, file in files.items()}
        gathered = processes.allgather(entries if self._first else {})
        whole = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in bits.values())
        for key in sorted({_key(name) for names in gathered for name in names}, key=_age, reverse=True):
            copies = self._sound(key, files, gathered, list(bits))
            size = _size(copies, bits)
            if size < whole:
                lacking.append(f"{whole - size:,} of {whole:,} bytes of step {_step(key):,} are on no host")
                continue
            state, sent = {}, 0
            for name, (abstract, restored) in stored.items():
                array, count = self._load(abstract, copies[name], files)
                state[name], sent = restored(array), sent + count
            known = processes.allgather(
                [file.description["content"] for name, file in files.items() if _key(name) == key]
            )
            content = next(contents[0] for contents in known if contents)
            self._kept = key
            self.found = f"step {content['step']:,} of the local checkpoints in {self._parent}"
            self.found += f", {sent:,} shards of it from other hosts" if sent else ""
            tree = jax.tree.structure(abstract_state).unflatten(state.values())
            return Restored(content["step"], tree, content["extra"], content["loss"])
        if lacking or newer_than >= 0:
            self.found = f"local checkpoints in {self._parent}: {'; '.join(lacking) or 'none is newer'}"
        return None

    def _settle(self) -> None:
        """Wait for the previous save, here and on all processes: if it is complete, it is the one to keep."""
        error = self.wait()
        wrong = processes.allgather(None if error is None else f"{platform.node()}: {one_line(error)}")
        if self._pending is not None:
            previous, self._pending = self._pending[0], None
            if failed := next((one for one in wrong if one), None):
                self._warn(f"step {_step(previous):,} could not be written ({failed}); the one before it is kept")
            else:
                self._kept = previous

    def _delete(self, keys: Collection[str | None] = ()) -> None:
        """Delete the files of all processes of this host but those of these keys."""
        for path in self.folder.iterdir() if self._first else ():
            if _key(path.name) not in keys:
                path.unlink(missing_ok=True)

    def _lay_out(self, arrays: Mapping[str, jax.Array]) -> None:
        """Decide which shards this process keeps; they are the same at every save."""
        for name, array in arrays.items():
            self._placements[name] = placement = place(array.sharding, array.shape, self._hosts)
            kept = (*placement.own, *placement.sent)
            self._shards += [Shard(name, array.dtype.name, array.shape, bounds) for bounds in kept]

    def _fetch(self, arrays: Mapping[str, jax.Array]) -> list[np.ndarray]:
        """The shards in host memory. On a CPU it is the arrays' own, which the next step then does not reuse."""
        for name, array in arrays.items():
            for shard in array.addressable_shards:
                if shard.device in self._placements[name].own.values():
                    shard.data.copy_to_host_async()
        parts = []
        for name, array in arrays.items():  # one after the other, so that few are on the devices twice
            placement = self._placements[name]
            own = {shard.device: shard.data for shard in array.addressable_shards}
            sent = send(array, placement.sources) if placement.sources else {}
            kept = (*map(own.get, placement.own.values()), *map(sent.get, placement.sent.values()))
            parts += [np.asarray(data) for data in kept]
        return parts

    def _files(self, newer_than: int) -> Files:
        """Name -> file, of those on this host with a sound header, of this stage and of later steps."""
        files = {}
        for path in sorted(self.folder.iterdir()):
            if _step(path.name) <= newer_than or path.name.endswith(atomic.SUFFIX):
                continue
            try:
                file = ShardFile.open(path)
            except ValueError as error:
                if self._first:
                    _log.warning("local checkpoint %s: damaged (%s); it is not used", path, error)
                continue
            if file.description["of"] == self._of:
                files[path.name] = file
        return files

    def _sound(self, key: str, files: Files, gathered: list[dict[str, list[Any]]], names: list[str]) -> Copies:
        """The sound shards of a step. A collective call: the processes of a host share its verification."""
        own = [process for process, host in enumerate(self._hosts) if host == self._host]
        mine = [
            (name, i) for name, found in gathered[self._host].items() if _key(name) == key for i in range(len(found))
        ]
        share = mine[own.index(jax.process_index()) :: len(own)]
        with ThreadPoolExecutor() as pool:  # hashing releases the GIL
            sound = list(pool.map(lambda entry: files[entry[0]].is_sound(entry[1]), share))
        damaged = processes.allgather([entry for entry, is_sound in zip(share, sound, strict=True) if not is_sound])
        bad = {(self._hosts[process], name, i) for process, found in enumerate(damaged) for name, i in found}
        for host, name, i in sorted(bad):
            leaf = names[gathered[host][name][i][0]]
            self._warn(f"{name} of the host of process {host} is damaged ({leaf} is not as it was written)")
        copies: Copies = {name: defaultdict(list) for name in names}
        for host, found in enumerate(gathered):
            for name, shards in found.items():
                for i, (leaf, bounds) in enumerate(shards):
                    if _key(name) == key and leaf is not None and (host, name, i) not in bad:
                        copies[names[leaf]][tuple(map(tuple, bounds))].append((host, name, i))
        return copies

    def _load(
        self, leaf: jax.ShapeDtypeStruct, copies: Mapping[Bounds, list[Source]], files: Files
    ) -> tuple[jax.Array, int]:
        """An array from its shards, and how many of them were sent between hosts. A collective call."""
        wanted = bounds_by_device(leaf.sharding, leaf.shape)
        users: dict[Bounds, set[int]] = defaultdict(set)
        for device, bounds in wanted.items():
            users[bounds].add(device.process_index)
        here = jax.process_index()
        mine = {bounds for device, bounds in wanted.items() if device.process_index == here}
        parts = {bounds: np.empty([stop - start for start, stop in bounds], leaf.dtype) for bounds in mine}
        sent = 0
        for bounds, sources in sorted(copies.items()):
            overlapping = [bounds] if bounds in users else [part for part in users if _overlap(bounds, part)]
            needing = set().union(*(users[part] for part in overlapping))
            at = {host: (name, number) for host, name, number in sources}
            shard = Shard("", leaf.dtype.name, leaf.shape, bounds)
            data = None
            if self._host in at and (here in needing or here == min(at)):
                name, number = at[self._host]
                data = files[name].read(number)
            if any(self._hosts[process] not in at for process in needing):
                sent += 1
                data = _broadcast(data if here == min(at) else None, shard.bytes)
            for part in mine.intersection(overlapping):
                assert data is not None
                common = _overlap(bounds, part) or ()
                to, source = (
                    tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(common, whole, strict=True))
                    for whole in (part, bounds)
                )
                parts[part][to] = shard.view(data)[source]
        arrays = [
            jax.device_put(parts[wanted[device]], device)
            for device in leaf.sharding.addressable_devices_indices_map(leaf.shape)
        ]
        return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, arrays), sent

    def _warn(self, message: str) -> None:
        if jax.process_index() == 0:
            _log.warning("local checkpoints: %s", message)


def _leaves(tree: PyTree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _key(name: str) -> str:
    """Key of a save, from the name of one of its files."""
    return name.partition(".")[0]


def _step(name: str) -> int:
    """Step of a key or file. -1: it is no such name."""
    step = name.partition("-")[0]
    return int(step) if step.isdecimal() else -1


def _age(key: str) -> tuple[int, int, str]:
    """Order of keys: of two saves of a step, the later one of a process is the greater."""
    _, token, number = key.split("-")
    return _step(key), int(number), token


def _entries(file: ShardFile, leaves: Mapping[str, jax.ShapeDtypeStruct]) -> list[Any]:
    """Number of the array and bounds of each shard of a file. None in place of the number: not of these arrays."""
    names = {(name, leaf.dtype.name, leaf.shape): number for number, (name, leaf) in enumerate(leaves.items())}
    return [[names.get((shard.leaf, shard.dtype, shard.shape)), shard.bounds] for shard in file.shards]


def _size(copies: Copies, leaves: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    """Bytes of a state that some host has. Shards of one save do not overlap."""
    volumes = {name: sum(map(shard_file.volume, found)) for name, found in copies.items()}
    return sum(volumes[name] * leaf.dtype.itemsize for name, leaf in leaves.items())


def _overlap(first: Bounds, second: Bounds) -> Bounds | None:
    """Common part of two shards, which a scalar is. None: there is none."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(first, second, strict=True))
    return common if all(start < stop for start, stop in common) else None


def _broadcast(data: bytes | None, size: int) -> memoryview:
    """Bytes of the process that has them, the others None. A collective call."""
    words = np.zeros(-(-size // 1024) * 256, np.uint32)  # few distinct sizes, as each one compiles
    if data is not None:
        words.view(np.uint8)[:size] = np.frombuffer(data, np.uint8)
    sent = np.asarray(multihost_utils.broadcast_one_to_all(words, is_source=data is not None))
    return memoryview(sent.tobytes())[:size]
