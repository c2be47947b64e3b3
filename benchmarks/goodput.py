"""`gptjax serve` beside llama.cpp's server (xllamacpp) on the same float32 weights, seen by a client outside of both.

    pip install -e '.[serve]' xllamacpp httpx
    python benchmarks/goodput.py closed --size 6x384 --turns 3       # tokens a second and CPU time, one and 32 streams
    python benchmarks/goodput.py open --size 6x384 --rates 1 2 4 8   # Poisson arrivals: latencies, and goodput
    python benchmarks/goodput.py open --shared 256                   # prompts with 256 tokens in common

The weights are a random GPT-2 that writes printable characters; texts are greedy and end at their length. `closed`:
every stream starts at once; in a turn each number is measured once, one after the other. `open`: requests arrive at
random times (Poisson) with log-normal lengths like ShareGPT's, scaled down; each rate is sent to one server after the
other. A request meets its levels if its first token comes within --first seconds and the later ones take --each seconds
each on average. Goodput is the highest rate of --rates at which 90 % do; failed requests do not.

    TTFT  seconds from the arrival to the first piece of text
    TPOT  seconds per token after it, of each text
    ITL   seconds between two pieces of text
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np

SIZES = {"6x384": (512, 6, 384, 6, 64), "GPT-2 124M": (50_257, 12, 768, 12, 32)}
"""Name -> vocabulary, layers, width, heads, number of tokens to write in `closed`."""
CONTEXT, ROWS, PROMPT = 1_024, 32, 16
LIBRARY = "Once upon a time there was a model that wrote a story about a model. " * 20


def make_model(name: str) -> Any:
    """A `LanguageModel` with a byte-level tokenizer whose likely tokens are printable characters."""
    import jax
    import jax.numpy as jnp
    import tokenizers

    from gptjax.data.tokenizers import HuggingFaceTokenizer
    from gptjax.models.language_model import LanguageModel
    from gptjax.nn import GELU, LayerNorm, LearnedPositions, TransformerConfig

    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator([LIBRARY], vocab_size=300, show_progress=False)
    made.add_special_tokens(["<end>"])
    with tempfile.TemporaryDirectory() as folder:
        made.save(str(Path(folder) / "tokenizer.json"))
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
        tokenizer = HuggingFaceTokenizer.from_file(Path(folder) / "tokenizer.json")
    vocab, layers, width, heads, _ = SIZES[name]
    options = {"positions": LearnedPositions(CONTEXT), "norm": LayerNorm(), "mlp": GELU(), "bias": True}
    config = TransformerConfig(vocab, layers, width, heads, **options)
    params = jax.jit(config.build().init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    shown = np.zeros((vocab, 1), np.float32)
    texts = [tokenizer.decode([i]) for i in range(tokenizer.vocab - 1)]
    shown[[i for i, text in enumerate(texts) if text.isascii() and text.isprintable()]] = 10
    return LanguageModel(config, {**params, "embedding": params["embedding"] * shown}, tokenizer, context=CONTEXT)


@dataclasses.dataclass(frozen=True)
class Load:
    """One request."""

    arrival: float
    prompt: tuple[int, ...]
    tokens: int


@dataclasses.dataclass(frozen=True)
class Timing:
    """A request as its client saw it, in seconds."""

    first: float
    each: float
    gaps: list[float]


def prompt(numpy: np.random.Generator, length: int) -> tuple[int, ...]:
    return tuple(numpy.integers(0, 256, length).tolist())


def streams(count: int, tokens: int, seed: int) -> list[Load]:
    numpy = np.random.default_rng(seed)
    return [Load(0.0, prompt(numpy, PROMPT), tokens) for _ in range(count)]


def poisson(rate: float, count: int, shared: int, seed: int) -> list[Load]:
    """Requests of which `rate` arrive a second. Lengths: medians of 80 and 60 tokens, after `shared` common ones."""
    numpy = np.random.default_rng(seed)
    arrivals = np.cumsum(numpy.exponential(1 / rate, count))
    common = prompt(np.random.default_rng(0), shared)
    prompts, tokens = (
        np.clip(numpy.lognormal(np.log(middle), 0.8, count), 4, most).astype(int)
        for middle, most in ((80, 500), (60, 200))
    )
    return [Load(at, common + prompt(numpy, n), int(m)) for at, n, m in zip(arrivals, prompts, tokens, strict=True)]


async def play(url: str, load: Sequence[Load]) -> list[Timing | None]:
    """Send each request at its time. None: it failed."""

    async def one(client: httpx.AsyncClient, request: Load) -> Timing | None:
        await asyncio.sleep(max(start + request.arrival - time.perf_counter(), 0))
        asked = time.perf_counter()
        body = {"prompt": request.prompt, "max_tokens": request.tokens, "ignore_eos": True}
        body |= {"stream": True, "temperature": 0, "model": "f32.gguf", "cache_prompt": True}
        seen: list[float] = []
        try:
            async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
                answer.raise_for_status()
                async for line in answer.aiter_lines():
                    if line.startswith("data: {") and any(c["text"] for c in json.loads(line[6:]).get("choices", ())):
                        seen.append(time.perf_counter())
        except (httpx.HTTPError, KeyError):
            return None
        if not seen:
            return None
        each = (seen[-1] - seen[0]) / max(request.tokens - 1, 1)
        return Timing(seen[0] - asked, each, np.diff(seen).tolist())

    start = time.perf_counter()
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        return await asyncio.gather(*(one(client, request) for request in load))


def cpu_seconds(process: int) -> float:
    """CPU time that a process has used: on a machine with other work it says more than the clock."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def serving(program: Sequence[str], port: int) -> Iterator[tuple[str, int]]:
    """The address of a server and its process, once it is ready."""
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*program, str(port)], stdout=log, stderr=log)
        try:
            for _ in range(600):
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                if process.poll() is not None:
                    log.seek(0)
                    raise SystemExit(f"error: {' '.join(program)} ended: {log.read().decode()[-1_000:]}")
                time.sleep(0.5)
            yield url, process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def llama(file: str, port: int) -> None:
    """llama.cpp's server, until a signal."""
    import xllamacpp

    params, cores = xllamacpp.CommonParams(), len(os.sched_getaffinity(0))
    params.model.path, params.port, params.n_gpu_layers = file, port, 0
    params.n_parallel, params.n_ctx = ROWS, ROWS * CONTEXT
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = cores
    server = xllamacpp.Server(params)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    del server


