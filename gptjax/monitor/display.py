"""Live display of a stage: progress, loss, speed, evaluations and samples.

    with Display("pretrain", steps=5000, tokens_per_step=4096, flops_per_token=6 * parameters) as display:
        display.update(step, loss=3.2)
        display.evaluation(step, loss=3.3)
        display.sample(step, "Once upon a time", " there was a model.")

On a terminal it is a progress bar with everything else printed above it; elsewhere, a plain line every few seconds.
"""

from __future__ import annotations

import math
import time
from typing import Self

import jax
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gptjax.monitor.chips import peak_flops

PLAIN_EVERY = 10.0
"""Seconds between lines without a terminal."""
SMOOTHING = 0.9
"""Decay per update of the moving average of the loss."""
SPEED_WINDOW = 10.0
"""Seconds over which the speed is averaged."""
INPUT_WAIT = 0.05
"""Fraction of a step spent waiting for input above which it is shown."""


class Display:
    """Progress display of one stage. Only the first process of a job prints; the others only measure.

    title:            name of the stage
    steps:            total number of steps
    tokens_per_step:  over all devices
    flops_per_token:  of training, forward and backward; for the model-FLOPs utilisation on devices of known peak
    start:            steps done before
    console:          None: standard output
    """

    def __init__(
        self,
        title: str,
        steps: int,
        tokens_per_step: int,
        flops_per_token: float | None = None,
        start: int = 0,
        console: Console | None = None,
    ):
        self.title = title
        self.steps = steps
        self.tokens_per_step = tokens_per_step
        self.flops_per_token = flops_per_token
        self.console = console or Console(highlight=False, quiet=jax.process_index() != 0)
        self.step = start
        self._peak = peak_flops(jax.devices()[0].device_kind)
        self._loss = self._weight = 0.0  # moving average and its bias correction
        self._more: dict[str, float] = {}
        self._validation: float | None = None
        self._waiting = 0.0
        self._first: tuple[float, int] | None = None  # (time, step) of the first update, after compilation
        self._last: tuple[float, int] | None = None  # (time, step) from which the speed is measured
        self._seconds_per_step: float | None = None
        self._printed = 0.0
        self._live = Live(
            console=self.console, get_renderable=self._bar, refresh_per_second=4, vertical_overflow="visible"
        )

    def __enter__(self) -> Self:
        if self.console.is_interactive:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_) -> None:
        if self._live.is_started:
            self._live.stop()  # restores the cursor, also after Ctrl-C
        elif self._weight:
            self._line()

    @property
    def tokens_per_second(self) -> float | None:
        """Recent tokens per second over all devices, without evaluation and sampling. None: not yet known."""
        return self.tokens_per_step / self._seconds_per_step if self._seconds_per_step else None

    @property
    def utilisation(self) -> float | None:
        """Model-FLOPs utilisation, from 0 to 1: the model's FLOP/s divided by the devices' peak. None: unknown."""
        speed = self.tokens_per_second
        if speed is None or self.flops_per_token is None or self._peak is None:
            return None
        return speed * self.flops_per_token / (self._peak * jax.device_count())

    def update(self, step: int, loss: float, waiting: float = 0.0, **more: float) -> None:
        """Show that `step` steps are done, the last one with this loss and further metrics. Call it every step or every
        few.

        waiting: fraction of these steps that the devices waited for input, from 0 to 1
        """
        now = time.monotonic()
        self._first = self._first or (now, step)
        self._last = self._last or (now, step)
        if step > self._last[1]:
            seconds, steps = now - self._last[0], step - self._last[1]
            old = math.exp(-seconds / SPEED_WINDOW) if self._seconds_per_step else 0.0
            self._seconds_per_step = old * (self._seconds_per_step or 0.0) + (1 - old) * seconds / steps
            self._last = (now, step)
        self.step = max(self.step, step)
        self._more = {name: value for name, value in more.items() if value != loss}  # loss is shown averaged
        self._waiting = waiting
        self._loss = SMOOTHING * self._loss + (1 - SMOOTHING) * loss
        self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        if not self._live.is_started and now - self._printed >= PLAIN_EVERY:
            self._line()

    def evaluation(self, step: int, loss: float) -> None:
        """Show the validation loss at this step."""
        self._validation = loss
        self._show(Text(f"step {step:,}  validation loss {loss:.4f}"))
        self._restart(step)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Show a prompt and the model's continuation at this step."""
        self._show(
            Text.assemble((f"step {step:,} writes\n", "dim"), (_visible(prompt), "bold"), _visible(text).rstrip())
        )
        self._restart(step)

    def note(self, text: str) -> None:
        """Print a line that stays on the screen."""
        self._show(Text(_visible(text)))

    def _restart(self, step: int) -> None:
        """Restart the speed measurement here: the time until now was not spent on training."""
        if self._last is not None:
            self._last = (time.monotonic(), step)

    def _line(self) -> None:
        self._printed = time.monotonic()
        self._show(Text(f"{self.title}  step {self.step:,}/{self.steps:,}  {self._status()}"))

    def _show(self, text: Text) -> None:
        encoding = self.console.encoding
        text.plain = text.plain.encode(encoding, "replace").decode(encoding)  # no UnicodeEncodeError may end a run
        self.console.print(text, soft_wrap=not self._live.is_started)

    def _status(self) -> str:
        parts = [f"loss {self._loss / self._weight:.3f}"] if self._weight else ["compiling"]
        parts += [f"{name} {value:.3g}" for name, value in self._more.items()]
        if self._validation is not None:
            parts.append(f"validation {self._validation:.3f}")
        if (speed := self.tokens_per_second) is not None:
            parts.append(f"{_short(speed)} tokens/s")
        if (utilisation := self.utilisation) is not None:
            parts.append(f"MFU {utilisation:.1%}")
        if self._waiting > INPUT_WAIT:
            parts.append(f"input wait {self._waiting:.0%}")
        if self._first is not None and self._first[1] < self.step < self.steps:
            pace = (time.monotonic() - self._first[0]) / (self.step - self._first[1])
            parts.append(f"{_clock(pace * (self.steps - self.step))} left")
        return "  ".join(parts)

    def _bar(self) -> Group:
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        progress = ProgressBar(total=self.steps, completed=self.step)
        bar.add_row(Text(self.title, "bold"), progress, Text(f"{self.step:,}/{self.steps:,}"))
        return Group(bar, Text(self._status(), "cyan"))


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
