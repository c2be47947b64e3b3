"""Generative evaluation beside the engine alone, with the same prompts, as a markdown table.

    python benchmarks/generative.py
    python benchmarks/generative.py --items 96 --turns 5

`evals.Generative` writes replies by the engine and scores them in other processes. The floor is an engine that is given
all requests at once, with nothing to score. Both write the same tokens, drawn with the same seeds, and take turns in
one process; the first turn, in which programs are compiled, is left out. Tokens per second are medians over the turns,
on the clock and of processor time, that of the scorers included, which other work on the machine changes less.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time

from gptjax.distributed import processes

processes.configure()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from prepare import processor_seconds  # noqa: E402

from gptjax import LanguageModel, data, evals, nn, tasks  # noqa: E402
from gptjax.evals.replies import prompts  # noqa: E402
from gptjax.inference import Sampling  # noqa: E402
from gptjax.inference.engine import Request  # noqa: E402

ROWS, TOKENS = 16, 64
SAMPLING = Sampling()


@dataclasses.dataclass(frozen=True)
class Words(tasks.Task):
    """Prompts of about 20 to 60 tokens; every reply is scored by its letters."""

    count: int

    def __len__(self) -> int:
        return self.count

    def example(self, i: int) -> tuple[data.Message, data.Message]:
        return data.Message("user", f"{i}: " + "word " * (4 + i % 9)), data.Message("assistant", "word")

    def score(self, i: int, reply: tasks.Reply) -> tasks.Score:
        return tasks.Score(float("word" in reply.text))


def alone(lm: LanguageModel, task: Words) -> int:
    """Tokens of the engine alone."""
    engine = lm.engine(rows=ROWS, queue=task.count)
    asked = prompts(lm, task, range(task.count), "chat")
    texts = [
        engine.submit(Request(p.ids, max_tokens=TOKENS, sampling=SAMPLING, seed=p.item, stop=task.generation.stop))
        for p in asked
    ]
    while any(text.finish is None for text in texts):
        engine.run_round()
    return sum(len(text.tokens) for text in texts)


def evaluated(lm: LanguageModel, task: Words) -> int:
    """Tokens of the evaluation."""
    result = evals.Generative(task, sampling=SAMPLING, max_tokens=TOKENS, rows=ROWS)(lm)
    return sum(item["tokens"] for item in result.items)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    tokenizer = data.Bytes().build(iter(()))
    config = nn.TransformerConfig(vocab=tokenizer.vocab, layers=6, width=384, heads=6)
    params = config.build().init(jax.random.key(0), jnp.zeros((1, 2), int))["params"]
    lm, task = LanguageModel(config, params, tokenizer, context=256), Words(options.items)
    ours, floor = [], []  # tokens per second and per second of processor time
    for turn in range(options.turns + 1):
        for way, speeds in ((evaluated, ours), (alone, floor)):
            start = time.perf_counter(), processor_seconds()
            tokens = way(lm, task)
            seconds = time.perf_counter() - start[0], processor_seconds() - start[1]
            if turn:
                speeds.append([tokens / each for each in seconds])
            print(
                f"{way.__name__}, turn {turn}: {tokens} tokens in {seconds[0]:.1f} s, CPU {seconds[1]:.1f} s",
                flush=True,
            )
    print("\n| items | clock | Generative, tokens/s | engine alone, tokens/s | ratio |\n|---:|---|---:|---:|---:|")
    for clock, mine, theirs in zip(("wall", "CPU"), zip(*ours, strict=True), zip(*floor, strict=True), strict=True):
        ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
        print(
            f"| {options.items} | {clock} | {statistics.median(mine):.0f} | {statistics.median(theirs):.0f} | "
            f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )


if __name__ == "__main__":
    main()
