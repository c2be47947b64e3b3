"""The engine on a CPU, beside transformers on the same float32 weights and beside itself, as markdown tables.

    python benchmarks/serve.py                               # 6 x 384 and GPT-2 124M
    python benchmarks/serve.py --size 6x384 --turns 5
    python benchmarks/serve.py --size 6x384 --continuous     # transformers' continuous batching too, which is slow

The weights are a random GPT-2; texts are greedy and end at their length. In a turn every number is measured once, one
after the other; ratios are of one turn, and medians over the turns are given.

    one stream          tokens a second of one text: an engine of one row, `generate`, transformers' `generate`
    32 streams          tokens a second of 32 texts at a time: an engine of 32 rows, transformers' `generate`, batch 32,
                        transformers' `generate_batch`
    prefix              seconds to the first token of a prompt of 960 tokens, read before or not
    first token         seconds to the first token of a prompt of 64 while 16 texts are written, and while none is
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from gptjax.distributed import processes

processes.configure()

import jax  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from decode_cpu import SIZES, parameters, peer  # noqa: E402
from transformers import GenerationConfig  # noqa: E402

from gptjax.inference.engine import Engine, Generation, Request  # noqa: E402
from gptjax.inference.generate import generate  # noqa: E402
from gptjax.inference.sampling import Sampling  # noqa: E402
from gptjax.nn import GELU, LayerNorm, LearnedPositions, Transformer, TransformerConfig, unstack  # noqa: E402

GREEDY = Sampling(temperature=0)
CONTEXT, PROMPT = 1_024, 16


def number(vocab: int) -> Any:
    """A tokenizer whose every token is a letter: texts are not looked at."""
    return SimpleNamespace(vocab=vocab, specials={}, decode_bytes=lambda ids: b"x" * len(ids))


def timed(run: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds of a call, and its result."""
    start = time.perf_counter()
    result = run(*arguments)
    return time.perf_counter() - start, result


def prompts(count: int, length: int, vocab: int, seed: int) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for row in np.random.default_rng(seed).integers(1, vocab, (count, length))]


def first_token(engine: Engine, prompt: Sequence[int]) -> float:
    """Seconds to the first token of this prompt, with whatever the engine's thread has to do."""
    text = engine.submit(Request(tuple(prompt), 2, GREEDY))
    text.wait()
    assert text.first is not None
    return text.first - text.asked


def texts_of(engine: Engine, given: Sequence[tuple[int, ...]], new: int) -> list[Generation]:
    texts = [engine.submit(Request(prompt, new, GREEDY)) for prompt in given]
    engine.run()
    return texts


