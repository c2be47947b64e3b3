"""A model family: the mapping between config.json and our configuration, and a table of tensor names, both used in both
directions.

A row of the table has a tensor's name and layout in published files on the left, ours on the right:

    Row("model.layers.{L}.self_attn.q_proj.weight", "(N H) D", "blocks/{L}/attention/q", "D N H")

{L} stands for the index of a layer, any other letter for an index along that axis, such as {E} for an expert. Layouts
are explained in `interop/layout.py`. A row applies if the model has its parameter with that number of axes, so that
rows of biases or experts are skipped for models without them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from gptjax.interop import layout
from gptjax.interop.schema import NUMBERS
from gptjax.nn import ClassifierConfig, ModelConfig, RegressorConfig, Stack, TransformerConfig
from gptjax.types import Json, UserError


@dataclasses.dataclass(frozen=True)
class Row:
    """A published tensor, or a part of one, and the parameter that it holds."""

    theirs: str
    their_layout: str
    ours: str
    our_layout: str
    if_present: str = ""
    """The row applies only if the model has this parameter."""
    if_absent: str = ""
    """The row applies only if the model does not have this parameter."""


class Fields(dict[str, Any]):
    """The fields of a config.json. `fields[name]` raises UserError for a field that is missing or null."""

    def __getitem__(self, name: str) -> Any:
        if (value := self.get(name)) is None:
            raise UserError(f"config.json: {'got null for' if name in self else 'missing'} {name}")
        return value

    def or_default(self, name: str, default: Json) -> Any:
        """The field; the default if it is missing. Raises UserError for null."""
        return Fields({name: default, **self})[name]

    def only(self, **values: object) -> None:
        """Raise UserError for a field with a value other than the supported one."""
        for name, value in values.items():
            if (got := self.get(name)) is not None and got != value:
                raise UserError(f"config.json: {name}: got {got!r}, must be {value!r}, the only supported value")


TIED = {"lm_head.weight": "model.embed_tokens.weight"}
"""A head tied to the embedding, by the names of most families."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family: one class of `transformers`."""

    model_type: str
    """Name in config.json."""
    architecture: str
    """Class in `transformers`."""
    read: Callable[[Fields], Any]
    """config.json -> configuration. Raises UserError, naming the field, for an unsupported setting."""
    write: Callable[[Any], dict[str, Any]]
    """Configuration -> config.json. Settings that the family cannot express are found by comparing with `read`."""
    table: tuple[Row, ...]
    kind: type[ModelConfig] = TransformerConfig
    """Class of the configuration."""
    prefix: str = "model."
    """Prefix of tensor names; absent in files of a model without its head."""
    ignored: str = r".*\.rotary_emb\.inv_freq"
    """Pattern of redundant tensor names: buffers that can be computed, and what a language model does not use."""
    copies: Mapping[str, str] = dataclasses.field(default_factory=lambda: dict(TIED))
    """Tensor that may be in a file twice -> its name in the table: a head tied to the embedding."""
    former: tuple[tuple[str, str], ...] = ()
    """(suffix of names in older files, suffix in the table)."""
    classifier: Callable[[Any, int, Fields], ClassifierConfig] | None = lambda m, classes, c: ClassifierConfig(
        m, classes
    )
    """(configuration, number of classes, config.json) -> the family's classifier. None: `transformers` has no class for
    one."""
    of_classifier: Callable[[ClassifierConfig | RegressorConfig], dict[str, Any]] = lambda m: {}
    """The fields of config.json for a classifier's own settings: the inverse of `classifier`."""
    stem: str = ""
    """Prefix of the classifier's class in `transformers`. "": that of `architecture`."""

    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Other names of fields of config.json, which `transformers` reads too."""

    def named(self, fields: Mapping[str, Any]) -> Fields:
        """The fields by the names that `read` knows; real numbers as floats, also if they are written as integers.
        Raises UserError if two names of one field disagree."""
        named = Fields({name: value for name, value in fields.items() if name not in self.aliases})
        named.update({name: float(named[name]) for name in NUMBERS if type(named.get(name)) is int})
        for alias, name in self.aliases.items():
            if alias not in fields:
                continue
            if named.setdefault(name, fields[alias]) != fields[alias]:
                raise UserError(
                    f"config.json: {alias}: got {fields[alias]!r} beside {name} {named[name]!r}, which is the same "
                    "setting; delete one"
                )
        return named

    @property
    def head(self) -> str:
        """The tensor of the head, if the family has one."""
        return next((row.theirs for row in self.table if row.ours.endswith("head")), "")

    @property
    def tags(self) -> bool:
        """True if `transformers` has a class that classifies tokens, and we its tensors' names."""
        return self.model_type in TAGGERS and any(row.ours == "token_classifier" for row in self.table)

    def with_head(self, suffix: str) -> str:
        """The family's class in `transformers` with another head: `CLASSIFYING` or `TAGGING`."""
        return (self.stem or re.sub(r"(ForCausalLM|ForMaskedLM|LMHeadModel)$", "", self.architecture)) + suffix

    @property
    def answering(self) -> Family:
        """The family as its class of `transformers` that extracts answers names its tensors."""
        prefix = "transformer." if self.model_type in TRANSFORMERS else self.prefix
        rows = (
            dataclasses.replace(row, theirs=re.sub(f"^{re.escape(self.prefix)}", prefix, row.theirs))
            for row in self.table
        )
        return dataclasses.replace(self, prefix=prefix, table=(*rows, *SPANS))


