"""Numbers for Prometheus, in its text format. Times are those of the engine: they do not depend on readers."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from gptjax.inference.engine import Engine, Generation

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
TOKENS = tuple(2**i for i in range(18))
ENGINE: dict[str, tuple[str, str, Callable[[Engine], float]]] = {
    "rows": ("gauge", "Texts that can be written at a time", lambda e: e.rows),
    "requests_running": ("gauge", "Texts that have a row", lambda e: e.active),
    "requests_waiting": ("gauge", "Texts that wait", lambda e: e.waiting),
    "pages_used_ratio": ("gauge", "Part of the pages that have readers", lambda e: used(e)),
    "decode_calls_total": ("counter", "Calls of the decoding program", lambda e: e.decode_calls),
    "decode_rows_total": (
        "counter",
        "Texts in these calls; per call, the batch",
        lambda e: e.decode_rows,
    ),
    "tokens_written_total": ("counter", "Tokens written", lambda e: e.written),
    "passes_total": ("counter", "Passes per text; tokens per pass is the accepted length", lambda e: e.passes),
    "prefix_tokens_reused_total": ("counter", "Tokens of prompts found in pages", lambda e: e.pages.hits),
    "preemptions_total": ("counter", "Texts that gave up their pages", lambda e: e.preempted),
}
"""Name -> type, meaning and value, read from an engine."""
PROTOCOL: dict[str, tuple[str, str, Callable[[Engine], float]]] = {
    "num_requests_running": ("gauge", "As gptjax_requests_running", lambda e: e.active),
    "num_requests_waiting": ("gauge", "As gptjax_requests_waiting", lambda e: e.waiting),
    "kv_cache_usage_perc": ("gauge", "As gptjax_pages_used_ratio", lambda e: used(e)),
}
"""The same under the names by which the Kubernetes gateway's inference extension finds them, those of vLLM."""


class Histogram:
    """Counts of values up to each bound, for each model."""

    def __init__(self, meaning: str, bounds: tuple[float, ...]):
        self.meaning, self.bounds = meaning, bounds
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def observe(self, model: str, value: float) -> None:
        """Count a value."""
        counts = self._counts.setdefault(model, [0] * (len(self.bounds) + 1))
        counts[bisect.bisect_left(self.bounds, value)] += 1
        self._sums[model] = self._sums.get(model, 0.0) + value

    def lines(self, name: str) -> Iterator[str]:
        """The histogram in the text format."""
        yield from _head(name, "histogram", self.meaning)
        for model, counts in self._counts.items():
            total = 0
            for bound, count in zip((*self.bounds, "+Inf"), counts, strict=True):
                total += count
                yield f'{name}_bucket{{model="{_label(model)}",le="{bound}"}} {total}'
            yield f'{name}_sum{{model="{_label(model)}"}} {self._sums[model]}'
            yield f'{name}_count{{model="{_label(model)}"}} {total}'


class Metrics:
    """Numbers of a server since its start."""

    def __init__(self) -> None:
        self.replies: Counter[tuple[str, int]] = Counter()
        self.histograms = {
            "queue_seconds": Histogram("Time until a text has a row", SECONDS),
            "first_token_seconds": Histogram("Time until the first token, since the request", SECONDS),
            "token_seconds": Histogram("Time per token after the first", SECONDS),
            "text_seconds": Histogram("Time until the end of a text, since the request", SECONDS),
            "prompt_tokens": Histogram("Tokens of prompts", TOKENS),
            "text_tokens": Histogram("Tokens of texts", TOKENS),
        }

    def reply(self, route: str, status: int) -> None:
        """Count a reply."""
        self.replies[route, status] += 1

    def text(self, model: str, text: Generation) -> None:
        """Count a text that has ended."""
        asked, began, first, ended = text.asked, text.began, text.first, text.ended
        found: dict[str, float] = {"prompt_tokens": len(text.request.prompt), "text_tokens": len(text.tokens)}
        if began is not None:
            found["queue_seconds"] = began - asked
        if first is not None:
            found["first_token_seconds"] = first - asked
        if ended is not None:
            found["text_seconds"] = ended - asked
            if first is not None and len(text.tokens) > 1:
                found["token_seconds"] = (ended - first) / (len(text.tokens) - 1)
        for name, value in found.items():
            self.histograms[name].observe(model, value)

    def lines(self, engines: Mapping[str, Engine]) -> Iterator[str]:
        """All of it."""
        for prefix, label, table in (("gptjax_", "model", ENGINE), ("vllm:", "model_name", PROTOCOL)):
            for name, (kind, meaning, value) in table.items():
                yield from _head(prefix + name, kind, meaning)
                yield from (f'{prefix}{name}{{{label}="{_label(m)}"}} {value(engine)}' for m, engine in engines.items())
        yield from _head("vllm:cache_config_info", "gauge", "Pages and their tokens")
        for model, engine in engines.items():
            pages = f'block_size="{engine.pages.size}",num_gpu_blocks="{engine.pages.count}"'
            yield f'vllm:cache_config_info{{model_name="{_label(model)}",{pages}}} 1'
        yield from _head("gptjax_replies_total", "counter", "Replies by route and status")
        for (route, status), count in sorted(self.replies.items()):
            yield f'gptjax_replies_total{{route="{route}",status="{status}"}} {count}'
        for name, histogram in self.histograms.items():
            yield from histogram.lines(f"gptjax_{name}")


def used(engine: Engine) -> float:
    """Part of the pages that have readers."""
    return 1 - engine.pages.free / engine.pages.count


def _label(text: str) -> str:
    """The text as the value of a label."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _head(name: str, kind: str, meaning: str) -> Iterator[str]:
    yield f"# HELP {name} {meaning}"
    yield f"# TYPE {name} {kind}"
