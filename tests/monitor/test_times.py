"""The parts of a loop's time add up, and host time counts only while the devices wait."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import pytest

from gptjax.monitor import times
from gptjax.monitor.times import Clock, memory


class Devices:
    """A clock to turn by hand, and devices that are busy until some moment of it."""

    def __init__(self, monkeypatch):
        self.now = self.worked = self.until = 0.0
        clock = types.SimpleNamespace(perf_counter=lambda: self.now, thread_time=lambda: self.worked)
        monkeypatch.setattr(times, "time", clock)

    def run(self, clock: Clock, seconds: float, call: float = 0.0) -> None:
        """Call a step of that length; the call takes the host `call` seconds."""
        self.wait(call, worked=call)
        self.until = until = max(self.until, self.now) + seconds
        clock.dispatched([types.SimpleNamespace(is_ready=lambda: self.now >= until)])

    def wait(self, seconds: float, worked: float = 0.0) -> None:
        self.now, self.worked = self.now + seconds, self.worked + worked

    def fetch(self) -> None:
        self.now = max(self.now, self.until)


@pytest.mark.parametrize(
    ("input_", "step", "call", "part"),
    [(0.3, 1.0, 0.1, "device"), (3.0, 1.0, 0.1, "input"), (0.0, 1.0, 2.0, "host")],
)
def test_a_step_takes_as_long_as_what_the_others_wait_for(input_, step, call, part, monkeypatch):
    """Input and devices side by side: the slower of them gets the time, the sum of the parts is that on the wall."""
    devices = Devices(monkeypatch)
    clock = Clock(0, tokens=10, flops=6.0)
    for number in range(1, 41):
        clock.lap("host")
        devices.wait(input_)
        clock.lap("input")
        devices.run(clock, step, call)
        if number == 20:
            devices.fetch()
            clock.lap("device")
            clock.take(number)
            start = devices.now
    devices.fetch()
    clock.lap("device")
    found = clock.take(40)
    values = found.values()
    wall = (devices.now - start) / 20
    assert values["time_step"] == pytest.approx(wall)
    assert sum(values[f"time_{name}"] for name in times.TRAINING) == pytest.approx(wall)
    assert values[f"time_{part}"] > 0.7 * wall
    assert values["tokens_per_second"] == pytest.approx(10 / wall)
    assert found.waiting == pytest.approx(values["time_input"] / wall)


def test_a_call_is_host_time_only_where_the_devices_had_nothing_to_do(monkeypatch):
    """A call that works while the previous step runs; one with idle devices; one that begins 2 s after they went idle,
    without a lap between."""
    devices = Devices(monkeypatch)
    clock = Clock(0, tokens=10, flops=6.0)
    devices.run(clock, 10.0)
    devices.run(clock, 10.0, call=3.0)
    assert dict(clock.take(2).parts) == {**dict.fromkeys((*times.TRAINING, *times.BESIDE), 0.0), "device": 3.0}
    devices.fetch()
    clock.lap("device")
    clock.take(3)
    devices.run(clock, 10.0, call=3.0)
    assert clock.take(4).parts["host"] == 3.0
    devices.fetch()
    clock.lap("device")
    devices.wait(2.0)
    devices.run(clock, 10.0, call=2.0)
    parts = clock.take(5).parts
    assert (parts["host"], parts["device"]) == (2.0, 12.0)


def test_an_interval_that_ends_while_the_devices_are_busy_is_theirs(monkeypatch):
    """Whatever the host did in it; what follows is the host's."""
    devices = Devices(monkeypatch)
    clock = Clock(0, tokens=10, flops=6.0)
    devices.run(clock, 10.0)
    for part, seconds in (("host", 2.0), ("input", 3.0), ("checkpoint", 4.0), ("host", 6.0), ("input", 1.0)):
        devices.wait(seconds)
        clock.lap(part)
    parts = clock.take(1).parts
    assert {name: parts[name] for name in ("device", "host", "input", "checkpoint")} == {
        "device": 9.0,
        "host": 6.0,
        "input": 1.0,
        "checkpoint": 0.0,
    }


def test_what_is_beside_the_steps_is_apart(monkeypatch):
    devices = Devices(monkeypatch)
    clock = Clock(5, tokens=10, flops=6.0)
    devices.wait(2.0)
    clock.lap("input")  # the first batch
    devices.run(clock, 1.0, call=30.0)  # compilation
    devices.fetch()
    clock.lap("device")
    for part, seconds in (("evaluation", 7.0), ("checkpoint", 3.0)):
        devices.wait(seconds)
        clock.lap(part)
    values = clock.take(6).values()
    expected = {"start": 32.0, "input": 0.0, "host": 0.0, "device": 1.0, "evaluation": 7.0, "checkpoint": 3.0}
    assert {name: values[f"time_{name}"] for name in expected} == pytest.approx(expected)
    assert values["time_step"] == pytest.approx(1.0)


def test_utilisation_is_of_all_devices(monkeypatch):
    monkeypatch.setattr(times, "peak_flops", lambda kind: 1e3)
    devices = Devices(monkeypatch)
    clock = Clock(0, tokens=10, flops=600.0)
    devices.run(clock, 1.0)
    devices.fetch()
    clock.lap("device")
    assert clock.take(1).values()["mfu"] == pytest.approx(6e3 / (1e3 * jax.device_count()))


def test_memory_is_what_the_backend_and_the_system_count(monkeypatch):
    held = jnp.ones(64 * 2**20, jnp.int8).block_until_ready()
    found = memory()
    assert held.nbytes < found["memory_process"] < 2**38
    assert "memory_device" not in found  # a CPU does not count
    used = [{"peak_bytes_in_use": 5}, {"peak_bytes_in_use": 7}, None]
    devices = [types.SimpleNamespace(memory_stats=lambda stats=stats: stats) for stats in used]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert memory()["memory_device"] == 7
