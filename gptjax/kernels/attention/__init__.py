"""Attention: one function, the plain form and the kernels behind it, the reference that they are tested against."""

from gptjax.kernels.attention.dispatch import IMPLEMENTATIONS as IMPLEMENTATIONS
from gptjax.kernels.attention.dispatch import attention as attention
from gptjax.kernels.attention.reference import reference as reference
from gptjax.kernels.attention.spec import Mask as Mask
from gptjax.kernels.attention.spec import Options as Options
