"""cuDNN's flash attention on NVIDIA GPUs, through `jax.nn.dot_product_attention`: 16-bit, scores are not materialised.

The kernel supports causality and a window; segments and a prefix become a bias [B, 1, T, S].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gptjax.kernels import target
from gptjax.kernels.attention import sharding
from gptjax.kernels.attention.spec import Mask, Options
from gptjax.types import Array


def unsupported_reason(q: Array, k: Array, v: Array, mask: Mask, options: Options) -> str | None:
    """Reason cuDNN cannot handle the inputs (completes "it ..."), or None."""
    if target.backend() != "gpu":
        return f"needs a GPU, got {target.backend()}"
    T, S, H = q.shape[1], k.shape[1], q.shape[-1]
    if {x.dtype for x in (q, k, v)} not in ({jnp.dtype("bfloat16")}, {jnp.dtype("float16")}):
        return f"needs q, k and v all bfloat16 or all float16, got {q.dtype}, {k.dtype}, {v.dtype}"
    generation = _generation()
    if generation < 8:
        return "needs an NVIDIA GPU of compute capability 8.0 or later"
    largest = 256 if generation >= 9 else 128
    if H % 8 or largest < H or v.shape[-1] != H:
        return f"needs heads of a multiple of 8 up to {largest}, keys and values alike, got {H} and {v.shape[-1]}"
    if mask.offset is not None or (mask.causal and T != S):
        return "needs as many queries as keys for a causal mask, and no offset"
    if mask.window is not None and (not mask.causal or mask.prefix is not None):
        return "needs a causal mask without a prefix for a window"
    if options.softcap is not None or options.sinks is not None or options.dropout:
        return "has no softcap, sinks or dropout"
    masked = mask.query_segments is not None or mask.prefix is not None
    if masked and options.bias is not None:
        return "needs a mask without segments and prefix if there is a bias"
    if (masked or options.bias is not None) and (T % 2 or S % 2):
        return f"needs even lengths for segments, a prefix or a bias, got {T} and {S}"
    return sharding.unsupported_reason(q, k, v)


def attention(q: Array, k: Array, v: Array, mask: Mask, options: Options) -> Array:
    """As `gptjax.kernels.attention.attention`."""
    causal = mask.causal and mask.prefix is None
    bias = None if options.bias is None else options.bias.astype(q.dtype)

    def kernel(q, k, v, bias, query_segments, key_segments, prefix):
        rest = Mask(mask.causal and not causal, None, None, query_segments, key_segments, prefix)
        return jax.nn.dot_product_attention(
            *(q, k, v),
            bias=None if bias is None else bias[None],
            mask=rest.visible(q.shape[1], k.shape[1]),
            scale=options.scale,
            is_causal=causal,
            local_window_size=None if mask.window is None else (mask.window - 1, 0),
            implementation="cudnn",
        )

    axes = "BTNH", "BSKH", "BSKH", "NTS", "BT", "BS", "BS"
    arrays = q, k, v, bias, mask.query_segments, mask.key_segments, mask.prefix
    return sharding.on_each_device(kernel, axes, *arrays)


def _generation() -> int:
    """Major version of the GPUs' compute capability. Without a GPU (a program for another machine): 8, Ampere."""
    try:
        capability = jax.local_devices(backend="gpu")[0].compute_capability
    except RuntimeError:
        return 8
    return int(capability.split(".")[0]) if capability[0].isdigit() else 0
