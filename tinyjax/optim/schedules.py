"""Learning-rate schedules: (step, steps) -> factor of the peak rate, as functions that trace.

Warm-up: factor (step + 1) / warm-up steps, so that step 0 already learns. A decay over n steps starts at progress 0
(the peak) and its last step has progress (n - 1) / n, so that no step is wasted on a rate of zero.
"""

import abc
import dataclasses
from typing import Any, ClassVar, Literal

import jax.numpy as jnp

from tinyjax.config import Variant
from tinyjax.errors import ConfigError


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(name, f"must be a share from 0 to 1, got {value}")


def _warm(step, warmup_steps: int):
    return jnp.minimum((step + 1) / max(warmup_steps, 1), 1.0)


def _progress(step, start: int, stop: int):
    return jnp.clip((step - start) / max(stop - start, 1), 0.0, 1.0)


class Schedule(Variant, abc.ABC):
    """A rule for the learning rate. A new one is a class in this room."""

    room: ClassVar[str] = "tinyjax.optim"

    @abc.abstractmethod
    def factor(self, step, steps: int) -> Any:
        """Return the factor of the peak rate at `step` (0-based, may be traced) of a run of `steps`."""


@dataclasses.dataclass(frozen=True)
class Constant(Schedule):
    """Warm up, then stay."""

    kind: ClassVar[str] = "constant"
    warmup: float = 0.02  # share of the steps

    def __post_init__(self):
        _check_share("warmup", self.warmup)

    def factor(self, step, steps: int):
        return _warm(step, round(self.warmup * steps))


@dataclasses.dataclass(frozen=True)
class Cosine(Schedule):
    """Warm up, then half a cosine down to `final` (Loshchilov and Hutter 2016)."""

    kind: ClassVar[str] = "cosine"
    warmup: float = 0.02  # share of the steps
    final: float = 0.1  # factor approached at the end

    def __post_init__(self):
        _check_share("warmup", self.warmup)
        _check_share("final", self.final)

    def factor(self, step, steps: int):
        start = round(self.warmup * steps)
        down = 0.5 * (1 + jnp.cos(jnp.pi * _progress(step, start, steps)))
        return jnp.where(step < start, _warm(step, start), self.final + (1 - self.final) * down)


@dataclasses.dataclass(frozen=True)
class Linear(Schedule):
    """Warm up, then a straight line down to `final`."""

    kind: ClassVar[str] = "linear"
    warmup: float = 0.02  # share of the steps
    final: float = 0.0  # factor approached at the end

    def __post_init__(self):
        _check_share("warmup", self.warmup)
        _check_share("final", self.final)

    def factor(self, step, steps: int):
        start = round(self.warmup * steps)
        line = self.final + (1 - self.final) * (1 - _progress(step, start, steps))
        return jnp.where(step < start, _warm(step, start), line)


@dataclasses.dataclass(frozen=True)
class WarmupStableDecay(Schedule):
    """Warm up, stay, then decay over the last share of the steps (MiniCPM, Hu et al. 2024).

    With progress p in the decay, its forms are 1 - sqrt(p) (Haegele et al. 2024), 1 - p, (1 + cos(pi p)) / 2, each
    scaled to end at `final`, and exponential final^p.
    """

    kind: ClassVar[str] = "wsd"
    warmup: float = 0.02  # share of the steps
    decay: float = 0.2  # share of the steps, the last ones
    form: Literal["1-sqrt", "linear", "cosine", "exponential"] = "1-sqrt"  # of the decay
    final: float = 0.0  # factor approached at the end; above 0 for exponential

    def __post_init__(self):
        for name in ("warmup", "decay", "final"):
            _check_share(name, getattr(self, name))
        if self.warmup + self.decay > 1:
            raise ConfigError("decay", f"warmup + decay is {self.warmup + self.decay:g}, more than the whole run")
        if self.form == "exponential" and self.final == 0:
            raise ConfigError("final", "must be above 0 for an exponential decay, for example 0.1")

    def factor(self, step, steps: int):
        start = steps - round(self.decay * steps)
        p = _progress(step, start, steps)
        if self.form == "exponential":
            down = self.final**p
        else:
            shape = {"1-sqrt": 1 - jnp.sqrt(p), "linear": 1 - p, "cosine": 0.5 * (1 + jnp.cos(jnp.pi * p))}[self.form]
            down = self.final + (1 - self.final) * shape
        return _warm(step, round(self.warmup * steps)) * down
