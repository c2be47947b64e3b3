"""Load and save models in the format of `transformers`: config.json and safetensors, by the tables of `families/`.

config, params = load_hf(folder)                     # straight into stacked, sharded arrays, without a second copy
save_hf(folder, config, params, tokenizer)           # loads in `transformers` without our code

The intermediate form between a model and its files, the fields of config.json and named tensors, is shared with other
formats.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import differences
from gptjax.data.tokenizers import MissingTokenizer, Tokenizer
from gptjax.distributed.parameters import declared, flat, nested, parameter_info
from gptjax.distributed.sharding import ShardingRules
from gptjax.inference.sampling import Sampling
from gptjax.interop import compressed, heads, multimodal, quantised, safetensors, schema, tokenizers
from gptjax.interop.compressed import Exported
from gptjax.interop.essence import essence, summarise
from gptjax.interop.families import FAMILIES, Family, Fields, Piece, pieces
from gptjax.interop.generation import of_sampling
from gptjax.interop.multimodal import read_config
from gptjax.interop.templates import ChatTemplate
from gptjax.nn import (
    GELU,
    BackboneConfig,
    EncoderConfig,
    EncoderDecoderConfig,
    HeadConfig,
    ModelConfig,
    Stack,
    SwiGLU,
    TransformerConfig,
)
from gptjax.types import Params, UserError

DTYPES = ("float32", "bfloat16", "float16")
"""Dtypes of written tensors."""
MLPS = SwiGLU(), GELU()
"""MLPs of which every family has one, except for mixtures of experts."""
SHOWN, MORE = 8, "possibly more"
"""Number of differences listed for a model that no family can express, and a note that there may be others."""


def load_hf(
    folder: str | Path, dtype: str | None = None, rules: ShardingRules = ShardingRules()
) -> tuple[ModelConfig, Params]:
    """Load the model in a folder, with parameters sharded by `rules` over the current mesh. It computes in bfloat16 if
    most parameters are bfloat16, else in float32; in float32 too if config.json says so, as in `transformers`.

    dtype  dtype of the parameters, float32 or bfloat16. None: the files' own

    Raises UserError, with the names, for an unknown family, an unsupported setting, tensors that are missing,
    unexpected or of the wrong shape, and for pickled weights."""
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
    """Write a folder that `transformers` loads: config.json, generation_config.json, safetensors of this dtype
    (float32, bfloat16 or float16), and the tokenizer's files.

    context                 maximum number of tokens that the model reads, if its positions do not limit it
    template                chat template. None: our own format, if the tokenizer has its special tokens
    model_type              family to write. None: the first that can express the model
    stop_token_ids          tokens that end a text. None: the special tokens, the end token first
    decoder_start_token_id  first token of every target of an encoder-decoder
    sampling                default sampling settings. None: the default of `transformers`, greedy
    labels                  names of a classifier's classes. None: the default of `transformers`
    append_eos              end every text with the tokenizer's end token. None: only if the model is not a decoder

    Raises UserError, with the differences, for a model that no published family can express, and for values that the
    dtype cannot hold."""
    described, tensors = to_tensors(config, params, dtype, model_type)
    folder = Path(folder)
    tokenizer = None if isinstance(tokenizer, MissingTokenizer) else tokenizer
    specials = {} if tokenizer is None else tokenizer.specials
    bos, end = (specials.get(role) for role in ("<|bos|>", "<|end|>"))
    if append_eos is None:
        append_eos = not isinstance(config, TransformerConfig)
    pad = None if tokenizer is None else tokenizers.padding(tokenizer, append_eos)
    if (own := described.get("pad_token_id", pad)) != pad and pad is not None:
        raise UserError(f"tokenizer: got one that pads with {pad}, must be {own}, from which the positions are counted")
    safetensors.write(folder, tensors.shapes, tensors.__getitem__)
    ids = {"bos_token_id": bos, "eos_token_id": end, "pad_token_id": own}
    if decoder_start_token_id is not None:
        ids["decoder_start_token_id"] = decoder_start_token_id
    if stop_token_ids is None and tokenizer is not None:
        stop_token_ids = sorted(set(tokenizer.specials.values()), key=lambda i: (i != end, i))
    length = {} if context is None or config.max_positions is not None else {"max_position_embeddings": context}
    named = {} if labels is None else heads.names(labels)
    _write_json(folder / "config.json", {**length, **described, **named, **ids, "dtype": dtype})
    generation = (
        {**ids, "eos_token_id": stop_token_ids[0] if len(stop_token_ids) == 1 else list(stop_token_ids)}
        if stop_token_ids
        else ids
    )
    if sampling is not None:
        generation = {**generation, **of_sampling(sampling)}
    if not isinstance(config, EncoderConfig | HeadConfig):  # they do not generate
        _write_json(folder / "generation_config.json", generation)
    if tokenizer is not None:
        tokenizers.save(tokenizer, folder, context or config.max_positions, template, append_eos)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_kind(folder: str | Path) -> type[ModelConfig]:
    """The configuration class of a folder's model. Raises UserError for an unknown family."""
    fields = read_config(folder)
    return heads.kind_of(fields) or _family(fields["model_type"]).kind


