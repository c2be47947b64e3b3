"""BERT (arXiv:1810.04805), with its masked-token head or a classification head."""

from __future__ import annotations

from typing import Any

from gptjax.interop.families.family import Family, Fields, Row
from gptjax.interop.families.fields import DENSE, activation, of_activation
from gptjax.nn import (
    ClassifierConfig,
    EncoderConfig,
    First,
    LayerNorm,
    LearnedPositions,
    Pooler,
    PostNorm,
    Transform,
)

TABLE = (
    Row("bert.embeddings.word_embeddings.weight", "V D", "embedding", "V D"),
    Row("bert.embeddings.position_embeddings.weight", "T D", "positions/table", "T D"),
    Row("bert.embeddings.token_type_embeddings.weight", "A D", "type_embedding", "A D"),
    Row("bert.embeddings.LayerNorm.weight", "D", "embedding_norm/scale", "D"),
    Row("bert.embeddings.LayerNorm.bias", "D", "embedding_norm/bias", "D"),
    Row("bert.encoder.layer.{L}.attention.self.query.weight", "(N H) D", "blocks/{L}/attention/q", "D N H"),
    Row("bert.encoder.layer.{L}.attention.self.query.bias", "(N H)", "blocks/{L}/attention/q_bias", "N H"),
    Row("bert.encoder.layer.{L}.attention.self.key.weight", "(N H) D", "blocks/{L}/attention/k", "D N H"),
    Row("bert.encoder.layer.{L}.attention.self.key.bias", "(N H)", "blocks/{L}/attention/k_bias", "N H"),
    Row("bert.encoder.layer.{L}.attention.self.value.weight", "(N H) D", "blocks/{L}/attention/v", "D N H"),
    Row("bert.encoder.layer.{L}.attention.self.value.bias", "(N H)", "blocks/{L}/attention/v_bias", "N H"),
    Row("bert.encoder.layer.{L}.attention.output.dense.weight", "D (N H)", "blocks/{L}/attention/o", "N H D"),
    Row("bert.encoder.layer.{L}.attention.output.dense.bias", "D", "blocks/{L}/attention/o_bias", "D"),
    Row("bert.encoder.layer.{L}.attention.output.LayerNorm.weight", "D", "blocks/{L}/norm_1/scale", "D"),
    Row("bert.encoder.layer.{L}.attention.output.LayerNorm.bias", "D", "blocks/{L}/norm_1/bias", "D"),
    Row("bert.encoder.layer.{L}.intermediate.dense.weight", "F D", "blocks/{L}/mlp/up", "D F"),
    Row("bert.encoder.layer.{L}.intermediate.dense.bias", "F", "blocks/{L}/mlp/up_bias", "F"),
    Row("bert.encoder.layer.{L}.output.dense.weight", "D F", "blocks/{L}/mlp/down", "F D"),
    Row("bert.encoder.layer.{L}.output.dense.bias", "D", "blocks/{L}/mlp/down_bias", "D"),
    Row("bert.encoder.layer.{L}.output.LayerNorm.weight", "D", "blocks/{L}/norm_2/scale", "D"),
    Row("bert.encoder.layer.{L}.output.LayerNorm.bias", "D", "blocks/{L}/norm_2/bias", "D"),
    Row("cls.predictions.transform.dense.weight", "C D", "transform/dense", "D C"),
    Row("cls.predictions.transform.dense.bias", "C", "transform/dense_bias", "C"),
    Row("cls.predictions.transform.LayerNorm.weight", "D", "transform/norm_scale", "D"),
    Row("cls.predictions.transform.LayerNorm.bias", "D", "transform/norm_bias", "D"),
    Row("cls.predictions.bias", "V", "head_bias", "V"),
    Row("bert.pooler.dense.weight", "P D", "pooler/dense", "D P"),
    Row("bert.pooler.dense.bias", "P", "pooler/dense_bias", "P"),
    Row("classifier.weight", "Y D", "classifier", "D Y"),
    Row("classifier.bias", "Y", "classifier_bias", "Y"),
    Row("classifier.weight", "Y D", "token_classifier", "D Y"),
    Row("classifier.bias", "Y", "token_classifier_bias", "Y"),
)


def read(c: Fields) -> EncoderConfig:
    c.only(is_decoder=False, add_cross_attention=False, position_embedding_type="absolute", tie_word_embeddings=True)
    norm, mlp = LayerNorm(c["layer_norm_eps"]), activation(c, "hidden_act", DENSE)
    return EncoderConfig(
        vocab=c["vocab_size"],
        layers=c["num_hidden_layers"],
        width=c["hidden_size"],
        heads=c["num_attention_heads"],
        hidden=c["intermediate_size"],
        positions=LearnedPositions(c["max_position_embeddings"]),
        norm=norm,
        mlp=mlp,
        residual=PostNorm(),
        bias=True,
        token_types=c["type_vocab_size"],
        embedding_norm=norm,
        transform=None if c.get("architectures") in HEADLESS else Transform(mlp),
    )


def write(m: EncoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": m.vocab,
        "num_hidden_layers": m.layers,
        "hidden_size": m.width,
        "num_attention_heads": m.heads,
        "intermediate_size": m.F,
        "max_position_embeddings": m.max_positions or 1,
        "layer_norm_eps": m.norm.eps,
        "hidden_act": of_activation(m.mlp, DENSE),
        "type_vocab_size": m.token_types,
        **({"architectures": HEADLESS[0]} if m.transform is None else {}),
    }


def classifier(backbone: EncoderConfig, classes: int, c: Fields) -> ClassifierConfig:
    return ClassifierConfig(backbone, classes, First(), Pooler(), bias=True)


OTHERS = "Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"
HEADLESS = [[f"Bert{kind}"] for kind in OTHERS]
"""Architectures without the masked-token head: most sentence encoders, and other heads."""
IGNORED = r"(bert\.)?(pooler\..*|embeddings\.position_ids)|cls\.seq_relationship\..*"
COPIES = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
FORMER = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))
FAMILY = Family(
    "bert",
    "BertForMaskedLM",
    read,
    write,
    TABLE,
    kind=EncoderConfig,
    prefix="bert.",
    ignored=IGNORED,
    copies=COPIES,
    former=FORMER,
    classifier=classifier,
)