@contextlib.contextmanager
def servers(lm: Any, folder: Path) -> Iterator[dict[str, tuple[str, int]]]:
    """Addresses and processes of `gptjax serve` and llama.cpp's server in float32, and of the latter with Q8_0."""
    files = {dtype: str(folder / f"{dtype}.gguf") for dtype in ("f32", "q8_0")}
    for dtype, file in files.items():
        lm.save_gguf(file, dtype)
    ours = [sys.executable, "-m", "gptjax.cli.main", "serve", files["f32"], "--rows", str(ROWS), "--port"]
    with contextlib.ExitStack() as stack:
        addresses = {"gptjax serve": stack.enter_context(serving(ours, free_port()))}
        for dtype, file in files.items():
            theirs = [sys.executable, __file__, "llama", file]
            addresses[f"llama.cpp {dtype}"] = stack.enter_context(serving(theirs, free_port()))
        yield addresses


def closed(name: str, turns: int) -> None:
    from gptjax.inference.engine import Request
    from gptjax.inference.sampling import Sampling

    lm, tokens = make_model(name), SIZES[name][-1]

    def in_process(engine: Any) -> Callable[[Sequence[Load]], None]:
        engine.warm_up()
        engine.start()  # as in the server

        def run(load: Sequence[Load]) -> None:
            texts = [engine.submit(Request(one.prompt, one.tokens, Sampling(0), stop_token_ids=())) for one in load]
            for text in texts:
                text.wait()

        return run

    def through(url: str) -> Callable[[Sequence[Load]], None]:
        def run(load: Sequence[Load]) -> None:
            if None in asyncio.run(play(url, load)):
                raise SystemExit(f"error: {url} failed")

        return run

    with tempfile.TemporaryDirectory() as folder, servers(lm, Path(folder)) as addresses:
        many = {"engine, in process": in_process(lm.engine(rows=ROWS))}
        many |= {key: through(url) for key, (url, _) in addresses.items() if "q8_0" not in key}
        single = {"engine, in process": in_process(lm.engine(rows=1))}
        single["engine int8, in process"] = in_process(lm.quantised(8).engine(rows=1))
        single |= {key: through(url) for key, (url, _) in addresses.items() if "gptjax" not in key}
        speeds: dict[tuple[int, str], list[float]] = {}
        used: dict[tuple[int, str], list[float]] = {}
        for turn in range(turns + 1):  # the first one warms up
            for count, runs in ((ROWS, many), (1, single)):
                for key, run in runs.items():
                    load = streams(count, tokens, turn)
                    process = addresses[key][1] if key in addresses else os.getpid()
                    start, before = time.perf_counter(), cpu_seconds(process)
                    run(load)
                    seconds = time.perf_counter() - start
                    print(f"turn {turn}: {count} streams, {key}: {seconds:.1f} s", file=sys.stderr, flush=True)
                    if turn:
                        speeds.setdefault((count, key), []).append(count * tokens / seconds)
                        each = (cpu_seconds(process) - before) / count / tokens
                        used.setdefault((count, key), []).append(1_000 * each)
    print("| model | streams | | tokens a second | of the engine in process, median (range) | CPU ms a token |")
    print("|---|---:|---|---:|---:|---:|")
    for (count, key), values in speeds.items():
        base = speeds[count, "engine, in process"]
        ratios = sorted(a / b for a, b in zip(values, base, strict=True))
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        cpu = statistics.median(used[count, key])
        print(f"| {name} | {count} | {key} | {statistics.median(values):,.0f} | {spread} | {cpu:.2f} |")


