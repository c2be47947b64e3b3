"""ModernBERT (arXiv:2412.13663): rotary positions, local attention in two of three layers, GeGLU and norms before the
sublayers, except the first, which follows the embedding's norm."""

from __future__ import annotations

import dataclasses
from typing import Any

from gptjax.interop.families.family import Family, Fields, Row
from gptjax.interop.families.fields import (
    DENSE,
    GATED,
    GLOBAL,
    LOCAL,
    activation,
    attention_bias,
    attention_kinds,
    layer_types,
    of_activation,
    repeated,
    window,
)
from gptjax.interop.families.rope import of_ropes, ropes
from gptjax.nn import (
    MLP,
    ClassifierConfig,
    EncoderConfig,
    First,
    LayerNorm,
    LayerOverrides,
    Mean,
    MultiHeadAttention,
    NormedPooler,
    PreNormButFirst,
    RegressorConfig,
    Transform,
)
from gptjax.types import UserError


def head(part: str) -> tuple[Row, ...]:
    """Rows of the layer before the logits, of tokens or of classes."""
    return (
        Row("head.dense.weight", "C D", f"{part}/dense", "D C"),
        Row("head.dense.bias", "C", f"{part}/dense_bias", "C"),
        Row("head.norm.weight", "D", f"{part}/norm_scale", "D"),
        Row("head.norm.bias", "D", f"{part}/norm_bias", "D"),
    )


TABLE = (
    Row("model.embeddings.tok_embeddings.weight", "V D", "embedding", "V D"),
    Row("model.embeddings.norm.weight", "D", "embedding_norm/scale", "D"),
    Row("model.embeddings.norm.bias", "D", "embedding_norm/bias", "D"),
    Row("model.layers.{L}.attn_norm.weight", "D", "blocks/{L}/norm_1/scale", "D"),
    Row("model.layers.{L}.attn_norm.bias", "D", "blocks/{L}/norm_1/bias", "D"),
    Row("model.layers.{L}.attn.Wqkv.weight", "([N]+N+N H) D", "blocks/{L}/attention/q", "D N H"),
    Row("model.layers.{L}.attn.Wqkv.weight", "(N+[N]+N H) D", "blocks/{L}/attention/k", "D N H"),
    Row("model.layers.{L}.attn.Wqkv.weight", "(N+N+[N] H) D", "blocks/{L}/attention/v", "D N H"),
    Row("model.layers.{L}.attn.Wqkv.bias", "([N]+N+N H)", "blocks/{L}/attention/q_bias", "N H"),
    Row("model.layers.{L}.attn.Wqkv.bias", "(N+[N]+N H)", "blocks/{L}/attention/k_bias", "N H"),
    Row("model.layers.{L}.attn.Wqkv.bias", "(N+N+[N] H)", "blocks/{L}/attention/v_bias", "N H"),
    Row("model.layers.{L}.attn.Wo.weight", "D (N H)", "blocks/{L}/attention/o", "N H D"),
    Row("model.layers.{L}.attn.Wo.bias", "D", "blocks/{L}/attention/o_bias", "D"),
    Row("model.layers.{L}.mlp_norm.weight", "D", "blocks/{L}/norm_2/scale", "D"),
    Row("model.layers.{L}.mlp_norm.bias", "D", "blocks/{L}/norm_2/bias", "D"),
    Row("model.layers.{L}.mlp.Wi.weight", "([F]+F) D", "blocks/{L}/mlp/gate", "D F"),
    Row("model.layers.{L}.mlp.Wi.weight", "(F+[F]) D", "blocks/{L}/mlp/up", "D F"),
    Row("model.layers.{L}.mlp.Wi.bias", "([F]+F)", "blocks/{L}/mlp/gate_bias", "F"),
    Row("model.layers.{L}.mlp.Wi.bias", "(F+[F])", "blocks/{L}/mlp/up_bias", "F"),
    Row("model.layers.{L}.mlp.Wo.weight", "D F", "blocks/{L}/mlp/down", "F D"),
    Row("model.layers.{L}.mlp.Wo.bias", "D", "blocks/{L}/mlp/down_bias", "D"),
    Row("model.final_norm.weight", "D", "norm/scale", "D"),
    Row("model.final_norm.bias", "D", "norm/bias", "D"),
    Row("decoder.weight", "V D", "head", "D V"),
    Row("decoder.bias", "V", "head_bias", "V"),
    *(row for part in ("transform", "pooler") for row in head(part)),
    Row("classifier.weight", "Y D", "classifier", "D Y"),
    Row("classifier.bias", "Y", "classifier_bias", "Y"),
)


