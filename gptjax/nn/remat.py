"""Rematerialisation: activations saved for the backward pass, and those recomputed in it (arXiv:1604.06174)."""

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
"""Policies, from the one that saves most. "dots" are matrix products; those without batch dimensions are all but
attention's. "attention" saves the residuals of splash, ring and chunked attention, [B, T, N, H] per layer: scores,
which dominate long sequences, are computed once less. It saves nothing of other kernels."""


def rematerialised(function: Callable[..., Any], policy: str | None, static: tuple[int, ...] = ()) -> Any:
    """Apply a remat policy to `function`. None: save all activations. `static`: numbers of the arguments that are not
    arrays."""
    return function if policy is None else jax.checkpoint(function, policy=POLICIES[policy], static_argnums=static)
