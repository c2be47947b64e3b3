"""The PyTorch peer of `gpu.py`: the same model, batch and step, compiled, with flash attention, in bfloat16.

    python benchmarks/torch_gpu.py --model gpt2_124m

Causal attention without segments, fused AdamW after clipping the global gradient norm to 1. One JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PEAK = 989e12  # FLOP/s of an H100 or H200 in bfloat16, without sparsity


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of its batch."""

    vocab: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    length: int
    rows: int
    llama: bool
    """RMSNorm, rotary positions, SwiGLU, no biases, an untied head; else GPT-2's parts."""


SHAPES = {
    "gpt2_124m": Shape(50_304, 12, 768, 12, 12, 3072, 1024, 32, False),
    "llama_1b": Shape(32_000, 16, 2048, 16, 8, 5632, 2048, 8, True),
    "tiny": Shape(300, 2, 128, 2, 2, 512, 128, 2, False),
}


class Block(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        norm, bias, head = nn.RMSNorm if s.llama else nn.LayerNorm, not s.llama, s.width // s.heads
        self.shape, self.norm_1, self.norm_2 = s, norm(s.width), norm(s.width)
        self.q = nn.Linear(s.width, s.heads * head, bias=bias)
        self.kv = nn.Linear(s.width, 2 * s.kv_heads * head, bias=bias)
        self.o = nn.Linear(s.heads * head, s.width, bias=bias)
        self.up = nn.Linear(s.width, (2 if s.llama else 1) * s.hidden, bias=bias)
        self.down = nn.Linear(s.hidden, s.width, bias=bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        s, (B, T, D) = self.shape, x.shape
        y = self.norm_1(x)
        q = self.q(y).view(B, T, s.heads, -1).transpose(1, 2)
        k, v = self.kv(y).view(B, T, 2, s.kv_heads, -1).permute(2, 0, 3, 1, 4)
        if s.llama:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=s.kv_heads != s.heads)
        x = x + self.o(y.transpose(1, 2).reshape(B, T, D))
        y = self.up(self.norm_2(x))
        if s.llama:
            gate, y = y.chunk(2, -1)
            return x + self.down(F.silu(gate) * y)
        return x + self.down(F.gelu(y, approximate="tanh"))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Model(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, s: Shape):
        super().__init__()
        self.shape, self.tokens = s, nn.Embedding(s.vocab, s.width)
        self.positions = None if s.llama else nn.Embedding(s.length, s.width)
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.norm = nn.RMSNorm(s.width) if s.llama else nn.LayerNorm(s.width)
        self.head = nn.Linear(s.width, s.vocab, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
        if not s.llama:
            self.head.weight = self.tokens.weight
        size = s.width // s.heads
        angles = torch.arange(s.length)[:, None] * 10_000 ** (-torch.arange(0, size, 2) / size)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats, a scalar, from tokens and targets int64 [B, T]."""
        x = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.head(self.norm(x)).float()
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


def measure(arguments: argparse.Namespace, wait: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Compile, wait, run."""
    started = time.perf_counter()
    s = SHAPES[arguments.model]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    model = Model(s).to(device)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=device == "cuda")
    compiled = torch.compile(model)
    text = torch.randint(s.vocab, (s.rows, s.length + 1), device=device)
    tokens, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()

    def step() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            loss = compiled(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    def steps(count: int) -> tuple[float, float]:
        before = time.perf_counter()
        loss = torch.zeros(())
        for _ in range(count):
            loss = step()
        value = loss.item()
        return 1e3 * (time.perf_counter() - before) / count, value

    _, loss_before = steps(1)
    first = round(time.perf_counter() - started, 1)
    steps(3)
    wait()
    steps(2)
    turns = [steps(arguments.steps) for _ in range(arguments.turns)]
    ms = statistics.median(turn[0] for turn in turns)
    head = s.width // s.heads
    attention = 2 * s.width * head * (s.heads + s.kv_heads)
    matrices = s.layers * (attention + s.width * s.hidden * (3 if s.llama else 2)) + s.vocab * s.width
    flops = 6 * matrices + 12 * s.layers * s.heads * head * s.length
    return {
        "torch": torch.__version__,
        "first_step_s": first,
        "ms": round(ms, 2),
        "spread": [round(min(t[0] for t in turns), 2), round(max(t[0] for t in turns), 2)],
        "tokens_per_s": round(s.rows * s.length / ms * 1e3),
        "mfu": round(100 * flops * s.rows * s.length / ms * 1e3 / PEAK, 1),
        "peak_GiB": round(torch.cuda.max_memory_allocated() / 2**30, 1) if device == "cuda" else 0.0,
        "loss": [round(loss_before, 3), round(turns[-1][1], 3)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2_124m", choices=list(SHAPES))
    parser.add_argument("--steps", type=int, default=10, help="steps per turn (default 10)")
    parser.add_argument("--turns", type=int, default=5, help="turns (default 5)")
    arguments = parser.parse_args()
    print(json.dumps({**vars(arguments), **measure(arguments)}), flush=True)


if __name__ == "__main__":
    main()
