"""Random tiny models of every family, as `transformers` makes them."""

import copy

import pytest

# fmt: off
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
SHORT, LONG = [1.0, 1.5, 2.0], [1.0, 2.0, 4.0]
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "partial_rotary_factor": 0.75}
GEMMA = {**GROUPED, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 5}
LOCAL_AND_GLOBAL = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
EXPERTS = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {
    **SIZES, "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 2,
    "n_shared_experts": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 24, "q_lora_rank": 12,
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10,
}
T5 = {
    "vocab_size": 96, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "eos_token_id": None,
    "decoder_start_token_id": 0,
}
CASES = {
    "gpt2": {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "eos_token_id": None},
    "llama": GROUPED,
    "llama biased": {**GROUPED, "attention_bias": True, "mlp_bias": True, "head_dim": 16, "tie_word_embeddings": True},
    "llama 3.1": {
        **GROUPED, "rope_parameters": {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 32}
    },
    "mistral": {**GROUPED, "sliding_window": 5},
    "mixtral": EXPERTS,
    "qwen2": {**GROUPED, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {**GROUPED, "head_dim": 16, "rope_parameters": YARN},
    "qwen3_moe": {**EXPERTS, "head_dim": 16, "moe_intermediate_size": 24, "mlp_only_layers": [1]},
    "qwen3_moe window": {
        **EXPERTS, "head_dim": 16, "moe_intermediate_size": 24, "use_sliding_window": True, "sliding_window": 5
    },
    "gpt_neox": SIZES,
    "gpt_neox serial": {**SIZES, "use_parallel_residual": False, "attention_bias": False, "rotary_pct": 1.0},
    "gemma": {**GROUPED, "head_dim": 16},
    "gemma biased": {
        **GROUPED, "head_dim": 16, "attention_bias": True, "hidden_act": "silu", "tie_word_embeddings": False
    },
    "gemma2": GEMMA,
    "gemma3_text": {**GEMMA, "num_hidden_layers": 7, "rope_parameters": LOCAL_AND_GLOBAL},
    "olmo2": GROUPED,
    "olmo3": {**GROUPED, "num_hidden_layers": 5, "sliding_window": 5},
    "olmo3 yarn": {
        **GROUPED, "head_dim": 16, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "sliding_window": 5, "attention_bias": True,
        "rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 7e3}},
    },
    "phi3": {**GROUPED, "sliding_window": 5},
    "phi3 long": {
        **GROUPED, "original_max_position_embeddings": 64, "rope_parameters": {**LONGROPE, "rope_theta": 1e4}
    },
    "phi3 4-mini": {  # in the words of Phi-4-mini
        **GROUPED, "original_max_position_embeddings": 64, "partial_rotary_factor": 0.75, "sliding_window": 200,
        "rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG}, "rope_theta": 1e4,
        "tie_word_embeddings": True,
    },
    "smollm3": {**GROUPED, "num_hidden_layers": 5},
    "smollm3 window": {
        **GROUPED, "head_dim": 16, "attention_bias": True, "mlp_bias": True, "no_rope_layers": [0, 1, 0],
        "use_sliding_window": True, "sliding_window": 5, "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
        "tie_word_embeddings": False, "rope_parameters": YARN,
    },
    "nanochat": GROUPED,
    "nanochat biased": {
        **GROUPED, "head_dim": 16, "attention_bias": True, "tie_word_embeddings": True, "hidden_act": "gelu",
        "final_logit_softcapping": None, "rms_norm_eps": 0.1, "rope_parameters": {**LLAMA3, "rope_theta": 1e5,
        "original_max_position_embeddings": 32},
    },
    "granite": {
        **GROUPED, "embedding_multiplier": 12, "attention_multiplier": 0.2, "residual_multiplier": 0.22,
        "logits_scaling": 7.0, "tie_word_embeddings": True,
    },
    "granite plain": {**GROUPED, "head_dim": 16, "attention_bias": True, "mlp_bias": True},
    "cohere": {**GROUPED, "attention_bias": True, "tie_word_embeddings": False},
    "cohere qk-norm": {**GROUPED, "head_dim": 16, "use_qk_norm": True, "logit_scale": 0.3},
    "cohere2": {**GROUPED, "num_hidden_layers": 5, "sliding_window": 5},
    "cohere2 yarn": {
        **GROUPED, "head_dim": 16, "attention_bias": True, "logit_scale": 0.25, "sliding_window": 5,
        "rope_parameters": YARN, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "stablelm": {**GROUPED, "use_qkv_bias": True},
    "stablelm 2": {
        **GROUPED, "qk_layernorm": True, "use_parallel_residual": True, "tie_word_embeddings": True,
        "rope_parameters": {**YARN, "partial_rotary_factor": 0.5},
    },
    "starcoder2": {**GROUPED, "sliding_window": 5},
    "starcoder2 odd": {
        **GROUPED, "head_dim": 16, "use_bias": False, "tie_word_embeddings": False, "hidden_act": "gelu",
        "rope_parameters": YARN,
    },
    "falcon": SIZES,
    "falcon heads": {**SIZES, "multi_query": False, "bias": True, "tie_word_embeddings": False, "activation": "relu"},
    "falcon new": {
        **SIZES, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True, "ffn_hidden_size": 48,
        "rope_parameters": YARN,
    },
    "falcon new shared": {
        **SIZES, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1,
    },
    "bloom": {**SIZES, "num_attention_heads": 4},
    "bloom odd": {**SIZES, "hidden_size": 36, "n_head": 6, "tie_word_embeddings": False},
    "gpt_oss": {**EXPERTS, "head_dim": 16, "sliding_window": 5},
    "deepseek_v3": DEEPSEEK,
    "deepseek_v3 yarn": {
        **DEEPSEEK, "q_lora_rank": None, "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0}
    },
    "bert": SIZES,
    "roberta": {**SIZES, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    "xlm-roberta": {**SIZES, "pad_token_id": 0, "hidden_act": "relu"},
    "modernbert": {**SIZES, "num_hidden_layers": 7, "local_attention": 8, "cls_token_id": None, "sep_token_id": None},
    "modernbert odd": {
        **SIZES, "num_hidden_layers": 5, "local_attention": 5, "attention_bias": True, "mlp_bias": True,
        "norm_bias": True, "classifier_bias": True, "classifier_activation": "relu", "hidden_activation": "silu",
        "classifier_pooling": "mean", "rope_parameters": LOCAL_AND_GLOBAL, "tie_word_embeddings": False,
        "layer_types": [*["sliding_attention"] * 2, *["full_attention"] * 3],
    },
    "t5": T5,
    "t5 gated": {**T5, "feed_forward_proj": "gated-gelu"},
}
# fmt: on
"""Family, and what sets the case apart -> the fields of its config."""


KINDS = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "modernbert"), "AutoModelForMaskedLM"),
    "t5": "AutoModelForSeq2SeqLM",
}


def saved(kind: str, folder, family: str, **fields):
    """A random model of `transformers`, and its folder: biases and scales that are not 0 and 1, logits far apart."""
    torch = pytest.importorskip("torch", reason="compares with PyTorch: pip install -e '.[torch]'")
    transformers = pytest.importorskip("transformers", reason="compares with it: pip install -e '.[torch]'")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    auto = getattr(transformers, kind)
    config = transformers.AutoConfig.for_model(family, **copy.deepcopy(fields))  # which changes objects inside
    model = auto.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(torch.rand_like(buffer))
    model.save_pretrained(folder)
    return torch, auto, model
