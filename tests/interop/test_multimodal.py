"""The language model within a model of text and images."""

import json

import jax
import numpy as np
import pytest

from gptjax.interop.huggingface import load_hf
from gptjax.interop.safetensors import SINGLE

TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 7,
    "intermediate_size": 48,
    "sliding_window": 5,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 2,
}
SEEING = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def test_gemma_3_is_read_without_its_eyes(tmp_path):
    """With the published names and those of `transformers`' own modules; with all fields, and as published."""
    torch = pytest.importorskip("torch", reason="compares with PyTorch: pip install -e '.[torch]'")
    transformers = pytest.importorskip("transformers", reason="compares with it: pip install -e '.[torch]'")
    from safetensors.numpy import load_file, save_file

    torch.manual_seed(0)
    config = transformers.Gemma3Config(text_config=TEXT, vision_config=SEEING, mm_tokens_per_image=4)
    theirs = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    theirs.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(3, 96, (1, 24))
    with torch.inference_mode():
        expected = theirs(input_ids=torch.tensor(tokens)).logits.numpy()

    def check():
        ours, params = load_hf(tmp_path)
        logits = np.asarray(jax.jit(ours.build().apply)({"params": params}, tokens)[0])
        assert np.abs(logits - expected).max() / np.abs(expected).max() < 1e-4

    check()

    tensors = load_file(tmp_path / SINGLE)
    later = {name.replace("language_model.model.", "model.language_model."): x for name, x in tensors.items()}
    assert later.keys() != tensors.keys()
    save_file(later, tmp_path / SINGLE)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["text_config"] = {"model_type": "gemma3_text", **TEXT}  # published files leave out what is as usual
    (tmp_path / "config.json").write_text(json.dumps(fields))
    check()
