"""One small model of every architecture, for laws that hold for all."""

import dataclasses

from gptjax.nn import (
    GELU,
    ClampedSwiGLU,
    ClassifierConfig,
    EncoderConfig,
    EncoderDecoderConfig,
    LayerNorm,
    LayerOverrides,
    LearnedPositions,
    MixtureOfExperts,
    ModelConfig,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    MultiTokenConfig,
    NormedPooler,
    Pooler,
    PreNormButFirst,
    RecurrentConfig,
    RMSNorm,
    RoPE,
    ScaledStream,
    Sigmoid,
    Softmax,
    SwiGLU,
    T5Bias,
    Transform,
    TransformerConfig,
    ValueEmbedding,
    ValueResidual,
)

BASE = TransformerConfig(vocab=32, layers=3, width=16, heads=4, kv_heads=2)
LATENT = MultiHeadLatentAttention(q_rank=12, kv_rank=8, rope_size=4, value_size=6)
GPT_OSS = MixtureOfExperts(experts=4, expert=ClampedSwiGLU(), router=Softmax(bias=True))
DEEPSEEK = MixtureOfExperts(experts=4, shared=1, router=Sigmoid(groups=2))
T5 = {"vocab": 32, "width": 16, "heads": 2, "positions": T5Bias()}

ARCHITECTURES: dict[str, ModelConfig] = {
    "plain": BASE,
    "gpt2": dataclasses.replace(BASE, positions=LearnedPositions(8), norm=LayerNorm(), mlp=GELU(), bias=True),
    "one layer": dataclasses.replace(BASE, layers=1, tie_embeddings=False),
    "leading layer": dataclasses.replace(BASE, leading_layers=(LayerOverrides(mlp=GELU(), hidden=8),)),
    "leading layer alone": dataclasses.replace(BASE, layers=1, leading_layers=(LayerOverrides(),)),
    "uneven pattern": dataclasses.replace(
        BASE,
        pattern=(LayerOverrides(window=3), LayerOverrides()),
        attention=MultiHeadAttention(qk_norm=LayerNorm(per_head=True)),
    ),
    "gpt-oss": dataclasses.replace(
        BASE, bias=True, mlp=GPT_OSS, attention=MultiHeadAttention(sinks=True, qk_norm=RMSNorm())
    ),
    "deepseek": dataclasses.replace(
        BASE, kv_heads=None, attention=LATENT, mlp=DEEPSEEK, leading_layers=(LayerOverrides(mlp=SwiGLU(), hidden=8),)
    ),
    "value residual": dataclasses.replace(BASE, attention=MultiHeadAttention(values=ValueResidual())),
    "value embedding": dataclasses.replace(
        BASE, residual=ScaledStream(), attention=MultiHeadAttention(values=ValueEmbedding(32))
    ),
    "lstm": RecurrentConfig(32, 2, 16),
    "bert": EncoderConfig(32, 2, 16, 2, transform=Transform(), bias=True, token_types=2),
    "modernbert": EncoderConfig(
        *(32, 3, 16, 2),
        leading_layers=(LayerOverrides(residual=PreNormButFirst()),),
        pattern=(LayerOverrides(positions=RoPE(100.0), window=3), LayerOverrides()),
        transform=Transform(bias=False),
        embedding_norm=LayerNorm(bias=False),
    ),
    "multi-token": MultiTokenConfig(32, 2, 16, 2, ahead=1),
    "classifier": ClassifierConfig(BASE, classes=3, pooler=Pooler(), bias=True),
    "normed classifier": ClassifierConfig(BASE, classes=3, pooler=NormedPooler()),
    "t5": EncoderDecoderConfig(
        EncoderConfig(layers=2, **T5), TransformerConfig(layers=3, cross_attention=MultiHeadAttention(), **T5)
    ),
}
