"""The family of objectives."""

import abc
from typing import Any, ClassVar

from tinyjax.config import Variant
from tinyjax.models.model import Model


class Objective(Variant, abc.ABC):
    """A loss over a batch. A new objective is a file in this room that subclasses it."""

    room: ClassVar[str] = "tinyjax.objectives"

    @abc.abstractmethod
    def loss(self, model: Model, params: Any, batch: dict, key) -> tuple[tuple[Any, Any], dict[str, Any]]:
        """Return ((sum, count), metrics): what is differentiated, over how many tokens, and further *sums* by name.

        All are float32 scalars, so that microbatches, devices and hosts add up exactly as one batch would. `key` is a
        PRNG key, or None for evaluation (no dropout).
        """