def open_loop(name: str, rates: Sequence[float], count: int, shared: int, first: float, each: float) -> None:
    goodput: dict[str, float] = {}
    lm = make_model(name)
    print("| server | rate | meet the levels | TTFT p50 / p90 / p99 | TPOT p50 / p90 / p99 | ITL p50 / p90 / p99 |")
    print("|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder, servers(lm, Path(folder)) as addresses:
        for url, _ in addresses.values():
            asyncio.run(play(url, streams(2, 4, 1)))
        for rate in rates:
            for key in ("gptjax serve", "llama.cpp f32"):
                load = poisson(rate, count, shared, 2)
                seen = [one for one in asyncio.run(play(addresses[key][0], load)) if one is not None]
                met = sum(one.first <= first and one.each <= each for one in seen) / count
                if met >= 0.9:
                    goodput[key] = rate
                columns = (
                    [one.first for one in seen],
                    [one.each for one in seen],
                    [gap for one in seen for gap in one.gaps],
                )
                points = [np.percentile(column or [np.nan], (50, 90, 99)) * 1_000 for column in columns]
                shown = [" / ".join(f"{x:,.0f}" for x in values) for values in points]
                print(f"| {key} | {rate:g} | {met:.0%} | {' | '.join(f'{text} ms' for text in shown)} |", flush=True)
    for key in ("gptjax serve", "llama.cpp f32"):
        print(f"goodput of {key}: {goodput.get(key, 0):g} requests a second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("closed", "open"):
        one = commands.add_parser(command)
        one.add_argument("--size", choices=SIZES, default="6x384", help="model (default 6x384)")
        if command == "closed":
            one.add_argument("--turns", type=int, default=3, help="turns (default 3)")
            continue
        one.add_argument("--rates", type=float, nargs="+", default=[1, 2, 4, 8], help="requests a second")
        one.add_argument("--requests", type=int, default=60, help="number of requests at each rate (default 60)")
        one.add_argument("--shared", type=int, default=0, help="tokens that all prompts begin with (default 0)")
        one.add_argument("--first", type=float, default=1.0, help="level of TTFT in seconds (default 1)")
        one.add_argument("--each", type=float, default=0.1, help="level of TPOT in seconds (default 0.1)")
    child = commands.add_parser("llama")
    child.add_argument("file")
    child.add_argument("port", type=int)
    given = parser.parse_args()
    if given.command == "llama":
        return llama(given.file, given.port)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the servers end with this program
    print(f"# {len(os.sched_getaffinity(0))} cores")
    if given.command == "closed":
        return closed(given.size, given.turns)
    return open_loop(given.size, given.rates, given.requests, given.shared, given.first, given.each)


if __name__ == "__main__":
    from gptjax.distributed import processes

    processes.configure()
    main()
