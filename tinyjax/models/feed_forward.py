"""Feed-forward layers: gated (SwiGLU, GeGLU) and plain."""

import dataclasses
from typing import ClassVar, Literal

import flax.linen as nn
import jax

from tinyjax.errors import ConfigError
from tinyjax.models.component import Build, FeedForward
from tinyjax.models.linear import Linear, matmul_flops

Activation = Literal["silu", "gelu", "relu", "relu2"]

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,  # the tanh form, as in GPT-2
    "relu": jax.nn.relu,
    "relu2": lambda x: jax.numpy.square(jax.nn.relu(x)),  # Primer (So et al. 2021)
}


def _check(hidden: int | None) -> None:
    if hidden is not None and hidden < 1:
        raise ConfigError("hidden", f"must be at least 1, got {hidden}")


@dataclasses.dataclass(frozen=True)
class Gated(FeedForward):
    """out(activation(gate(x)) * up(x)) (Shazeer 2020): silu gives SwiGLU, gelu GeGLU."""

    kind: ClassVar[str] = "gated"
    hidden: int | None = None  # F; none: 8/3 width, rounded up to a multiple of 32
    activation: Activation = "silu"  # of the gate
    bias: bool = False  # on the three projections

    def __post_init__(self):
        _check(self.hidden)

    def hidden_width(self, width: int) -> int:
        """Return F; 8/3 makes three matrices as large as the two of a plain layer with F = 4 D."""
        return self.hidden or -(-8 * width // (3 * 32)) * 32

    def module(self, build: Build, name: str) -> nn.Module:
        return GatedModule(self, build, name=name)

    def flops(self, width: int) -> int:
        return 3 * matmul_flops((width,), (self.hidden_width(width),))


class GatedModule(nn.Module):
    """Parameters: gate and up [D, F], out [F, D]."""

    config: Gated
    build: Build

    @nn.compact
    def __call__(self, x_BSD):
        c, build = self.config, self.build
        f = c.hidden_width(build.width)

        def inward(name):
            return Linear(build, (build.width,), (f,), ("embed", "mlp"), "inward", c.bias, name=name)(x_BSD)

        y_BSF = ACTIVATIONS[c.activation](inward("gate")) * inward("up")
        return Linear(build, (f,), (build.width,), ("mlp", "embed"), "outward", c.bias, name="out")(y_BSF)


@dataclasses.dataclass(frozen=True)
class Plain(FeedForward):
    """out(activation(up(x))), the feed-forward layer of the original Transformer and GPT-2."""

    kind: ClassVar[str] = "plain"
    hidden: int | None = None  # F; none: 4 width
    activation: Activation = "gelu"  # between the two projections
    bias: bool = False  # on the two projections

    def __post_init__(self):
        _check(self.hidden)

    def hidden_width(self, width: int) -> int:
        """Return F."""
        return self.hidden or 4 * width

    def module(self, build: Build, name: str) -> nn.Module:
        return PlainModule(self, build, name=name)

    def flops(self, width: int) -> int:
        return 2 * matmul_flops((width,), (self.hidden_width(width),))


class PlainModule(nn.Module):
    """Parameters: up [D, F], out [F, D]."""

    config: Plain
    build: Build

    @nn.compact
    def __call__(self, x_BSD):
        c, build = self.config, self.build
        f = c.hidden_width(build.width)
        y_BSF = Linear(build, (build.width,), (f,), ("embed", "mlp"), "inward", c.bias, name="up")(x_BSD)
        y_BSF = ACTIVATIONS[c.activation](y_BSF)
        return Linear(build, (f,), (build.width,), ("mlp", "embed"), "outward", c.bias, name="out")(y_BSF)
