"""What a model family is: how its config.json describes a model, and a table of names, both read in both directions.

A row of the table has on the left a tensor's name and layout in published files, on the right ours:

    Row("model.layers.{L}.self_attn.q_proj.weight", "(N H) D", "blocks/{L}/attention/q", "D N H")

{L} stands for the number of a layer, another letter for an index along that axis, as {E} for an expert. Layouts are
explained in `interop/layout.py`. Rows of parameters that a model does not have, or has with fewer or more axes, do not
apply to it: biases, for one, or experts.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from gptjax.interop import layout
from gptjax.nn import ClassifierConfig, ModelConfig, Stack, TransformerConfig
from gptjax.nn.stack import place
from gptjax.types import UserError


@dataclasses.dataclass(frozen=True)
class Row:
    """A tensor, or a part of one, and the parameter that it is."""

    theirs: str
    their_layout: str
    ours: str
    our_layout: str
    beside: str = ""
    """A parameter without which the row does not apply."""
    without: str = ""
    """A parameter with which the row does not apply."""


class Fields(dict[str, Any]):
    """The fields of a config.json. Reading one that is lacking raises UserError."""

    def __missing__(self, name: str) -> Any:
        raise UserError(f"config.json: lacks {name}")

    def only(self, **values: Any) -> None:
        """Raises UserError for a field that has another value than the one we know how to read."""
        for name, value in values.items():
            if (got := self.get(name)) is not None and got != value:
                raise UserError(f"config.json: {name}: got {got!r}, must be {value!r}: this version knows no other")


@dataclasses.dataclass(frozen=True)
class Family:
    """Models that one class of `transformers` runs."""

    model_type: str
    """What config.json calls it."""
    architecture: str
    """The class in `transformers`."""
    read: Callable[[Fields], Any]
    """The model that a config.json describes. Raises UserError, naming the field, for what we don't have."""
    write: Callable[[Any], dict[str, Any]]
    """The fields of config.json for a model. What they leave out because the family can't express it, `read` shows."""
    table: tuple[Row, ...]
    kind: type[ModelConfig] = TransformerConfig
    """The class of the configuration."""
    prefix: str = "model."
    """What names begin with; files of the model without its head lack it."""
    ignored: str = r"lm_head\.weight|.*\.rotary_emb\.inv_freq"
    """Names of tensors that nobody needs: buffers that can be computed, and a head that is tied to the embedding."""
    former: tuple[tuple[str, str], ...] = ()
    """How names end in older files, and how they do in the table."""
    classifier: Callable[[Any, int], ClassifierConfig] = ClassifierConfig
    """The classifier that the family makes of a model and a number of classes."""
    stem: str = ""
    """What the class in `transformers` of that begins with, where it is not what `architecture` does."""

    @property
    def classifying(self) -> str:
        """That class."""
        return (self.stem or re.sub(r"(ForCausalLM|ForMaskedLM|LMHeadModel)$", "", self.architecture)) + CLASSIFYING


CLASSIFYING = "ForSequenceClassification"
"""What classes of `transformers` are called that tell of which class a text is."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A parameter, or an entry of a stacked one, and the tensor, or the part of one, that it is."""

    leaf: str
    """Name of the parameter, such as "blocks/attention/q"."""
    index: tuple[int, ...]
    """Which entry of it: numbers along its first axes."""
    tensor: str
    row: Row
    sizes: layout.Sizes

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return layout.shape(self.row.their_layout, self.sizes)

    def view(self, tensor: np.ndarray) -> np.ndarray:
        """The part of the tensor, in our layout; to be read, or to be written to."""
        ours = " ".join(letter for letter in self.row.our_layout.split() if f"{{{letter}}}" not in self.row.theirs)
        return layout.view(np.asarray(tensor), self.row.their_layout, ours, self.sizes)


def pieces(family: Family, stacks: Mapping[str, Stack], shapes: Mapping[str, tuple[int, ...]]) -> list[Piece]:
    """All pieces of a model.

    stacks  by the name of their parameters: {"blocks": ...}
    shapes  of all parameters, by name
    """
    trees: list[tuple[str, str, str, tuple[int, ...]]] = [("", "", "", ())]  # what is in no layer, and then each layer
    for name, stack in stacks.items():
        for layer in range(len(stack.blocks)):
            names, number = place(stack, layer)
            index = () if number is None else (number,)
            trees.append((str(layer), f"{name}/{{L}}/", "/".join((name, *names, "")), index))
    found: list[Piece] = []
    sizes: dict[str, int] = {}
    for layer, pattern, path, index in trees:
        rows = dict(_applying(family.table, shapes, pattern, path, len(index)))
        sizes = dict(sizes)
        for row, leaf in rows.items():
            sizes |= layout.sizes(row.our_layout, shapes[leaf][len(index) :])
        for row, leaf in rows.items():
            found += _expanded(row, leaf, row.theirs.replace("{L}", layer), index, sizes)
    return found


def _applying(
    table: tuple[Row, ...], shapes: Mapping[str, tuple[int, ...]], pattern: str, path: str, stacked: int
) -> Iterator[tuple[Row, str]]:
    """The rows that apply to a tree of parameters, where their `pattern` stands for its `path`, and the parameter of
    each. stacked: how many axes more a parameter has than the row says."""
    for row in table:
        leaf, beside, without = (name.replace(pattern, path, 1) for name in (row.ours, row.beside, row.without))
        here = row.ours.startswith(pattern) and ("{L}" in row.ours) == ("{L}" in pattern)
        axes = len(row.our_layout.split()) + stacked
        if here and len(shapes.get(leaf, ())) == axes and (not beside or beside in shapes) and without not in shapes:
            yield row, leaf


def _expanded(row: Row, leaf: str, name: str, index: tuple[int, ...], sizes: layout.Sizes) -> Iterator[Piece]:
    """One piece, or one for each index along the axes that the tensor's name counts."""
    counted = re.findall(r"\{(\w)\}", name)
    assert row.our_layout.split()[: len(counted)] == counted, f"{row}: the axes that are counted must come first"
    for numbers in np.ndindex(*(sizes[letter] for letter in counted)):
        tensor = name.format(**dict(zip(counted, numbers, strict=True)))
        yield Piece(leaf, (*index, *numbers), tensor, row, sizes)
