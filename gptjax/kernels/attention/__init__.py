"""Attention: one function and its implementations, plain jax and kernels. `reference.py` is the reference for tests."""

from gptjax.kernels.attention.dispatch import IMPLEMENTATIONS as IMPLEMENTATIONS
from gptjax.kernels.attention.dispatch import attention as attention
from gptjax.kernels.attention.spec import Mask as Mask
from gptjax.kernels.attention.spec import Options as Options
