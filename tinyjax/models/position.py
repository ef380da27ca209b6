"""Position schemes: rotary embeddings, or none."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from tinyjax.errors import ConfigError
from tinyjax.models.component import Position


@dataclasses.dataclass(frozen=True)
class Rotary(Position):
    """RoPE (Su et al. 2021) with the two halves of a head paired, as in Llama: angle = position * base^(-2i/A)."""

    kind: ClassVar[str] = "rope"
    base: float = 10000.0  # wavelengths run from 2 pi to 2 pi base

    def __post_init__(self):
        if self.base <= 1:
            raise ConfigError("base", f"must be above 1, got {self.base}")

    def tables(self, positions_BS, head_width: int):
        rate_A = self.base ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
        angle_BSA = positions_BS[:, :, None].astype(jnp.float32) * rate_A[None, None]
        return jnp.cos(angle_BSA)[:, :, None], jnp.sin(angle_BSA)[:, :, None]

    def rotate(self, x_BSHA, tables):
        cos, sin = (table.astype(x_BSHA.dtype) for table in tables)
        a, b = jnp.split(x_BSHA, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


@dataclasses.dataclass(frozen=True)
class NoPosition(Position):
    """NoPE: the causal mask is all a layer knows of order (Kazemnejad et al. 2023)."""

    kind: ClassVar[str] = "none"

    def tables(self, positions_BS, head_width: int):
        del positions_BS, head_width
        return ()

    def rotate(self, x_BSHA, tables):
        del tables
        return x_BSHA
