"""The reusable core: Flax modules and the parts they are built from. Each works alone, in any JAX program."""

from gptjax.kernels.attention import Mask
from gptjax.nn.attention import Attention, MultiHeadAttention
from gptjax.nn.block import Block, Context
from gptjax.nn.cache import Cache
from gptjax.nn.config import TransformerConfig, Variant
from gptjax.nn.mlp import GELU, MLP, GeGLU, ReLU, ReLUSquared, SwiGLU
from gptjax.nn.module import Layer, Weight
from gptjax.nn.norms import LayerNorm, Norm, RMSNorm
from gptjax.nn.positions import LearnedPositions, Positions, RoPE, Sinusoidal
from gptjax.nn.residual import OutputNorm, Parallel, PostNorm, PreNorm, Residual, SandwichNorm
from gptjax.nn.stack import Stack
from gptjax.nn.transformer import Transformer, count, make_cache, unstack

__all__ = [
    "GELU",
    "MLP",
    "Attention",
    "Block",
    "Cache",
    "Context",
    "GeGLU",
    "Layer",
    "LayerNorm",
    "LearnedPositions",
    "Mask",
    "MultiHeadAttention",
    "Norm",
    "OutputNorm",
    "Parallel",
    "Positions",
    "PostNorm",
    "PreNorm",
    "RMSNorm",
    "ReLU",
    "ReLUSquared",
    "Residual",
    "RoPE",
    "SandwichNorm",
    "Sinusoidal",
    "Stack",
    "SwiGLU",
    "Transformer",
    "TransformerConfig",
    "Variant",
    "Weight",
    "count",
    "make_cache",
    "unstack",
]
