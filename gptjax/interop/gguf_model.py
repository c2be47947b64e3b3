"""The model in a GGUF file: keys of the metadata, and the mapping of Hugging Face's tensors to GGUF's.

GGUF's "llama" pairs neighbouring channels in its rotary embedding, like Meta's checkpoints; "qwen2" and "qwen3" pair
the halves of a head, like Hugging Face. So the rows of Llama's queries and keys are permuted (see `rotary`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from math import pi
from typing import Any

import numpy as np

from gptjax.interop.rotary import interleave
from gptjax.types import UserError


@dataclasses.dataclass(frozen=True)
class Weight:
    """A tensor of the file."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    """Returns the values, of `shape` and any float type; called when they are written."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A model as described by a GGUF file."""

    architecture: str
    vocab: int
    metadata: dict[str, Any]
    weights: list[Weight]


def describe(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Model:
    """Describe the model of a Hugging Face config.json and its tensors.

    Raises UserError for an architecture or a setting that llama.cpp would compute differently, and for a tensor that is
    missing, of the wrong shape or unexpected."""
    kind = config.get("model_type")
    if kind not in _FAMILIES:
        raise UserError(f"model_type: got {kind!r}, GGUF files can hold {', '.join(_FAMILIES)}")
    return _FAMILIES[kind](config, tensors)


@dataclasses.dataclass(frozen=True)
class _Row:
    """A tensor in both formats."""

    source: str
    """Hugging Face's name."""
    name: str
    """GGUF's name."""
    shape: tuple[int, ...]
    """Hugging Face's shape."""
    convert: Callable[[np.ndarray], np.ndarray] = np.asarray
    """Hugging Face's layout -> GGUF's."""


def _llama(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Model:
    """Llama 2 and 3, Mistral, Qwen 2 and 3."""
    kind = config["model_type"]
    arch = "llama" if kind == "mistral" else kind
    _only(config, "hidden_act", "silu", "silu")
    L, D, F, V, T, N = _sizes(config, "num_hidden_layers hidden_size intermediate_size vocab_size "
                              "max_position_embeddings num_attention_heads")  # fmt: skip
    K = config.get("num_key_value_heads") or N
    H = config.get("head_dim") or D // N
    window = config.get("sliding_window") if kind == "mistral" or config.get("use_sliding_window") else None
    rope, frequencies = _rope(config, H)
    metadata = {
        # llama.cpp has no sliding window for these models; up to the window's length it makes no difference.
        "context_length": min(T, window or T),
        "embedding_length": D,
        "block_count": L,
        "feed_forward_length": F,
        "attention.head_count": N,
        "attention.head_count_kv": K,
        "attention.key_length": H,
        "attention.value_length": H,
        "attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "vocab_size": V,
        "rope.dimension_count": H,
        **rope,
    }
    if arch == "qwen3":
        _only(config, "attention_bias", False, False)
    biased = {"q", "k", "v"} if kind == "qwen2" else set("qkvo") if config.get("attention_bias") else set()
    converters = {"q": lambda x: interleave(x, N), "k": lambda x: interleave(x, K)} if arch == "llama" else {}

    def rows() -> Iterator[_Row]:
        yield _Row("model.embed_tokens.weight", "token_embd.weight", (V, D))
        for i in range(L):
            layer, block = f"model.layers.{i}.", f"blk.{i}."
            yield _Row(layer + "input_layernorm.weight", block + "attn_norm.weight", (D,))
            for letter, shape in {"q": (N * H, D), "k": (K * H, D), "v": (K * H, D), "o": (D, N * H)}.items():
                source = f"{layer}self_attn.{letter}_proj."
                name = block + ("attn_output." if letter == "o" else f"attn_{letter}.")
                convert = converters.get(letter, np.asarray)
                yield _Row(source + "weight", name + "weight", shape, convert)
                if letter in biased:
                    yield _Row(source + "bias", name + "bias", shape[:1], convert)
            if arch == "qwen3":
                yield _Row(layer + "self_attn.q_norm.weight", block + "attn_q_norm.weight", (H,))
                yield _Row(layer + "self_attn.k_norm.weight", block + "attn_k_norm.weight", (H,))
            yield _Row(layer + "post_attention_layernorm.weight", block + "ffn_norm.weight", (D,))
            for matrix, shape in {"gate": (F, D), "up": (F, D), "down": (D, F)}.items():
                yield _Row(f"{layer}mlp.{matrix}_proj.weight", f"{block}ffn_{matrix}.weight", shape)
                if config.get("mlp_bias"):
                    yield _Row(f"{layer}mlp.{matrix}_proj.bias", f"{block}ffn_{matrix}.bias", shape[:1])
        yield _Row("model.norm.weight", "output_norm.weight", (D,))
        if not config.get("tie_word_embeddings", False):
            yield _Row("lm_head.weight", "output.weight", (V, D))

    weights = _weights(list(rows()), tensors)
    if frequencies is not None:
        weights.append(Weight("rope_freqs.weight", frequencies.shape, lambda: frequencies))
    return Model(arch, V, {f"{arch}.{key}": value for key, value in metadata.items()}, weights)


def _gpt2(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Model:
    _only(config, "activation_function", "gelu_new", "gelu_new", "gelu_pytorch_tanh")
    _only(config, "scale_attn_weights", True, True)
    _only(config, "scale_attn_by_inverse_layer_idx", False, False)
    L, D, V, T, N = _sizes(config, "n_layer n_embd vocab_size n_positions n_head")
    F = config.get("n_inner") or 4 * D
    metadata = {
        "context_length": T,
        "embedding_length": D,
        "block_count": L,
        "feed_forward_length": F,
        "attention.head_count": N,
        "attention.head_count_kv": N,
        "attention.layer_norm_epsilon": float(config.get("layer_norm_epsilon", 1e-5)),
        "vocab_size": V,
    }
    # The tensor names of OpenAI's own checkpoint have no prefix.
    prefix = "transformer." if any(name.startswith("transformer.") for name in tensors) else ""

    def rows() -> Iterator[_Row]:
        yield _Row(prefix + "wte.weight", "token_embd.weight", (V, D))
        yield _Row(prefix + "wpe.weight", "position_embd.weight", (T, D))
        for i in range(L):
            layer, block = f"{prefix}h.{i}.", f"blk.{i}."
            for source, name, shape in (
                ("ln_1", "attn_norm", (D,)),
                ("attn.c_attn", "attn_qkv", (D, 3 * D)),
                ("attn.c_proj", "attn_output", (D, D)),
                ("ln_2", "ffn_norm", (D,)),
                ("mlp.c_fc", "ffn_up", (D, F)),
                ("mlp.c_proj", "ffn_down", (F, D)),
            ):
                yield _Row(f"{layer}{source}.weight", f"{block}{name}.weight", shape, np.transpose)  # [in, out]
                yield _Row(f"{layer}{source}.bias", f"{block}{name}.bias", shape[-1:])
        yield _Row(prefix + "ln_f.weight", "output_norm.weight", (D,))
        yield _Row(prefix + "ln_f.bias", "output_norm.bias", (D,))
        if not config.get("tie_word_embeddings", True):
            yield _Row("lm_head.weight", "output.weight", (V, D))

    return Model("gpt2", V, {f"gpt2.{key}": value for key, value in metadata.items()}, _weights(list(rows()), tensors))


_FAMILIES = {"llama": _llama, "mistral": _llama, "qwen2": _llama, "qwen3": _llama, "gpt2": _gpt2}
"""`model_type` of a config.json -> function that describes the model."""
_REDUNDANT = re.compile(r"lm_head\.weight|.*\.attn\.(masked_)?bias|.*rotary_emb\.inv_freq")
"""Redundant tensors of checkpoints, which are ignored: a tied head, masks, frequencies."""


_YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
"""llama.cpp's defaults for YaRN. There is no key for bounds that are not rounded (`truncate` False)."""


def _weights(rows: list[_Row], tensors: Mapping[str, np.ndarray]) -> list[Weight]:
    """The tensors of the rows. Raises UserError, naming the tensors that do not fit."""
    expected = {row.source for row in rows}
    if missing := sorted(expected - tensors.keys()):
        raise UserError(f"tensors: got none named {_list(missing)}, which the config requires")
    if extra := sorted(name for name in tensors.keys() - expected if not _REDUNDANT.fullmatch(name)):
        raise UserError(f"tensors: got {_list(extra)}, which do not belong to the config")
    weights = []
    for row in rows:
        if (shape := tensors[row.source].shape) != row.shape:
            raise UserError(f"tensors: got {row.source} of shape {shape}, must be {row.shape} by the config")
        shape = shape[::-1] if row.convert is np.transpose else shape
        weights.append(Weight(row.name, shape, lambda row=row: row.convert(tensors[row.source])))
    return weights


def _rope(config: Mapping[str, Any], H: int) -> tuple[dict[str, Any], np.ndarray | None]:
    """The keys of the rotary embedding, and divisors of its H/2 frequencies if no key can express them (Llama 3)."""
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(scaling.pop("rope_theta", None) or config.get("rope_theta") or 10_000)
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    scaling = {key: value for key, value in scaling.items() if value not in (None, _YARN_DEFAULTS.get(key))}
    keys: dict[str, Any] = {"rope.freq_base": theta}
    needed = {
        "default": (),
        "linear": ("factor",),
        "yarn": ("factor", "original_max_position_embeddings"),
        "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    }
    more = {key: scaling.pop(key) for key in ("beta_fast", "beta_slow") if kind == "yarn" and key in scaling}
    if kind not in needed or scaling.keys() != set(needed[kind]):
        given = ", ".join(f"{key} {value}" for key, value in scaling.items()) or "nothing else"
        options = "; ".join(f"{name} with {', '.join(keys) or 'nothing'}" for name, keys in needed.items())
        raise UserError(f"rope_scaling: got {kind} with {given}, GGUF files can have {options}")
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}
    if kind == "yarn":
        keys["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
        keys |= {f"rope.scaling.yarn_{key}": float(value) for key, value in more.items()}
    return keys, _llama3(theta, H, **scaling) if kind == "llama3" else None


def _llama3(
    theta: float,
    H: int,
    factor: float,
    original_max_position_embeddings: int,
    low_freq_factor: float,
    high_freq_factor: float,
) -> np.ndarray:
    """Divisors of Llama 3.1's H/2 rotary frequencies, float32 (https://arxiv.org/abs/2407.21783): 1 for wavelengths
    short against the original context, `factor` for long ones, between them 1 / ((1 - s) / factor + s) with s from 0 to
    1."""
    waves = 2 * pi * theta ** (np.arange(0, H, 2) / H)  # tokens
    s = (original_max_position_embeddings / waves - low_freq_factor) / (high_freq_factor - low_freq_factor)
    s = np.clip(s, 0, 1)
    return (1 / ((1 - s) / factor + s)).astype(np.float32)


def _sizes(config: Mapping[str, Any], fields: str) -> list[int]:
    """Required integer fields of the config."""
    for field in fields.split():
        if not isinstance(config.get(field), int):
            raise UserError(f"{field}: got {config.get(field)!r} in the config, must be an integer")
    return [config[field] for field in fields.split()]


def _only(config: Mapping[str, Any], field: str, default: Any, *allowed: Any) -> None:
    """Raise UserError for a value that llama.cpp would silently ignore."""
    if (got := config.get(field, default)) not in allowed:
        raise UserError(
            f"{field}: got {got!r}, must be {' or '.join(map(repr, allowed))} for a GGUF file of this architecture"
        )


def _list(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
