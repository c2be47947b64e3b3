"""T5 and T5 1.1 (arXiv:1910.10683, arXiv:2002.05202): an encoder and a decoder that share one embedding table."""

from __future__ import annotations

from typing import Any

from gptjax.interop.families.family import Family, Fields, Row
from gptjax.nn import (
    GELU,
    EncoderConfig,
    EncoderDecoderConfig,
    GeGLU,
    MultiHeadAttention,
    ReLU,
    RMSNorm,
    T5Bias,
    TransformerConfig,
)
from gptjax.types import UserError

KINDS = {"relu": ReLU(), "gated-gelu": GeGLU(), "gelu": GELU(approximate=False)}


def half(name: str, feed: int) -> tuple[Row, ...]:
    """Rows of the encoder or the decoder. feed: index of the MLP among the sublayers, from 0."""
    layer, block = f"{name}.block.{{L}}.layer", f"{name}/blocks/{{L}}"
    first = f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return (
        Row(first, "A N", f"{name}/relative/table", "A N"),
        Row(f"{layer}.0.layer_norm.weight", "D", f"{block}/norm_1/scale", "D"),
        *attention(f"{layer}.0.SelfAttention", f"{block}/attention"),
        Row(f"{layer}.{feed}.layer_norm.weight", "D", f"{block}/norm_{feed + 1}/scale", "D"),
        Row(f"{layer}.{feed}.DenseReluDense.wi.weight", "F D", f"{block}/mlp/up", "D F", if_absent=f"{block}/mlp/gate"),
        Row(f"{layer}.{feed}.DenseReluDense.wi_0.weight", "F D", f"{block}/mlp/gate", "D F"),
        Row(
            f"{layer}.{feed}.DenseReluDense.wi_1.weight",
            "F D",
            f"{block}/mlp/up",
            "D F",
            if_present=f"{block}/mlp/gate",
        ),
        Row(f"{layer}.{feed}.DenseReluDense.wo.weight", "D F", f"{block}/mlp/down", "F D"),
        Row(f"{name}.final_layer_norm.weight", "D", f"{name}/norm/scale", "D"),
    )


def attention(theirs: str, ours: str) -> tuple[Row, ...]:
    return (
        Row(f"{theirs}.q.weight", "(N H) D", f"{ours}/q", "D N H"),
        Row(f"{theirs}.k.weight", "(N H) D", f"{ours}/k", "D N H"),
        Row(f"{theirs}.v.weight", "(N H) D", f"{ours}/v", "D N H"),
        Row(f"{theirs}.o.weight", "D (N H)", f"{ours}/o", "N H D"),
    )


TABLE = (
    Row("shared.weight", "V D", "embedding", "V D"),
    *half("encoder", feed=1),
    *half("decoder", feed=2),
    Row("decoder.block.{L}.layer.1.layer_norm.weight", "D", "decoder/blocks/{L}/norm_2/scale", "D"),
    *attention("decoder.block.{L}.layer.1.EncDecAttention", "decoder/blocks/{L}/cross_attention"),
    Row("lm_head.weight", "V D", "decoder/head", "D V"),
)


def read(c: Fields) -> EncoderDecoderConfig:
    kind = c.get("feed_forward_proj", "relu")
    if kind not in KINDS:
        raise UserError(f"config.json: feed_forward_proj: got {kind!r}, must be one of {', '.join(KINDS)}")
    attention = MultiHeadAttention(scale=1.0)
    common = {
        "vocab": c["vocab_size"],
        "width": c["d_model"],
        "heads": c["num_heads"],
        "head_size": c["d_kv"],
        "hidden": c["d_ff"],
        "positions": T5Bias(c["relative_attention_num_buckets"], c.or_default("relative_attention_max_distance", 128)),
        "norm": RMSNorm(c["layer_norm_epsilon"]),
        "attention": attention,
        "mlp": KINDS[kind],
    }
    layers, tied = c["num_layers"], c.get("tie_word_embeddings") is not False
    scaled = c.get("scale_decoder_outputs", tied)
    return EncoderDecoderConfig(
        EncoderConfig(**common, layers=layers),
        TransformerConfig(
            **common,
            layers=c.get("num_decoder_layers") or layers,
            cross_attention=attention,
            tie_embeddings=tied,
            logit_scale=c["d_model"] ** -0.5 if scaled else 1.0,
        ),
    )


def write(m: EncoderDecoderConfig) -> dict[str, Any]:
    decoder = m.decoder
    bias = decoder.positions if isinstance(decoder.positions, T5Bias) else T5Bias()
    kind = next((name for name, mlp in KINDS.items() if mlp == decoder.mlp), None)
    return {
        "is_encoder_decoder": True,
        "vocab_size": m.vocab,
        "num_layers": m.encoder.layers,
        "num_decoder_layers": decoder.layers,
        "d_model": decoder.width,
        "num_heads": decoder.heads,
        "d_kv": decoder.H,
        "d_ff": decoder.F,
        "relative_attention_num_buckets": bias.buckets,
        "relative_attention_max_distance": bias.max_distance,
        "layer_norm_epsilon": decoder.norm.eps,
        "feed_forward_proj": kind,
        "tie_word_embeddings": decoder.tie_embeddings,
        "scale_decoder_outputs": decoder.logit_scale != 1,
    }


IGNORED = r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"  # unused
NAMES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
COPIES: dict[str, str] = dict.fromkeys(NAMES, "shared.weight")
ALIASES = {
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "head_dim": "d_kv",
}
FAMILY = Family(
    "t5",
    "T5ForConditionalGeneration",
    read,
    write,
    TABLE,
    kind=EncoderDecoderConfig,
    prefix="",
    ignored=IGNORED,
    copies=COPIES,
    aliases=ALIASES,
    classifier=None,
)
