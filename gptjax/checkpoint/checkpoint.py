"""Checkpoints: saved by Orbax in the background, verified byte by byte before they are restored.

    with Checkpoints("runs/small/checkpoints") as checkpoints:
        start = checkpoints.restore(abstract_state).state if checkpoints.steps() else fresh_state
        ...
        checkpoints.save(step, state, extra={"input": batches.state()}, loss=validation_loss)

Orbax commits a checkpoint atomically, but it restores a flipped bit without an error and never falls back to an older
checkpoint. So every committed checkpoint gets a manifest: its content, and the size and SHA-256 of all its files. A
folder without a manifest is unfinished; one that disagrees with its manifest is damaged. Either is skipped, and the
checkpoint before it is restored.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import jax
import jax.numpy as jnp
from etils import epath  # pathlib that also knows gs://
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from gptjax.checkpoint import manifest
from gptjax.distributed import processes
from gptjax.types import BESIDE, PyTree, UserError, one_line

_TEMPORARY = ".orbax-checkpoint-tmp"
_DAY = 24 * 60 * 60  # seconds
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Restored:
    """A restored checkpoint."""

    step: int
    state: PyTree
    extra: dict[str, Any]
    loss: float | None
    """Validation loss. None: it was not known."""


class Checkpoints:
    """The checkpoints of one run, in `folder`, a local path or gs://. Only one job may save there.

    The newest `max_to_keep` and the `best` of lowest validation loss are kept. Every method that touches the disk first
    waits for the save in progress and raises UserError if that failed: a full disk is reported by the next call.

    All processes of a job must make the same calls, in a folder that they share. Each reads and hashes its part of the
    files; where their views of the folder differ, the first process decides.
    """

    def __init__(self, folder: str | os.PathLike[str], max_to_keep: int = 2, best: int = 1):
        if max_to_keep < 1 or best < 0:
            raise UserError(
                f"checkpoints: got max_to_keep={max_to_keep}, best={best}; must be at least 1 and at least 0"
            )
        path = epath.Path(folder).expanduser()
        self.folder = path if path.is_absolute() else path.resolve()  # resolve() would spoil gs://
        self.max_to_keep = max_to_keep
        self.best = best
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._restored: int | None = None
        self._saves = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Wait until everything is written, then stop the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def wait(self) -> None:
        """Wait for the save in progress. Raises UserError if it failed."""
        if self._pending is not None:
            try:
                self._pending.result()
            finally:
                if self._pending.done():  # False after Ctrl-C interrupted the wait
                    self._pending = None

    def save(self, step: int, state: PyTree, extra: Mapping[str, Any], loss: float | None = None) -> None:
        """Copy the state to the host and return; the files are written in the background.

        state: any tree of `jax.Array`s, including typed keys. It may be donated or deleted as soon as this returns.
        extra: JSON types: input position, resolved configuration, tokenizer fingerprint, stage.
        loss:  validation loss. None: not known at this step.

        The first save after a restore deletes the checkpoints later than the restored one: they are damaged, or of
        steps that are being trained again. Raises UserError if the disk is full or the folder is not writable (an error
        found in the background is raised by the next call), and ValueError if this step already has a checkpoint.
        """
        self.wait()
        content = {"step": step, "loss": None if loss is None else float(loss), "extra": json.loads(json.dumps(extra))}
        try:
            self._tidy()
            if processes.allgather(step in self._committed())[0]:
                raise ValueError(f"checkpoints: step {step} already has a checkpoint in {self.folder}")
            with _whole_small_arrays():
                response = _orbax().save_async(self.folder / str(step), state)
        except OSError as error:
            raise self._failure(step, error) from error
        self._saves += 1
        self._pending = self._thread.submit(self._finish, step, content, response)

    def restore(self, abstract_state: PyTree, step: int | None = None) -> Restored:
        """Restore the newest sound checkpoint, or the one of `step`.

        abstract_state: tree of `jax.ShapeDtypeStruct`s (or arrays), such as `jax.eval_shape` returns under a mesh.
        Leaves are read directly into their shardings, whatever the mesh and number of devices they were saved from. A
        leaf without a sharding is replicated over the current mesh; without a mesh, it is put on the first device.
        Values are cast to these dtypes.

        Damaged and unfinished checkpoints are named in a warning and skipped. Raises UserError if no checkpoint is
        sound, or if the sound one does not fit `abstract_state`.
        """
        step, content = self._sound(step)
        state = self._load(step, abstract_state, self._saved(step))
        self._restored = step
        return Restored(step, state, content["extra"], content["loss"])

    def restore_params(self, step: int | None = None, *, ema: bool = False, abstract_params: PyTree = None) -> Restored:
        """Restore only the state's `params`, a nested dict, as `restore` does; the optimizer's state, and what an
        objective trained beside the model, are not read.

        ema: prefer the exponential moving average of the parameters, the state's `ema`, if the checkpoint has one.
        abstract_params: as in `restore`. None: the saved shapes and dtypes, on the first device.
        """
        step, content = self._sound(step)
        saved = self._saved(step)
        name = "ema" if ema and saved.get("ema") else "params"
        stored = {branch: tree for branch, tree in saved[name].items() if branch != BESIDE}
        if abstract_params is None:
            abstract_params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stored)
        params = self._load(step, {name: abstract_params}, {name: stored})[name]
        return Restored(step, params, content["extra"], content["loss"])

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first. Their files are not verified."""
        self.wait()
        return processes.allgather(self._finished())[0]

    def extra(self, step: int | None = None) -> dict[str, Any] | None:
        """`extra` of a checkpoint's `content`."""
        content = self.content(step)
        return None if content is None else content["extra"]

    def content(self, step: int | None = None) -> dict[str, Any] | None:
        """Content of the manifest of `step`, or of the newest finished checkpoint with a sound one. None: there is
        none. No file is verified."""
        self.wait()
        steps = reversed(self._finished()) if step is None else [step]
        contents = (manifest.read(self.folder / str(step)) for step in steps)
        return processes.allgather(next((content for content in contents if content), None))[0]

    def complete(self, step: int) -> bool:
        """True if `step` has a sound checkpoint whose validation loss is known."""
        self.wait()
        if self._fault(step) is not None:
            return False
        return processes.allgather((manifest.read(self.folder / str(step)) or {}).get("loss") is not None)[0]

    def rank(self, step: int, loss: float) -> None:
        """Record the validation loss of a checkpoint that was saved before it was known."""
        self.wait()
        try:
            if jax.process_index() == 0:
                manifest.amend(self.folder / str(step), loss=loss)
            processes.barrier("a checkpoint is ranked")
        except OSError as error:
            raise self._failure(step, error) from error

    def end_at(self, step: int, extra: Mapping[str, Any]) -> None:
        """Make a checkpoint the newest: add to its `extra`, then delete the later ones, oldest first, so that an
        interrupted call can be repeated."""
        self.wait()
        try:
            if jax.process_index() == 0:
                content = manifest.read(self.folder / str(step)) or {}
                extra = json.loads(json.dumps(extra))
                manifest.amend(self.folder / str(step), extra={**content.get("extra", {}), **extra})
                for later in self._committed():
                    if later > step:
                        manifest.delete(self.folder / str(later))
            processes.barrier("later checkpoints are deleted")
        except OSError as error:
            raise self._failure(step, error) from error

    def latest_step(self) -> int | None:
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """Step of the lowest validation loss. None: of no checkpoint is it known."""
        self.wait()
        return processes.allgather(next(iter(self._ranked()), None))[0]

    def _committed(self) -> list[int]:
        """Steps of all committed checkpoints, with a manifest or without, oldest first."""
        if not self.folder.exists():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())

    def _finished(self) -> list[int]:
        return [step for step in self._committed() if manifest.finished(self.folder / str(step))]

    def _ranked(self) -> list[int]:
        """Steps with a finite validation loss, best first."""
        contents = {step: manifest.read(self.folder / str(step)) for step in self._committed()}
        losses = {step: content.get("loss") for step, content in contents.items() if content}
        finite = {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}
        return sorted(finite, key=lambda step: (finite[step], -step))

    def _fault(self, step: int) -> str | None:
        """The first fault of a checkpoint, or None if it is sound; the files are divided among the processes."""
        found = processes.allgather(manifest.fault(self.folder / str(step), jax.process_index(), jax.process_count()))
        return next((fault for fault in found if fault is not None), None)

    def _sound(self, step: int | None) -> tuple[int, dict[str, Any]]:
        """The step to restore and the content of its manifest."""
        self.wait()
        candidates = processes.allgather(self._committed()[::-1])[0] if step is None else [step]
        faults = []
        for candidate in candidates:
            if (fault := self._fault(candidate)) is None:
                content = manifest.read(self.folder / str(candidate))
                assert content is not None, "it is sound"
                return candidate, content
            if jax.process_index() == 0:
                _log.warning("checkpoint %s: %s; it is not used", self.folder / str(candidate), fault)
            faults.append(f"step {candidate}: {fault}")
        found = "; ".join(faults) or "there is none"
        raise UserError(
            f"checkpoints: no usable one in {self.folder} ({found}); restore a copy, or delete it to start again"
        )

    def _saved(self, step: int) -> dict[str, Any]:
        """The saved tree as nested dicts and lists, with shapes and dtypes instead of arrays."""
        return _orbax().metadata(self.folder / str(step)).metadata

    def _load(self, step: int, abstract: PyTree, saved: PyTree) -> PyTree:
        """Restore into the abstract tree, which must match `saved`: the whole saved tree or a subtree of it. Of several
        copies of the state on the mesh, one is read."""
        folder = self.folder / str(step)
        there, here = _shapes(saved), _shapes(abstract)  # compared here because Orbax's own error is noisy
        if there != here:
            name = sorted(name for name in there | here if there.get(name) != here.get(name))[0]
            raise UserError(
                f"checkpoint {folder}: does not fit this configuration: {name} is {there.get(name, 'absent')} there "
                f"and {here.get(name, 'absent')} here; use the configuration it was saved with"
            )
        ocp, wanted = _orbax(), jax.tree.map(placed, abstract)
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            if jax.process_count() > 1:
                from gptjax.checkpoint import replicas

                if (axis := replicas.replica_axis(wanted)) is not None:
                    return replicas.restore(functools.partial(ocp.load, folder), wanted, saved, axis)
            return ocp.load(folder, wanted)

    def _finish(self, step: int, content: dict[str, Any], response: Any) -> None:
        """Wait for Orbax's commit, write the manifest, then delete older checkpoints. Runs on the background thread.

        The files to hash are divided among the processes. All wait for the manifest: a process that exited earlier
        would take the first process down with it."""
        folder, process, processes = self.folder / str(step), jax.process_index(), jax.process_count()
        try:
            response.result()
            with self._together(f"{step} is finished"):
                with self._together(f"{step} is read"):
                    files = manifest.digests(folder, process, processes)
                    if process:
                        manifest.write_digests(folder, process, files)
                if process == 0:
                    manifest.write(folder, content, files | manifest.read_digests(folder, processes))
                    kept = {*self._committed()[-self.max_to_keep :], *self._ranked()[: self.best]}
                    for old in set(self._committed()) - kept:
                        manifest.delete(self.folder / str(old))
            if not manifest.finished(folder):
                raise OSError("the first process could not finish it")
        except (OSError, ValueError) as error:  # tensorstore reports a full disk as ValueError
            with contextlib.suppress(OSError):
                self._tidy()
            raise self._failure(step, error) from error

    @contextlib.contextmanager
    def _together(self, what: str) -> Iterator[None]:
        """A barrier at the end of the block, reached after an error too. Unlike `processes.barrier` it works on any
        thread, because nothing is sent between devices. The timeout is longer than any disk needs: a lost process is
        detected by its heartbeat."""
        try:
            yield
        finally:
            meeting = _orbax().multihost.sync_global_processes
            asyncio.run(meeting(f"{self.folder}/{what}", operation_id=f"gptjax.{self._saves}", timeout=_DAY))

    def _tidy(self) -> None:
        """Create the folder; delete unfinished checkpoints and those later than the restored one."""
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in list(self.folder.iterdir()):
                step = int(path.name) if path.name.isdecimal() else None
                abandoned = step is not None and self._restored is not None and step > self._restored
                unfinished = step is not None and not manifest.finished(path)
                if abandoned or unfinished or _TEMPORARY in path.name:
                    manifest.delete(path)
        self._restored = None

    def _failure(self, step: int, error: Exception) -> UserError:
        finished = self._finished()
        last = f"the last good checkpoint is step {finished[-1]}" if finished else "there is no earlier checkpoint"
        return UserError(
            f"checkpoints: could not write step {step} to {self.folder} ({one_line(error)}); "
            f"free some space or make it writable; {last}"
        )


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    """Shape of each leaf by its path, such as "params/blocks/mlp/up"."""

    def shape(leaf: Any) -> tuple[int, ...]:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        return tuple(leaf.shape)

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): shape(leaf) for path, leaf in leaves}


def placed(leaf: Any) -> jax.ShapeDtypeStruct:
    """The abstract array with a sharding on devices: Orbax would use the sharding that one without was saved with.
    Those that `jax.eval_shape` returns have an abstract mesh, of the current one's shape."""
    sharding, mesh = leaf.sharding, jax.sharding.get_mesh()
    if sharding is None:
        sharding = SingleDeviceSharding(jax.local_devices()[0]) if mesh.empty else NamedSharding(mesh, PartitionSpec())
    elif isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh):
        sharding = NamedSharding(mesh, sharding.spec)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


@functools.cache
def _whole_small_arrays() -> contextlib.AbstractContextManager[Any]:
    """Context in which Orbax parts an array that several devices have a copy of among them only if each part has 1 MiB
    or more: every size of a part is a program to compile."""
    options = _orbax().options.ArrayOptions
    saving = options.Saving(min_slice_bytes_for_replica_parallel=2**20)
    return _orbax().Context(array_options=options(saving=saving))


def _orbax():
    """Import Orbax late, as it takes seconds, and drop its log: pages for every failed write, which it raises
    anyway."""
    from orbax.checkpoint import v1

    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    return v1
