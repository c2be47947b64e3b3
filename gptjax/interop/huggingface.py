"""Models as `transformers` keeps them: config.json and safetensors, by the tables of `families/`, in both directions.

config, params = load_hf(folder)                     # straight into stacked, sharded arrays, without a second copy
save_hf(folder, config, params, tokenizer)           # what `transformers` loads with no code of ours

Between a model and its files lies a description that other formats share: the fields of config.json, and named tensors.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import differences
from gptjax.data.tokenizers import Tokenizer
from gptjax.distributed.parameters import declared, flat, nested
from gptjax.distributed.sharding import ShardingRules
from gptjax.inference.sampling import Sampling
from gptjax.interop import multimodal, quantised, safetensors, tokenizers
from gptjax.interop.families import CLASSIFYING, FAMILIES, Family, Fields, Piece, pieces
from gptjax.interop.templates import ChatTemplate
from gptjax.nn import (
    MLP,
    Attention,
    ClassifierConfig,
    EncoderConfig,
    EncoderDecoderConfig,
    LayerOverrides,
    LongRoPE,
    MixtureOfExperts,
    ModelConfig,
    MultiHeadAttention,
    RoPE,
    Stack,
    SwiGLU,
    TransformerConfig,
)
from gptjax.types import Params, UserError


def load_hf(
    folder: str | Path, dtype: str | None = None, rules: ShardingRules = ShardingRules()
) -> tuple[ModelConfig, Params]:
    """The model in a folder. Its parameters have this dtype, float32 or bfloat16 (None: the files' own), and lie as
    `rules` say on the current mesh; it computes in bfloat16 if most of them are, else in float32.

    Raises UserError, with the names, for a model of no known family, a setting that we don't have, tensors that are
    lacking, one too many or of another shape, and for weights that are pickles."""
    fields = read_config(folder)
    return from_tensors(fields, safetensors.Tensors(folder), dtype, rules)


def save_hf(
    folder: str | Path,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer | None = None,
    context: int | None = None,
    template: ChatTemplate | None = None,
    dtype: str = "float32",
    model_type: str | None = None,
    stop_token_ids: Sequence[int] | None = None,
    decoder_start_token_id: int | None = None,
    sampling: Sampling | None = None,
    labels: Sequence[str] | None = None,
    append_eos: bool | None = None,
) -> None:
    """Writes a folder that `transformers` loads: config.json, generation_config.json, safetensors of this dtype, and
    the tokenizer's files.

    context     the most tokens that the model reads, where its positions don't say
    template    how it reads conversations; None: in our own format, where the tokenizer has its markers
    model_type  the family to write it as; None: the first that can express it
    stop_token_ids  the tokens at which a text ends; None: the special ones, the end of a message first
    decoder_start_token_id  the token that every target of an encoder-decoder begins with
    sampling    how the next token is drawn where nothing else is said; None: as `transformers` has it, greedily
    labels      what the classes of a classifier are called; None: as `transformers` does
    append_eos  end every text with the tokenizer's end token; None: only where the model is not a decoder

    Raises UserError for a model that no published family can express, and says what is in the way."""
    described, tensors = to_tensors(config, params, dtype, model_type)
    folder = Path(folder)
    safetensors.write(folder, tensors.shapes, tensors.__getitem__)
    specials = {} if tokenizer is None else tokenizer.specials
    bos, end = (specials.get(role) for role in ("<|bos|>", "<|end|>"))
    if append_eos is None:
        append_eos = isinstance(config, EncoderConfig) or not isinstance(config, TransformerConfig)
    pad = None if tokenizer is None else tokenizers.padding(tokenizer, append_eos)
    ids = {"bos_token_id": bos, "eos_token_id": end, "pad_token_id": pad}
    if decoder_start_token_id is not None:
        ids["decoder_start_token_id"] = decoder_start_token_id
    if stop_token_ids is None and tokenizer is not None:
        stop_token_ids = sorted(set(tokenizer.specials.values()), key=lambda i: (i != end, i))
    length = {} if context is None else {"max_position_embeddings": context}
    named = {} if labels is None else _named(labels)
    _write_json(folder / "config.json", {**length, **described, **named, **ids, "dtype": dtype})
    generation = (
        {**ids, "eos_token_id": stop_token_ids[0] if len(stop_token_ids) == 1 else list(stop_token_ids)}
        if stop_token_ids
        else ids
    )
    if sampling is not None:
        drawing = {name: value for name, value in dataclasses.asdict(sampling).items() if value is not None}
        drawing.setdefault("top_k", 0)  # all: where nothing is said, `transformers` takes 50
        if sampling.greedy:
            drawing = {"repetition_penalty": sampling.repetition_penalty}
        generation = {**generation, "do_sample": not sampling.greedy, **drawing}
    if not isinstance(config, EncoderConfig | ClassifierConfig):  # which don't generate
        _write_json(folder / "generation_config.json", generation)
    if tokenizer is not None:
        tokenizers.save(tokenizer, folder, context or config.max_positions, template, append_eos)


def _named(labels: Sequence[str]) -> dict[str, Any]:
    """The fields that say what classes are called."""
    return {"id2label": dict(enumerate(labels)), "label2id": {label: number for number, label in enumerate(labels)}}


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_config(folder: str | Path, name: str = "config.json") -> Fields:
    """A folder's config.json, or its other file of fields; those of the text in a model of text and images."""
    try:
        return Fields(multimodal.text_fields(json.loads((Path(folder) / name).read_text())))
    except (OSError, ValueError) as error:
        raise UserError(f"path: got {folder}, whose {name} is missing or damaged ({error})") from None


def read_kind(folder: str | Path) -> type[ModelConfig]:
    """The class of configuration that a folder's model has. Raises UserError for a model of no known family."""
    fields = read_config(folder)
    return ClassifierConfig if _classifies(fields) else _family(fields["model_type"]).kind


def read_decoder_start_token_id(folder: str | Path) -> int:
    """The token that every target of a folder's encoder-decoder begins with: padding, where it names no other."""
    names = ("generation_config.json", "config.json")
    files = [read_config(folder, name) for name in names if (Path(folder) / name).is_file()]
    keys = ("decoder_start_token_id", "pad_token_id")
    return next((file[key] for key in keys for file in files if file.get(key) is not None), 0)


def read_stop_token_ids(folder: str | Path) -> tuple[int, ...] | None:
    """The tokens at which a text of the folder's model ends: one, or several; None where it doesn't say."""
    names = ("generation_config.json", "config.json")
    found = [read_config(folder, name).get("eos_token_id") for name in names if (Path(folder) / name).is_file()]
    ids = next((ids for ids in found if ids is not None), None)
    return (ids,) if isinstance(ids, int) else None if ids is None else tuple(ids)


def read_labels(folder: str | Path) -> tuple[str, ...] | None:
    """What the classes of a folder's classifier are called; None where it doesn't say."""
    labels = read_config(folder).get("id2label")
    return labels and tuple(str(labels[number]) for number in sorted(labels, key=int))


def read_closed(folder: str | Path, tokenizer: Tokenizer) -> bool:
    """Whether the folder's classifier looks at the tokenizer's last token, after a text. One of `transformers` looks at
    the last token that is no padding, and so does not where the same token pads."""
    return tokenizers.closes(folder, tokenizer) and read_config(folder).get("pad_token_id") != tokenizer.eos


def read_sampling(folder: str | Path) -> Sampling | None:
    """How the folder's generation_config.json lets the next token be drawn; None where it doesn't say."""
    name = "generation_config.json"
    fields = read_config(folder, name) if (Path(folder) / name).is_file() else {}
    if (drawn := fields.get("do_sample")) is None:
        return None
    names = [field.name for field in dataclasses.fields(Sampling)] if drawn else ["repetition_penalty"]
    said = {name: fields[name] for name in names if fields.get(name) is not None}
    if said.get("top_k") == 0:  # which stands for all
        del said["top_k"]
    return Sampling(**said) if drawn else Sampling(temperature=0, **said)


def from_tensors(
    fields: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    dtype: str | None = None,
    rules: ShardingRules = ShardingRules(),
) -> tuple[ModelConfig, Params]:
    """The model of a config.json's fields and its tensors, which are read one after the other. Raises as `load_hf`."""
    fields = Fields(fields)
    tensors = quantised.dequantised(multimodal.text_tensors(tensors), fields.get("quantization_config"))
    family = _family(fields["model_type"])
    config = _read(family, fields)
    tensors = safetensors.Renamed(tensors, {_current(name, family.former): name for name in tensors})
    abstract = declared(config.build(rules))
    table = _without_prefix(family) if not any(name.startswith(family.prefix) for name in tensors) else family
    parts = pieces(table, _stacks(config), {name: leaf.shape for name, leaf in abstract.items()})
    _check_names(table, parts, tensors)
    by_leaf: dict[str, dict[tuple[int, ...], Piece]] = defaultdict(dict)
    for part in parts:
        by_leaf[part.leaf][part.index] = part

    def placed(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        stack = [part for _, part in sorted(by_leaf[name].items())]
        own = jnp.result_type(*{tensors[part.tensor].dtype for part in stack})
        leaf = jax.ShapeDtypeStruct(leaf.shape, dtype or own, sharding=leaf.sharding)
        return safetensors.place(leaf, lambda i: stack[i].view(tensors[stack[i].tensor]))

    params = {name: placed(name, leaf) for name, leaf in abstract.items()}
    half = sum(x.nbytes for x in params.values() if x.dtype == jnp.bfloat16)
    mostly = 2 * half > sum(x.nbytes for x in params.values())  # routers' biases are float32 in files of bfloat16
    return config.with_dtype("bfloat16" if mostly else "float32"), nested(params)


@dataclasses.dataclass(frozen=True)
class Exported(Mapping[str, np.ndarray]):
    """Name -> tensor, made of parameters when it is asked for."""

    parts: Mapping[str, list[Piece]]
    leaves: Mapping[str, Any]
    dtype: np.dtype

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Name -> shape and dtype."""
        return {name: jax.ShapeDtypeStruct(parts[0].shape, self.dtype) for name, parts in self.parts.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = np.empty(self.parts[name][0].shape, self.dtype)
        for part in self.parts[name]:
            leaf = self.leaves[part.leaf]
            part.view(tensor)[...] = np.asarray(leaf[part.index] if part.index else leaf)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


def to_tensors(
    config: ModelConfig, params: Params, dtype: str = "float32", model_type: str | None = None
) -> tuple[dict[str, Any], Exported]:
    """The fields of config.json and the tensors of a model: `from_tensors` undone. Raises as `save_hf`."""
    family, fields = _expressed(config, model_type)
    leaves = flat(params)
    by_tensor: dict[str, list[Piece]] = defaultdict(list)
    for part in pieces(family, _stacks(config), {name: leaf.shape for name, leaf in leaves.items()}):
        by_tensor[part.tensor].append(part)
    if lacking := leaves.keys() - {part.leaf for parts in by_tensor.values() for part in parts}:
        raise UserError(f"params: got {_some(lacking)}, for which {family.model_type} has no name")
    return fields, Exported(by_tensor, leaves, jnp.dtype(dtype))


def expressing(config: ModelConfig, model_type: str | None = None) -> Family:
    """The family that a model is written as: this one, or the first that can express it. Raises as `save_hf`."""
    return _expressed(config, model_type)[0]


def _family(model_type: str) -> Family:
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise UserError(f"model_type: got {model_type!r}, must be one of {known}")


def _classifies(fields: Fields) -> bool:
    return any(name.endswith(CLASSIFYING) for name in fields.get("architectures") or ())


def _read(family: Family, fields: Fields) -> ModelConfig:
    """The model that a config.json describes: the family's, or what that makes of it."""
    if not _classifies(fields):
        return family.read(fields)
    if not issubclass(family.kind, TransformerConfig):
        raise UserError(f"config.json: architectures: got {fields['architectures']}, must be {family.architecture}")
    fields.only(problem_type="single_label_classification")
    return family.classifier(family.read(fields), len(fields.get("id2label") or (0, 0)))


def _write(family: Family, config: ModelConfig) -> dict[str, Any]:
    """`_read` undone."""
    fields = {"model_type": family.model_type, "architectures": [family.architecture]}
    if not isinstance(config, ClassifierConfig):
        return fields | family.write(config)
    labels = [f"LABEL_{number}" for number in range(config.classes)]
    return fields | _named(labels) | family.write(config.trunk) | {"architectures": [family.classifying]}


def _expressed(config: ModelConfig, model_type: str | None) -> tuple[Family, dict[str, Any]]:
    """The family whose config.json, read back, gives this model again; and its fields."""
    families = FAMILIES if model_type is None else (_family(model_type),)
    reasons: dict[str, list[str]] = {}
    for family in families:
        if type(config.trunk if isinstance(config, ClassifierConfig) else config) is not family.kind:
            continue
        fields: dict[str, Any] = {}
        try:
            fields = _write(family, config)
            changed = differences(_essence(config), _essence(_read(family, Fields(fields))))
        except UserError as error:
            changed = [str(error), "perhaps more"]
        if not changed:
            return family, fields
        reasons[family.model_type] = changed
    if not reasons:
        known = ", ".join(sorted({family.kind.__name__ for family in families}))
        raise UserError(f"model: got {type(config).__name__}, must be {known} for a family of published models")
    nearest = min(reasons, key=lambda name: len(reasons[name]))
    raise UserError(
        f"model: no family of published models has it; in the way of the nearest, {nearest}, is "
        f"{'; '.join(reasons[nearest][:3])}"
    )


def _stacks(config: ModelConfig) -> dict[str, Stack]:
    """The stacks of a model, by the name of their parameters."""
    if isinstance(config, EncoderDecoderConfig):
        return {"encoder/blocks": config.encoder.stack(), "decoder/blocks": config.decoder.stack()}
    trunk = config.trunk if isinstance(config, ClassifierConfig) else config
    return {"blocks": trunk.stack()} if isinstance(trunk, TransformerConfig) else {}


def _essence(m: ModelConfig) -> dict[str, Any]:
    """All that decides what a trained model computes, said in one way only: each layer by itself, with its sizes."""
    if isinstance(m, EncoderDecoderConfig):
        return {"encoder": _essence(m.encoder), "decoder": _essence(m.decoder)}
    if isinstance(m, ClassifierConfig):
        headless: dict[str, Any] = {"transform": None} if isinstance(m.trunk, EncoderConfig) else {}
        trunk = dataclasses.replace(m.trunk, tie_embeddings=True, **headless)
        parts = ("classes", "pooling", "pooler", "bias")
        return {**_essence(trunk), "classifier": {name: getattr(m, name) for name in parts}}
    assert isinstance(m, TransformerConfig)
    layers = {
        str(i): {
            "attention": _attention(block.attention),
            "cross_attention": _attention(block.cross_attention),
            "mlp": _mlp(block.mlp),
            "hidden": block.hidden,
            "bias": block.bias,
        }
        for i, block in enumerate(m.stack().blocks)
    }
    of_layers = {
        "kv_heads": None,
        "head_size": 2,
        "hidden": None,
        "bias": False,
        "leading_layers": (),
        "pattern": (LayerOverrides(),),
    }
    parts = {"attention": MultiHeadAttention(), "cross_attention": None, "mlp": SwiGLU()}
    positions = RoPE() if isinstance(m.positions, RoPE) else m.positions  # which turn queries and keys in the layers
    of_training = {"dropout": 0.0, "layer_drop": 0.0, "remat": None, "dtype": "float32"}
    rest = dataclasses.replace(m, positions=positions, **of_layers, **parts, **of_training)
    return {"model": rest, "layers": layers}


def _attention(part: Attention | None) -> Attention | None:
    if isinstance(part, MultiHeadAttention):
        if part.scale is None and part.head_size is not None:
            part = dataclasses.replace(part, scale=part.head_size**-0.5)
        if part.output_bias is None:
            part = dataclasses.replace(part, output_bias=part.bias)
    positions = None if part is None else part.positions
    if part is not None and isinstance(positions, RoPE) and isinstance(positions.scaling, LongRoPE):
        scaling = dataclasses.replace(positions.scaling, length=None)  # there, the length of each text decides
        part = dataclasses.replace(part, positions=dataclasses.replace(positions, scaling=scaling))
    return part


def _mlp(part: MLP | None) -> MLP | None:
    if not isinstance(part, MixtureOfExperts):
        return part
    router = dataclasses.replace(part.router, load_balance=0.0, z_loss=0.0)
    return dataclasses.replace(part, router=router, capacity=None, implementation=None)


def _current(name: str, former: Iterable[tuple[str, str]]) -> str:
    """The name of the table for one of a file."""
    return next((name.removesuffix(old) + new for old, new in former if name.endswith(old)), name)


def _without_prefix(family: Family) -> Family:
    rows = (dataclasses.replace(row, theirs=row.theirs.removeprefix(family.prefix)) for row in family.table)
    return dataclasses.replace(family, table=tuple(rows))


def _check_names(family: Family, parts: Iterable[Piece], tensors: Mapping[str, np.ndarray]) -> None:
    shapes = {part.tensor: part.shape for part in parts}
    if lacking := shapes.keys() - tensors.keys():
        raise UserError(f"tensors: lacks {_some(lacking)}, of which a {family.model_type} like this one is made")
    extra = [name for name in tensors.keys() - shapes.keys() if not re.fullmatch(family.ignored, name)]
    if extra:
        raise UserError(f"tensors: got {_some(extra)} too many, which a {family.model_type} like this one has not")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise UserError(f"tensors: {name}: got shape {tensors[name].shape}, must be {shape} by config.json")


def _some(names: Iterable[str]) -> str:
    """The first few names."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
