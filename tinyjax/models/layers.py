"""Two forms of a stack's parameters: stacked (`layers/...`, depth is an axis) and unrolled (`layers/0/...`)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def unstack(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return params with `layers` as one subtree per layer, named 0 .. L-1. The inverse of `stack`."""
    layers = params["layers"]
    depth = jax.tree.leaves(layers)[0].shape[0]
    return {**params, "layers": {str(i): jax.tree.map(lambda x, i=i: x[i], layers) for i in range(depth)}}


def stack(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return params with `layers` as one subtree whose leaves have a leading axis of layers."""
    layers = [params["layers"][name] for name in sorted(params["layers"], key=int)]
    return {**params, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def is_stacked(params: Mapping[str, Any]) -> bool:
    """Return whether `layers` is in the stacked form."""
    return not all(name.isdigit() for name in params["layers"])
