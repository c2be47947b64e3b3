"""Scaled dot-product attention, softmax(q k^T / sqrt(H)) v under a mask (Vaswani et al. 2017, arXiv:1706.03762).

There are several implementations: the fastest that can do a case on its device does it, or the one that is named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from gptjax.kernels import target
from gptjax.kernels.attention import chunked, cudnn, gathered, plain, ring, sharding, splash, xla
from gptjax.kernels.attention.spec import Mask, Options
from gptjax.types import Array, Key, UserError


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A form of attention and the cases that it cannot do."""

    attention: Callable[[Array, Array, Array, Mask, Options], Array]
    unsupported_reason: Callable[[Array, Array, Array, Mask, Options], str | None] = lambda *case: None
    """Why it cannot do a case, in words that go on from "it"; None: it can."""


IMPLEMENTATIONS = {
    "plain": Implementation(plain.attention, plain.unsupported_reason),
    "chunked": Implementation(chunked.attention, chunked.unsupported_reason),
    "xla": Implementation(xla.attention, xla.unsupported_reason),
    "cudnn": Implementation(cudnn.attention, cudnn.unsupported_reason),
    "splash": Implementation(splash.attention, splash.unsupported_reason),
    "ring": Implementation(ring.attention, ring.unsupported_reason),
    "gathered": Implementation(gathered.attention, gathered.unsupported_reason),
}
CHOICE = {"cpu": (), "gpu": ("cudnn",), "tpu": ("splash",)}
"""Platform -> what is tried there, before "chunked" on long sequences, and "plain"."""
CUT = ("ring", "gathered")
"""What is tried after that where a mesh cuts the rows: "ring" first, whose memory is the smaller."""
LONG = 2_048
"""Queries from which "chunked" is surely faster than "plain", in an eighth of its memory (benchmarks/README.md)."""


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
    """q [B, T, N, H], k [B, S, K, H], v [B, S, K, Hv] -> [B, T, N, Hv], in q's dtype; scores and softmax in float32.

        score_ts = cap(scale q_t . k_s) + bias_ts                      cap(x) = softcap tanh(x / softcap)
        y_t = sum_s exp(score_ts) v_s / (exp(sink) + sum_s exp(score_ts))        over the s that the mask lets t see

    Grouped queries (Ainslie et al. 2023, arXiv:2305.13245): N is a multiple of K and query head n reads key head
    n // (N / K). A query that sees no key returns something finite: in the plain form the mean of v.

    bias     float [N, T, S], added to the scores (ALiBi, T5)
    sinks    float [N], a learned score that every query sees and that has no value (gpt-oss, arXiv:2309.17453)
    scale    1 / sqrt(H) when None
    softcap  bounds the scores (Gemma 2, arXiv:2408.00118)
    dropout  share of probabilities that are dropped when a key is given

    implementation  one of `IMPLEMENTATIONS`; None: what suits the device the program is for, the mask and the options.
                    "ring" and "gathered" are for rows that a mesh cuts, and elsewhere like None

    Raises UserError when the named implementation does not exist or cannot do this.
    """
    k, v = sharding.with_heads_of(q, k, v)
    case = q, k, v, mask, Options(bias, sinks, scale, softcap, dropout if key is not None else 0.0, key)
    if implementation is None or (implementation in CUT and not sharding.row_axes(q)):
        implementation = _choose(*case)
    elif implementation not in IMPLEMENTATIONS:
        names = ", ".join(IMPLEMENTATIONS)
        raise UserError(f"attention.implementation: got {implementation!r}, can be none or one of {names}")
    elif (reason := IMPLEMENTATIONS[implementation].unsupported_reason(*case)) is not None:
        raise UserError(f"attention.implementation: got {implementation!r}, which cannot do this: it {reason}")
    return IMPLEMENTATIONS[implementation].attention(*case)


def _choose(q: Array, *case: Any) -> str:
    rest = CUT if sharding.row_axes(q) else ("chunked", "plain") if q.shape[1] >= LONG else ("plain",)
    names = *CHOICE.get(target.backend(), ()), *rest
    reasons = {name: IMPLEMENTATIONS[name].unsupported_reason(q, *case) for name in names}
    for name, reason in reasons.items():
        if reason is None:
            return name
    what = "; ".join(f"{name} {reason}" for name, reason in reasons.items())
    raise UserError(f"attention: rows that a mesh cuts (mesh.context) cannot be done: {what}")