def measure(name: str, turns: int, continuous: bool = False) -> Iterator[str]:
    config, new = SIZES[name]
    positions = LearnedPositions(CONTEXT)
    config = TransformerConfig(
        **{**vars(config), "norm": LayerNorm(), "mlp": GELU(), "bias": True, "positions": positions}
    )
    theirs = peer(config, CONTEXT)
    params, model = unstack(config, jax.device_put(parameters(theirs, config))), Transformer(config)
    tokenizer, vocab = number(config.vocab), config.vocab

    def transformers(given: Sequence[tuple[int, ...]]) -> list[list[int]]:
        ids = torch.tensor(given)
        with torch.inference_mode():
            options = {"max_new_tokens": new, "do_sample": False, "use_cache": True}
            return theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, PROMPT:].tolist()

    def batched(given: Sequence[tuple[int, ...]]) -> None:
        settings = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
        done = theirs.generate_batch([list(prompt) for prompt in given], generation_config=settings)
        assert len(done) == len(given)
        assert all(len(one.generated_tokens) == new for one in done.values())

    def written(given: Sequence[tuple[int, ...]]) -> Any:
        return generate(model, params, tokenizer, given, new, GREEDY, stop_token_ids=())

    def ids(texts: Sequence[Generation]) -> list[list[int]]:
        return [[token.id for token in text.tokens] for text in texts]

    single, many, single_live, many_live = (
        Engine(model, params, tokenizer, rows=rows, context=CONTEXT) for rows in (1, 32, 1, 32)
    )
    for engine in (single, many):
        engine.warm_up()
    for engine in (single_live, many_live):
        engine.start()
    results: dict[str, list[float]] = {}
    equal: list[float] = []
    for turn in range(turns + 1):  # the first one compiles
        one, all = prompts(1, PROMPT, vocab, turn), prompts(32, PROMPT, vocab, 100 + turn)
        times: dict[str, float] = {}
        times["engine, one stream"], _ = timed(texts_of, single, one, new)
        times["generate, one stream"], _ = timed(written, one)
        times["transformers, one stream"], _ = timed(transformers, one)
        times["engine, 32 streams"], texts = timed(texts_of, many, all, new)
        times["transformers, 32 streams"], expected = timed(transformers, all)
        if continuous:
            times["continuous batching, 32 streams"], _ = timed(batched, all)
        (long,) = prompts(1, 961, vocab, 200 + turn)
        times["first token of 960, cold"] = first_token(single_live, long)
        times["first token of 960, warm"] = first_token(single_live, long)
        (short, again) = prompts(2, 65, vocab, 300 + turn)
        times["first token of 64, idle"] = first_token(many_live, short)
        running = [many_live.submit(Request(prompt, 200, GREEDY)) for prompt in prompts(16, PROMPT, vocab, 400 + turn)]
        while not all_running(running):
            time.sleep(0.001)
        times["first token of 64, beside 16"] = first_token(many_live, again)
        for text in running:
            many_live.cancel(text)
        for text in running:
            text.wait()
        if turn:
            for key, value in times.items():
                results.setdefault(key, []).append(value)
            equal.append(np.mean([a == b for a, b in zip(ids(texts), expected, strict=True)]))

    for engine in (single_live, many_live):
        engine.close()

    def ratio(a: str, b: str) -> str:
        values = sorted(x / y for x, y in zip(results[a], results[b], strict=True))
        return f"{statistics.median(values):.2f} ({values[0]:.2f} to {values[-1]:.2f})"

    def speed(key: str, count: int = 1) -> str:
        return f"{count * new / statistics.median(results[key]):,.0f}"

    def milliseconds(key: str) -> str:
        return f"{1_000 * statistics.median(results[key]):,.0f} ms"

    yield f"| {name} | one stream: engine / generate | {speed('engine, one stream')} tok/s | " + (
        f"{speed('generate, one stream')} tok/s | {ratio('generate, one stream', 'engine, one stream')} |"
    )
    yield f"| | one stream: engine / transformers | {speed('engine, one stream')} tok/s | " + (
        f"{speed('transformers, one stream')} tok/s | {ratio('transformers, one stream', 'engine, one stream')} |"
    )
    yield f"| | 32 streams: engine / transformers, {np.mean(equal):.0%} of texts equal | " + (
        f"{speed('engine, 32 streams', 32)} tok/s | {speed('transformers, 32 streams', 32)} tok/s | "
        f"{ratio('transformers, 32 streams', 'engine, 32 streams')} |"
    )
    if continuous:
        yield "| | 32 streams: engine / transformers' continuous batching | " + (
            f"{speed('engine, 32 streams', 32)} tok/s | {speed('continuous batching, 32 streams', 32)} tok/s | "
            f"{ratio('continuous batching, 32 streams', 'engine, 32 streams')} |"
        )
    yield f"| | first token of 960: cold / prefix found | {milliseconds('first token of 960, cold')} | " + (
        f"{milliseconds('first token of 960, warm')} | "
        f"{ratio('first token of 960, cold', 'first token of 960, warm')} |"
    )
    yield f"| | first token of 64: beside 16 texts / alone | {milliseconds('first token of 64, beside 16')} | " + (
        f"{milliseconds('first token of 64, idle')} | "
        f"{ratio('first token of 64, beside 16', 'first token of 64, idle')} |"
    )


def all_running(texts: Sequence[Generation]) -> bool:
    return all(len(text.tokens) > 2 for text in texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES), help="models (default: all)")
    parser.add_argument("--turns", type=int, default=3, help="turns of each (default 3)")
    parser.add_argument("--continuous", action="store_true", help="transformers' continuous batching too")
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    print(f"# {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}, jax {jax.__version__}")
    print("| model | measured | first | second | ratio, median (range) |")
    print("|---|---|---:|---:|---:|")
    for name in arguments.size:
        for line in measure(name, arguments.turns, arguments.continuous):
            print(line, flush=True)


if __name__ == "__main__":
    main()
