"""How a model's initial weights, multipliers and learning rates depend on its width and depth.

A model with `MuP` keeps the best learning rate of a narrow one, so that it can be looked for there:

    config = TransformerConfig(..., width=1_024, parametrisation=MuP(base_width=128))
    optimizer = AdamW(learning_rate=3e-3).build(steps, config.width_multiplier)  # 3e-3 was best at width 128

With m = width / base_width, and as against the standard parametrisation (Yang et al. 2022, "Tensor Programs V",
arXiv:2203.03466, table 8):

    hidden matrices           initial deviation / sqrt(m); learning rate / m (AdamW, Lion), / sqrt(m) (Muon, Adafactor)
    embedding, head, vectors  as they are
    logits                    / m
    attention scores          q k / H, not q k / sqrt(H); the same at the base's head size

Matrices of recurrent layers keep PyTorch's initial deviation, which falls with the root of the width anyway. The ranks
of latent attention are to grow with the width.
"""

from __future__ import annotations

import dataclasses

from gptjax.types import UserError


@dataclasses.dataclass(frozen=True)
class Parametrisation:
    """The standard parametrisation, as in GPT-2: matrices begin with deviation 0.02 at every width, those that write to
    the residual stream with 0.02 / sqrt(2 L), which keeps a sum of L blocks small."""

    def width_multiplier(self, width: int) -> float:
        """m: how many times wider the model is than the one whose hyperparameters it has."""
        return 1.0

    def hidden_init_scale(self, width: int) -> float:
        """What the initial hidden matrices are multiplied by."""
        return self.width_multiplier(width) ** -0.5

    def attention(self, head_size: int) -> float:
        """What attention scores are multiplied by beside what they are anyway, such as 1 / sqrt(H)."""
        return 1.0

    def residual_init_scale(self, layers: int) -> float:
        """What the initial matrices that write to the residual stream are multiplied by."""
        return (2 * layers) ** -0.5


@dataclasses.dataclass(frozen=True)
class MuP(Parametrisation):
    """The maximal update parametrisation, see above."""

    base_width: int
    """The width at which learning rate and initialisation are as they would be without muP."""
    base_head_size: int | None = None
    """H at that width; none: the model's own, where what grows is the number of heads."""

    def __post_init__(self):
        for field in ("base_width", "base_head_size"):
            if (value := getattr(self, field)) is not None and value < 1:
                raise UserError(f"model.parametrisation.{field}: got {value}, must be at least 1")

    def width_multiplier(self, width: int) -> float:
        return width / self.base_width

    def attention(self, head_size: int) -> float:
        return ((self.base_head_size or head_size) / head_size) ** 0.5
