"""The families of interchangeable components, and what every one of them is built with.

Axis letters: B batch, S sequence, D model width, H query heads, K key/value heads, A head width, F feed-forward width,
V vocabulary, L layers. A new component is a file in this room that subclasses one of the families.
"""

import abc
import dataclasses
from typing import Any, ClassVar

import flax.linen as nn

from tinyjax.config import Variant
from tinyjax.models.init import Init


@dataclasses.dataclass(frozen=True)
class Build:
    """What a component is built with: the sizes of the stream it sits in and the policies of the whole model."""

    width: int
    depth: int
    dtype: Any  # of activations and of parameters in use; parameters themselves are float32
    init: Init
    dropout: float


class Norm(Variant, abc.ABC):
    """x_BSD -> x_BSD, over the last axis; also used on heads x_BSHA."""

    room: ClassVar[str] = "tinyjax.models"

    @abc.abstractmethod
    def module(self, build: Build, name: str) -> nn.Module:
        """Return the Linen module, to be called on an array."""


class Position(Variant, abc.ABC):
    """How queries and keys learn where they stand."""

    room: ClassVar[str] = "tinyjax.models"

    @abc.abstractmethod
    def tables(self, positions_BS, head_width: int):
        """Return a pytree computed once per batch, handed to every layer's `rotate`."""

    @abc.abstractmethod
    def rotate(self, x_BSHA, tables):
        """Return queries or keys with their positions applied."""


class Mixer(Variant, abc.ABC):
    """Mixes along the sequence: (x_BSD, tables, segment_ids_BS) -> x_BSD."""

    room: ClassVar[str] = "tinyjax.models"

    @abc.abstractmethod
    def module(self, build: Build, norm: Norm, position: Position, name: str) -> nn.Module:
        """Return the Linen module."""

    @abc.abstractmethod
    def rotated_width(self, width: int) -> int:
        """Return the head width A for which position tables are needed."""

    @abc.abstractmethod
    def check(self, width: int) -> None:
        """Raise ConfigError when it cannot work in a stream of this width."""

    @abc.abstractmethod
    def flops(self, width: int, sequence: int) -> dict[str, int]:
        """Return {part: forward matmul FLOPs per token in a row of `sequence` tokens, all pairs counted}."""


class FeedForward(Variant, abc.ABC):
    """Mixes along the channels: x_BSD -> x_BSD."""

    room: ClassVar[str] = "tinyjax.models"

    @abc.abstractmethod
    def module(self, build: Build, name: str) -> nn.Module:
        """Return the Linen module."""

    @abc.abstractmethod
    def flops(self, width: int) -> int:
        """Return forward matmul FLOPs per token."""


class Architecture(Variant, abc.ABC):
    """A whole model; `tinyjax.models.model.Model` gives it parameters."""

    room: ClassVar[str] = "tinyjax.models"
    compute_dtype: str

    @abc.abstractmethod
    def module(self, vocab_size: int, dtype: Any) -> nn.Module:
        """Return the Linen module with `hidden(batch, train)`, `head()` and `__call__(batch, train)`."""

    @abc.abstractmethod
    def flops(self, vocab_size: int, sequence: int) -> dict[str, int]:
        """Return {part: forward matmul FLOPs per token}, attention over all pairs and the head included."""
