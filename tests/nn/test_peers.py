"""The same weights in another library's model give the same logits."""

import importlib.util
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.nn import GELU, LayerNorm, LearnedPositions, Transformer, TransformerConfig

DECODING = Path(__file__).resolve().parents[2] / "benchmarks" / "decode_cpu.py"


@pytest.mark.torch
@pytest.mark.filterwarnings("default")  # theirs are not ours to mend
def test_gpt2_is_that_of_transformers():
    torch = pytest.importorskip("torch", reason="compares with PyTorch: pip install -e '.[torch]'")
    pytest.importorskip("transformers", reason="compares with transformers: pip install -e '.[torch]'")
    spec = importlib.util.spec_from_file_location("decode_cpu", DECODING)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    config = TransformerConfig(
        vocab=50, layers=3, width=32, heads=4, positions=LearnedPositions(16), norm=LayerNorm(), mlp=GELU(), bias=True
    )
    theirs = benchmark.peer(config, 16)
    with torch.no_grad():  # biases and scales that are not 0 and 1
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    tokens = np.random.default_rng(0).integers(0, 50, (2, 16))
    with torch.inference_mode():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    params = benchmark.parameters(theirs, config)
    logits, _ = Transformer(config).apply({"params": params}, jnp.asarray(tokens, jnp.int32), cache=None)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
