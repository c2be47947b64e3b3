"""Detection of a straggler: the host that keeps the others waiting.

All hosts take the same time per step, because their collectives wait for one another. The straggler is recognised by
its own time: how long its devices waited for its input and dispatch, while the other hosts' devices waited for them.
"""

from __future__ import annotations

import socket
import statistics
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.distributed import processes
from gptjax.monitor.times import Times

FACTOR = 1.5
"""A host is slow if its own time exceeds the usual own time by this factor ..."""
SHARE = 0.05
"""... and by this fraction of a step; less is not worth a message."""

WARM = 3
"""Calls ignored at the start: their times include compilation, imports and the opening of files."""


def slowest(own: Sequence[float], step: float) -> int | None:
    """Index of the slow process, or None.

    own:  each process's own seconds per step
    step: seconds of a whole step

    The usual time is the lower median, so that of two processes the faster counts as usual.
    """
    usual, worst = statistics.median_low(own), max(own)
    return own.index(worst) if worst > FACTOR * usual and worst - usual > SHARE * step else None


class StragglerDetector:
    """Compare the times of a job's processes. All must make the same calls."""

    def __init__(self):
        self._names = processes.allgather(socket.gethostname())
        self._table: jax.Array | None = None
        self._known: set[int] = set()
        self._calls = 0
        if jax.process_count() > 1:
            devices = np.array(sorted(jax.devices(), key=lambda device: (device.process_index, device.id)))
            self._mesh = jax.sharding.Mesh(devices.reshape(jax.process_count(), -1), ("process", "local"))
            self._everywhere = jax.jit(lambda x: x, out_shardings=NamedSharding(self._mesh, PartitionSpec()))

    def compare(self, times: Times) -> tuple[dict[str, float], str | None]:
        """Metrics about the slow host of the previous call, if there was one, and a message the first time.

        The result is one call late so that nobody waits: the exchange is queued behind the steps that the devices have
        still to do, and is read at the next call, when it has long been done.
        """
        if len(self._names) == 1:
            return {}, None
        self._calls += 1
        table, mine = self._table, [times.parts["input"] / times.steps, times.parts["host"] / times.steps, times.step]
        with jax.set_mesh(self._mesh):
            by_process = NamedSharding(self._mesh, PartitionSpec("process"))
            self._table = self._everywhere(
                jax.make_array_from_process_local_data(by_process, np.array([mine], np.float32))
            )
        if table is None or self._calls <= WARM:
            return {}, None
        rows = np.asarray(table.addressable_data(0))  # [processes, (input, host, step)]
        own = rows[:, :2].sum(1).tolist()
        slow = slowest(own, float(np.median(rows[:, 2])))
        if slow is None:
            return {}, None
        known = slow in self._known
        self._known.add(slow)
        cause = "its input" if rows[slow, 0] > rows[slow, 1] else "its host"
        usual = f"{statistics.median_low(own):.3g} s is usual"
        note = f"process {slow} on {self._names[slow]} is slow: {cause} takes {own[slow]:.3g} s per step, {usual}"
        return {"slow_process": slow, "slow_seconds": own[slow]}, None if known else note
