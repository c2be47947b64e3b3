"""The hosts of a job, compared: which one keeps the others waiting?

All hosts take the same time for a step, as none gets past what they compute together. The slow one is known by its own
part of that time: what its devices waited for its input and its orders, while the others' waited for its devices.
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
"""A host is slow from so many times the usual own time ..."""
SHARE = 0.05
"""... if that is this share of a step more: below it nobody needs to know."""

WARM = 3
"""Calls whose times have what happens once: compiling, importing, opening files."""


def slowest(own: Sequence[float], step: float) -> int | None:
    """The process that holds up a job, if one does. own: seconds a step that each needs for itself; step: of a step.

    The usual time is the (lower) median: the one of two processes that is faster is right.
    """
    usual, worst = statistics.median_low(own), max(own)
    return own.index(worst) if worst > FACTOR * usual and worst - usual > SHARE * step else None


class StragglerDetector:
    """What the processes of a job tell each other about their times. All must make the same calls."""

    def __init__(self):
        self._names = processes.gather(socket.gethostname())
        self._told: jax.Array | None = None
        self._known: set[int] = set()
        self._calls = 0
        if jax.process_count() > 1:
            devices = np.array(sorted(jax.devices(), key=lambda device: (device.process_index, device.id)))
            self._mesh = jax.sharding.Mesh(devices.reshape(jax.process_count(), -1), ("process", "local"))
            self._everywhere = jax.jit(lambda x: x, out_shardings=NamedSharding(self._mesh, PartitionSpec()))

    def compare(self, times: Times) -> tuple[dict[str, float], str | None]:
        """What to record of the host that was slow at the call before, if one was, and, the first time, what to say.

        It is of the call before because nobody waits here: the times travel behind the steps that the devices have yet
        to do, and are looked at when they have long arrived.
        """
        if len(self._names) == 1:
            return {}, None
        self._calls += 1
        told, mine = self._told, [times.parts["input"] / times.steps, times.parts["host"] / times.steps, times.step]
        with jax.set_mesh(self._mesh):
            rows = NamedSharding(self._mesh, PartitionSpec("process"))
            self._told = self._everywhere(jax.make_array_from_process_local_data(rows, np.array([mine], np.float32)))
        if told is None or self._calls <= WARM:
            return {}, None
        table = np.asarray(told.addressable_data(0))  # [processes, (input, host, step)]
        own = table[:, :2].sum(1).tolist()
        slow = slowest(own, float(np.median(table[:, 2])))
        if slow is None:
            return {}, None
        known = slow in self._known
        self._known.add(slow)
        what = "its input" if table[slow, 0] > table[slow, 1] else "its host"
        usual = f"{statistics.median_low(own):.3g} s is usual"
        note = f"process {slow} on {self._names[slow]} is slow: {own[slow]:.3g} s a step go into {what}, {usual}"
        return {"slow_process": slow, "slow_seconds": own[slow]}, None if known else note
