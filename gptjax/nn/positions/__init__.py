"""Position encodings for `TransformerConfig(positions=...)`, or for any JAX program.

A new one is a subclass of `Positions`. The tests find it.
"""

from gptjax.nn.positions.absolute import LearnedPositions, Sinusoidal
from gptjax.nn.positions.encoding import Positions
from gptjax.nn.positions.relative import ALiBi, T5Bias
from gptjax.nn.positions.rope import RoPE, Scaling
from gptjax.nn.positions.scaling import LinearScaling, Llama3Scaling, LongRoPE, NTKScaling, YaRN

__all__ = [
    "ALiBi",
    "LearnedPositions",
    "LinearScaling",
    "Llama3Scaling",
    "LongRoPE",
    "NTKScaling",
    "Positions",
    "RoPE",
    "Scaling",
    "Sinusoidal",
    "T5Bias",
    "YaRN",
]
