"""Greedy decoding on a CPU compared with transformers' `generate`, on the same float32 weights, as a markdown table.

    python benchmarks/decode_cpu.py                          # 6 x 384 and GPT-2 124M, batch 1 and 8, all cores
    python benchmarks/decode_cpu.py --size 6x384 --turns 7

The weights are a random GPT-2; the fraction of equal tokens is printed. A run is one call: prefill of a prompt of 16
tokens, then decoding of the given number of tokens. The two take turns in one process. The ratio is gptjax's tokens per
second over transformers' in the same turn; its median over the turns is given (above 1: gptjax is faster).
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

from gptjax.distributed import processes

processes.configure()

import jax  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402

from gptjax.inference.generate import decode, prefill  # noqa: E402
from gptjax.inference.sampling import Sampling, SamplingRows  # noqa: E402
from gptjax.nn import GELU, LayerNorm, LearnedPositions, Transformer, TransformerConfig, unstack  # noqa: E402

PROMPT = 16
SIZES = {
    "6x384": (TransformerConfig(vocab=65, layers=6, width=384, heads=6, positions=LearnedPositions(256)), 128),
    "GPT-2 124M": (
        TransformerConfig(vocab=50_257, layers=12, width=768, heads=12, positions=LearnedPositions(1024)),
        32,
    ),
}
"""Name -> (shape, number of tokens to decode)."""


def peer(config: TransformerConfig, length: int) -> GPT2LMHeadModel:
    """A GPT-2 of this shape with random weights."""
    torch.manual_seed(0)
    shape = {"vocab_size": config.vocab, "n_embd": config.width, "n_layer": config.layers, "n_head": config.heads}
    marks = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**shape, **marks, n_positions=length)).eval()
    with torch.no_grad():  # logits far enough apart that both choose the same tokens
        model.transformer.wte.weight.mul_(10)
    return model


def parameters(model: GPT2LMHeadModel, config: TransformerConfig) -> dict:
    """The peer's weights under our names."""
    tensors = {name: value.numpy() for name, value in model.transformer.state_dict().items()}
    D, N, H = config.width, config.heads, config.H

    def norm(name: str) -> dict:
        return {"scale": tensors[f"{name}.weight"], "bias": tensors[f"{name}.bias"]}

    def layer(i: int) -> dict:
        def get(name: str) -> np.ndarray:
            return tensors[f"h.{i}.{name}"]

        q, k, v = (w.reshape(D, N, H) for w in np.split(get("attn.c_attn.weight"), 3, axis=1))
        q_bias, k_bias, v_bias = (b.reshape(N, H) for b in np.split(get("attn.c_attn.bias"), 3))
        attention = {"q": q, "k": k, "v": v, "q_bias": q_bias, "k_bias": k_bias, "v_bias": v_bias}
        attention |= {"o": get("attn.c_proj.weight").reshape(N, H, D), "o_bias": get("attn.c_proj.bias")}
        mlp = {"up": get("mlp.c_fc.weight"), "up_bias": get("mlp.c_fc.bias")}
        mlp |= {"down": get("mlp.c_proj.weight"), "down_bias": get("mlp.c_proj.bias")}
        return {"norm_1": norm(f"h.{i}.ln_1"), "attention": attention, "norm_2": norm(f"h.{i}.ln_2"), "mlp": mlp}

    blocks = [layer(i) for i in range(config.layers)]
    return {
        "embedding": tensors["wte.weight"],
        "positions": {"table": tensors["wpe.weight"]},
        "blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *blocks),
        "norm": norm("ln_f"),
    }


def seconds(run: Callable[[], np.ndarray]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def contenders(name: str, batch: int, new: int) -> tuple[Callable[[], np.ndarray], Callable[[], np.ndarray]]:
    """Decoding of `new` tokens by gptjax, without the prompt, and by transformers, with it."""
    config, _ = SIZES[name]
    config = TransformerConfig(**{**vars(config), "norm": LayerNorm(), "mlp": GELU(), "bias": True})
    theirs = peer(config, config.positions.max_positions or 0)
    params, model = jax.device_put(parameters(theirs, config)), Transformer(config)
    params = unstack(config, params)
    prompts = np.random.default_rng(0).integers(1, config.vocab, (batch, PROMPT)).astype(np.int32)
    ids = torch.tensor(prompts, dtype=torch.int64)

    def gptjax() -> np.ndarray:
        lengths, seeds = np.full(batch, PROMPT, np.int32), np.arange(batch, dtype=np.uint32)
        state = prefill(model, params, prompts, lengths, seeds, 1, PROMPT + new, new, config.vocab)
        done, ends = np.zeros(batch, bool), np.array([-1], np.int32)
        settings = SamplingRows.of([Sampling(temperature=0)] * batch)
        return np.asarray(decode(model, params, state, new, done, ends, settings).tokens)

    def transformers() -> np.ndarray:
        with torch.inference_mode():
            options = {"max_new_tokens": new, "do_sample": False, "use_cache": True}
            return theirs.generate(ids, attention_mask=torch.ones_like(ids), **options).numpy()

    return gptjax, transformers


def measure(name: str, batch: int, turns: int) -> None:
    _, new = SIZES[name]
    gptjax, transformers = contenders(name, batch, new)
    same = (gptjax() == transformers()[:, PROMPT:]).mean()
    rounds = [(seconds(gptjax), seconds(transformers)) for _ in range(turns)]
    ours, peers = (batch * new / statistics.median(r[i] for r in rounds) for i in (0, 1))
    ratios = sorted(b / a for a, b in rounds)
    print(
        f"| {name} | {batch} | {ours:.0f} | {peers:.0f} | {statistics.median(ratios):.2f} "
        f"| {ratios[0]:.2f} to {ratios[-1]:.2f} | {same:.1%} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES), help="models (default: all)")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="batch sizes (default: 1 8)")
    parser.add_argument("--turns", type=int, default=5, help="turns of each (default 5)")
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    print(f"# {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}, jax {jax.__version__}")
    print("| model | batch | gptjax tok/s | transformers tok/s | ratio, median | range | same tokens |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in arguments.size:
        for batch in arguments.batch:
            measure(name, batch, arguments.turns)


if __name__ == "__main__":
    main()
