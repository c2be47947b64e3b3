"""Flax modules and the parts that they are built from. Each works alone, in any JAX program.

Names are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptjax.kernels.attention import Mask
    from gptjax.nn.attention import Attention, MultiHeadAttention
    from gptjax.nn.backbone import Backbone
    from gptjax.nn.block import Block, Context
    from gptjax.nn.cache import Cache
    from gptjax.nn.config import BackboneConfig, LayerOverrides, ModelConfig
    from gptjax.nn.encoder import Encoder, EncoderConfig, Transform
    from gptjax.nn.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
    from gptjax.nn.heads import (
        Classifier,
        ClassifierConfig,
        Embedder,
        EmbedderConfig,
        First,
        HeadConfig,
        Last,
        Mean,
        NormedPooler,
        Pooler,
        Pooling,
        RegressorConfig,
        SpanExtractor,
        SpanExtractorConfig,
        TokenClassifier,
        TokenClassifierConfig,
    )
    from gptjax.nn.intermediates import activations
    from gptjax.nn.latent_attention import MultiHeadLatentAttention
    from gptjax.nn.lora import DoRA, LoRA
    from gptjax.nn.mixer import SequenceMixer
    from gptjax.nn.mlp import GELU, MLP, ClampedSwiGLU, GeGLU, ReLU, ReLUSquared, SwiGLU
    from gptjax.nn.module import ParamFactory, Part
    from gptjax.nn.moe import MixtureOfExperts
    from gptjax.nn.multi_token import MultiTokenConfig, MultiTokenTransformer
    from gptjax.nn.norms import LayerNorm, Norm, RMSNorm
    from gptjax.nn.parametrisation import MuP, Parametrisation
    from gptjax.nn.positions import (
        ALiBi,
        LearnedPositions,
        LinearScaling,
        Llama3Scaling,
        LongRoPE,
        NTKScaling,
        Positions,
        RoPE,
        Scaling,
        Sinusoidal,
        T5Bias,
        YaRN,
    )
    from gptjax.nn.recurrent import GRU, LSTM, Recurrent, RecurrentConfig
    from gptjax.nn.residual import (
        NoResidual,
        OutputNorm,
        Parallel,
        PostNorm,
        PreNorm,
        PreNormButFirst,
        Residual,
        SandwichNorm,
        ScaledPreNorm,
        ScaledStream,
    )
    from gptjax.nn.router import Router, Sigmoid, Softmax
    from gptjax.nn.stack import Stack
    from gptjax.nn.transformer import Transformer, TransformerConfig, count, make_cache, unstack
    from gptjax.nn.values import ValueEmbedding, ValueResidual

__all__ = [
    "GELU",
    "GRU",
    "LSTM",
    "MLP",
    "ALiBi",
    "Attention",
    "Backbone",
    "BackboneConfig",
    "Block",
    "Cache",
    "ClampedSwiGLU",
    "Classifier",
    "ClassifierConfig",
    "Context",
    "DoRA",
    "Embedder",
    "EmbedderConfig",
    "Encoder",
    "EncoderConfig",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "First",
    "GeGLU",
    "HeadConfig",
    "Last",
    "LayerNorm",
    "LayerOverrides",
    "LearnedPositions",
    "LinearScaling",
    "Llama3Scaling",
    "LoRA",
    "LongRoPE",
    "Mask",
    "Mean",
    "MixtureOfExperts",
    "ModelConfig",
    "MuP",
    "MultiHeadAttention",
    "MultiHeadLatentAttention",
    "MultiTokenConfig",
    "MultiTokenTransformer",
    "NTKScaling",
    "NoResidual",
    "Norm",
    "NormedPooler",
    "OutputNorm",
    "Parallel",
    "ParamFactory",
    "Parametrisation",
    "Part",
    "Pooler",
    "Pooling",
    "Positions",
    "PostNorm",
    "PreNorm",
    "PreNormButFirst",
    "RMSNorm",
    "ReLU",
    "ReLUSquared",
    "Recurrent",
    "RecurrentConfig",
    "RegressorConfig",
    "Residual",
    "RoPE",
    "Router",
    "SandwichNorm",
    "ScaledPreNorm",
    "ScaledStream",
    "Scaling",
    "SequenceMixer",
    "Sigmoid",
    "Sinusoidal",
    "Softmax",
    "SpanExtractor",
    "SpanExtractorConfig",
    "Stack",
    "SwiGLU",
    "T5Bias",
    "TokenClassifier",
    "TokenClassifierConfig",
    "Transform",
    "Transformer",
    "TransformerConfig",
    "ValueEmbedding",
    "ValueResidual",
    "YaRN",
    "activations",
    "count",
    "make_cache",
    "unstack",
]

_NAMES = {
    "gptjax.kernels.attention": "Mask",
    "gptjax.nn.intermediates": "activations",
    "gptjax.nn.attention": "Attention MultiHeadAttention",
    "gptjax.nn.backbone": "Backbone",
    "gptjax.nn.block": "Block Context",
    "gptjax.nn.cache": "Cache",
    "gptjax.nn.config": "BackboneConfig LayerOverrides ModelConfig",
    "gptjax.nn.encoder": "Encoder EncoderConfig Transform",
    "gptjax.nn.encoder_decoder": "EncoderDecoder EncoderDecoderConfig",
    "gptjax.nn.heads": (
        "Classifier ClassifierConfig Embedder First HeadConfig Last Mean NormedPooler Pooler Pooling RegressorConfig "
        "SpanExtractor SpanExtractorConfig TokenClassifier TokenClassifierConfig EmbedderConfig"
    ),
    "gptjax.nn.latent_attention": "MultiHeadLatentAttention",
    "gptjax.nn.lora": "DoRA LoRA",
    "gptjax.nn.mixer": "SequenceMixer",
    "gptjax.nn.mlp": "GELU MLP ClampedSwiGLU GeGLU ReLU ReLUSquared SwiGLU",
    "gptjax.nn.module": "ParamFactory Part",
    "gptjax.nn.moe": "MixtureOfExperts",
    "gptjax.nn.multi_token": "MultiTokenConfig MultiTokenTransformer",
    "gptjax.nn.norms": "LayerNorm Norm RMSNorm",
    "gptjax.nn.parametrisation": "MuP Parametrisation",
    "gptjax.nn.positions": (
        "ALiBi LearnedPositions LinearScaling Llama3Scaling LongRoPE NTKScaling Positions RoPE Scaling "
        "Sinusoidal T5Bias YaRN"
    ),
    "gptjax.nn.recurrent": "GRU LSTM Recurrent RecurrentConfig",
    "gptjax.nn.residual": (
        "NoResidual OutputNorm Parallel PostNorm PreNorm PreNormButFirst Residual SandwichNorm ScaledPreNorm "
        "ScaledStream"
    ),
    "gptjax.nn.router": "Router Sigmoid Softmax",
    "gptjax.nn.stack": "Stack",
    "gptjax.nn.transformer": "Transformer TransformerConfig count make_cache unstack",
    "gptjax.nn.values": "ValueEmbedding ValueResidual",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'gptjax.nn' has no attribute {name!r}")
