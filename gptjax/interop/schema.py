"""Types of the fields that are read in the JSON files of published models, and sizes that their tensors can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptjax.io.json_file import FLAG, INTEGER, NATURAL, NUMBER, OBJECT, POSITIVE, TEXT, Schema, check, read_object
from gptjax.types import UserError

IDS = (NATURAL, [NATURAL])
PADDING = (INTEGER, [NATURAL])
"""Some files have -1 for none."""
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers")
WIDTHS = ("hidden_size", "n_embd", "d_model", "d_ff", "d_kv", "head_dim", "intermediate_size", "n_inner", "vocab_size")
COUNTS = ("num_attention_heads", "n_head", "num_heads", "num_key_value_heads", "n_positions", "type_vocab_size")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
LATENT = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
FALCON = ("num_kv_heads", "ffn_hidden_size", "n_embed")
SIZES = (*WIDTHS, *COUNTS, *EXPERTS, *LATENT, *FALCON, "relative_attention_num_buckets")
"""Fields that are a size of a tensor, or a factor of one."""
NATURALS = (
    *("n_shared_experts", "first_k_dense_replace", "max_window_layers", "max_position_embeddings", "sliding_window"),
    *("original_max_position_embeddings", "num_experts_per_tok", "n_group", "topk_group"),
    *("relative_attention_max_distance", "num_ln_in_parallel_attn", "local_attention"),
)
PERIODS = ("decoder_sparse_step", "sliding_window_pattern", "no_rope_layer_interval", "global_attn_every_n_layers")
"""Fields that say which layers differ: every so many."""
NUMBERS = (
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta", "rope_local_base_freq", "rotary_emb_base"),
    *("rotary_pct", "partial_rotary_factor", "query_pre_attn_scalar", "attn_logit_softcapping", "swiglu_alpha"),
    *("final_logit_softcapping", "routed_scaling_factor", "swiglu_limit", "embedding_multiplier"),
    *("attention_multiplier", "residual_multiplier", "logits_scaling", "logit_scale", "norm_epsilon"),
    *("norm_eps", "global_rope_theta", "local_rope_theta"),
)
FLAGS = (
    *("attention_bias", "mlp_bias", "tie_word_embeddings", "use_parallel_residual", "use_sliding_window", "is_decoder"),
    *("norm_topk_prob", "rope_interleave", "scale_decoder_outputs", "add_cross_attention"),
    *("use_qk_norm", "qk_layernorm", "use_qkv_bias"),
    *("use_bias", "bias", "alibi", "multi_query", "parallel_attn", "new_decoder_architecture"),
    *("apply_residual_connection_post_layernorm", "norm_bias", "decoder_bias", "classifier_bias"),
)
TEXTS = (
    *("model_type", "hidden_act", "hidden_activation", "activation_function", "feed_forward_proj", "dtype"),
    *("torch_dtype", "problem_type", "activation", "classifier_activation", "classifier_pooling"),
)
ROPE: dict[str, Schema] = {
    **dict.fromkeys(("rope_type", "type"), TEXT),
    **dict.fromkeys(("rope_theta", "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor"), NUMBER),
    **dict.fromkeys(("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"), NUMBER),
    "short_factor": [NUMBER],
    "long_factor": [NUMBER],
    "original_max_position_embeddings": POSITIVE,
    "truncate": FLAG,
}
"""Fields of one rotary encoding; Gemma 3 has two, by name."""
QUANTISATION: Schema = {"quant_method": TEXT, "weight_block_size": [POSITIVE]}
CONFIG: dict[str, Schema] = {
    **dict.fromkeys((*LAYERS, *SIZES, *PERIODS), POSITIVE),
    **dict.fromkeys(NATURALS, NATURAL),
    **dict.fromkeys(NUMBERS, NUMBER),
    **dict.fromkeys(FLAGS, FLAG),
    **dict.fromkeys(TEXTS, TEXT),
    **dict.fromkeys(("eos_token_id", "bos_token_id", "decoder_start_token_id"), IDS),
    "pad_token_id": PADDING,
    "architectures": [TEXT],
    "layer_types": [TEXT],
    "mlp_only_layers": [NATURAL],
    "no_rope_layers": [NATURAL],
    "id2label": OBJECT,
    "text_config": OBJECT,
    "quantization_config": QUANTISATION,
}
GENERATION: dict[str, Schema] = {"eos_token_id": IDS, "pad_token_id": PADDING, "decoder_start_token_id": NATURAL}
TOKENIZER: dict[str, Schema] = {
    **{f"{name}_token": (TEXT, {"content": TEXT}) for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")},
    **dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space", "do_lower_case", "strip_accents"), FLAG),
    "tokenize_chinese_chars": FLAG,
    "added_tokens_decoder": {"*": {"content": TEXT}},
    "chat_template": (TEXT, [{"name": TEXT, "template": TEXT}]),
    "extra_ids": NATURAL,
    "tokenizer_class": TEXT,
}
ADAPTER: dict[str, Schema] = {
    **dict.fromkeys(("use_rslora", "use_dora"), FLAG),
    "alpha_pattern": {"*": NUMBER},
    "rank_pattern": {"*": NUMBER},
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), (TEXT, [TEXT])),
    "layers_to_transform": IDS,
}
FILES = {
    "config.json": CONFIG,
    "generation_config.json": GENERATION,
    "tokenizer_config.json": TOKENIZER,
    "special_tokens_map.json": TOKENIZER,
    "added_tokens.json": {"*": NATURAL},
    "vocab.json": {"*": NATURAL},
    "adapter_config.json": ADAPTER,
}
"""File -> schema."""


def check_types(fields: Mapping[str, Any], name: str) -> None:
    """Raise UserError, naming the file and the field, for a field of another type than its reader expects."""
    check(fields, FILES[name], name)
    if name != "config.json":
        return
    for field in ("rope_parameters", "rope_scaling"):
        inside = fields.get(field)
        if isinstance(inside, dict):
            check(inside, ROPE, f"{name}: {field}")
            nested = {kind: value for kind, value in inside.items() if isinstance(value, dict)}
            check(nested, {"*": ROPE}, f"{name}: {field}")
    for key in fields.get("id2label") or ():
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise UserError(f"{name}: id2label: got the key {key[:100]!r}, must be the number of a class")


def check_sizes(fields: Mapping[str, Any], tensors: Mapping[str, Any], file: str = "config.json") -> None:
    """Raise UserError for a size that these tensors cannot hold, before a model of that size is described."""
    largest = 2 * max((math.prod(tensors[name].shape) for name in tensors), default=0)  # two 4-bit numbers in a byte
    for names, limit, what in ((LAYERS, len(tensors), "tensors"), (SIZES, largest, "numbers in its largest tensor")):
        for name in names:
            if (size := fields.get(name)) is not None and isinstance(size, int) and size > limit:
                raise UserError(f"{file}: {name}: got {size}, which is more than the file has {what}")


def read_fields(file: Path) -> dict[str, Any]:
    """Read a file of `FILES`. Raises OSError or ValueError for a damaged one, UserError for a wrong type."""
    fields = read_object(file)
    check_types(fields, file.name)
    return fields
