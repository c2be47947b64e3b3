"""Parametrisations: initial weights, multipliers and learning rates by width and depth.

With `MuP` the optimal learning rate of a narrow model is optimal for a wide model too:

    config = TransformerConfig(..., width=1_024, parametrisation=MuP(base_width=128))
    info = parameter_info(config.build())
    transform = AdamW(learning_rate=3e-3).build(steps, info, config.width_multiplier)  # 3e-3 was best at width 128

With m = width / base_width, relative to the standard parametrisation (Yang et al. 2022, "Tensor Programs V",
arXiv:2203.03466, table 8):

    hidden matrices           initial deviation / sqrt(m); learning rate / m (AdamW, Lion), / sqrt(m) (Muon, Adafactor)
    embedding, head, vectors  unchanged
    logits                    / m
    attention scores          q k / H, not q k / sqrt(H); equal at the base head size

Hidden matrices are the parameters of kind "matrix" (`ParamInfo.kind`). Those of recurrent layers keep PyTorch's initial
deviation, which is proportional to 1 / sqrt(width) already. The ranks of latent attention should grow with the width.
"""

from __future__ import annotations

import dataclasses

from gptjax.types import UserError


@dataclasses.dataclass(frozen=True)
class Parametrisation:
    """Standard parametrisation, as in GPT-2: the initial deviation of matrices is 0.02 at every width; of those that
    write to the residual stream 0.02 / sqrt(2 L), which keeps a sum of L blocks small."""

    zero_outputs: bool = dataclasses.field(default=False, kw_only=True)
    """Initialise the matrices that write to the residual stream to 0, so that every block begins as the identity
    (Fixup, arXiv:1901.09321)."""

    def width_multiplier(self, width: int) -> float:
        """m: width divided by the width that the hyperparameters were tuned at."""
        return 1.0

    def hidden_init_scale(self, width: int) -> float:
        """Factor of the initial hidden matrices."""
        return self.width_multiplier(width) ** -0.5

    def attention(self, head_size: int) -> float:
        """Factor of attention scores, on top of their own scale such as 1 / sqrt(H)."""
        return 1.0

    def residual_init_scale(self, layers: int) -> float:
        """Factor of the initial matrices that write to the residual stream."""
        return 0.0 if self.zero_outputs else (2 * layers) ** -0.5


@dataclasses.dataclass(frozen=True)
class MuP(Parametrisation):
    """Maximal update parametrisation (muP), see above."""

    base_width: int
    """Width at which learning rate and initialisation equal those without muP."""
    base_head_size: int | None = None
    """Head size at the base width. None: the model's own, if the number of heads grows with the width."""

    def __post_init__(self):
        for field in ("base_width", "base_head_size"):
            if (value := getattr(self, field)) is not None and value < 1:
                raise UserError(f"model.parametrisation.{field}: got {value}, must be at least 1")

    def width_multiplier(self, width: int) -> float:
        return width / self.base_width

    def attention(self, head_size: int) -> float:
        return ((self.base_head_size or head_size) / head_size) ** 0.5
