"""Live display of a stage: progress, loss, speed, time left, evaluations and samples.

    with Display("pretrain", steps=5000, tokens_per_step=4096, flops_per_token=6 * parameters) as display:
        display.begin(0)
        ...
        display.dispatched(step, metrics["loss"])  # every step; never waits for the devices
        display.update(step, loss=3.2)  # every few
        with display.phase("evaluating"):
            ...
            display.evaluation(step, loss=3.3)
            display.sample(step, "Once upon a time", " there was a model.")

On a terminal it is a progress bar with everything else printed above it; elsewhere, a plain line every few seconds.
Everything that takes its time, such as compilation, has a clock.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import math
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import jax
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gptjax.monitor.chips import peak_flops
from gptjax.types import PyTree

PLAIN_EVERY = 10.0
"""Seconds between lines without a terminal."""
REFRESH = 0.25
"""Seconds between looks at the devices' progress."""
SMOOTHING = 20.0
"""Steps over which the loss is averaged (time constant of the moving average)."""
INTERVAL, INTERVALS = 4.0, 15
"""Minimum duration in seconds of an interval whose speed is measured, and number of intervals in the median."""
INPUT_WAIT = 0.05
"""Fraction of a step spent waiting for input above which it is shown."""


class Pace:
    """Speed and remaining time of a stage: the median speed of recent intervals of training, plus the pauses to come.

    step:   steps done before
    steps:  total number of steps
    pauses: each kind of pause, such as {"saving": (250,)}, follows the multiples of these numbers, and the last step
    """

    def __init__(self, step: int, steps: int, pauses: Mapping[str, Sequence[int]]):
        self._step, self._steps, self._pauses = step, steps, pauses
        self._last: tuple[float, int] | None = None  # (time, step) at the start of the interval
        self._intervals: collections.deque[float] = collections.deque(maxlen=INTERVALS)
        self._durations: dict[str, list[float]] = {kind: [] for kind in pauses}
        self._paused: dict[str, int] = {}  # step of the last pause
        self._end: float | None = None  # estimated time of the stage's end
        self._pause: tuple[float, float] | None = None  # start and usual duration of the pause under way

    @property
    def seconds(self) -> float | None:
        """Seconds per training step. None: not yet known."""
        return statistics.median(self._intervals) if self._intervals else None

    def reached(self, step: int) -> None:
        """Note that the devices have done `step` steps."""
        now, self._step = time.monotonic(), step
        if self._last is None:
            self._last = (now, step)  # compilation is over
        elif step > self._last[1] and now - self._last[0] >= INTERVAL:
            self._intervals.append((now - self._last[0]) / (step - self._last[1]))
            self._last = (now, step)
        self._estimate(now)

    def pausing(self, kind: str) -> None:
        """Note the start of a pause."""
        self._pause = (time.monotonic(), self._usual(kind))

    def paused(self, kind: str) -> None:
        """Note the end of a pause, which is not part of the interval."""
        assert self._pause is not None, "it has started"
        duration, self._pause = time.monotonic() - self._pause[0], None
        if self._end is not None:
            self._end += duration
        if self._last is not None:
            self._last = (self._last[0] + duration, self._last[1])
        if kind in self._pauses:
            self._durations[kind].append(duration)
            self._paused[kind] = self._step
            self._estimate(time.monotonic())

    def left(self) -> float | None:
        """Seconds to the end of the stage; it counts down between two steps, and in a pause for as long as such a pause
        usually takes. None: not yet known."""
        now = time.monotonic()
        if self._pause is not None:
            now = min(now, sum(self._pause))
        return None if self._end is None else max(self._end - now, 0.0)

    def _estimate(self, now: float) -> None:
        if self.seconds is not None:
            pauses = sum(self._due(kind) * self._usual(kind) for kind in self._pauses)
            self._end = now + self.seconds * (self._steps - self._step) + pauses

    def _due(self, kind: str) -> int:
        """Number of pauses from this step on."""
        every = self._pauses[kind]
        last = all(self._steps % n for n in every)
        done = self._paused.get(kind) == self._step
        return _multiples(self._steps, every) - _multiples(max(self._step - 1, 0), every) + last - done

    def _usual(self, kind: str) -> float:
        durations = self._durations.get(kind, [])
        return statistics.median(durations[1:][-5:] or durations or [0.0])  # the first one compiles