def read_labels(folder: str | Path) -> tuple[str, ...] | None:
    """Names of the classes of a folder's classifier. None: the folder does not say."""
    labels = read_config(folder).get("id2label")
    return labels and tuple(str(labels[number]) for number in sorted(labels, key=int))


def read_append_eos(folder: str | Path, tokenizer: Tokenizer) -> bool:
    """True if the folder's classifier reads the end token after a text. `transformers` pools the last token that is not
    padding, which excludes an end token that is also the padding token."""
    return tokenizers.appends_eos(folder, tokenizer) and read_config(folder).get("pad_token_id") != tokenizer.eos


def from_tensors(
    fields: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    dtype: str | None = None,
    rules: ShardingRules = ShardingRules(),
) -> tuple[ModelConfig, Params]:
    """Build the model from a config.json's fields and its tensors, read one at a time. Raises UserError as
    `load_hf`."""
    fields = Fields(fields)
    _, config, found, tensors = matched(fields, tensors, rules)
    abstract, infos = declared(config.build(rules)), flat(parameter_info(config.build(rules)))
    by_leaf: dict[str, dict[tuple[int, ...], Piece]] = defaultdict(dict)
    for piece in found:
        by_leaf[piece.leaf][piece.index] = piece

    def load(name: str, leaf: jax.ShapeDtypeStruct) -> Any:
        stack = [piece for _, piece in sorted(by_leaf[name].items())]
        if dtype is None and (kept := compressed.quantised_leaf(stack, tensors, leaf, infos[name])) is not None:
            return kept
        own = jnp.result_type(*{tensors[piece.tensor].dtype for piece in stack})
        leaf = jax.ShapeDtypeStruct(leaf.shape, dtype or own, sharding=leaf.sharding)
        shape = leaf.shape[len(stack[0].index) :]
        return safetensors.place(leaf, lambda i: stack[i].view(tensors[stack[i].tensor]).reshape(shape))

    params = {name: load(name, leaf) for name, leaf in abstract.items()}
    half = sum(x.nbytes for x in params.values() if x.dtype == jnp.bfloat16)
    mostly = 2 * half > sum(x.nbytes for x in params.values())  # routers' biases are float32 in bfloat16 files
    said = fields.get("dtype") or fields.get("torch_dtype")
    exact = dtype is None and said == "float32"
    return config.with_dtype("bfloat16" if mostly and not exact else "float32"), nested(params)


def matched(
    fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray], rules: ShardingRules = ShardingRules()
) -> tuple[Family, ModelConfig, list[Piece], Mapping[str, np.ndarray]]:
    """The family and configuration of a config.json, the pieces of the model, and its tensors, by the names of the
    family's table. Raises UserError as `load_hf`."""
    fields = Fields(fields)
    tensors = quantised.dequantised(multimodal.text_tensors(tensors), fields.get("quantization_config"))
    schema.check_sizes(fields, tensors)
    family = _family(fields["model_type"])
    if family.model_type == "gpt2" and fields.get("quantization_config"):
        raise UserError("config.json: quantization_config: got one for gpt2, whose programs disagree on the layout")
    config = heads.read(family, fields)
    family = heads.naming(family, config)
    tensors = safetensors.Renamed(tensors, {_current(name, family.former): name for name in tensors})
    if not any(name.startswith(family.prefix) for name in tensors):
        tensors = safetensors.Renamed(tensors, _with_prefix(family, tensors))
    config = _with_own_head(family, config, tensors)
    found = tensor_pieces(family, config, rules)
    _check_names(family, found, tensors)
    return family, config, found, tensors


def tensor_pieces(family: Family, config: ModelConfig, rules: ShardingRules = ShardingRules()) -> list[Piece]:
    """All pieces of a model, with the names and shapes of its tensors in a folder of the family."""
    return pieces(family, _stacks(config), {name: leaf.shape for name, leaf in declared(config.build(rules)).items()})


def to_tensors(
    config: ModelConfig, params: Params, dtype: str = "float32", model_type: str | None = None
) -> tuple[dict[str, Any], Exported]:
    """The fields of config.json and the tensors of a model: the inverse of `from_tensors`. Raises UserError as
    `save_hf`, and on access for a value that is not finite in a dtype of `DTYPES`."""
    if dtype not in DTYPES:
        raise UserError(f"dtype: got {dtype!r}, must be one of {', '.join(DTYPES)}")
    family, fields = _expressed(config, model_type)
    leaves = flat(params)
    by_tensor: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces(family, _stacks(config), {name: leaf.shape for name, leaf in leaves.items()}):
        by_tensor[piece.tensor].append(piece)
    if lacking := leaves.keys() - {piece.leaf for group in by_tensor.values() for piece in group}:
        raise UserError(f"params: got {_some(lacking)}, for which {family.model_type} has no name")
    exported = Exported(by_tensor, leaves, jnp.dtype(dtype))
    quantised = compressed.config(exported, family.head)
    return fields if quantised is None else {**fields, "quantization_config": quantised}, exported


