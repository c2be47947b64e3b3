"""Curves of a stage whose batches the model writes: rewards, lengths, KL and entropy, sampler and trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

INK, COLORS = "#333333", ("#0b6e99", "#d9730d", "#6940a5")
PANELS: Mapping[str, Mapping[str, str]] = {
    "outcome and reward, mean of a round": {
        "outcome": "outcome",
        "validation_outcome": "outcome, held out",
        "reward": "reward",
    },
    "length, tokens a reply": {"reply_tokens": "training", "validation_reply_tokens": "held out"},
    "nats a token": {"kl": "KL from the reference", "entropy": "entropy"},
    "log-probabilities of sampler and trainer, difference": {
        "mismatch_p95": "95th percentile",
        "mismatch_max": "maximum",
    },
}
"""Title of each panel -> figure in the records -> its label."""


def rollout_curves(records: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Plot the figures of rollouts by step as a PNG of four panels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4), dpi=150, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontweight="bold")
    for axes, (name, curves) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        log = "maximum" in curves.values()
        shown: list[dict[int, float]] = []
        for (key, label), color in zip(curves.items(), COLORS, strict=False):
            # Sorted: the figures of a round are recorded before those of the step before it.
            found = {record["step"]: record[key] for record in records if record.get(key) is not None}
            found = {step: value for step, value in sorted(found.items()) if value > 0 or not log}
            if found and found not in shown:  # the reward is often the outcome
                shown.append(found)
                steps, values = np.array([*found.items()], float).T
                marker = "o" if key.startswith("validation") else ""
                axes.plot(steps, values, color=color, linewidth=1.5, marker=marker, markersize=4, label=label)
        if log and axes.lines:
            axes.set_yscale("log")
        axes.set_title(name, loc="left", color=INK, fontsize=10)
        axes.set_xlabel("step", color=INK)
        axes.set_xlim(left=0)
        axes.tick_params(colors=INK, length=0)
        axes.grid(axis="y", color="#e5e5e5")
        axes.spines[["top", "right", "left"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False, labelcolor=INK, fontsize=9)
    figure.savefig(path, bbox_inches="tight", pad_inches=0.2)
