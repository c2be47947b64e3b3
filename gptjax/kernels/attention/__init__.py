"""Attention: one function, its implementations (plain jax and kernels), and the reference for tests."""

from gptjax.kernels.attention.dispatch import IMPLEMENTATIONS as IMPLEMENTATIONS
from gptjax.kernels.attention.dispatch import attention as attention
from gptjax.kernels.attention.reference import reference as reference
from gptjax.kernels.attention.spec import Mask as Mask
from gptjax.kernels.attention.spec import Options as Options
