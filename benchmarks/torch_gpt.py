"""The PyTorch peer: nanoGPT's architecture and training step, as fast as stock PyTorch is on a CPU.

`python benchmarks/torch_gpt.py --layers 4 --width 128 --heads 4 --length 64 --batch 12` prints milliseconds per step.
Pre-norm LayerNorm, learned positions, causal `scaled_dot_product_attention`, tanh-GELU MLP of 4x width, tied head, no
biases, no dropout; AdamW (the fused kernel) after clipping the global gradient norm to 1.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of its batch."""

    layers: int = 4
    width: int = 128
    heads: int = 4
    length: int = 64
    batch: int = 12
    vocab: int = 65


class Block(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        D = shape.width
        self.heads = shape.heads
        self.norm_1, self.norm_2 = nn.LayerNorm(D, bias=False), nn.LayerNorm(D, bias=False)
        self.qkv, self.o = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.up, self.down = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(B, T, D))
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.tokens = nn.Embedding(shape.vocab, shape.width)
        self.positions = nn.Embedding(shape.length, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats, a scalar, from tokens and targets int64 [B, T]."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


def make_step(shape: Shape, compiled: bool, fused: bool = True) -> Callable[[], float]:
    """A training step on a fixed random batch; each call updates the model and returns the loss before the update."""
    torch.manual_seed(0)
    model = GPT(shape)
    decayed = [p for p in model.parameters() if p.dim() == 2]
    other = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=fused, foreach=not fused)
    forward = torch.compile(model) if compiled else model
    text = torch.randint(shape.vocab, (shape.batch, shape.length + 1))

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = forward(text[:, :-1], text[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        return loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in vars(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model (forward and backward)")
    parser.add_argument(
        "--foreach", action="store_true", help="AdamW's foreach implementation instead of the fused kernel"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="duration of the measurement (default 5)")
    given = vars(parser.parse_args())
    step = make_step(Shape(**{name: given[name] for name in vars(Shape())}), given["compile"], not given["foreach"])
    for _ in range(3):
        step()
    times = []
    while sum(times) < given["seconds"] or len(times) < 5:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    print(f"median {statistics.median(times) * 1e3:.2f} ms  min {min(times) * 1e3:.2f} ms  ({len(times)} steps)")


if __name__ == "__main__":
    main()
