"""Multiple choice by likelihood beside lm-eval's `hf` back end on a CPU, with the same model, as a markdown table.

    python benchmarks/multiple_choice.py                    # ARC-Easy's form with GPT-2 124M's shape and a small one
    python benchmarks/multiple_choice.py --items 40 --turns 5 --size "GPT-2 124M"

Both score the same requests, (context, option) texts, and take turns in one process: gptjax through `GptjaxLM`, the
peer through `HFLM`, at the fastest of its batch sizes 1, 8 and 32. Weights are random, float32; items are questions of
about 24 words with 4 options. The first turn, in which gptjax compiles, is reported apart. Items per second are medians
over the turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from gptjax.distributed import processes

processes.configure()
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from gptjax.cli.lm_eval import GptjaxLM  # noqa: E402

SIZES = {"6x384": (6, 384, 6, 8_192), "GPT-2 124M": (12, 768, 12, 50_257)}
"""Name -> layers, width, heads, vocabulary."""
WORDS = [
    *("which", "of", "these", "best", "explains", "why", "water", "plants", "light", "energy", "heat", "rock"),
    *("animal", "air", "cell", "force", "earth", "sun"),
]


def model(folder: Path, size: str) -> None:
    """A random GPT-2 of this size, whose tokenizer has a token for each word."""
    layers, width, heads, vocab = SIZES[size]
    library = tokenizers.ByteLevelBPETokenizer()
    library.train_from_iterator([" ".join(WORDS)] * 9, 512, special_tokens=["<|endoftext|>"])
    end = "<|endoftext|>"
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=library._tokenizer, bos_token=end, eos_token=end)
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"n_layer": layers, "n_embd": width, "n_head": heads, "vocab_size": vocab, "n_positions": 1024}
    config = transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


def requests(items: int) -> list[Instance]:
    """(context, option) of each option of the items."""
    draw = np.random.default_rng(0)

    def words(least: int, most: int) -> str:
        return " ".join(draw.choice(WORDS, draw.integers(least, most + 1)))

    found = []
    for i in range(items):
        context = f"Question: {words(12, 36)}?\nAnswer:"
        found += [Instance("loglikelihood", {}, (context, " " + words(1, 8)), i) for _ in range(4)]
    return found


def seconds(lm: GptjaxLM | HFLM, asked: list[Instance]) -> tuple[float, list[float]]:
    start = time.perf_counter()
    values = [value for value, _ in lm.loglikelihood(asked, disable_tqdm=True)]
    return time.perf_counter() - start, values


def measure(size: str, items: int, turns: int) -> None:
    asked = requests(items)
    with tempfile.TemporaryDirectory() as folder:
        model(Path(folder), size)
        ours = GptjaxLM(folder)
        peers = {rows: HFLM(folder, device="cpu", batch_size=rows) for rows in (1, 8, 32)}
    first, values = seconds(ours, asked)
    fewer = asked[: max(len(asked) // 4, 4)]
    rows = min(peers, key=lambda rows: seconds(peers[rows], fewer)[0])
    times: list[tuple[float, float]] = []
    for _ in range(turns):
        mine, values = seconds(ours, asked)
        theirs, expected = seconds(peers[rows], asked)
        np.testing.assert_allclose(values, expected, atol=2e-3)
        times.append((mine, theirs))
    ratios = sorted(theirs / mine for mine, theirs in times)
    mine, theirs = (items / statistics.median(each) for each in zip(*times, strict=True))
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    print(f"| {size} | {mine:.1f} | {items / first:.1f} | {theirs:.1f} | {rows} ", end="")
    print(f"| **{statistics.median(ratios):.2f}** ({spread}) |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, action="append", help="default: all")
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    print("| size | gptjax, items/s | with compilation | hf, items/s | its batch | ratio |")
    print("|---|---:|---:|---:|---:|---:|")
    for size in options.size or SIZES:
        measure(size, options.items, options.turns)


if __name__ == "__main__":
    main()
