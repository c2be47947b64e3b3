"""Granite's multipliers, which models trained in muP need too."""

import jax
import numpy as np
import pytest

from gptjax.interop.families import Fields, granite
from gptjax.interop.huggingface import load_hf, save_hf, to_tensors
from gptjax.nn import ClassifierConfig, MuP, TransformerConfig
from gptjax.types import UserError

SIZES = {"vocab": 96, "layers": 2, "width": 32, "heads": 2, "hidden": 48}
TOKENS = np.random.default_rng(0).integers(0, 96, (1, 24))


@pytest.mark.torch
@pytest.mark.filterwarnings("default")  # theirs are not ours to mend
@pytest.mark.parametrize(("base", "scale"), [(8, 1.0), (12, 0.7)])
def test_a_model_in_mup_is_a_granite(base, scale, tmp_path):
    """muP's factors of scores and logits are Granite's multipliers."""
    transformers = pytest.importorskip("transformers", reason="compares with it: pip install -e '.[torch]'")
    torch = pytest.importorskip("torch", reason="compares with PyTorch: pip install -e '.[torch]'")
    config = TransformerConfig(
        **SIZES, parametrisation=MuP(base_width=base, base_head_size=4), logit_scale=scale, embedding_scale=3.0
    )
    params = jax.tree.map(lambda x: x * 20, jax.jit(config.build().init)(jax.random.key(0), TOKENS)["params"])
    save_hf(tmp_path, config, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert type(theirs).__name__ == "GraniteForCausalLM"
    with torch.inference_mode():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    for model, weights in ((config, params), load_hf(tmp_path)):
        logits = np.asarray(model.build().apply({"params": weights}, TOKENS)[0])
        assert np.abs(logits - expected).max() / np.abs(expected).max() < 1e-5
    with pytest.raises(UserError, match="model: no published family"):
        to_tensors(ClassifierConfig(config, 2), params)


def test_a_scale_of_logits_that_is_written_is_read_again():
    """Its reciprocal is in the file; 1 / (1 / x) is x for an x that was such a reciprocal, of any number."""
    draw = np.random.default_rng(0)
    for divisor in (*range(1, 200), *draw.uniform(0.01, 100, 200)):
        m = granite.read(Fields({**PLAIN, "logits_scaling": float(divisor)}))
        assert granite.read(Fields(granite.write(m))).logit_scale == m.logit_scale
    with pytest.raises(UserError, match="logits_scaling: got 0, which divides the logits"):
        granite.read(Fields({**PLAIN, "logits_scaling": 0}))


PLAIN = {
    "vocab_size": 16, "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12,
    "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip
