"""Initialisation schemes by name: the standard deviation of each parameter from its role and fan-in."""

import abc
import dataclasses
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from tinyjax.config import Variant
from tinyjax.errors import ConfigError

# embedding: the token table. head: an untied output table. inward: reads the residual stream. outward: writes to it.
Role = Literal["embedding", "head", "inward", "outward"]


class Init(Variant, abc.ABC):
    """A rule for standard deviations; values are drawn from a normal distribution."""

    room: ClassVar[str] = "tinyjax.models"

    @abc.abstractmethod
    def deviation(self, role: Role, fan_in: int, width: int, depth: int) -> float:
        """Return the standard deviation for one parameter of a model of this width and depth."""

    def initializer(self, role: Role, fan_in: int, width: int, depth: int):
        """Return a Linen initializer (key, shape, dtype) -> array."""
        deviation = self.deviation(role, fan_in, width, depth)
        return lambda key, shape, dtype=jnp.float32: deviation * jax.random.normal(key, shape, dtype)


def _positive(name: str, value: float) -> None:
    if value <= 0:
        raise ConfigError(name, f"must be positive, got {value}")


@dataclasses.dataclass(frozen=True)
class Normal(Init):
    """One deviation for everything."""

    kind: ClassVar[str] = "normal"
    std: float = 0.02  # of every matrix

    def __post_init__(self):
        _positive("std", self.std)

    def deviation(self, role, fan_in, width, depth):
        del role, fan_in, width, depth
        return self.std


@dataclasses.dataclass(frozen=True)
class GPT2(Init):
    """GPT-2: matrices that write to the residual stream are divided by sqrt(2 depth), two writes per layer."""

    kind: ClassVar[str] = "gpt2"
    std: float = 0.02  # of matrices that do not write to the stream

    def __post_init__(self):
        _positive("std", self.std)

    def deviation(self, role, fan_in, width, depth):
        del fan_in, width
        return self.std / math.sqrt(2 * depth) if role == "outward" else self.std


@dataclasses.dataclass(frozen=True)
class FanIn(Init):
    """1 / sqrt(fan-in), outward ones also over sqrt(2 depth); the token table as if tied: 1 / sqrt(width)."""

    kind: ClassVar[str] = "fan_in"
    scale: float = 1.0  # multiplies every deviation

    def __post_init__(self):
        _positive("scale", self.scale)

    def deviation(self, role, fan_in, width, depth):
        if role in ("embedding", "head"):
            return self.scale / math.sqrt(width)
        return self.scale / math.sqrt(fan_in * (2 * depth if role == "outward" else 1))


@dataclasses.dataclass(frozen=True)
class Small(Init):
    """SmallInit (Nguyen and Salazar 2019) sqrt(2 / (5 width)), outward 2 / (depth sqrt(width)) as in GPT-NeoX."""

    kind: ClassVar[str] = "small"

    def deviation(self, role, fan_in, width, depth):
        del fan_in
        return 2 / (depth * math.sqrt(width)) if role == "outward" else math.sqrt(2 / (5 * width))
