"""gpt-oss: mixture of experts with biases, attention sinks, a sliding window in every other layer."""

from __future__ import annotations

from typing import Any

from gptjax.interop.families import Fields
from gptjax.interop.gguf import rope
from gptjax.interop.gguf.architecture import Architecture, Keys, Metadata, Row, expanded
from gptjax.interop.gguf.architectures import gemma, llama
from gptjax.types import UserError

ROWS = expanded(
    {
        "input_layernorm.weight": "attn_norm.weight",
        "post_attention_layernorm.weight": "post_attention_norm.weight",
        "self_attn.sinks": "attn_sinks.weight",
        "mlp.router.weight": "ffn_gate_inp.weight",
        "mlp.router.bias": "ffn_gate_inp.bias",
        "mlp.experts.down_proj_bias": "ffn_down_exps.bias",
    },
    *llama.LAYER,
)
THEIRS = "model.layers.{L}.mlp.experts."
EXPERTS = (  # gate and up alternate in the published matrix
    Row(THEIRS + "gate_up_proj", "blk.{L}.ffn_gate_exps.weight", "E D (F [1]+1)", "E F D"),
    Row(THEIRS + "gate_up_proj", "blk.{L}.ffn_up_exps.weight", "E D (F 1+[1])", "E F D"),
    Row(THEIRS + "gate_up_proj_bias", "blk.{L}.ffn_gate_exps.bias", "E (F [1]+1)", "E F"),
    Row(THEIRS + "gate_up_proj_bias", "blk.{L}.ffn_up_exps.bias", "E (F 1+[1])", "E F"),
    Row(THEIRS + "down_proj", "blk.{L}.ffn_down_exps.weight", "E F D", "E D F"),
)
TABLE = (*llama.ENDS, *llama.ATTENTION, *ROWS, *EXPERTS)


def write(c: Fields) -> Metadata:
    if c["tie_word_embeddings"]:
        raise UserError("tie_word_embeddings: got True, must be False for a GGUF file of architecture gpt-oss")
    return {
        **llama.plain(c),
        "rope.dimension_count": c["head_dim"],
        **rope.write(c["rope_parameters"], settings=("truncate",)),
        "expert_count": c["num_local_experts"],
        "expert_used_count": c["num_experts_per_tok"],
        "expert_feed_forward_length": c["intermediate_size"],
        **gemma.pattern(c, 2),
    }


def read(keys: Keys) -> dict[str, Any]:
    """YaRN's bounds are not rounded in the published models; see `rope.write`."""
    fields = llama.of_rotary(keys)
    hidden = keys.integer("expert_feed_forward_length", fields["intermediate_size"])
    keys.only("expert_weights_scale", 0.0, 1.0)
    if fields["rope_parameters"]["rope_type"] == "yarn":
        fields["rope_parameters"]["truncate"] = False
    return {
        **fields,
        "model_type": "gpt_oss",
        "intermediate_size": hidden,
        "num_local_experts": keys.integer("expert_count"),
        "num_experts_per_tok": keys.integer("expert_used_count"),
        "attention_bias": True,
        **gemma.read_pattern(keys, fields["num_hidden_layers"], 2),
    }


def sizes(c: Fields) -> dict[str, int]:
    return {"F": c["intermediate_size"]}


ARCHITECTURE = Architecture("gpt-oss", ("gpt_oss",), TABLE, write, read, sizes, windows=True)
