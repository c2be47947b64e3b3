"""A configuration with every kind of field."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from gptjax.cli.options import override
from gptjax.config import allow, from_json, to_json
from gptjax.types import UserError

allow(sys.modules[__name__])


class Positions:
    pass


@dataclass(frozen=True)
class RoPE(Positions):
    theta: float = 10_000.0
    """Longest wavelength."""


@dataclass(frozen=True)
class Learned(Positions):
    length: int = 64


@dataclass(frozen=True)
class Model:
    layers: int = 4
    """Number of blocks."""
    width: int = 8
    heads: int = 2
    kv_heads: int | None = None
    positions: Positions = RoPE()
    """Position encoding."""
    remat: Literal["full", "dots"] | None = None
    tie_embeddings: bool = True

    def __post_init__(self):
        if self.width % self.heads:
            raise UserError(f"model.heads: got {self.heads}, must divide width {self.width}")


class Source(Protocol):
    def letters(self) -> list[str]: ...


@dataclass(frozen=True)
class Text:
    path: Path = Path("a.txt")
    names: tuple[str, ...] = ()

    def letters(self) -> list[str]:
        return []


@dataclass(frozen=True)
class Sheet(Text):
    column: str = field(kw_only=True)


@dataclass(frozen=True)
class Data:
    source: Source = Text()
    mixture: tuple[tuple[Source, float], ...] = ((Text(), 0.25), (Text(Path("b.txt")), 0.75))
    shares: dict[str, float] = field(default_factory=lambda: {"code": 0.5})


@dataclass(frozen=True)
class Adam:
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)


@dataclass(frozen=True)
class Stage:
    optimizer: Any = Adam()
    steps: int = 10
    data: Data | None = None


@dataclass(frozen=True)
class Run:
    model: Model
    stages: dict[str, Stage]
    seed: int = 0
    """Seed of all randomness."""
    axis: str | tuple[str, ...] | None = ("data", "fsdp")
    extra: Any = None


CONFIG = Run(Model(), {"pretrain": Stage(data=Data()), "chat": Stage(Adam(1e-4), 5)})


def apply(*arguments: str, config: Any = CONFIG) -> Any:
    return override(config, arguments, "prog", "A description.")


def roundtrip(config: Any) -> Any:
    return from_json(json.loads(json.dumps(to_json(config))))