def expressing(config: ModelConfig, model_type: str | None = None) -> Family:
    """The family `model_type`, or the first that can express the model. Raises UserError as `save_hf`."""
    return _expressed(config, model_type)[0]


def _family(model_type: str) -> Family:
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise UserError(f"model_type: got {model_type!r}, must be one of {known}")


def _expressed(config: ModelConfig, model_type: str | None) -> tuple[Family, dict[str, Any]]:
    """The family whose config.json, read back, gives the same model; and its fields."""
    families = FAMILIES if model_type is None else (_family(model_type),)
    reasons: dict[str, list[str]] = {}
    for family in families:
        if type(heads.backbone_of(config)) is not family.kind:
            continue
        fields, changed = _changes(family, config)
        if not changed:
            return heads.naming(family, config), fields
        reasons[family.model_type] = changed
    if not reasons:
        known = ", ".join(sorted({family.kind.__name__ for family in families}))
        fix = "; lm.without_extra_heads() may be one" if hasattr(config, "without_extra_heads") else ""
        raise UserError(f"model: got {type(config).__name__}, must be {known} for a published family{fix}")
    nearest = min(reasons, key=lambda name: (MORE in reasons[name], len(reasons[name])))
    changed = reasons[nearest]
    more = f"; and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
    which = f"no published family can express it; the nearest, {nearest}," if model_type is None else nearest
    raise UserError(f"model: {which} differs in {'; '.join(changed[:SHOWN])}{more}")


def _changes(family: Family, config: ModelConfig) -> tuple[dict[str, Any], list[str]]:
    """The fields of config.json in this family, and the differences of the model that they describe."""

    def written(config: ModelConfig) -> tuple[dict[str, Any], list[str]]:
        fields = heads.write(family, config)
        return fields, summarise(differences(essence(config), essence(heads.read(family, Fields(fields)))))

    try:
        return written(config)
    except UserError as error:
        reason = str(error)
    if reason.startswith("model.mlp:") and isinstance(config, BackboneConfig):
        for mlp in MLPS:  # the other differences are those of the model with an MLP of the family
            with contextlib.suppress(UserError):
                return {}, [reason, *written(dataclasses.replace(config, mlp=mlp))[1]]
    return {}, [reason, MORE]


def _stacks(config: ModelConfig) -> dict[str, Stack]:
    """The stacks of layers of a model, by the name of their parameters."""
    if isinstance(config, EncoderDecoderConfig):
        return {"encoder/blocks": config.encoder.stack(), "decoder/blocks": config.decoder.stack()}
    backbone = heads.backbone_of(config)
    return {"blocks": backbone.stack()} if isinstance(backbone, BackboneConfig) else {}


def _current(name: str, former: Iterable[tuple[str, str]]) -> str:
    """The name in the family's table for a name in a file, which may be a former one."""
    return next((name.removesuffix(old) + new for old, new in former if name.endswith(old)), name)


def _with_prefix(family: Family, names: Iterable[str]) -> dict[str, str]:
    """Name in the family's table -> name in a file of a model without its head, where names lack the prefix."""
    bare = {row.theirs for row in family.table if not row.theirs.startswith(family.prefix)} | family.copies.keys()
    return {name if name in bare else family.prefix + name: name for name in names}


def _with_own_head(family: Family, config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> ModelConfig:
    """The configuration, whose head is not tied if the file has one that differs from the embedding, as `transformers`
    reads it. Raises UserError for another copy that differs from its original."""
    decoder = config.decoder if isinstance(config, EncoderDecoderConfig) else config
    if not isinstance(decoder, BackboneConfig):
        return config  # a classifier, whose head is another
    for name, source in family.copies.items():
        own = name == family.head
        if (own and not decoder.tie_embeddings) or {name, source} - tensors.keys():
            continue
        if _equal(tensors[name], tensors[source]):
            continue
        if not own:
            raise UserError(f"tensors: got {name} that differs from {source}, must be the same for {family.model_type}")
        decoder = dataclasses.replace(decoder, tie_embeddings=False)
    return dataclasses.replace(config, decoder=decoder) if isinstance(config, EncoderDecoderConfig) else decoder


def _equal(a: np.ndarray, b: np.ndarray, rows: int = 4_096) -> bool:
    """True if the matrices are equal; compared a few rows at a time, as they may be large."""
    strips = (slice(i, i + rows) for i in range(0, len(a), rows))
    return a.shape == b.shape and all(np.array_equal(a[strip], b[strip]) for strip in strips)


def _check_names(family: Family, pieces: Iterable[Piece], tensors: Mapping[str, np.ndarray]) -> None:
    shapes = {piece.tensor: piece.shape for piece in pieces}
    if lacking := shapes.keys() - tensors.keys():
        raise UserError(f"tensors: missing {_some(lacking)}, which a {family.model_type} of this configuration needs")
    extra = tensors.keys() - shapes.keys() - family.copies.keys()
    if extra := [name for name in extra if not re.fullmatch(family.ignored, name)]:
        raise UserError(f"tensors: unexpected {_some(extra)}, which a {family.model_type} of this configuration lacks")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise UserError(f"tensors: {name}: got shape {tensors[name].shape}, must be {shape} by config.json")


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
