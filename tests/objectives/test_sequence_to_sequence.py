"""The sequence-to-sequence loss can be learned, and needs its source."""

import jax
import numpy as np
import optax

from gptjax.nn import EncoderConfig, EncoderDecoder, EncoderDecoderConfig, MultiHeadAttention, TransformerConfig
from gptjax.objectives import SequenceToSequence
from gptjax.train import state as train_state
from gptjax.train.step import make_step
from gptjax.types import Pair


def test_reversal_is_learned():
    """Four digits are written backwards: nothing but the source says which. In two parts, as `accumulate` does."""
    sizes = {"vocab": 12, "layers": 1, "width": 32, "heads": 2}
    config = EncoderDecoderConfig(
        EncoderConfig(**sizes), TransformerConfig(**sizes, cross_attention=MultiHeadAttention())
    )
    model = EncoderDecoder(config)
    source = np.random.default_rng(0).integers(2, 12, (32, 4), dtype=np.int32)
    target = source[:, ::-1]
    tokens = np.concatenate([np.zeros((32, 1), np.int32), target[:, :-1]], 1)
    ones, places = np.ones_like(source), np.broadcast_to(np.arange(4, dtype=np.int32), source.shape)
    pair = Pair(tokens, target, ones.astype(np.float32), ones, places, source, ones, places)
    optimizer = optax.adam(1e-2)
    state = train_state.create(jax.jit(model.init)(jax.random.key(0), tokens)["params"], optimizer, jax.random.key(1))
    step = make_step(SequenceToSequence(), model.apply, optimizer, accumulate=2)
    for _ in range(200):
        state, metrics = step(state, pair)
    assert metrics["loss"][1] == 128
    assert metrics["loss"][0] / metrics["loss"][1] < 0.1 < np.log(10)
