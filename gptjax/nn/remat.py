"""What the backward pass keeps of each layer, and what it computes again (rematerialisation, arXiv:1604.06174)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from gptjax.kernels.attention.spec import SAVED

_jax = jax.checkpoint_policies
POLICIES: dict[str, Callable[..., Any]] = {
    "everything_saveable": _jax.everything_saveable,
    "dots_saveable": _jax.dots_saveable,
    "dots_with_no_batch_dims_saveable": _jax.dots_with_no_batch_dims_saveable,
    "attention_saveable": _jax.save_only_these_names(SAVED),
    "nothing_saveable": _jax.nothing_saveable,
}
"""From the one that keeps most. "dots" are matrix products, those with no batch dimensions all but attention's.
"attention" is what splash, ring and chunked attention need to go backwards, [B, T, N, H] a layer: so their scores are
computed once less, which for long rows is most of a step. Of other kernels it keeps nothing."""


def rematerialised(function: Callable[..., Any], policy: str | None, static: tuple[int, ...] = ()) -> Any:
    """The function, its backward pass keeping what the policy says; none: everything. `static` are the numbers of the
    arguments that are no arrays."""
    return function if policy is None else jax.checkpoint(function, policy=POLICIES[policy], static_argnums=static)
