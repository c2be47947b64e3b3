"""Metrics of an interrupted and resumed run are those of one that never stopped. The display is never in the way."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from gptjax.monitor import display
from gptjax.monitor.display import Display
from gptjax.monitor.metrics import MetricsLogger, WandB, read
from gptjax.types import UserError


def without_time(folder) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "time"} for line in read(folder)]


def record(folder, stage, steps, resumed=0):
    with MetricsLogger(folder) as records:
        records.resume(stage, resumed)
        for step in steps:
            records.log(step, stage, loss=1 / (step + 1), tokens=step)
            if step % 4 == 0:
                records.text(step, f"{stage}/sample", f'é "{step}"\n')


def test_a_resumed_run_has_each_step_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record(tmp_path / "whole", "pretrain", range(1, 10))
    record(tmp_path / "whole", "chat", range(1, 6))

    record(tmp_path / "cut", "pretrain", range(1, 10))
    record(tmp_path / "cut", "chat", range(1, 4))
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "stage": "chat", "lo')
    record(tmp_path / "cut", "chat", range(3, 6), resumed=2)

    assert without_time(tmp_path / "cut") == without_time(tmp_path / "whole")
    assert all(json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines())
    for stage, steps in ("pretrain", range(1, 10)), ("chat", range(1, 6)):
        board = EventAccumulator(str(tmp_path / "cut" / "tensorboard" / stage)).Reload()
        assert [event.step for event in board.Scalars("loss")] == list(steps)
        np.testing.assert_allclose([event.value for event in board.Scalars("loss")], [1 / (s + 1) for s in steps])
        assert "sample/text_summary" in board.Tags()["tensors"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line.replace(b'"stage"', b'"stbge"'),
        lambda line: line.replace(b'"step"', b'"stap"'),
        lambda line: bytes([line[0] ^ 1]) + line[1:],
        lambda line: line.replace(b": 2", b": [2]"),
        lambda line: line[:20],
        lambda line: bytes(len(line)),
        lambda line: b"\xff\r" + line,
        lambda line: b"[" * 100_000,
        lambda line: b"5",
        lambda line: b"",
    ],
)
def test_damaged_lines_are_named_and_kept_aside_and_the_run_goes_on(tmp_path, caplog, damage):
    for step in range(1, 5):
        with MetricsLogger(tmp_path) as records:
            records.resume("train", step - 1)
            records.log(step, "train", loss=1.0 / step)
    path = tmp_path / "metrics.jsonl"
    sound = read(tmp_path)
    lines = path.read_bytes().splitlines()
    lines[1] = damage(lines[1])
    path.write_bytes(b"\n".join(lines) + b'\n{"step": 5, "sta')  # the last was cut by a kill
    assert read(tmp_path) == [sound[0], *sound[2:]]
    for _ in range(2):  # once: it is then as it should be
        with MetricsLogger(tmp_path) as records:
            records.resume("train", 4)
            records.log(5, "train", loss=0.2)
        assert [line["step"] for line in read(tmp_path)] == [1, 3, 4, 5]
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == lines[1] + b"\n"
    (message,) = (record.getMessage() for record in caplog.records)
    assert message == f"{path}: damaged in 1 lines (2), which are now in {tmp_path / 'metrics.damaged.jsonl'}"


def test_any_number_is_recorded_and_every_line_is_json(tmp_path):
    with MetricsLogger(tmp_path) as records:
        records.log(1, "pretrain", a=jnp.float32(0.5), b=np.int64(3), c=jax.device_put(2.0), d=float("nan"), e=-jnp.inf)
    (line,) = read(tmp_path)
    assert line.pop("time") > 1.7e9
    assert line == {"step": 1, "stage": "pretrain", "a": 0.5, "b": 3.0, "c": 2.0, "d": None, "e": None}
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert read(tmp_path / "elsewhere") == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_full_disk_is_a_user_error(tmp_path):
    with MetricsLogger(tmp_path / "run") as records:
        records._file.close()
        records._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
        with pytest.raises(UserError, match=r"cannot write to .*run .No space left"):
            records.log(1, "pretrain", loss=1.0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file/run"):
        MetricsLogger(tmp_path / "file" / "run")


KILLED = """
import os, signal, sys
from gptjax.monitor.metrics import MetricsLogger
records = MetricsLogger(sys.argv[1])
records.log(1, "pretrain", loss=1.0)
records.text(1, "pretrain/sample", "x" * 100_000)
assert "orbax" not in sys.modules
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_logged_survives_a_kill(tmp_path):
    run = subprocess.run([sys.executable, "-c", KILLED, tmp_path], env={**os.environ}, capture_output=True, timeout=60)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert [len(line.get("sample", "")) for line in read(tmp_path)] == [0, 100_000]


