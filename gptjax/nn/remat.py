"""Rematerialisation: activations saved for the backward pass, and those recomputed in it (arXiv:1604.06174)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

from gptjax.kernels.attention.spec import SAVED
from gptjax.types import UserError

Tree = TypeVar("Tree")
Remat = str | tuple[str, ...] | None
"""A key of `POLICIES`, or names of activations to save, of `NAMES`; NAME@host saves it in the host's memory. None: save
all activations."""

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

NAMES = {
    "queries": "[B, T, N, H], projected, before normalisation and rotation",
    "keys": "[B, T, K, H], likewise",
    "values": "[B, T, K, H]",
    SAVED: "[B, T, N, H], results of splash, ring and chunked attention, and their softmax's denominators",
    "attention_output": "[B, T, D], after the output projection",
    "mlp_gate": "[B, T, F], product of a gated MLP's input and its gate; in a mixture of k experts, [k B T, F]",
    "mlp_up": "likewise, of the other factor; in an MLP without gate, of the only one",
    "mlp_hidden": "likewise, input of the last product",
    "mlp_output": "[B, T, D]",
}
"""Names of activations that can be saved, and what they are."""
LAYER_INPUT = "layer_input"
"""Name of every layer's input, [B, T, D]. It is saved, also where several layers are rematerialised together."""
_HOST = "@host"


def named(x: Tree, name: str) -> Tree:
    """x, which is saved for the backward pass where its name is in `remat`."""
    assert name in NAMES, name
    return checkpoint_name(x, name)


def check(remat: Remat) -> None:
    """Raise UserError if it is neither a policy nor names of activations."""
    if remat is None or remat in POLICIES:
        return
    for name in _listed(remat):
        if name.removesuffix(_HOST) not in NAMES:
            raise UserError(
                f"model.remat: got {name!r}, must be None, one of {', '.join(POLICIES)}, or names of activations: "
                f"{', '.join(NAMES)}; NAME{_HOST} saves one in the host's memory"
            )


def rematerialised(function: Callable[..., Any], remat: Remat, static: tuple[int, ...] = ()) -> Any:
    """`function` that saves for its backward pass what `remat` says. `static`: numbers of the arguments that are not
    arrays."""
    return function if remat is None else jax.checkpoint(function, policy=policy(remat), static_argnums=static)


def policy(remat: str | tuple[str, ...], also: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Policy of `jax.checkpoint`. `also`: names of further values to save."""
    if isinstance(remat, str) and remat in POLICIES:
        found = POLICIES[remat]
        return _jax.save_from_both_policies(found, _jax.save_only_these_names(*also)) if also else found
    names = (*_listed(remat), *also)
    host = [name.removesuffix(_HOST) for name in names if name.endswith(_HOST)]
    device = [name for name in names if not name.endswith(_HOST)]
    if not host:
        return _jax.save_only_these_names(*device)
    return _jax.save_and_offload_only_these_names(
        names_which_can_be_saved=device,
        names_which_can_be_offloaded=host,
        offload_src="device",
        offload_dst="pinned_host",
    )


def _listed(remat: str | tuple[str, ...]) -> Sequence[str]:
    return (remat,) if isinstance(remat, str) else remat
