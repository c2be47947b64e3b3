"""How parameters are changed: learning-rate schedules, optimizers and what weight decay leaves alone, over optax."""

from gptjax.optim.adafactor import Adafactor
from gptjax.optim.muon import Muon
from gptjax.optim.optimizers import AdamW, Lion, Optimizer
from gptjax.optim.schedules import Constant, Cosine, Linear, Schedule, WarmupStableDecay

__all__ = [
    "Adafactor",
    "AdamW",
    "Constant",
    "Cosine",
    "Linear",
    "Lion",
    "Muon",
    "Optimizer",
    "Schedule",
    "WarmupStableDecay",
]
