"""The reusable core: Flax modules and the parts they are built from. Each works alone, in any JAX program."""

from gptjax.kernels.attention import Mask
from gptjax.nn.attention import MultiHeadAttention
from gptjax.nn.cache import Cache
from gptjax.nn.mlp import GELU, MLP, GeGLU, ReLUSquared, SwiGLU
from gptjax.nn.module import Layer, Module
from gptjax.nn.norms import LayerNorm, Norm, RMSNorm
from gptjax.nn.positions import LearnedPositions, Positions, RoPE, Sinusoidal
from gptjax.nn.transformer import Block, Transformer, TransformerConfig, count, make_cache, unstack

__all__ = [
    "GELU",
    "MLP",
    "Block",
    "Cache",
    "GeGLU",
    "Layer",
    "LayerNorm",
    "LearnedPositions",
    "Mask",
    "Module",
    "MultiHeadAttention",
    "Norm",
    "Positions",
    "RMSNorm",
    "ReLUSquared",
    "RoPE",
    "Sinusoidal",
    "SwiGLU",
    "Transformer",
    "TransformerConfig",
    "count",
    "make_cache",
    "unstack",
]
