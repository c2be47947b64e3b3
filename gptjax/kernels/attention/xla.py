"""`jax.nn.dot_product_attention` as compiled by XLA. It is never chosen automatically; name it for comparisons."""

from __future__ import annotations

import jax

from gptjax.kernels.attention.spec import Mask, Options
from gptjax.types import Array


def unsupported_reason(q: Array, k: Array, v: Array, mask: Mask, options: Options) -> str | None:
    """Reason this implementation cannot handle the inputs (completes "it ..."), or None."""
    if options.softcap is not None or options.sinks is not None or options.dropout:
        return "has no softcap, sinks or dropout"
    if k.shape[-1] != v.shape[-1]:
        return f"needs values of the size of keys, got {v.shape[-1]} and {k.shape[-1]}"
    return None


def attention(q: Array, k: Array, v: Array, mask: Mask, options: Options) -> Array:
    """As `gptjax.kernels.attention.attention`."""
    # The mask as an array, because `is_causal` supports no offset.
    return jax.nn.dot_product_attention(
        *(q, k, v),
        bias=None if options.bias is None else options.bias[None],
        mask=mask.visible(q.shape[1], k.shape[1]),
        scale=options.scale,
        implementation="xla",
    )
