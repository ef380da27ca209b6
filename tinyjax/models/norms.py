"""RMSNorm and LayerNorm; statistics in float32 whatever the compute dtype."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from tinyjax.errors import ConfigError
from tinyjax.models.component import Build, Norm


def _check_eps(eps: float) -> None:
    if eps <= 0:
        raise ConfigError("eps", f"must be positive, got {eps}")


@dataclasses.dataclass(frozen=True)
class RMSNorm(Norm):
    """x / sqrt(mean(x^2) + eps) * scale (Zhang and Sennrich 2019)."""

    kind: ClassVar[str] = "rms"
    eps: float = 1e-6  # added to the mean square

    def __post_init__(self):
        _check_eps(self.eps)

    def module(self, build: Build, name: str) -> nn.Module:
        return Normalise(build, self.eps, centre=False, name=name)


@dataclasses.dataclass(frozen=True)
class LayerNorm(Norm):
    """(x - mean) / sqrt(variance + eps) * scale + bias (Ba et al. 2016)."""

    kind: ClassVar[str] = "layer"
    eps: float = 1e-5  # added to the variance

    def __post_init__(self):
        _check_eps(self.eps)

    def module(self, build: Build, name: str) -> nn.Module:
        return Normalise(build, self.eps, centre=True, name=name)


class Normalise(nn.Module):
    """Parameters: scale and, when centred, bias, both of the last axis's size."""

    build: Build
    eps: float
    centre: bool

    @nn.compact
    def __call__(self, x):
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.centre:
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        shape = x.shape[-1:]
        ones = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
        scale = self.param("scale", ones, shape, jnp.float32)
        y = y * _along_last(scale, y)
        if self.centre:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("norm",))
            y = y + _along_last(self.param("bias", zeros, shape, jnp.float32), y)
        return y.astype(self.build.dtype)


def _along_last(vector, x):
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)