def read(c: Fields) -> EncoderConfig:
    c = Fields({"hidden_activation": "gelu", "classifier_activation": "gelu", **c})
    c.only(decoder_bias=True)
    reach = c.or_default("local_attention", 128) // 2
    if c.get("rope_scaling"):
        raise UserError("config.json: rope_scaling: got one for both kinds of layers, must be in rope_parameters")
    if (half := c.get("sliding_window", reach)) != reach:
        raise UserError(f"config.json: sliding_window: got {half}, must be half of local_attention, {reach}")
    period = c.or_default("global_attn_every_n_layers", 3)
    kinds = attention_kinds(c, [LOCAL if i % period else GLOBAL for i in range(c["num_hidden_layers"])])
    thetas = {GLOBAL: c.or_default("global_rope_theta", 160_000.0), LOCAL: c.or_default("local_rope_theta", 10_000.0)}
    positions = ropes(c, thetas)
    local = LayerOverrides(positions=positions[LOCAL], window=reach + 1)
    first, *rest = [local if kind == LOCAL else LayerOverrides() for kind in kinds]
    norm = LayerNorm(c["norm_eps"], bias=c.get("norm_bias", False))
    transform = Transform(activation(c, "classifier_activation", DENSE), c.get("classifier_bias", False))
    return EncoderConfig(
        vocab=c["vocab_size"],
        layers=c["num_hidden_layers"],
        width=c["hidden_size"],
        heads=c["num_attention_heads"],
        hidden=c["intermediate_size"],
        positions=positions[GLOBAL],
        norm=norm,
        attention=MultiHeadAttention(bias=c.get("attention_bias", False)),
        mlp=activation(c, "hidden_activation", GATED),
        bias=c.get("mlp_bias", False),
        tie_embeddings=c.get("tie_word_embeddings", True),
        embedding_norm=norm,
        transform=None if c.get("architectures") in HEADLESS else transform,
        **repeated([dataclasses.replace(first, residual=PreNormButFirst()), *rest]),
    )


def write(m: EncoderConfig) -> dict[str, Any]:
    return {
        **of_ropes(m),
        **(of_head(m.transform.mlp, m.transform.bias) if m.transform else {"architectures": HEADLESS[0]}),
        "vocab_size": m.vocab,
        "num_hidden_layers": m.layers,
        "hidden_size": m.width,
        "num_attention_heads": m.heads,
        "intermediate_size": m.F,
        "norm_eps": m.norm.eps,
        "norm_bias": isinstance(m.norm, LayerNorm) and m.norm.bias,
        "attention_bias": attention_bias(m),
        "mlp_bias": m.bias,
        "hidden_activation": of_activation(m.mlp, GATED),
        "layer_types": layer_types(m),
        "local_attention": 2 * ((window(m) or 65) - 1),
        "tie_word_embeddings": m.tie_embeddings,
    }


def of_head(mlp: MLP, bias: bool) -> dict[str, Any]:
    return {"classifier_activation": of_activation(mlp, DENSE), "classifier_bias": bias}


def classifier(backbone: EncoderConfig, classes: int, c: Fields) -> ClassifierConfig:
    if (pooling := c.get("classifier_pooling", "cls")) not in POOLINGS:
        raise UserError(f"config.json: classifier_pooling: got {pooling!r}, must be one of {', '.join(POOLINGS)}")
    mlp = activation(Fields({"classifier_activation": "gelu", **c}), "classifier_activation", DENSE)
    pooler = NormedPooler(mlp, backbone.norm, c.get("classifier_bias", False))
    return ClassifierConfig(backbone, classes, POOLINGS[pooling], pooler, bias=True)


def of_classifier(m: ClassifierConfig | RegressorConfig) -> dict[str, Any]:
    pooler = m.pooler if isinstance(m.pooler, NormedPooler) else NormedPooler()
    pooling = "mean" if m.pooling == Mean() else "cls"
    return {**of_head(pooler.mlp, pooler.bias), "classifier_pooling": pooling}


POOLINGS = {"cls": First(), "mean": Mean()}
HEADLESS = ["ModernBertModel"], ["ModernBertForSequenceClassification"]
COPIES = {"decoder.weight": "model.embeddings.tok_embeddings.weight"}
FAMILY = Family(
    "modernbert",
    "ModernBertForMaskedLM",
    read,
    write,
    TABLE,
    kind=EncoderConfig,
    copies=COPIES,
    classifier=classifier,
    of_classifier=of_classifier,
)
