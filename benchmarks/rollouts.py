"""Rollouts beside the engine alone, with the same prompts, and the time of an update, as a markdown table.

    python benchmarks/rollouts.py
    python benchmarks/rollouts.py --turns 5

A round of rollouts writes 128 replies of 64 tokens to 16 prompts and scores them in other processes; then the batch is
prepared, and GRPO's update made. The floor is an engine that is given the same requests at once, with nothing to score
and no new parameters. Both take turns in one process; the first turn, in which programs are compiled, is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import time

from gptjax.distributed import processes

processes.configure()

import jax  # noqa: E402

from gptjax import Stage, data, nn, objectives, optim, tasks  # noqa: E402
from gptjax.inference import Sampling  # noqa: E402
from gptjax.inference.engine import Engine, Request  # noqa: E402
from gptjax.train.program import program  # noqa: E402
from gptjax.train.rollouts import Rollouts  # noqa: E402
from gptjax.train.rounds import Policy  # noqa: E402

ROWS, TOKENS, BATCH, GROUP = 16, 64, 128, 8


@dataclasses.dataclass(frozen=True)
class Words(tasks.Task):
    """Prompts of about 20 to 60 tokens; every reply is scored by its letters."""

    def __len__(self) -> int:
        return 1_000

    def example(self, i: int) -> tuple[data.Message, data.Message]:
        return data.Message("user", f"{i}: " + "word " * (4 + i % 9)), data.Message("assistant", "word")

    def score(self, i: int, reply: tasks.Reply) -> tasks.Score:
        return tasks.Score(sum(letter in "word" for letter in reply.text) / max(len(reply.text), 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    tokenizer = data.Bytes().build(iter(()))
    model = nn.TransformerConfig(vocab=tokenizer.vocab, layers=6, width=384, heads=6).build()
    rollouts = Rollouts(Words(), length=160, batch=BATCH, group=GROUP, max_tokens=TOKENS, rows=ROWS)
    stage = Stage(rollouts, objectives.GRPO(kl=0.0), optim.AdamW(learning_rate=1e-5), steps=100, accumulate=4)
    functions = program(stage, model)
    state = jax.jit(functions.init_state)()
    ours, floor, updates = [], [], []
    with contextlib.closing(rollouts.batches(tokenizer, "train", 0, "")) as rounds:
        engine = Engine(model, jax.tree.map(lambda x: x.copy(), state.params), tokenizer, rows=ROWS, context=160)
        for turn in range(options.turns + 1):
            params = state.params
            policy = Policy(model, lambda p=params: p, lambda batch: batch, turn, rounds)
            batch = rounds.next_batch(policy)
            speed = rounds.figures["rollout_tokens_per_second"]
            start = time.perf_counter()
            state, metrics = functions.step(state, functions.prepare(params, batch))
            jax.block_until_ready(metrics)
            update = time.perf_counter() - start
            asked = [rounds._asked(turn * BATCH // GROUP + i // GROUP, i % GROUP) for i in range(BATCH)]
            start = time.perf_counter()
            texts = [
                engine.submit(
                    Request(a.prompt, TOKENS, Sampling(temperature=1.0), seed=a.seed, choice=a.sample, tempered=True)
                )
                for a in asked
            ]
            engine.run()
            alone = sum(len(text.tokens) for text in texts) / (time.perf_counter() - start)
            print(f"turn {turn}: rollouts {speed:.0f} tokens/s, engine {alone:.0f}, update {update:.1f} s", flush=True)
            if turn:
                ours.append(speed)
                floor.append(alone)
                updates.append(update)
    ratios = [a / b for a, b in zip(ours, floor, strict=True)]
    print("\n| rollouts, tokens/s | engine alone, tokens/s | ratio | update, s |\n|---:|---:|---:|---:|")
    print(
        f"| {statistics.median(ours):.0f} | {statistics.median(floor):.0f} | {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}) | {statistics.median(updates):.1f} |"
    )


if __name__ == "__main__":
    main()
