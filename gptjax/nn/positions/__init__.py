"""Position encodings for `TransformerConfig(positions=...)`, or for any JAX program.

A new one is a subclass of `Positions`. The tests find it. Names are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_NAMES = {
    "gptjax.nn.positions.absolute": "LearnedPositions Sinusoidal",
    "gptjax.nn.positions.encoding": "Positions",
    "gptjax.nn.positions.relative": "ALiBi T5Bias",
    "gptjax.nn.positions.rope": "RoPE Scaling",
    "gptjax.nn.positions.scaling": "LinearScaling Llama3Scaling LongRoPE NTKScaling YaRN",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'gptjax.nn.positions' has no attribute {name!r}")