CLASSIFYING = "ForSequenceClassification"
"""Suffix of the classes of `transformers` that classify texts."""
TAGGING = "ForTokenClassification"
"""Suffix of those that classify tokens."""
TAGGERS = (
    *("bert", "roberta", "xlm-roberta", "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma"),
    *("gemma2", "phi3", "smollm3", "stablelm", "starcoder2", "gpt_oss", "deepseek_v3"),
)
"""Families with a class that classifies tokens."""


ANSWERING = "ForQuestionAnswering"
"""Suffix of those that find the first and the last token of an answer."""
TRANSFORMERS = "llama", "qwen2", "qwen3", "qwen3_moe", "smollm3"
"""Families whose tensors are named "transformer." instead of "model." there."""
ANSWERERS = (
    *("bert", "roberta", "xlm-roberta", "gpt2", "gpt_neox", "falcon", "bloom", "mistral", "mixtral"),
    *TRANSFORMERS,
)
"""Families with such a class."""
SPANS = (
    Row("qa_outputs.weight", "Y D", "span_extractor", "D Y"),
    Row("qa_outputs.bias", "Y", "span_extractor_bias", "Y"),
)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A parameter, or one entry of a stacked parameter, and the tensor, or part of one, that holds it."""

    leaf: str
    """Name of the parameter, such as "blocks/attention/q"."""
    index: tuple[int, ...]
    """Index of the entry along the parameter's leading axes."""
    tensor: str
    row: Row
    sizes: layout.Sizes

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return layout.shape(self.row.their_layout, self.sizes)

    def view(self, tensor: np.ndarray) -> np.ndarray:
        """View of the part of the tensor, in our layout, to read from or write to."""
        axes = layout.axes(self.row.our_layout)
        ours = " ".join(f"({axis})" for axis in axes if f"{{{axis}}}" not in self.row.theirs)
        return layout.view(np.asarray(tensor), self.row.their_layout, ours, self.sizes)


def pieces(family: Family, stacks: Mapping[str, Stack], shapes: Mapping[str, tuple[int, ...]]) -> list[Piece]:
    """All pieces of a model.

    stacks  name of a stack's parameters, such as "blocks" -> stack of layers
    shapes  name -> shape of every parameter
    """
    trees: list[tuple[str, str, str, tuple[int, ...]]] = [("", "", "", ())]  # outside the layers, then each layer
    for name, stack in stacks.items():
        for layer in range(len(stack.blocks)):
            names, number = stack.location(layer)
            index = () if number is None else (number,)
            trees.append((str(layer), f"{name}/{{L}}/", "/".join((name, *names, "")), index))
    found: list[Piece] = []
    sizes: dict[str, int] = {}
    for layer, pattern, path, index in trees:
        rows = dict(_applying(family.table, shapes, pattern, path, len(index)))
        sizes = dict(sizes)
        for row, leaf in rows.items():
            sizes |= layout.sizes(row.our_layout, shapes[leaf][len(index) :], sizes)
        for row, leaf in rows.items():
            found += _expanded(row, leaf, row.theirs.replace("{L}", layer), index, sizes)
    return found


def _applying(
    table: tuple[Row, ...], shapes: Mapping[str, tuple[int, ...]], pattern: str, path: str, stacked: int
) -> Iterator[tuple[Row, str]]:
    """The rows that apply to a tree of parameters, each with its parameter. `pattern` in a row's names is replaced by
    `path`. stacked: number of leading axes that the row does not list."""
    for row in table:
        names = (row.ours, row.if_present, row.if_absent)
        leaf, present, absent = (name.replace(pattern, path, 1) for name in names)
        here = row.ours.startswith(pattern) and ("{L}" in row.ours) == ("{L}" in pattern)
        axes = len(layout.axes(row.our_layout)) + stacked
        if here and len(shapes.get(leaf, ())) == axes and (not present or present in shapes) and absent not in shapes:
            yield row, leaf


def _expanded(row: Row, leaf: str, name: str, index: tuple[int, ...], sizes: layout.Sizes) -> Iterator[Piece]:
    """The pieces of a row: one for each index along the axes in the tensor's name, such as {E}."""
    axes = re.findall(r"\{(\w)\}", name)
    assert row.our_layout.split()[: len(axes)] == axes, f"{row}: axes in the name must come first in the layout"
    for numbers in np.ndindex(*(sizes[letter] for letter in axes)):
        tensor = name.format(**dict(zip(axes, numbers, strict=True)))
        yield Piece(leaf, (*index, *numbers), tensor, row, sizes)
