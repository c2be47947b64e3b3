"""Scaled dot-product attention, softmax(q k^T / sqrt(H)) v under a mask (Vaswani et al. 2017, arXiv:1706.03762).

There are several implementations. The fastest one that supports the inputs on the platform is used, unless one is
named.
"""

from __future__ import annotations

import importlib
from typing import Any

from gptjax.kernels import target
from gptjax.kernels.attention import sharding
from gptjax.kernels.attention.spec import Mask, Options
from gptjax.types import Array, Key, UserError

CONTEXT_PARALLEL = ("ring", "gathered", "ulysses")
"""Implementations for sequences sharded over the mesh, in the order in which they are tried."""
PAGED = ("ragged", "paged")
"""Implementations for keys and values in pages, in the order in which they are tried."""
IMPLEMENTATIONS = "plain", "chunked", "xla", "cudnn", "flash", "splash", *CONTEXT_PARALLEL, *PAGED
"""Modules of this package, imported when they are first used. Each has

attention(q, k, v, mask, options) -> Array
unsupported_reason(q, k, v, mask, options) -> str | None    reason it cannot handle the inputs (completes "it ...")
"""
CHOICE = {"cpu": (), "gpu": ("flash", "cudnn"), "tpu": ("splash",)}
"""Platform -> implementations tried first; then "chunked" for long sequences, then "plain"."""
CONTEXT_CHOICE = {"gpu": ("ulysses", *CONTEXT_PARALLEL), "tpu": ("splash", *CONTEXT_PARALLEL)}
"""Platform -> the same, where kernels of the platform come first: "ulysses" alone runs those of GPUs."""
LONG = 2_048
"""Number of queries from which "chunked" is faster than "plain", with an eighth of its memory
(benchmarks/README.md)."""


def attention(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    *,
    bias: Array | None = None,
    sinks: Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    key: Key | None = None,
    implementation: str | None = None,
) -> Array:
    """Attention: q [B, T, N, H], k [B, S, K, H], v [B, S, K, Hv] -> [B, T, N, Hv] in q's dtype; softmax in float32.

        score_ts = cap(scale q_t . k_s) + bias_ts                      cap(x) = softcap tanh(x / softcap)
        y_t = sum_s exp(score_ts) v_s / (exp(sink) + sum_s exp(score_ts))        over the keys s visible to query t

    Scores are float32 too. Grouped queries (Ainslie et al. 2023, arXiv:2305.13245): N is a multiple of K and query head
    n reads key head n // (N / K). A query that sees no key returns a finite value; "plain" returns the mean of v.

    bias     float [N, T, S] or [B, N, T, S], added to the scores (ALiBi, T5)
    sinks    float [N], a learned score without a value in every query's softmax (gpt-oss, arXiv:2309.17453)
    scale    None: 1 / sqrt(H)
    softcap  bounds the scores (Gemma 2, arXiv:2408.00118)
    dropout  rate at which probabilities are dropped; no dropout without a key

    implementation  one of `IMPLEMENTATIONS`. None: chosen by platform, mask and options. Those in `CONTEXT_PARALLEL`
                    are for sequences sharded over the mesh; for other sequences they mean None. Those in `PAGED` are
                    for keys and values in pages: there the others mean None, and elsewhere these do

    Raises UserError if the named implementation does not exist or does not support the inputs.
    """
    if (implementation in PAGED) != (mask.pages is not None):
        implementation = None
    if mask.pages is None:
        k, v = sharding.with_heads_of(q, k, v)
    case = q, k, v, mask, Options(bias, sinks, scale, softcap, dropout if key is not None else 0.0, key)
    if implementation is None or (implementation in CONTEXT_PARALLEL and not sharding.sequence_axes(q)):
        implementation = _choose(*case)
    elif implementation not in IMPLEMENTATIONS:
        names = ", ".join(IMPLEMENTATIONS)
        raise UserError(f"attention.implementation: got {implementation!r}, must be None or one of {names}")
    elif (reason := _module(implementation).unsupported_reason(*case)) is not None:
        raise UserError(f"attention.implementation: got {implementation!r}, which cannot do this: it {reason}")
    return _module(implementation).attention(*case)


def _module(name: str) -> Any:
    return importlib.import_module(f"gptjax.kernels.attention.{name}")


def _choose(q: Array, k: Array, v: Array, mask: Mask, options: Options) -> str:
    where = "in pages" if mask.pages is not None else "sharded over mesh.context"
    if mask.pages is not None:
        names = PAGED
    elif sharding.sequence_axes(q):
        names = CONTEXT_CHOICE.get(target.backend(), CONTEXT_PARALLEL)
    else:
        names = *CHOICE.get(target.backend(), ()), *(("chunked", "plain") if q.shape[1] >= LONG else ("plain",))
    reasons = {name: _module(name).unsupported_reason(q, k, v, mask, options) for name in names}
    for name, reason in reasons.items():
        if reason is None:
            return name
    listed = "; ".join(f"{name} {reason}" for name, reason in reasons.items())
    raise UserError(f"attention: no implementation supports these inputs {where}: {listed}")
