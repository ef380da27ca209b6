"""AdamW and Muon: optax transformations that give the update for a learning rate of 1.

The rate multiplies the update afterwards (`train/step.py`), so that the step counter has one owner and a rate can be an
array; weight decay scales with it, as in AdamW.
"""

import abc
import dataclasses
from typing import Any, ClassVar

import optax
from optax.contrib import MuonDimensionNumbers, muon

from tinyjax import tree
from tinyjax.config import Variant
from tinyjax.errors import ConfigError

# Matrices that map between activations. Token tables are left out: decay shrinks the rows of rare tokens, which get no
# gradient to answer it with.
DECAYED = ("kernel$",)


class Optimizer(Variant, abc.ABC):
    """A rule for updates. A new one is a class in this room."""

    room: ClassVar[str] = "tinyjax.optim"
    learning_rate: float
    clip: float | None

    @abc.abstractmethod
    def transform(self, spec: Any, axes: Any) -> optax.GradientTransformation:
        """Return the transformation for a rate of 1.

        spec: the parameters' tree of shapes; axes: the tree of their logical axis names.
        """


def _check_common(optimizer: Optimizer) -> None:
    for name in ("learning_rate", "eps"):
        if getattr(optimizer, name) <= 0:
            raise ConfigError(name, f"must be positive, got {getattr(optimizer, name)}")
    if optimizer.weight_decay < 0:
        raise ConfigError("weight_decay", f"must not be negative, got {optimizer.weight_decay}")
    if optimizer.clip is not None and optimizer.clip <= 0:
        raise ConfigError("clip", f"must be positive, or none for off, got {optimizer.clip}")
    for name in ("b1", "b2", "momentum"):
        if not 0 <= getattr(optimizer, name, 0.0) < 1:
            raise ConfigError(name, f"must be in [0, 1), got {getattr(optimizer, name)}")


def _clipped(clip: float | None, *transforms: optax.GradientTransformation) -> optax.GradientTransformation:
    first = () if clip is None else (optax.clip_by_global_norm(clip),)
    return optax.chain(*first, *transforms)


@dataclasses.dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2017)."""

    kind: ClassVar[str] = "adamw"
    learning_rate: float = 3e-3  # peak; the schedule scales it
    b1: float = 0.9  # decay of the first moment
    b2: float = 0.95  # decay of the second moment
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # times the learning rate, per step
    decay_paths: tuple[str, ...] = DECAYED  # regular expressions; parameters whose path matches one are decayed
    clip: float | None = 1.0  # largest global gradient norm

    def __post_init__(self):
        _check_common(self)

    def transform(self, spec, axes):
        del axes
        decayed = tree.mask(spec, self.decay_paths, "optimizer.decay_paths")
        return _clipped(
            self.clip,
            optax.scale_by_adam(self.b1, self.b2, self.eps),
            optax.add_decayed_weights(self.weight_decay, decayed),
            optax.scale(-1.0),
        )


@dataclasses.dataclass(frozen=True)
class Muon(Optimizer):
    """Muon (Jordan et al. 2024) on kernels, Adam with Nesterov momentum (Dozat 2016) on everything else, as in optax.

    Updates of kernels are orthogonalised momentum, scaled to a root mean square of `rms` (Liu et al. 2025 match AdamW's
    with 0.2), so that one learning rate serves both.
    """

    kind: ClassVar[str] = "muon"
    learning_rate: float = 3e-3  # peak; the schedule scales it
    momentum: float = 0.95  # decay of the kernels' momentum, Nesterov's form
    rms: float = 0.2  # root mean square of a kernel's update before the rate
    b1: float = 0.9  # Adam's first moment, of tables and vectors
    b2: float = 0.95  # Adam's second moment
    eps: float = 1e-8  # in both
    weight_decay: float = 0.1  # of kernels, times the learning rate, per step
    clip: float | None = 1.0  # largest global gradient norm

    def __post_init__(self):
        _check_common(self)
        if self.rms <= 0:
            raise ConfigError("rms", f"must be positive, got {self.rms}")

    def transform(self, spec, axes):
        del spec
        dimensions = tree.map_named(_matrix, axes)
        return _clipped(
            self.clip,
            muon(
                learning_rate=1.0,
                beta=self.momentum,
                eps=self.eps,
                weight_decay=self.weight_decay,
                consistent_rms=self.rms,
                adam_b1=self.b1,
                adam_b2=self.b2,
                muon_weight_dimension_numbers=dimensions,
            ),
        )


def _matrix(path: str, names: Any) -> MuonDimensionNumbers | None:
    """Tell which axes of a kernel are rows and which columns: layers are separate matrices, heads are one."""
    if not path.endswith("kernel"):
        return None
    first = 1 if names[0] == "layers" else 0
    inner = tuple(range(first, len(names)))
    split = 1 if names[first] == "embed" else len(inner) - 1
    return MuonDimensionNumbers(reduction_axis=inner[:split], output_axis=inner[split:])