def test_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install"):
        MetricsLogger(tmp_path, WandB())

    calls = []
    run = types.SimpleNamespace(
        log=calls.append, define_metric=lambda *_, **__: None, finish=lambda: calls.append("finish")
    )
    stub = types.SimpleNamespace(init=lambda **options: calls.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    for step in (1, 2):
        with MetricsLogger(tmp_path / "small", WandB(project="p", tags=("a",)), config={"width": 8}) as records:
            records.log(step, "chat", loss=2.0)
    assert calls[0] == calls[3]  # the same id, so the run goes on
    assert calls[0]["id"]
    assert calls[0] | {"project": "p", "name": "small", "resume": "allow", "config": {"width": 8}} == calls[0]
    assert calls[1] == {"chat/step": 1, "chat/loss": 2.0}
    assert calls[2] == "finish"


@pytest.fixture
def clock(monkeypatch):
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(display, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_display_measures_training_alone(clock, monkeypatch):
    monkeypatch.setattr(display, "peak_flops", lambda _: 1e6)
    shown = Display("pretrain", 100, 1000, flops_per_token=2000, console=Console(file=io.StringIO()))
    shown.begin(10)
    clock.now += 60
    shown.update(11, loss=4.0)
    assert shown.tokens_per_second is None  # the first interval is compilation
    for step in range(12, 40):
        clock.now += 0.5
        if step % 3 == 0:
            shown.update(step, loss=4.0)
        if step % 5 == 0:
            with shown.phase("evaluating"):
                clock.now += 30
                shown.evaluation(step, 4.0)
            shown.update(step - 1, loss=4.0)  # fetched late
    assert shown.tokens_per_second == pytest.approx(2000)
    assert shown.utilisation == pytest.approx(2000 * 2000 / (1e6 * jax.device_count()))


@pytest.mark.parametrize("log_every", [1, 10])
def test_the_time_left_is_steady(clock, log_every):
    """At every look, from the second evaluation on, it is the truth but for a twentieth; between two looks it falls."""
    rng = np.random.default_rng(0)
    seconds, steps = 3.0, 1000
    pauses = {"evaluating": ((100, 250), 60.0), "sampling": ((100,), 30.0), "saving": ((250,), 20.0)}
    durations = seconds * rng.choice([0.8, 0.9, 1.0, 1.1, 1.2], steps)
    shown = Display(
        "pretrain",
        steps,
        1000,
        pauses={kind: every for kind, (every, _) in pauses.items()},
        console=Console(file=io.StringIO()),
    )
    due = {
        kind: [step for step in range(1, steps + 1) if any(step % n == 0 for n in every)]
        for kind, (every, _) in pauses.items()
    }
    truth = durations.sum() + sum(len(due[kind]) * length for kind, (_, length) in pauses.items())
    shown.begin(0)
    start, estimates = clock.now, []

    def wait(duration: float) -> None:
        end = clock.now + duration
        while clock.now < end:
            clock.now = min(clock.now + 0.25, end)
            if (left := re.search(r"([\d:]+) left", shown._status())) is not None:
                *hours, minutes, second = map(int, left[1].split(":"))
                left = (hours[0] if hours else 0) * 3600 + minutes * 60 + second
                estimates.append((clock.now - start, clock.now - start + left))

    for step, duration in enumerate(durations, 1):
        wait(duration)
        if step % log_every == 0:
            shown.update(step, loss=4.0)
        for kind, (_, length) in pauses.items():
            if step in due[kind]:
                with shown.phase(kind):
                    wait(length)
    late = np.array([end for at, end in estimates if at > 400])
    assert np.abs(late / truth - 1).max() < 0.05
    (left,) = {round(end - at) for at, end in estimates if 310 < at < 350}  # in the first pause, whose end is unknown
    assert left == pytest.approx(durations[100:].sum(), rel=0.05)
    early = np.array([end for at, end in estimates if 60 < at < 300])  # nothing is known of the pauses yet
    assert early.max() / early.min() < 1.15


def test_the_loss_is_of_the_last_steps_and_goes_on_after_a_resume():
    def shown(**options) -> Display:
        return Display("pretrain", 1000, 1000, console=Console(file=io.StringIO()), **options)

    losses = [(step, 5.0 - step / 100 + (step % 20 == 0)) for step in range(10, 400, 10)]
    whole, cut = shown(), shown()
    whole.begin(0)
    for step, loss in losses:
        whole.update(step, loss=loss)
    assert whole._loss / whole._weight == pytest.approx(np.mean([loss for _, loss in losses[-4:]]), abs=0.2)
    cut.begin(200, [line for line in losses if line[0] <= 200], 3.5)
    assert re.fullmatch(r"compiling 0:00  loss 3\.\d+  validation 3\.500", cut._status())
    for step, loss in losses:
        if step > 200:
            cut.update(step, loss=loss)
    assert cut._status() == whole._status() + "  validation 3.500"


def test_the_display_never_waits_for_the_devices(clock):
    """It counts the steps that are done, whatever their metrics are fetched for."""

    class Result:
        done = False

        def is_ready(self) -> bool:
            return self.done

    shown = Display("pretrain", 100, 1000, console=Console(file=io.StringIO()))
    shown.begin(0)
    assert shown._status() == "compiling 0:00"
    results = [Result() for _ in range(10)]
    for step, result in enumerate(results, 1):
        shown.dispatched(step, result)
    shown._look()
    assert (shown.step, shown._status()) == (0, "")
    for step, result in enumerate(results[:5], 1):
        clock.now += 8
        result.done = True
        shown._look()
        assert shown.step == step
    assert shown._status() == "125 tokens/s  12:40 left"


def test_what_takes_its_time_shows_a_clock_without_a_terminal(monkeypatch):
    output = io.StringIO()
    monkeypatch.setattr(display, "PLAIN_EVERY", 0.5)
    with Display("chat", 60, 10, console=Console(file=output)) as shown:
        shown.begin(3)
        with shown.phase("evaluating"):
            time.sleep(2.2)
    lines = output.getvalue().splitlines()  # after 0.5 and 1.5 s, and not after 1.0
    assert [re.sub(r"\d:\d\d", "CLOCK", line) for line in lines] == ["chat  step 3/60  evaluating CLOCK"] * 2


def test_display_without_a_terminal(clock):
    output = io.StringIO()
    with Display("chat", 60, 10, console=Console(file=output, width=40)) as shown:
        shown.begin(0)
        shown.dispatched(1, jnp.zeros(()))
        for step in range(1, 61):
            clock.now += 1
            shown.update(step, loss=2.0, rate=3e-4, cross_entropy=2.0)
            if step == 30:
                shown.evaluation(step, 1.5)
                shown.sample(step, "Say [b]hi[/b]", "\x1b[31mhi\x07")
    lines = output.getvalue().splitlines()
    progress = [line for line in lines if line.startswith("chat")]
    assert len(progress) == 7
    assert progress[-1] == "chat  step 60/60  loss 2.000  rate 0.0003  validation 1.500  10 tokens/s"
    assert progress[1] == "chat  step 11/60  loss 2.000  rate 0.0003  10 tokens/s  0:49 left"
    assert "step 30  validation loss 1.5000" in lines
    assert "Say [b]hi[/b]�[31mhi�" in lines


@pytest.mark.parametrize("width", [20, 100])
def test_display_on_a_terminal(width):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="")
    console = Console(file=output, force_terminal=True, width=width, color_system=None)

    def interrupted():
        with Display("pretrain", 1000, 10, console=console) as shown:
            shown.begin(0)
            shown.dispatched(500, jnp.zeros(()))
            shown.update(500, loss=2.0)
            shown.note("é a note")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    output.flush()
    text = output.buffer.getvalue().decode()
    assert "? a note" in text  # this terminal has no é
    assert "500/1,000" in text
    assert "loss 2.000" in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") >= 0  # the cursor is given back
    assert all(len(line) <= width for line in re.split(r"\x1b\[[?\d;]*[A-Za-z]|[\r\n]", text))
