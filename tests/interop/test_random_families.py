"""Random small models of every family, with odd sizes and settings: the logits of `transformers`, or one line."""

import copy
import random

import jax
import numpy as np
import pytest
from family_cases import CASES, KINDS, saved

from gptjax.interop.huggingface import load_hf, save_hf
from gptjax.types import UserError

SEEDS = range(100, 120)
"""About a minute. Others find new faults: a change of this range is how to look."""
KINDS_OF_LAYERS = ("full_attention", "sliding_attention")
VALUES = {
    **dict.fromkeys(("num_hidden_layers", "n_layer"), (1, 2, 6)),
    **dict.fromkeys(("num_attention_heads", "n_head"), (2, 8)),
    **dict.fromkeys(("hidden_size", "n_embd"), (48, 64)),
    "num_key_value_heads": (1, 2, 4),
    "head_dim": (6, 8, 24),
    "vocab_size": (61,),
    "intermediate_size": (40,),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), (1e-6, 1e-3, 0.1)),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_bias", "bias"), (True, False)),
    **dict.fromkeys(("use_qkv_bias", "use_qk_norm", "qk_layernorm", "use_parallel_residual"), (True, False)),
    **dict.fromkeys(("hidden_act", "hidden_activation"), ("silu", "gelu", "gelu_pytorch_tanh")),
    **dict.fromkeys(("sliding_window", "no_rope_layer_interval"), (1, 3, 64)),
    **dict.fromkeys(("logit_scale", "logits_scaling", "residual_multiplier", "embedding_multiplier"), (0.3, 1.0, 7.0)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), (None, 5.0)),
    "attention_multiplier": (0.2,),
    "query_pre_attn_scalar": (7, 16),
    "rope_parameters": ({"rope_type": "default", "rope_theta": 5e3}, {"rope_type": "linear", "factor": 2.0}),
}
"""Field -> values that are put in the place of those of a case, if its family has the field."""
BY_LAYER = ("layer_types", "no_rope_layers", "mlp_only_layers")


def drawn(rng: random.Random, transformers) -> tuple[str, dict]:
    """A family, and a configuration of it."""
    case = rng.choice([case for case in CASES if not case.startswith("t5")])
    fields = dict(CASES[case])
    known = transformers.AutoConfig.for_model(case.split()[0], **copy.deepcopy(fields)).to_dict()
    names = VALUES.keys() & known.keys()
    if "full_attention" in (known.get("rope_parameters") or {}):
        names -= {"rope_parameters"}  # each kind of layer has its own
    for name in rng.sample(sorted(names), 3):
        fields[name] = rng.choice(VALUES[name])
    layers = fields.get("num_hidden_layers") or fields.get("n_layer")
    if layers != len(known.get("layer_types") or ()):
        fields = {name: value for name, value in fields.items() if name not in BY_LAYER}
    if "layer_types" in known and rng.random() < 0.5:
        fields["layer_types"] = [rng.choice(KINDS_OF_LAYERS) for _ in range(layers)]
    return case.split()[0], fields


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.filterwarnings("default")  # theirs are not ours to mend
def test_many_random_models(tmp_path):
    """Within ten times the rounding errors of `transformers` in float32, which odd settings magnify. Those are its
    distance from float64."""
    transformers = pytest.importorskip("transformers", reason="compares with it: pip install -e '.[torch]'")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    compared = 0
    for seed in SEEDS:
        rng = random.Random(seed)
        family, fields = drawn(rng, transformers)
        said, folder = f"seed {seed}: {family} {fields}", tmp_path / str(seed)
        try:
            torch, auto, theirs = saved(KINDS.get(family, "AutoModelForCausalLM"), folder / "theirs", family, **fields)
            tokens = np.random.default_rng(seed).integers(3, fields["vocab_size"], (2, 40))  # 2 is padding
            with torch.inference_mode():
                expected = theirs(torch.tensor(tokens)).logits.numpy()
                exact = theirs.double()(torch.tensor(tokens)).logits.numpy()
        except Exception:  # settings that they do not have
            continue
        refused = ""
        try:
            config, params = load_hf(folder / "theirs")
        except UserError as error:
            refused = str(error)
        assert "\n" not in refused, said
        if refused:
            continue
        logits = np.asarray(jax.jit(config.build().apply)({"params": params}, tokens)[0])
        size, rounding = np.abs(exact).max(), np.abs(expected - exact).max()
        close = 10 * rounding + 1e-6 * size
        assert np.abs(logits - exact).max() < close, said
        save_hf(folder / "ours", config, params, model_type=family)
        again = auto.from_pretrained(folder / "ours", attn_implementation="eager")
        with torch.inference_mode():
            assert np.abs(again(torch.tensor(tokens)).logits.numpy() - exact).max() < close, said
        assert load_hf(folder / "ours")[0] == config, said
        compared += 1
    assert compared > len(SEEDS) / 2