class Display:
    """Progress display of one stage. Only the first process of a job prints; the others only measure.

    title:            name of the stage
    steps:            total number of steps
    tokens_per_step:  over all devices
    flops_per_token:  of training, forward and backward; for the model-FLOPs utilisation on devices of known peak
    pauses:           the pauses to expect, as in `Pace`
    console:          None: standard output
    """

    def __init__(
        self,
        title: str,
        steps: int,
        tokens_per_step: int,
        flops_per_token: float | None = None,
        pauses: Mapping[str, Sequence[int]] | None = None,
        console: Console | None = None,
    ):
        self.title = title
        self.steps = steps
        self.tokens_per_step = tokens_per_step
        self.flops_per_token = flops_per_token
        self.console = console or Console(highlight=False, quiet=jax.process_index() != 0)
        self.step = 0
        self._pauses = pauses or {}
        self._pace = Pace(0, steps, self._pauses)
        self._peak = peak_flops(jax.devices()[0].device_kind)
        self._loss = self._weight = 0.0  # moving average and its bias correction
        self._averaged = 0  # step of the newest loss in the average
        self._more: dict[str, float] = {}
        self._validation: float | None = None
        self._waiting = 0.0
        self._phase: tuple[str, float] | None = ("preparing", time.monotonic())
        self._pending: collections.deque[tuple[int, Any]] = collections.deque()  # steps, with a result of each
        self._lock = threading.Lock()
        self._shown: float | None = None  # time of the last line of an update
        self._quiet, self._patience = time.monotonic(), PLAIN_EVERY  # time of the last line, seconds to the next
        self._ended = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="display", daemon=True)
        self._live = Live(
            console=self.console, get_renderable=self._bar, refresh_per_second=1 / REFRESH, vertical_overflow="visible"
        )

    def __enter__(self) -> Self:
        if self.console.is_interactive:
            self._live.start(refresh=True)
        else:
            self._ticker.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        if self._live.is_started:
            self._live.stop()  # restores the cursor, also after Ctrl-C
        elif self._weight:
            self._line()

    @property
    def tokens_per_second(self) -> float | None:
        """Recent tokens per second over all devices, without evaluation and sampling. None: not yet known."""
        return self.tokens_per_step / self._pace.seconds if self._pace.seconds else None

    @property
    def utilisation(self) -> float | None:
        """Model-FLOPs utilisation, from 0 to 1: the model's FLOP/s divided by the devices' peak. None: unknown."""
        speed = self.tokens_per_second
        if speed is None or self.flops_per_token is None or self._peak is None:
            return None
        return speed * self.flops_per_token / (self._peak * jax.device_count())

    def begin(self, step: int, losses: Sequence[tuple[int, float]] = (), validation: float | None = None) -> None:
        """Show that the training continues after `step` steps, which had these training losses and validation loss,
        and that the next step is being compiled."""
        with self._lock:
            self._pending.clear()
            self.step, self._pace = step, Pace(step, self.steps, self._pauses)
        self._loss = self._weight = 0.0
        self._averaged = 0
        for at, loss in losses:
            self._average(at, loss)
        self._validation = validation
        self._phase = ("compiling", time.monotonic())

    def dispatched(self, step: int, result: PyTree) -> None:
        """Note that a step was dispatched: it is done when this array of its results is ready."""
        self._pending.append((step, result))
        if self._phase is not None and self._phase[0] == "compiling":
            self._phase = None

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Context of an activity between the steps, such as "evaluating". It is shown with its duration."""
        before, start = self._phase, time.monotonic()
        with self._lock:
            self._pace.pausing(name)
        self._phase = (name, start)
        self._quiet, self._patience = start, PLAIN_EVERY
        try:
            yield
        finally:
            self._phase = before
            with self._lock:
                self._pace.paused(name)

    def update(self, step: int, loss: float, waiting: float = 0.0, **more: float) -> None:
        """Show that `step` steps are done, the last one with this loss and further metrics. Call it every step or every
        few.

        waiting: fraction of these steps that the devices waited for input, from 0 to 1
        """
        self._look(step)
        self._more = {name: value for name, value in more.items() if value != loss}  # loss is shown averaged
        self._waiting = waiting
        self._average(step, loss)
        now = time.monotonic()
        if not self._live.is_started and (self._shown is None or now - self._shown >= PLAIN_EVERY):
            self._shown = now
            self._line()
        self._quiet, self._patience = now, PLAIN_EVERY

    def evaluation(self, step: int, loss: float) -> None:
        """Show the validation loss at this step."""
        self._validation = loss
        self._print(Text(f"step {step:,}  validation loss {loss:.4f}"))

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Show a prompt and the model's continuation at this step."""
        self._print(
            Text.assemble((f"step {step:,} writes\n", "dim"), (_visible(prompt), "bold"), _visible(text).rstrip())
        )

    def note(self, text: str) -> None:
        """Print a line that stays on the screen."""
        self._print(Text(_visible(text)))

    def _average(self, step: int, loss: float) -> None:
        old = math.exp(-max(step - self._averaged, 1) / SMOOTHING)
        self._loss, self._weight = old * self._loss + (1 - old) * loss, old * self._weight + (1 - old)
        self._averaged = step

    def _look(self, step: int = 0) -> None:
        """Look how many steps the devices have done: `step` at least."""
        with self._lock:
            while self._pending and (self._pending[0][0] <= step or self._pending[0][1].is_ready()):
                step = max(step, self._pending.popleft()[0])
            if step > self.step:
                self.step = step
                self._pace.reached(step)

    def _tick(self) -> None:
        """Without a terminal: print a line when nothing happened for a while, twice as long each time."""
        while not self._ended.wait(REFRESH):
            self._look()
            if time.monotonic() - self._quiet >= self._patience:
                self._quiet, self._patience = time.monotonic(), 2 * self._patience
                self._line()

    def _line(self) -> None:
        self._print(Text(f"{self.title}  step {self.step:,}/{self.steps:,}  {self._status()}"))

    def _print(self, text: Text) -> None:
        encoding = self.console.encoding
        text.plain = text.plain.encode(encoding, "replace").decode(encoding)  # no UnicodeEncodeError may end a run
        self.console.print(text, soft_wrap=not self._live.is_started)

    def _status(self) -> str:
        parts = [f"{self._phase[0]} {_clock(time.monotonic() - self._phase[1])}"] if self._phase else []
        parts += [f"loss {self._loss / self._weight:.3f}"] if self._weight else []
        if self._phase is None:
            parts += [f"{name} {value:.3g}" for name, value in self._more.items()]
        if self._validation is not None:
            parts.append(f"validation {self._validation:.3f}")
        if (speed := self.tokens_per_second) is not None:
            parts.append(f"{_short(speed)} tokens/s")
        if (utilisation := self.utilisation) is not None:
            parts.append(f"MFU {utilisation:.1%}")
        if self._waiting > INPUT_WAIT:
            parts.append(f"input wait {self._waiting:.0%}")
        if (left := self._pace.left()) is not None and self.step < self.steps:
            parts.append(f"{_clock(left)} left")
        return "  ".join(parts)

    def _bar(self) -> Group:
        self._look()
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        progress = ProgressBar(total=self.steps, completed=self.step)
        bar.add_row(Text(self.title, "bold"), progress, Text(f"{self.step:,}/{self.steps:,}"))
        return Group(bar, Text(self._status(), "cyan"))


def _multiples(number: int, divisors: Sequence[int]) -> int:
    """Count of the numbers from 1 to `number` that are multiples of one of the divisors, by inclusion and exclusion."""
    groups = (group for size in range(1, len(divisors) + 1) for group in itertools.combinations(divisors, size))
    return sum(number // math.lcm(*group) * (-1) ** (len(group) + 1) for group in groups)


def _visible(text: str) -> str:
    """Replace control characters, which could steer the terminal: a model can write anything."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text.expandtabs(4))


def _short(number: float) -> str:
    """Format a number with a unit prefix: 950, 41.2k, 1.3M."""
    for unit in ("", "k", "M"):
        if number < 999.5:
            return f"{number:.0f}" if not unit else f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:.1f}G"


def _clock(seconds: float) -> str:
    """Format hours, minutes and seconds: 0:07, 12:34, 3:25:45."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
