"""RoBERTa (arXiv:1907.11692): BERT whose positions are counted from the row after the padding token's, and with other
heads."""

from __future__ import annotations

import dataclasses
from typing import Any

from gptjax.interop.families import bert
from gptjax.interop.families.family import Family, Fields, Row
from gptjax.nn import GELU, EncoderConfig, LearnedPositions, Transform
from gptjax.types import UserError

HEADS = (
    Row("lm_head.dense.weight", "C D", "transform/dense", "D C"),
    Row("lm_head.dense.bias", "C", "transform/dense_bias", "C"),
    Row("lm_head.layer_norm.weight", "D", "transform/norm_scale", "D"),
    Row("lm_head.layer_norm.bias", "D", "transform/norm_bias", "D"),
    Row("lm_head.bias", "V", "head_bias", "V"),
    Row("classifier.dense.weight", "P D", "pooler/dense", "D P"),
    Row("classifier.dense.bias", "P", "pooler/dense_bias", "P"),
    Row("classifier.out_proj.weight", "Y D", "classifier", "D Y"),
    Row("classifier.out_proj.bias", "Y", "classifier_bias", "Y"),
    Row("classifier.weight", "Y D", "token_classifier", "D Y"),
    Row("classifier.bias", "Y", "token_classifier_bias", "Y"),
)
BODY = tuple(
    dataclasses.replace(row, theirs=row.theirs.replace("bert.", "roberta.", 1))
    for row in bert.TABLE
    if row.theirs.startswith(("bert.embeddings.", "bert.encoder."))
)


def read(c: Fields) -> EncoderConfig:
    rows, offset = c["max_position_embeddings"], c.or_default("pad_token_id", 1) + 1
    if not 0 <= offset < rows:
        raise UserError(
            f"config.json: pad_token_id: got {offset - 1}, must be less than max_position_embeddings {rows} - 1"
        )
    return dataclasses.replace(
        bert.read(c),
        positions=LearnedPositions(rows - offset, offset),
        transform=None if c.get("architectures") in HEADLESS else Transform(GELU(approximate=False)),
    )


def write(m: EncoderConfig, stem: str = "Roberta") -> dict[str, Any]:
    positions = m.positions if isinstance(m.positions, LearnedPositions) else LearnedPositions(1)
    return {
        **bert.write(m),
        "max_position_embeddings": positions.length + positions.offset,
        "pad_token_id": positions.offset - 1,
        **({"architectures": [f"{stem}Model"]} if m.transform is None else {}),
    }


HEADLESS = [[f"{stem}{kind}"] for stem in ("Roberta", "XLMRoberta") for kind in bert.OTHERS]
IGNORED = r"(roberta\.)?(pooler\..*|embeddings\.position_ids)"
COPIES = {
    "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
    "lm_head.decoder.bias": "lm_head.bias",
}
FAMILY = Family(
    "roberta",
    "RobertaForMaskedLM",
    read,
    write,
    (*BODY, *HEADS),
    kind=EncoderConfig,
    prefix="roberta.",
    ignored=IGNORED,
    copies=COPIES,
    classifier=bert.classifier,
)
