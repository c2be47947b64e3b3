"""Heads over the layers of a family: the classes of `transformers` that classify texts or tokens, or find answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.interop.families import ANSWERERS, ANSWERING, CLASSIFYING, TAGGING, Family, Fields
from gptjax.nn import (
    ClassifierConfig,
    HeadConfig,
    ModelConfig,
    RegressorConfig,
    SpanExtractorConfig,
    TokenClassifierConfig,
)
from gptjax.types import UserError


def head_of(fields: Mapping[str, Any]) -> str | None:
    """Suffix of the class of `transformers` with a head that the fields of a config.json name. None: another class."""
    heads = (CLASSIFYING, TAGGING, ANSWERING)
    named = (head for name in fields.get("architectures") or () for head in heads if name.endswith(head))
    return next(named, None)


def kind_of(fields: Mapping[str, Any]) -> type[ModelConfig] | None:
    """Class of the configuration of a head. None: there is none."""
    kinds = {TAGGING: TokenClassifierConfig, ANSWERING: SpanExtractorConfig}
    kinds[CLASSIFYING] = RegressorConfig if _classes(fields) == 1 else ClassifierConfig
    return kinds.get(head_of(fields) or "")


def names(labels: Sequence[str]) -> dict[str, Any]:
    """Fields that name the classes."""
    return {"id2label": dict(enumerate(labels)), "label2id": {label: number for number, label in enumerate(labels)}}


def read(family: Family, fields: Fields) -> ModelConfig:
    """The configuration that a config.json describes: a model of the family, or a head on top of it."""
    fields = family.named(fields)
    if (head := head_of(fields)) is None:
        return family.read(fields)
    if not _has(family, head):
        raise UserError(f"config.json: architectures: got {fields['architectures']}, must be {family.architecture}")
    if head == ANSWERING:
        return SpanExtractorConfig(family.read(fields))
    classes = _classes(fields)
    if head == TAGGING:
        return TokenClassifierConfig(family.read(fields), classes)
    assert family.classifier is not None
    fields.only(problem_type="regression" if classes == 1 else "single_label_classification")
    found = family.classifier(family.read(fields), max(classes, 2), fields)
    return found if classes > 1 else RegressorConfig(found.backbone, found.pooling, found.pooler, found.bias)


def write(family: Family, config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json: the inverse of `read`."""
    fields = {"model_type": family.model_type, "architectures": [family.architecture]}
    kinds = {TokenClassifierConfig: TAGGING, SpanExtractorConfig: ANSWERING}
    head = kinds.get(type(config), CLASSIFYING)
    if not isinstance(config, ClassifierConfig | RegressorConfig | TokenClassifierConfig | SpanExtractorConfig):
        return fields | family.write(config)
    if not _has(family, head):
        what = "model for answers" if head == ANSWERING else "classifier"
        raise UserError(f"{what}: got one, for which {family.model_type} has no class in `transformers`")
    fields |= family.write(config.backbone)
    if head != ANSWERING:
        fields |= names([f"LABEL_{number}" for number in range(config.classes)])
    own = family.of_classifier(config) if isinstance(config, ClassifierConfig | RegressorConfig) else {}
    return fields | own | {"architectures": [family.with_head(head)]}


def naming(family: Family, config: ModelConfig) -> Family:
    """The family with the names of the tensors in the class of this configuration."""
    return family.answering if isinstance(config, SpanExtractorConfig) else family


def backbone_of(config: ModelConfig) -> ModelConfig:
    """The configuration under a head, or the configuration itself."""
    return config.backbone if isinstance(config, HeadConfig) else config


def _classes(fields: Mapping[str, Any]) -> int:
    """Number of outputs of a classifier's head: 1 is a regression, or a reward model."""
    return len(fields.get("id2label") or (0, 0))


def _has(family: Family, head: str) -> bool:
    """True if `transformers` has a class of the family with this head, and we its tensors' names."""
    if head == ANSWERING:
        return family.model_type in ANSWERERS
    return family.classifier is not None and (head == CLASSIFYING or family.tags)
